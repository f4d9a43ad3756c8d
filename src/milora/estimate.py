"""What a run will need on its devices, from the configuration and the model's config alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

from milora import adapter, costs
from milora.arguments import training_arguments
from milora.checkpoint import open_skeleton
from milora.errors import UserError
from milora.evaluate import task_name
from milora.gates import check_subjects, parse_gate
from milora.keep import check_inputs
from milora.matrices import adapted_matrices
from milora.pretrained import dtype_of, positions, task_of
from milora.preview import by_kind, compute_dtype, directions, prepared, size
from milora.progress import Progress, duration
from milora.protect import FIRST, check_patterns, parts_of
from milora.ready import check_alone, say_unused
from milora.recommended import as_before
from milora.rows import training_rows

# Of the rate of a product of its size, what a training step reaches: measured by
# benchmarks/estimate.py (docs/speed.md).
REACHED = {"cpu": 0.8, "cuda": 0.5}


def estimate(
    *,
    model: str,
    output_dir: str,
    data: Mapping[str, Any],
    method: str,
    seed: int,
    dtype: str,
    trust_remote_code: bool,
    early_stopping_patience: int,
    quantization: str | Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] = MappingProxyType({}),
    lora: Mapping[str, Any],
    milora: Mapping[str, Any],
    training: Mapping[str, Any],
    evaluate: Mapping[str, Any],
    gates: Sequence[str] = (),
    continue_: Mapping[str, Any] = MappingProxyType({}),
    processes: int = 1,
    sharded: bool = False,
    speed: float | None = None,
    rates: Mapping[torch.dtype, float] | None = None,
) -> dict[str, Any]:
    """Memory of each device by kind, operations and time of a step, decomposition, disk.

    The first arguments are the keys of the configuration file. No weight is read, and of the data
    the rows are counted where they are a file here; each batch is taken to be as long as
    data.max_length, so that memory and time are upper bounds. `processes` have a device each;
    `sharded` as FSDP does. `speed`, in operations a second, is that of the training device, and
    `rates`, those of products by dtype, that of the decomposing one; both are measured on this
    machine when not given. Raises UserError for whatever the user must change.
    """
    if quantization:
        raise UserError(
            "milora estimate cannot follow a quantised base: `milora train --dry-run` says what it "
            "takes, and measures a step"
        )
    arguments = training_arguments(
        method, training, Path(output_dir), seed, early_stopping_patience
    )
    asked = as_before(
        {
            "output_dir": output_dir, "method": method, "lora": lora, "milora": milora,
            "continue": continue_, "quantization": quantization,
        },
        resume=False,
    )  # fmt: skip
    milora, config = asked["milora"], check_alone(asked, arguments)
    say_unused(milora, Progress())
    check_subjects([parse_gate(gate) for gate in gates], list(map(task_name, evaluate["tasks"])))
    if (method == "full" or lora.get("modules_to_save")) and dtype == "auto":
        dtype = "float32"
    skeleton = open_skeleton(model, trust_remote_code).to(dtype_of(dtype))  # type: ignore[arg-type]
    if task_of(skeleton) != "CAUSAL_LM":
        raise UserError(
            f"milora estimate follows causal models, which {model} is not: `milora train "
            "--dry-run` measures a step"
        )
    if data["max_length"] > (longest := positions(skeleton)):
        raise UserError(
            f"data.max_length is {data['max_length']}, but {model} has {longest} positions: "
            f"set at most {longest}"
        )
    device = "cpu" if arguments.use_cpu else "cuda"
    rows, tokens = arguments.per_device_train_batch_size, int(data["max_length"])
    vocabulary, widest = skeleton.config.get_text_config().vocab_size, _widest(skeleton)
    gathered = costs.gathered(skeleton, skeleton._no_split_modules or ())
    parameters = sum(p.numel() for p in skeleton.parameters())
    live, shapes = prepared(skeleton, config, method, arguments)
    if isinstance(live, PeftModel):
        check_patterns(parts_of(milora["protect"])[0], list(shapes))
        if milora["protect_inputs"]:
            check_inputs(adapted_matrices(live), milora["protect_inputs"])
    trained = sum(p.numel() for p in live.parameters() if p.requires_grad)
    trained_bytes = sum(p.nbytes for p in live.parameters() if p.requires_grad)
    cast = compute_dtype(arguments)
    unfused = costs.attention_unfused(skeleton, device, cast)
    whole = costs.step(
        live, rows, tokens, vocabulary,
        accumulated=arguments.gradient_accumulation_steps > 1, autocast=cast, unfused=unfused,
    )  # fmt: skip
    if config:
        recommended = method == "milora" and not lora.get("target_parameters")
        whole.memory["directions"] = directions(milora, shapes, recommended, sharded)
    step = costs.per_device(whole, trained_bytes, processes, sharded, gathered)
    if rates is None:
        rates = {
            one: costs.product_rate(one, device, (1024, 1024, 1024))
            for one in (torch.float32, torch.float64)
        }
    reached = None
    if speed is None:
        of = cast or dtype_of(dtype)
        reached = costs.product_rate(of, device, (min(rows * tokens, 2048), *widest))
        speed = reached * REACHED[device]
    seconds = whole.operations / speed
    batches = _batches(data, arguments, processes)
    top = _top(milora) if config else 0
    decompose = {"initial factors": 0.0, "the largest": 0.0}
    for shape, rank, parts in shapes.values():
        for height in parts or (shape[0],):
            part = height, *shape[1:]
            if method in adapter.COMPONENT:
                decompose["initial factors"] += costs.decomposition_seconds(
                    part, rank, adapter.COMPONENT[method], rates
                )
            if top:
                decompose["the largest"] += costs.decomposition_seconds(
                    part, top, "principal", rates
                )
    checkpoints = (arguments.save_total_limit or 2) + 1  # a new one before the oldest goes
    return {
        "model": model, "method": method, "dtype": dtype_of(dtype), "rows": rows, "tokens": tokens,
        "processes": processes, "sharded": sharded,
        "checkpointing": bool(arguments.gradient_checkpointing),
        "parameters": {"all": parameters, "trained": trained},
        "memory": step.memory, "peak_bytes": step.peak, "gathered_bytes": gathered,
        "decomposition": {
            "weights": len(shapes), "seconds": decompose, "rate": rates[torch.float64],
            "top": top,
        },
        "training": {
            "operations": whole.operations, "seconds_a_batch": seconds, "batches": batches,
            "seconds": None if batches is None else batches * seconds,
            "speed": speed, "product_rate": reached,
        },
        "disk": costs.disk(
            {name: (shape, rank) for name, (shape, rank, _) in shapes.items()},
            trained, checkpoints, top, minor=bool(top) and method == "milora",
        ) if config else {"checkpoints/ and model/": (3 * checkpoints + 2) * trained_bytes},
        "notes": _notes(method, milora, tokenizer, continue_),
    }  # fmt: skip


def _widest(skeleton: nn.Module) -> tuple[int, int]:
    """(in, out) of the largest linear layer but the head."""
    layers = (m for name, m in skeleton.named_modules() if isinstance(m, nn.Linear | Conv1D)
              and not name.endswith("head"))  # fmt: skip
    m, n = max((layer.weight.shape for layer in layers), key=math.prod)
    return int(n), int(m)


def _batches(data: Mapping[str, Any], arguments: TrainingArguments, processes: int) -> int | None:
    """Of each device; None where neither the rows nor the steps are known."""
    if arguments.max_steps > 0:
        return arguments.max_steps * arguments.gradient_accumulation_steps
    if not Path(str(data["train"])).is_file():
        return None
    found = training_rows(data, seed=0)
    per_epoch = math.ceil(len(found) / (arguments.per_device_train_batch_size * processes))
    return math.ceil(per_epoch * arguments.num_train_epochs)


def _top(milora: Mapping[str, Any]) -> int:
    """How many of the largest singular vectors are computed of each weight."""
    protect, _ = parts_of(milora["protect"])
    known = protect if isinstance(protect, int) else FIRST
    return max(known, int(milora["interference"]["top"]))


def _notes(
    method: str, milora: Mapping[str, Any], tokenizer: Mapping[str, Any],
    continue_: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    notes = []
    if continue_.get("run"):
        notes.append("continue: the frozen update of the earlier run is not counted")
    if continue_.get("replay"):
        notes.append("continue.replay: the rows of earlier runs are not counted")
    if milora["rank"]:
        notes.append("milora.rank gives each weight the rank of its spectrum, which is not read "
                     "here: counted is lora.r for all")  # fmt: skip
    if not isinstance(parts_of(milora["protect"])[0], int):
        notes.append(f"milora.protect depends on the spectra: counted are {FIRST} directions")
    if method == "milora" and milora["protect_inputs"] != 0:
        notes.append("milora.protect_inputs: the 4,096 tokens that the base writes and reads are "
                     "not counted")  # fmt: skip
    if milora["keep"]:
        notes.append("milora.keep: its passes over general text are not counted")
    if tokenizer.get("tokens") or tokenizer.get("special_tokens"):
        notes.append("tokenizer: the rows of new tokens are not counted")
    return notes


def lines(found: Mapping[str, Any]) -> list[str]:
    """`estimate`'s result in sentences."""
    many = found["processes"] > 1
    where = f"each of {found['processes']} devices" if many else "the device"
    options = ["sharded"] * (many and found["sharded"]) + ["checkpointing"] * found["checkpointing"]
    kind = str(found["dtype"]).removeprefix("torch.")
    said = [
        f"{found['model']}: {found['parameters']['all'] / 1e9:.2f} billion parameters, "
        f"{found['parameters']['trained']:,} trained ({found['method']}, {kind})",
        f"memory of {where}, {found['rows']} x {found['tokens']} tokens"
        + "".join(f", {one}" for one in options)
        + f": {size(found['peak_bytes'])}",
        "  " + by_kind(found["memory"]),
    ]
    part = found["decomposition"]
    if any(part["seconds"].values()):
        parts = (f"{name} {duration(took)}" for name, took in part["seconds"].items() if took)
        said.append(
            f"decomposition: {part['weights']} weights, once, about: {', '.join(parts)} "
            f"(at {part['rate'] / 1e9:,.0f} GFLOP/s in fp64 products)"
        )
    part = found["training"]
    rate = f"{part['speed'] / 1e12:,.3g} TFLOP/s"
    if part["product_rate"]:
        rate += f", from products at {part['product_rate'] / 1e12:,.3g} measured here"
    said.append(
        f"training: {part['operations']:.3g} operations a batch, {part['seconds_a_batch']:.3g} s "
        f"at {rate}"
    )
    if part["batches"] is None:
        said.append("  of how many batches is not known here: data.train is no file, so set "
                    "training.max_steps")  # fmt: skip
    else:
        said.append(
            f"  {part['batches']:,} batches on each device: at most {duration(part['seconds'])}"
        )
    said.append(
        f"disk: {size(sum(found['disk'].values()))}; "
        + ", ".join(f"{name} {size(value)}" for name, value in found["disk"].items())
    )
    return said + [f"note: {note}" for note in found["notes"]]
