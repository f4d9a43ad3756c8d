"""`training:` as transformers' TrainingArguments, with the defaults of each method."""

import copy
import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import (  # type: ignore[attr-defined]
    get_available_reporting_integrations,
)
from transformers.utils import is_liger_kernel_available  # type: ignore[attr-defined]

from milora.errors import UserError

# Below LoRA's: at s = 1 the best rate of MiLoRA was a third and that of PiSSA a tenth of LoRA's
# in arXiv 2602.04998.
LEARNING_RATE = {
    "lora": 3e-4, "milora": 1e-4, "pissa": 3e-5, "middle": 1e-4, "random": 1e-4, "full": 2e-5,
}  # fmt: skip
HELD = 1e-3  # of `method: milora` as recommended: LoRA-sized factors, and inputs held

WHOLE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
OR_NULL = ("save_total_limit", "eval_accumulation_steps")
ABOVE = ("num_train_epochs", "logging_steps", "save_steps")
NOT_BELOW = ("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "eval_delay")
ORDERS = ("random", "sequential", "group_by_length", "batch_rebalance")

STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")

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
    "auto_find_batch_size": "where memory runs out it would begin again from weights that have "
    "moved, with smaller steps: use a lower per_device_train_batch_size",
    "push_to_hub": "upload the adapter folder when it is done",
    "deepspeed": "use accelerate launch --config_file examples/accelerate/zero3.yaml",
    "fsdp": "use accelerate launch --config_file examples/accelerate/fsdp2.yaml",
    "fsdp_config": "use accelerate launch --config_file examples/accelerate/fsdp2.yaml",
    "ignore_data_skip": "a run that is resumed would train other rows: leave it out",
    "dataloader_persistent_workers": "a run that is resumed would draw other masks: leave it out",
    "metric_for_best_model": "the best state is that of the lowest eval_loss: leave it out",
    "greater_is_better": "the best state is that of the lowest eval_loss: leave it out",
    "label_smoothing_factor": "the loss is that of the labels as they are: leave it out",
    "include_num_input_tokens_seen": "leave it out",
    "prediction_loss_only": "leave it out",
}


