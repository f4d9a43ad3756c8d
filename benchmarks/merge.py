"""A 13 GB checkpoint is merged in little memory: against copying its files, by turns.

    python benchmarks/merge.py run FOLDER [--blocks 32] [--rounds 3] [--beside WHAT]
    python benchmarks/merge.py docs

Writes a checkpoint of Llama-2-7B's shape in bf16 into FOLDER (one shard a block; the same drawn
numbers in each) and an adapter of rank 64 on q, k, v, up and down, then by turns copies the files
and runs `milora export --to merged`, both read from the disk and written through to it. FOLDER is
removed at the end; it takes 27 GB. Writes benchmarks/results/merge.json.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checkpoint import ADAPTED, SHAPES
from svd import RESULTS, ROOT, machine, write
from tables import fill

from milora.adapter import Factors
from milora.checkpoint import open_checkpoint
from milora.export import PlainLora, save_plain_lora
from milora.files import write_json
from milora.fingerprints import composed_sha256, tensor_sha256
from milora.verify import ADAPTER

RANK = 64
DOCUMENT = ROOT / "docs" / "serving.md"


def make(folder: Path, blocks: int) -> tuple[dict[str, str], str]:
    """The checkpoint; returns the hash of every adapted weight, and that of all weights."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        num_hidden_layers=blocks, architectures=["LlamaForCausalLM"], dtype="bfloat16"
    )
    config.save_pretrained(folder)
    torch.manual_seed(0)
    drawn = {name: (0.02 * torch.randn(shape)).bfloat16() for name, shape in SHAPES.items()}
    ones, index, every = torch.ones(4096, dtype=torch.bfloat16), {}, dict[str, str]()
    known = {id(value): tensor_sha256(value) for value in drawn.values()}  # of the same numbers
    for block in range(blocks + 1):
        file = f"model-{block + 1:05d}-of-{blocks + 1:05d}.safetensors"
        if block < blocks:
            own = f"model.layers.{block}"
            tensors = {f"{own}.{name}.weight": value for name, value in drawn.items()}
            tensors |= {f"{own}.{name}_layernorm.weight": ones.clone() for name in
                        ("input", "post_attention")}  # fmt: skip
        else:
            ends = {name: (0.02 * torch.randn(32000, 4096)).bfloat16() for name in
                    ("model.embed_tokens.weight", "lm_head.weight")}  # fmt: skip
            tensors = ends | {"model.norm.weight": ones.clone()}
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        every |= {name: known.get(id(x)) or tensor_sha256(x) for name, x in tensors.items()}
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    modules = {name.removesuffix(".weight"): digest for name, digest in every.items()}
    adapted = {n: digest for n, digest in modules.items() if n.rpartition(".")[2] in ADAPTED}
    return adapted, composed_sha256(every)


def make_adapter(folder: Path, base: Path, hashes: dict[str, str], whole: str) -> None:
    folder.mkdir()
    factors = {}
    for name in hashes:
        m, n = SHAPES[".".join(name.split(".")[-2:])]
        factors[name] = Factors(torch.randn(RANK, n) / n**0.5, 0.02 * torch.randn(m, RANK))
    skeleton = open_checkpoint(str(base)).skeleton
    save_plain_lora(folder, PlainLora(factors), skeleton, "synthetic")
    about = {"model": str(base), "name": "synthetic", "dtype": "bfloat16", "license": "unknown",
             "sha256": whole}  # fmt: skip
    write_json(
        folder / "milora.json",
        {
            "format": ADAPTER, "base": about, "weights_sha256": hashes, "method": "milora",
            "rank": RANK, "versions": {}, "probes": [], "configuration": {},
        },
    )  # fmt: skip


def forget(folder: Path) -> None:
    """Write everything out, and keep nothing of `folder` in memory."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(base: Path, out: Path) -> float:
    began = time.monotonic()
    out.mkdir()
    for path in sorted(base.iterdir()):
        shutil.copyfile(path, out / path.name)
        with (out / path.name).open("rb") as handle:
            os.fsync(handle.fileno())
    return time.monotonic() - began


def merge(adapter: Path, out: Path) -> dict[str, Any]:
    """`milora export` in a process of its own; the peak is of resident pages."""
    before, began, peak = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), 0
    command = [sys.executable, "-m", "milora", "export", str(adapter), "--to", "merged"]
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines() if status.exists() else []
        peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))])
        time.sleep(0.1)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"milora export failed: exit code {process.returncode}")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": seconds, "core_seconds": spent, "peak_bytes": 1024 * peak,
        "said": said.strip().partition(": ")[2],
    }  # fmt: skip


def run(folder: Path, blocks: int, rounds: int, beside: str) -> None:
    if folder.exists():
        raise SystemExit(f"{folder} exists: name a folder that may be made and removed")
    try:
        hashes, whole = make(folder / "base", blocks)
        make_adapter(folder / "adapter", folder / "base", hashes, whole)
        size = sum(path.stat().st_size for path in (folder / "base").iterdir())
        copies, merges = [], []
        for _ in range(rounds):
            forget(folder / "base")
            load = os.getloadavg()[0]
            copies.append(copy(folder / "base", folder / "copy"))
            shutil.rmtree(folder / "copy")
            forget(folder / "base")
            found = merge(folder / "adapter", folder / "merged")
            merges.append(found | {"load_before": load, "load_after": os.getloadavg()[0]})
            shutil.rmtree(folder / "merged")
            print(f"copied in {copies[-1]:.0f} s; merged: {merges[-1]}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ratios = [one / other["seconds"] for one, other in zip(copies, merges, strict=True)]
    write(
        RESULTS / "merge.json",
        {
            "blocks": blocks, "rank": RANK, "bytes": size, "weights": len(hashes),
            "device": machine("cpu"), "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "beside": beside, "niceness": os.nice(0), "copy_seconds": copies, "merge": merges,
            "speed_of_copying": statistics.median(ratios),
        },
    )  # fmt: skip


def docs() -> None:
    found = json.loads((RESULTS / "merge.json").read_text(encoding="utf-8"))
    merges = found["merge"]
    lines = [
        "| | seconds, each round | GB/s | core-seconds | peak memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, seconds, rest in (
        ("copy", found["copy_seconds"], "| |"),
        (
            "merge", [one["seconds"] for one in merges],
            f"{statistics.median(one['core_seconds'] for one in merges):.0f} | "
            f"{max(one['peak_bytes'] for one in merges) / 1e9:.2f} GB |",
        ),
    ):  # fmt: skip
        speed = found["bytes"] / statistics.median(seconds) / 1e9
        listed = ", ".join(f"{one:.0f}" for one in seconds)
        lines.append(f"| {name} | {listed} | {speed:.2f} | {rest}")
    loads = "; ".join(f"{one['load_before']:.1f}, {one['load_after']:.1f}" for one in merges)
    lines += [
        "",
        f"{found['bytes'] / 1e9:.1f} GB, {found['weights']} weights merged at rank "
        f"{found['rank']}, {found['cores']} cores of {found['device']}: "
        f"{found['speed_of_copying']:.2f} of the speed of copying (median of the rounds); "
        f"{merges[0]['said']}. Meanwhile the machine did {found['beside']} (load before and after "
        f"the rounds {loads}, niceness {found['niceness']}).",
    ]
    fill(DOCUMENT, {"merge": lines})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("run", "docs"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", default="nothing", help="what else the machine does meanwhile")
    given = parser.parse_args()
    if given.what == "docs":
        docs()
    elif given.folder is None:
        parser.error("name a folder")
    else:
        run(given.folder.resolve(), given.blocks, given.rounds, given.beside)
