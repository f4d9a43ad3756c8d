"""A checkpoint of LLaMA-2-7B's shape is decomposed in little memory, killed, and gone on with.

    python benchmarks/checkpoint.py FOLDER [--blocks 32]

Writes drawn weights with the spectra of language models into FOLDER (bf16, one shard a block,
0.4 GB each), runs `milora init` for q, k, v, up and down at r = 32, once through and once killed
half way, and writes benchmarks/results/checkpoint.json: wall time, core-seconds, peak memory.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
from svd import RESULTS, machine, write
from weights import llm_like

ADAPTED = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096), "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008),
}  # fmt: skip


def make(folder: Path, blocks: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    LlamaConfig(num_hidden_layers=blocks, architectures=["LlamaForCausalLM"]).save_pretrained(
        folder
    )
    index: dict[str, str] = {}

    def shard(file: str, tensors: dict[str, Tensor]) -> None:
        index.update(dict.fromkeys(tensors, file))
        if not (folder / file).exists():
            save_file(tensors, folder / ".part", {"format": "pt"})
            (folder / ".part").rename(folder / file)

    for block in range(blocks):
        file = f"model-{block + 1:05d}-of-{blocks + 1:05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for place, (name, shape) in enumerate(SHAPES.items()):
            drawn = name.rpartition(".")[2] in ADAPTED and not (folder / file).exists()
            empty = torch.zeros(1, dtype=torch.bfloat16).expand(shape)
            W = llm_like(*shape, seed=100 * block + place) if drawn else empty.contiguous()
            tensors[f"model.layers.{block}.{name}.weight"] = W
        for name in ("input_layernorm", "post_attention_layernorm"):
            ones = torch.ones(4096, dtype=torch.bfloat16)
            tensors[f"model.layers.{block}.{name}.weight"] = ones
        shard(file, tensors)
        print(f"{file}", flush=True)
    empty = torch.zeros(32000, 4096, dtype=torch.bfloat16)
    ends = {"model.embed_tokens.weight": empty, "lm_head.weight": empty.clone()}
    ends["model.norm.weight"] = torch.ones(4096, dtype=torch.bfloat16)
    shard(f"model-{blocks + 1:05d}-of-{blocks + 1:05d}.safetensors", ends)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def init(folder: Path, kill_at: int | None = None) -> dict[str, Any]:
    """`milora init` in a process of its own; with `kill_at`, SIGKILL when so many are stored."""
    store = folder / "store"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "milora", "init", str(folder / "run.yaml")],
        env=os.environ | {"MILORA_STORE": str(store)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines() if status.exists() else []
        peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))])
        if kill_at and len(list(store.rglob("*.safetensors"))) >= kill_at:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.2)
    out, _ = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(out, flush=True)
    return {
        "exit": process.returncode, "wall_seconds": round(time.monotonic() - began, 1),
        "core_seconds": round(spent, 1), "peak_resident_bytes": 1024 * peak,
        "said": out.splitlines()[0] if out else "",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    given = parser.parse_args()
    folder: Path = given.folder.resolve()
    make(folder, given.blocks)
    (folder / "run.yaml").write_text(
        f"model: {folder}\noutput_dir: unused\ndata: {{train: unused.jsonl}}\ndtype: bfloat16\n"
        f"lora: {{r: 32, lora_alpha: 32, target_modules: [{', '.join(ADAPTED)}]}}\n"
    )
    shutil.rmtree(folder / "store", ignore_errors=True)
    count = len(ADAPTED) * given.blocks
    killed = init(folder, kill_at=count // 2)
    resumed = init(folder)
    again = init(folder)
    shutil.rmtree(folder / "store")
    unbroken = init(folder)
    write(
        RESULTS / "checkpoint.json",
        {
            "blocks": given.blocks, "weights": count, "rank": 32, "device": machine("cpu"),
            "cores": os.cpu_count(), "torch": torch.__version__,
            "checkpoint_bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
            "store_bytes": sum(p.stat().st_size for p in folder.rglob("store/*/*.safetensors")),
            "unbroken": unbroken, "killed_half_way": killed,
            "then_resumed": resumed, "once_more": again,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
