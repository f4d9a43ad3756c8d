"""all-MiniLM-L6-v2 (BERT, fp32) as a classifier of 640 sentences, by `milora train`.

    python benchmarks/minilm.py           writes benchmarks/results/models/minilm.json
    python benchmarks/models.py docs      the table of docs/results.md

Sentence polarity, the rows that the language models of docs/results.md had. The rate is the one of
RATES with the smallest loss on 160 held-out rows; the 200 test rows take no part in that choice.
"""

import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tasks import ROOT, label_files, require_data, text_file
from weights import minilm

from milora.config import Config
from milora.files import read_json, read_lines, write_json
from milora.progress import Progress
from milora.train import train

RESULT = Path("benchmarks/results/models/minilm.json")
RATES = (3e-4, 5e-4, 1e-3, 2e-3)
TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]
TEXTS = ("wikitext2_test.txt", "c4_demo.jsonl")


def settings(rate: float, folder: Path) -> dict[str, Any]:
    files = label_files("polarity", 640, 160, 200)
    return {
        "model": str(minilm()), "output_dir": str(folder), "dtype": "float32",
        "data": {"train": files["train"], "eval": files["held_out"], "max_length": 128},
        "lora": {"r": 16, "lora_alpha": 16, "target_modules": TARGETS},
        "milora": "published",
        "training": {
            "learning_rate": rate, "num_train_epochs": 2, "per_device_train_batch_size": 16,
            "train_sampling_strategy": "group_by_length",
        },
        "evaluate": {
            "tasks": [{"file": files["test"], "name": "polarity"}],
            "knowledge": [text_file(text) for text in TEXTS],
        },
    }  # fmt: skip


def main() -> None:
    os.chdir(ROOT)
    require_data()
    outcomes = {}
    for rate in RATES:
        folder = Path("build/models") / f"minilm-{rate:g}"
        shutil.rmtree(folder, ignore_errors=True)
        values, began = settings(rate, folder), time.process_time()
        with Progress() as progress:
            record = train(**Config.model_validate(values).model_dump(), progress=progress)
        record["seconds"]["cpu"] = time.process_time() - began
        lines = read_lines(folder / "metrics.jsonl")
        losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
        outcomes[rate] = (losses[-1], values, record, read_json(folder / "evaluation.json"))
    rate = min(outcomes, key=lambda one: outcomes[one][0])
    _, values, record, evaluation = outcomes[rate]
    scored = evaluation["tasks"]["polarity"]
    result = {
        "model": "all-MiniLM-L6-v2",
        "packed": record["base"]["dtype"],
        "architecture": "encoder with a head",
        "task": "polarity",
        "train_rows": record["data"]["train"]["kept"],
        "test_rows": scored["rows"],
        "settings": {"method": "milora", "lora": values["lora"], "training": values["training"]},
        "held_out_loss": {f"{one:g}": outcomes[one][0] for one in RATES},
        "accuracy": {
            "base": scored["base"]["accuracy"],
            "tuned": scored["tuned"]["accuracy"],
            "tuned_interval": scored["tuned"]["interval"],
            "majority": scored["majority"],
        },
        "f1": {
            "of": scored["f1_of"],
            "base": scored["base"]["f1"],
            "tuned": scored["tuned"]["f1"],
            "tuned_interval": scored["tuned"]["f1_interval"],
        },
        "forgotten": {
            "what": "1 − cosine of embeddings",
            **{Path(one["text"]).stem: one["moved"] for one in evaluation["knowledge"]},
        },
        "step0": record["step0"],
        "exported_against_trained": record["adapter"]["exported_against_trained"],
        "seconds": record["seconds"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "base_bytes": 4 * record["parameters"]["all"],
        "parameters": record["parameters"],
        "base_sha256": record["base"]["sha256"],
        "versions": record["versions"],
        "machine": {"device": processor(), "threads": torch.get_num_threads()},
    }
    write_json(RESULT, result)
    print(json.dumps(result["accuracy"] | result["held_out_loss"] | result["forgotten"], indent=1))


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.machine()])[0]


if __name__ == "__main__":
    main()
