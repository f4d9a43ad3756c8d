"""Run the commands of docs/operating.md, in order, and put what they print below each.

    python benchmarks/operating.py [FIRST [LAST]]    of the blocks, counted from 1

A block is fenced as `console`, a command begins with `$ `; milora is the one of this Python. From
the first block on, runs/guarded is made anew. About half an hour on two cores.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "operating.md"
BLOCK = re.compile(r"```console\n(.*?)```\n", re.DOTALL)


def printed(command: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"PATH": path, "COLUMNS": "100"}, check=False,
    )  # fmt: skip
    said = done.stdout.rstrip() + f"\n(exit code {done.returncode})" * bool(done.returncode)
    return said.strip("\n") + "\n" if said.strip() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", type=int, nargs="?", default=1)
    parser.add_argument("last", type=int, nargs="?", default=10**6)
    given = parser.parse_args()
    first, last = given.first, given.last
    if first == 1:
        shutil.rmtree(ROOT / "runs" / "guarded", ignore_errors=True)
    blocks = len(BLOCK.findall(PAGE.read_text(encoding="utf-8")))
    for nth in range(first, min(last, blocks) + 1):
        page = PAGE.read_text(encoding="utf-8")
        block = list(BLOCK.finditer(page))[nth - 1]
        lines = []
        for line in block[1].splitlines():
            if line.startswith("$ "):
                print(f"{nth} of {blocks}: {line}", flush=True)
                lines.append(f"{line}\n{printed(line[2:])}")
        PAGE.write_text(
            page[: block.start(1)] + "".join(lines) + page[block.end(1) :], encoding="utf-8"
        )


if __name__ == "__main__":
    main()
