"""What it costs that freed memory goes back to the system: a step of SmolLM2, with it and without.

    python benchmarks/allocator.py [--rounds 4]

In one process, by turns; after each change of the allocator's thresholds the first step is not
counted, since it fills or empties the heap. Without: the thresholds that glibc arrives at by
itself, which is their upper bound, since training frees larger blocks than that. Writes
benchmarks/results/allocator.json: seconds of all cores, of each step.
"""

import argparse
import ctypes
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from step import CPU, Trial, smollm2
from svd import RESULTS, machine, write

from milora.allocator import LARGE, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD

MOST = 32 << 20  # mallopt(3): DEFAULT_MMAP_THRESHOLD_MAX; what is trimmed is twice that
THRESHOLDS = {"without": (MOST, 2 * MOST), "with": (LARGE, LARGE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    trial, library = Trial(smollm2(CPU["4x256"].dtype), "milora"), ctypes.CDLL(None)
    trial.use(CPU["4x256"])
    seconds: dict[str, list[float]] = {name: [] for name in THRESHOLDS}
    for i in range(rounds):
        for name in list(THRESHOLDS)[:: 1 if i % 2 else -1]:
            large, trimmed = THRESHOLDS[name]
            library.mallopt(M_MMAP_THRESHOLD, large)
            library.mallopt(M_TRIM_THRESHOLD, trimmed)
            trial.step()
            seconds[name].append(trial.step())
            print(name, seconds[name][-1], flush=True)
    ratio = statistics.median(a / b for a, b in zip(*reversed(seconds.values()), strict=True))
    write(
        RESULTS / "allocator.json",
        {"device": machine("cpu"), "threads": torch.get_num_threads(), "torch": torch.__version__,
         "seconds": seconds, "with_of_without": ratio},
    )  # fmt: skip


if __name__ == "__main__":
    main()