# What transformers 5 calls otherwise.
RENAMED = {
    "group_by_length": "train_sampling_strategy: group_by_length",
    "warmup_ratio": "warmup_steps, which below 1 is a share of all steps",
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
    fixed: dict[str, Any] = {
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
    known = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    for key, value in training.items():
        own = fixed.get(key, known.get(key))
        if key == "metric_for_best_model" and value == "eval_loss":
            continue  # as it is
        if key in OWNED and value != own and (value or own):
            raise UserError(f"training.{key} is set by milora: {OWNED[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1)
            hint = f": did you mean {near[0]}?" if near else ""
            hint = f": use {RENAMED[key]}" if key in RENAMED else hint
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
        values["load_best_model_at_end"] = True
    training = {  # YAML makes false of no
        key: "no" if key in STRATEGIES and value is False else value
        for key, value in training.items()
    }
    for what in ("save", "eval"):
        if training.get(f"{what}_steps") is None:
            continue
        values[f"{what}_strategy"] = "steps"
        if (given := training.get(f"{what}_strategy")) not in (None, "steps", "no"):
            raise UserError(
                f"training.{what}_steps does nothing with {what}_strategy: {given}: leave one out"
            )
    values |= training | fixed
    _check_numbers(values)
    if patience and not values["load_best_model_at_end"]:
        raise UserError(
            "training.load_best_model_at_end is off, and early_stopping_patience keeps the best "
            "state: leave one out"
        )
    judged = {
        "early_stopping_patience": bool(patience),
        "training.load_best_model_at_end": values.get("load_best_model_at_end"),
        "training.save_strategy: best": values["save_strategy"] == "best",
    }
    if by := next((key for key, there in judged.items() if there), None):
        if values["eval_strategy"] == "no":
            raise UserError(f"{by} needs evaluations: leave training.eval_strategy: no out")
        values["metric_for_best_model"] = "eval_loss"
    try:
        arguments = OneDevice(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error
    _check_effect(arguments)
    available = get_available_reporting_integrations()
    for tracker in arguments.report_to or ():
        if tracker not in available:
            raise UserError(
                f"training.report_to: {tracker} is not installed (pip install {tracker}) or not "
                f"known; here are {', '.join(available) or 'none'}"
            )
    return arguments


def _check_effect(arguments: TrainingArguments) -> None:
    """Raise UserError for what the Trainer would pass over, or take for something else."""
    steps = (arguments.save_steps, arguments.eval_steps)
    if (
        arguments.load_best_model_at_end
        and arguments.save_strategy == "steps"
        and steps[0] != steps[1]
    ):  # the best evaluation may then be of a step that is not saved
        raise UserError(
            f"training.save_steps is {steps[0]} and eval_steps {steps[1]}, and the best of the "
            "states that were evaluated is kept: make them equal"
        )
    if arguments.train_sampling_strategy not in ORDERS:
        raise UserError(
            f"training.train_sampling_strategy is {arguments.train_sampling_strategy!r}: it is "
            f"one of {', '.join(ORDERS)}"
        )
    own: Any = arguments.accelerator_config
    if own.gradient_accumulation_kwargs:
        raise UserError(
            "training.accelerator_config.gradient_accumulation_kwargs does nothing: leave it out"
        )
    if own.split_batches:
        raise UserError(
            "training.accelerator_config.split_batches: a process takes "
            "per_device_train_batch_size rows, which this would share out: leave it out"
        )
    if not own.use_seedable_sampler:
        raise UserError(
            "training.accelerator_config.use_seedable_sampler is off: a run that is resumed would "
            "train other rows: leave it out"
        )


def check_here(arguments: TrainingArguments) -> None:
    """Raise UserError for what this machine lacks, and for an optimizer or a schedule that cannot
    be made as they are asked for: both are made for one weight, which the Trainer does late.
    """
    if arguments.fp16 and arguments.device.type == "cpu":
        raise UserError("training.fp16 is for GPUs, and this runs on a CPU: leave it out")
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("training.use_liger_kernel: pip install liger-kernel, or leave it out")
    model, own = nn.Sequential(nn.Linear(1, 1)), copy.copy(arguments)
    if own.optim_target_modules:
        own.optim_target_modules = "all-linear"  # the names are those of another model
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(own, model)  # type: ignore[arg-type]
        passed_over = _passed_over(own, model, (kind, dict(options)))
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters())
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):  # no factory
            first = options.pop("params", options.pop("model", model.parameters()))
            optimizer = kind(first, **options)
        get_scheduler(
            arguments.lr_scheduler_type, optimizer, arguments.get_warmup_steps(100), 100,
            arguments.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )  # fmt: skip
    except (TypeError, ValueError, ImportError, KeyError, AttributeError) as error:
        raise UserError(f"training: {' '.join(str(error).split())}") from error
    if passed_over:
        name = getattr(arguments.optim, "value", arguments.optim)
        raise UserError(
            f"training.optim_args: {passed_over} does nothing with optim: {name}: leave it out"
        )


def _passed_over(own: TrainingArguments, model: nn.Module, made: tuple[Any, Any]) -> str:
    """The first of `optim_args` without which the optimizer is `made` as well; "" where none is."""
    parts = own.optim_args.split(",") if own.optim_args else []
    for part in parts:
        if part.partition("=")[0].strip() == "weight_decay":  # the Trainer's groups have their own
            raise UserError("weight_decay in optim_args does nothing: use training.weight_decay")
        own.optim_args = ",".join(other for other in parts if other is not part) or None
        without = Trainer.get_optimizer_cls_and_kwargs(own, model)  # type: ignore[arg-type]
        if without == made:
            return part.strip()
    return ""


def _check_numbers(values: Mapping[str, Any]) -> None:
    """TrainingArguments take anything, and training would end in a traceback much later."""
    bounds: tuple[tuple[Sequence[str], Callable[[float], bool], str], ...] = (
        (WHOLE, lambda value: _whole(value) and value >= 1, "a whole number of at least 1"),
        (OR_NULL, lambda value: _whole(value) and value >= 1, "a whole number of at least 1"),
        (
            ["max_steps"], lambda value: _whole(value) and (value == -1 or value >= 1),
            "a whole number of at least 1, or -1 for all epochs,",
        ),
        (
            ["dataloader_num_workers"], lambda value: _whole(value) and value >= 0,
            "a whole number of at least 0",
        ),
        (ABOVE, lambda value: value > 0, "a number above 0"),
        (NOT_BELOW, lambda value: value >= 0, "a number of at least 0"),
    )  # fmt: skip
    for keys, holds, what in bounds:
        for key in (key for key in keys if key in values):
            value = values[key]
            if value is None and key in OR_NULL:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and holds(value)):
                raise UserError(f"training.{key} is {value!r}: {what} is needed")


def _whole(value: float) -> bool:
    return isinstance(value, int)
