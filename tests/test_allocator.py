"""What is freed leaves the process."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path
from milora.allocator import give_back_freed

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) >> 10

print(give_back_freed() if "fixed" in sys.argv else None)
for _ in range(2):
    bytearray(30 << 20)  # once it is freed, what is smaller goes into the heap
before, held = resident(), []
for _ in range(50):
    held += [b"x" * (2 << 20), bytearray(2000)]
del held[::2]
print(resident() - before)
"""


def child(*words: str, **env: str) -> list[str]:
    command = [sys.executable, "-c", SCRIPT, *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc alone")
def test_what_is_freed_leaves_the_process() -> None:
    said, kept = child()
    assert int(kept) > 50  # MB: the test can fail
    said, kept = child("fixed")
    assert said == "True"
    assert int(kept) < 10
    assert child("fixed", MALLOC_MMAP_THRESHOLD_="65536")[0] == "False"
