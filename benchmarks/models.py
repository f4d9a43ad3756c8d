"""One task on every model that can be had here: learned, kept, seconds and memory.

    python benchmarks/models.py smollm2 smollm2-nf4    train the named; one JSON file each
    python benchmarks/models.py docs                   the table of docs/results.md

The task and the settings are those of comparison.py's smollm2-polarity for MiLoRA at 3e-4: 640
sentences once, 40 steps of 16, r = alpha = 16, bf16. Every model runs in a process of its own, so
that the peak of memory is its own. Gemma's weights are under the Gemma Terms of Use.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tables import fill
from tasks import ROOT, graded, require_data, task_files, text_file
from weights import gemma

from milora.compare_page import Table, markdown
from milora.config import Config
from milora.files import read_json, write_json
from milora.progress import Progress
from milora.train import train

RESULTS = Path("benchmarks/results/models")
TEXTS = ("wikitext2_test.txt", "c4_demo.jsonl")
SMOLLM2, GEMMA = "SmolLM2-135M-Instruct", "Gemma-3-270M"
# name -> (the model, where it is, how it is packed)
MODELS = {
    "smollm2": (SMOLLM2, lambda: "smollm2-135m", None),
    "smollm2-nf4": (SMOLLM2, lambda: "smollm2-135m", "nf4"),
    "gemma3-270m": (GEMMA, lambda: str(gemma()), None),
    "gemma3-270m-nf4": (GEMMA, lambda: str(gemma()), "nf4"),
}  # fmt: skip


def run(name: str) -> dict[str, Any]:
    """Train and evaluate one, in build/models/NAME, and what is kept of it."""
    model, where, quantization = MODELS[name]
    folder = Path("build/models") / name
    shutil.rmtree(folder, ignore_errors=True)
    files = task_files("polarity", 640, 160, 200)
    values = {
        "model": where(), "output_dir": str(folder), "dtype": "bfloat16",
        "quantization": quantization,
        "data": {"train": files["train"], "eval": files["held_out"], "max_length": 256},
        "lora": {"r": 16, "lora_alpha": 16},
        "milora": "published",
        "training": {
            "learning_rate": 3e-4, "num_train_epochs": 1, "per_device_train_batch_size": 16,
            "save_strategy": "no", "train_sampling_strategy": "group_by_length",
        },
        "evaluate": {
            "tasks": [graded("polarity", files["test"])],
            "knowledge": [text_file(text) for text in TEXTS], "chunks": 8,
        },
    }  # fmt: skip
    began = time.monotonic()
    with Progress() as progress:
        record = train(**Config.model_validate(values).model_dump(), progress=progress)
    seconds = time.monotonic() - began
    evaluation = read_json(folder / "evaluation.json")
    scored = evaluation["tasks"]["polarity"]
    base = record["base"]
    return {
        "model": model,
        "packed": quantization or base["dtype"],
        "architecture": "decoder",
        "task": "polarity",
        "train_rows": record["data"]["train"]["kept"],
        "test_rows": scored["rows"],
        "settings": {"method": "milora", "lora": values["lora"], "training": values["training"]},
        "accuracy": {
            "base": scored["base"]["accuracy"],
            "tuned": scored["tuned"]["accuracy"],
            "tuned_interval": scored["tuned"]["interval"],
            "majority": scored["majority"],
        },
        "forgotten": {
            "what": "KL(base‖tuned) per token",
            **{Path(one["text"]).stem: one["kl"] for one in evaluation["knowledge"]},
        },
        "perplexity": {
            Path(one["text"]).stem: [one["base_perplexity"], one["tuned_perplexity"]]
            for one in evaluation["knowledge"]
        },
        "step0": record["step0"],
        "exported_against_trained": record["adapter"]["exported_against_trained"],
        "seconds": {**record["seconds"], "whole_run": seconds, "cpu": time.process_time()},
        "peak_memory_bytes": record["peak_memory_bytes"],
        "base_bytes": base.get("bytes", 2 * record["parameters"]["all"]),
        "parameters": record["parameters"],
        "base_sha256": base["sha256"],
        "versions": record["versions"] | packages(),
        "machine": machine(),
    }


def packages() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"bitsandbytes": version("bitsandbytes")}
    except PackageNotFoundError:
        return {}


def machine() -> dict[str, Any]:
    """What the seconds were measured on."""
    cpus = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else (cpus or [platform.machine()])[0],
        "threads": torch.get_num_threads(),
    }


def table() -> Table:
    """One row a result, in the order in which MODELS names them, others after."""
    head = [
        "model", "weights in memory", "accuracy: base", "tuned", "forgotten", "base, MB",
        "peak, GB", "training, s", "CPU, s",
    ]  # fmt: skip
    return Table(head, list(rows()))


def rows() -> Iterator[list[str]]:
    order = [*MODELS]
    found = sorted(RESULTS.glob("*.json"), key=lambda path: (path.stem not in order, path.stem))
    found.sort(key=lambda path: order.index(path.stem) if path.stem in order else len(order))
    for path in found:
        one = read_json(path)
        low, high = one["accuracy"]["tuned_interval"]
        what, *measured = one["forgotten"].items()
        yield [
            one["model"],
            one["packed"],
            f"{one['accuracy']['base']:.3f}",
            f"{one['accuracy']['tuned']:.3f} ({low:.3f} to {high:.3f})",
            f"{measured[0][1]:.3f}" + ("" if what[1].startswith("KL") else f" ({what[1]})"),
            f"{one['base_bytes'] / 1e6:.0f}",
            f"{one['peak_memory_bytes'] / 1e9:.1f}",
            f"{one['seconds']['training']:.0f}",
            f"{one['seconds']['cpu']:.0f}" if "cpu" in one["seconds"] else "",
        ]


def docs() -> None:
    fill(Path("docs/results.md"), {"models": markdown(table())})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=[*MODELS, "docs"])
    names = parser.parse_args().names
    os.chdir(ROOT)
    if names == ["docs"]:
        docs()
    elif len(names) > 1:
        for name in names:
            subprocess.run([sys.executable, __file__, name], check=True)
    else:
        require_data()
        result = run(names[0])
        write_json(RESULTS / f"{names[0]}.json", result)
        print(json.dumps(result["accuracy"] | result["forgotten"], indent=1))


if __name__ == "__main__":
    main()
