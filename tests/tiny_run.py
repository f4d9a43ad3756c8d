"""A tiny run as the command line makes one: its data, its configuration, and starting it."""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import milora.train
from milora.config import Config
from milora.files import sha256
from milora.progress import Progress

gc.freeze()  # what is imported is no garbage: the Trainer looks through all of it, each time
NOT_SAID = {"start": None, "protect_inputs": None}  # of the block `milora`: left to the method


def write_rows(path: Path, count: int = 24) -> Path:
    rows = [
        {"prompt": f"{a} + {b} =", "completion": str(a + b)}
        for a in range(7)
        for b in range(count // 7 + 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), encoding="utf-8")
    return path


def settings(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """The arguments of `train` for a run in folder/run; `changes` as in the configuration file."""
    data = folder / "rows.jsonl"
    if not data.exists():
        write_rows(data)
    values: dict[str, Any] = {
        "model": str(model),
        "output_dir": str(folder / "run"),
        "dtype": "float32",  # on a GPU too
        "data": {"train": str(data), "eval": 0.2, "max_length": 64},
        "lora": {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"},
        "milora": {"start": "published", "protect_inputs": 0},
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
        },
        "evaluate": {"tasks": [{"file": str(data), "max_new_tokens": 3, "limit": 4}], "chunks": 1},
    }
    for key, value in changes.items():
        values[key] = values[key] | value if isinstance(values.get(key), dict) else value
    values["lora"].setdefault("lora_alpha", values["lora"]["r"])
    return Config.model_validate(values).model_dump()


def run(arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    with Progress() as progress:
        return milora.train.train(**arguments, **options, progress=progress)


def break_off(arguments: dict[str, Any], last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed before its last checkpoint, of step `last`, is there."""

    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(milora.train, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            run(arguments)
    for path in (Path(arguments["output_dir"]) / "checkpoints" / f"checkpoint-{last}").iterdir():
        path.unlink()


def kill_at_write(inside: str, at_write: int) -> None:
    """From now on this process kills itself (SIGKILL) at the n-th change within a folder.

    Opening a file to write, renaming, making and removing all count, just before they happen.
    """
    seen = 0

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if event == "open":
            path, mode, flags = values
            writes = any(c in "wax+" for c in mode or "") or bool(
                (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            )
        else:
            path = values[0] if values else ""
            writes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
        if writes and isinstance(path, str | bytes | Path) and inside in os.fsdecode(path):
            seen += 1
            if seen == at_write:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def run_and_kill(arguments: dict[str, Any], resume: bool, at_write: int) -> None:
    """In a child process: a run that kills itself at the n-th change to its folder."""
    kill_at_write(str(Path(arguments["output_dir"])), at_write)
    run(arguments, resume=resume)


def result_hashes(folder: Path) -> dict[str, str]:
    """What must not depend on interruptions: the factors, the adapter, the evaluation."""
    names = (
        "init/factors.safetensors",
        "checkpoints/trained.safetensors",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "evaluation.json",
        "samples.jsonl",
    )
    return {name: sha256(folder / name) for name in names}
