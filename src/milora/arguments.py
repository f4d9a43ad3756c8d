"""`training:` as transformers' TrainingArguments, with the defaults of each method."""

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import (  # type: ignore[attr-defined]
    get_available_reporting_integrations,
)

from milora.errors import UserError

# Below LoRA's: at s = 1 the best rate of MiLoRA was a third and that of PiSSA a tenth of LoRA's
# in arXiv 2602.04998.
LEARNING_RATE = {
    "lora": 3e-4, "milora": 1e-4, "pissa": 3e-5, "middle": 1e-4, "random": 1e-4, "full": 2e-5,
}  # fmt: skip
HELD = 1e-3  # of `method: milora` as recommended: LoRA-sized factors, and inputs held

WHOLE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
ABOVE = ("num_train_epochs", "logging_steps", "save_steps")
NOT_BELOW = ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")

# TrainingArguments that milora sets itself, and what to use in their place.
OWNED = {
    "output_dir": "use the top-level output_dir",
    "seed": "use the top-level seed",
    "data_seed": "use the top-level seed",
    "resume_from_checkpoint": "use --resume",
    "remove_unused_columns": "leave it out",
    "disable_tqdm": "leave it out",
    "label_names": "leave it out",
    "logging_nan_inf_filter": "a run that diverges is stopped, not hidden: leave it out",
    "restore_callback_states_from_checkpoint": "leave it out",
    "save_only_model": "it would make a run that cannot be resumed: leave it out",
    "push_to_hub": "upload the adapter folder when it is done",
    "deepspeed": "use accelerate launch --config_file examples/accelerate/zero3.yaml",
    "fsdp": "use accelerate launch --config_file examples/accelerate/fsdp2.yaml",
    "fsdp_config": "use accelerate launch --config_file examples/accelerate/fsdp2.yaml",
}


class OneDevice(TrainingArguments):
    """A process uses one GPU; more of them need more processes, by `accelerate launch`.

    transformers' Trainer would otherwise share a batch out by nn.DataParallel, which makes copies
    of a model that do not compute with an anchor of their own.
    """

    @property
    def n_gpu(self) -> int:
        return min(1, int(super().n_gpu))


def default_rate(method: str, begin: str | None) -> float:
    """The published start has large factors, which want a small rate; the others have LoRA's."""
    return HELD if method == "milora" and begin != "published" else LEARNING_RATE[method]


def training_arguments(
    method: str, training: Mapping[str, Any], run: Path, seed: int, patience: int,
    begin: str | None = "published",
) -> TrainingArguments:  # fmt: skip
    """`training:` with the defaults of `method`; raises UserError for what it cannot hold.

    `begin` is milora.start, None where it is left to the method.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for key, value in training.items():
        if key in OWNED and value:
            raise UserError(f"training.{key} is set by milora: {OWNED[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"training.{key} is not a field of TrainingArguments{hint}")
    values: dict[str, Any] = {
        "learning_rate": default_rate(method, begin),
        "per_device_train_batch_size": 16,
        "logging_steps": 10,
        "warmup_steps": 0.03,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "report_to": "none",
        # DeepSpeed has its own word for it, DS_ACCELERATOR=cpu.
        "use_cpu": not torch.cuda.is_available()
        and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true",
        "dataloader_pin_memory": torch.cuda.is_available(),
        # All that trains takes part in every step, and the anchor never changes.
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
    }
    if patience:
        values |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    for what in ("save", "eval"):
        if training.get(f"{what}_steps") is None:
            continue
        values[f"{what}_strategy"] = "steps"
        if training.get(f"{what}_strategy") == "epoch":
            raise UserError(
                f"training.{what}_steps does nothing with {what}_strategy: epoch: leave one out"
            )
    values |= training
    values |= {
        "output_dir": str(run / "checkpoints"),
        "seed": seed,
        "data_seed": seed,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "logging_nan_inf_filter": False,
        "prediction_loss_only": True,
        "include_num_input_tokens_seen": "non_padding",
        "restore_callback_states_from_checkpoint": True,  # the patience of early stopping
    }
    for key in ("eval_strategy", "save_strategy", "logging_strategy"):
        if values.get(key) is False:  # which YAML makes of no
            values[key] = "no"
    _check_numbers(values)
    try:
        arguments = OneDevice(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error
    available = get_available_reporting_integrations()
    for tracker in arguments.report_to or ():
        if tracker not in available:
            raise UserError(
                f"training.report_to: {tracker} is not installed (pip install {tracker}) or not "
                f"known; here are {', '.join(available) or 'none'}"
            )
    return arguments


def _check_numbers(values: Mapping[str, Any]) -> None:
    """TrainingArguments take anything, and training would end in a traceback much later."""
    bounds: tuple[tuple[Sequence[str], Callable[[float], bool], str], ...] = (
        (WHOLE, lambda value: value >= 1 and value == int(value), "a whole number of at least 1"),
        (ABOVE, lambda value: value > 0, "a number above 0"),
        (NOT_BELOW, lambda value: value >= 0, "a number of at least 0"),
    )
    for keys, holds, what in bounds:
        for key in (key for key in keys if key in values):
            value = values[key]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and holds(value)):
                raise UserError(f"training.{key} is {value!r}: {what} is needed")
