"""What protection and the interference monitor cost beside a training step of SmolLM2-135M.

    python benchmarks/protection.py     # benchmarks/results/protection.json

Steps, projections and measurements take turns in one process, r = 32 on q, k, v, up and down, at
4 x 256 and 16 x 128 tokens; medians. A quarter of an hour on two cores.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from milora.adapter import add_adapter
from milora.matrices import adapted_matrices
from milora.pretrained import load_pretrained
from milora.progress import Progress
from milora.protect import held, measure, project, top_vectors
from milora.store import Store
from milora.targeting import lora_config

RESULT = Path(__file__).resolve().parent / "results" / "protection.json"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ROUNDS, EVERY = 7, 50


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def run(shape: tuple[int, int], k: int) -> dict[str, Any]:
    base: Any = load_pretrained("smollm2-135m", "float32").model
    store = Store(optional=True)
    config = lora_config({"r": 32, "lora_alpha": 32, "target_modules": TARGETS})
    model, start = add_adapter(base, config, "milora", decompose=store.components)
    layers = adapted_matrices(model)
    with Progress() as progress:
        tops = top_vectors(
            layers, start, k, 0, 0, store.components,
            lambda name, done, total: progress("the largest components", done, total),
        )  # fmt: skip
    holds = held(layers, tops, {})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    ids = torch.randint(1000, 40000, shape, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    times: dict[str, list[float]] = {"step": [], "project": [], "measure": []}
    for _ in range(ROUNDS):
        times["step"].append(seconds(step))
        times["project"].append(seconds(lambda: project(layers, holds)))
        times["measure"].append(seconds(lambda: measure(layers, start, tops)))
    middle = {name: statistics.median(each) for name, each in times.items()}
    return {
        "tokens": f"{shape[0]} x {shape[1]}",
        "k": k,
        "protection": round(middle["project"] / middle["step"], 4),
        "monitor": round(middle["measure"] / (EVERY * middle["step"]), 4),
    }


def main() -> None:
    found = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "monitor_every": EVERY,
        "of_a_step": [run(shape, k) for shape in ((4, 256), (16, 128)) for k in (16, 64, 256)],
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for one in found["of_a_step"]:
        print(one)


if __name__ == "__main__":
    main()
