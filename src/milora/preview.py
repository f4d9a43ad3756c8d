"""What --dry-run shows: samples with their loss mask, coverage, and memory and time on one step."""

import copy
import math
import resource
import time
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.pytorch_utils import Conv1D

from milora import adapter, costs
from milora.data import IGNORED, Prepared
from milora.errors import UserError
from milora.forms import answers_apart, collator_for
from milora.matrices import (
    TRAINED,
    Matrix,
    Weights,
    adapted_matrices,
    base_modules,
    is_stack,
    kind_of,
)
from milora.pretrained import Pretrained, labels_of, task_of
from milora.progress import duration
from milora.protect import FIRST, parts_of
from milora.quantised import is_packed, linear_shape
from milora.recommended import held_inputs
from milora.svd import Component, components
from milora.vision import (
    Reader,
    outside_language_model,
    part_of,
    shown,
    tokenizer_of,
    train_in_full,
)

Shapes = dict[str, tuple[tuple[int, int], int, list[int]]]  # shape, rank, rows of each part


def plan(
    base: Pretrained,
    train: Prepared,
    lora_config: LoraConfig | None,
    method: str,
    milora: Mapping[str, Any],
    arguments: TrainingArguments,
    weights: Weights | None = None,
) -> dict[str, Any]:
    """Coverage, parameters, and an estimate of memory and time, measured on one training step.

    `milora` is that block of the configuration; `weights` reads the full-precision matrices of a
    quantised base.
    """
    longest = max(len(e["input_ids"]) for e in train.examples)
    memory_by_kind = {}
    causal = task_of(base.model) == "CAUSAL_LM"
    if weights is None and causal and not outside_language_model(base.model):  # as costs.step has
        memory_by_kind = _memory_by_kind(base.model, lora_config, method, arguments, longest)
    live: nn.Module = base.model
    covered: dict[str, Any] = {}
    decompose, beside = 0.0, 0
    if lora_config is not None:
        adapted, _ = adapter.add_adapter(  # shapes alone: no SVD
            base.model, lora_config, "lora", weights=weights
        )
        live, matrices = adapted, adapted_matrices(adapted, weights)
        covered = coverage(adapted)
        beside = directions(milora, _shapes(adapted), recommended=False)
        if memory_by_kind:
            memory_by_kind["directions"] = beside
        if method in adapter.COMPONENT:
            decompose = decomposition_time(matrices, adapter.COMPONENT[method])
        if milora["protect"] or milora["interference"]["top"]:
            decompose += largest_time(matrices)
    else:
        train_in_full(base.model)
    size = arguments.per_device_train_batch_size
    examples = sorted(train.examples, key=lambda e: len(e["input_ids"]))
    middle = max(0, len(examples) // 2 - size // 2)
    collate = collator_for(base.reader, base.model)
    live.train()
    if arguments.gradient_checkpointing:
        base.model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
    dtype, device = compute_dtype(arguments), base.model.device.type
    seconds = 0.0
    # The longest batch shows the memory (and warms up), a middling one the time.
    for chosen in (examples[-size:], examples[middle : middle + size]):
        batch = {k: v.to(base.model.device) for k, v in collate(chosen).items()}
        began = time.monotonic()
        with torch.autocast(device, dtype, enabled=dtype is not None):
            loss = live(**batch).loss
        loss.backward()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # it only queues its work
        seconds = time.monotonic() - began
    trainable = sum(p.numel() for p in live.parameters() if p.requires_grad)
    per_epoch = math.ceil(len(examples) / (size * arguments.world_size))  # of each process
    batches = per_epoch * arguments.num_train_epochs
    if arguments.max_steps > 0:
        batches = arguments.max_steps * arguments.gradient_accumulation_steps
    # Adam's two moments come with the first step; the anchor is as large as the adapter.
    extra = trainable * (8 + (4 if method in adapter.COMPONENT else 0))
    memory = peak_memory() + extra + beside
    kept = "; milora.keep: its passes over general text are not counted" if milora["keep"] else ""
    return {
        "samples": [sample(base, e) for e in train.examples[:3]],
        "coverage": covered,
        "parameters": {"trainable": trainable},
        "memory_bytes": memory,
        "memory_by_kind": memory_by_kind,
        "decomposition_seconds": decompose,
        "training_seconds": batches * seconds,
        "batches": batches,
        "estimate": f"about {duration(decompose)} to decompose, {duration(batches * seconds)} to "
        f"train ({batches:.0f} batches of {size}), {memory / 1e9:.1f} GB of memory{kept}",
    }


def _memory_by_kind(
    base: PreTrainedModel,
    lora_config: LoraConfig | None,
    method: str,
    arguments: TrainingArguments,
    tokens: int,
) -> dict[str, int]:
    """Of the longest batch, by costs.step; empty where that cannot follow the model."""
    with torch.device("meta"):
        skeleton = type(base)(copy.deepcopy(base.config)).to(base.dtype)  # type: ignore[arg-type]
    live, _ = prepared(skeleton, lora_config, method, arguments)
    try:
        return costs.step(
            live, arguments.per_device_train_batch_size, tokens,
            base.config.get_text_config().vocab_size,
            accumulated=arguments.gradient_accumulation_steps > 1,
            autocast=compute_dtype(arguments),
        ).memory  # fmt: skip
    except UserError:  # the step itself is measured in any case
        return {}


def _shapes(adapted: PeftModel) -> Shapes:
    return {
        name: (matrix.shape, matrix.rank(TRAINED), [len(part) for part in matrix.parts])
        for name, matrix in adapted_matrices(adapted).items()
    }


def directions(
    milora: Mapping[str, Any], shapes: Shapes, recommended: bool, sharded: bool = False
) -> int:
    """Bytes of what the update is kept out of and watched in, on the device; the adapted `shapes`.

    `recommended`: of inputs as many as where nothing is said of them. With `sharded` what is only
    watched stays on the CPU.
    """
    protect, _ = parts_of(milora["protect"])
    asked = protect if isinstance(protect, int) else FIRST if protect else 0
    inputs, watched, numbers = milora["protect_inputs"], milora["interference"]["top"], 0
    if inputs is None:
        inputs = held_inputs(n for (_, n), *_ in shapes.values()) if recommended else 0
    for (m, n), rank, _ in shapes.values():
        held = min(asked, min(m, n) - rank)
        there = held if sharded else max(held, min(watched, m, n))
        numbers += there * (m + n)
        if inputs:  # one basis of both, beside the protected ones that are watched
            numbers += (inputs + held * (not sharded)) * n
    return 4 * numbers


def prepared(
    skeleton: PreTrainedModel,
    lora_config: LoraConfig | None,
    method: str,
    arguments: TrainingArguments,
) -> tuple[nn.Module, Shapes]:
    """A model on the meta device as it trains, for costs.step, and what is adapted in it."""
    live: nn.Module = skeleton
    shapes: Shapes = {}
    if lora_config is None:
        train_in_full(skeleton)
    else:
        adapted = adapter.without_values(skeleton, copy.deepcopy(lora_config), method)
        live = adapted
        shapes = _shapes(adapted)
    live.train()
    if arguments.gradient_checkpointing:
        skeleton.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
    return live, shapes


def compute_dtype(arguments: TrainingArguments) -> torch.dtype | None:
    """That of autocast, if it is on."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None


def by_kind(memory: Mapping[str, int]) -> str:
    """weights 0.54 GB, activations 1.20 GB, ..."""
    return ", ".join(f"{kind} {size(value)}" for kind, value in memory.items() if value)


def size(value: int) -> str:
    """Bytes for people, in powers of ten."""
    return f"{value / 1e9:,.2f} GB" if value >= 1e8 else f"{value / 1e6:,.1f} MB"


def decomposition_time(matrices: Mapping[str, Matrix], component: Component) -> float:
    """Seconds without the store, measured on one weight of every shape and rank."""
    alike: dict[tuple[int, ...], list[Matrix]] = {}
    for matrix in matrices.values():
        key = (*matrix.shape, matrix.rank(TRAINED))
        alike.setdefault(key, []).append(matrix)
    total = 0.0
    for (*_, rank), same in alike.items():
        weight = same[0].weight
        began = time.monotonic()
        components(weight, rank, component)
        total += len(same) * (time.monotonic() - began)
    return total


def largest_time(matrices: Mapping[str, Matrix]) -> float:
    """Seconds for the largest components of all weights, by that of the smallest: as m n²."""

    def work(matrix: Matrix) -> int:
        m, n = sorted(matrix.shape)
        return m**2 * n

    smallest = min(matrices.values(), key=work)
    began = time.monotonic()
    components(smallest.weight, 1, "principal")
    return (time.monotonic() - began) * sum(map(work, matrices.values())) / work(smallest)


def sample(base: Pretrained, example: Mapping[str, list[Any]]) -> list[tuple[str, bool]]:
    """The row as pieces of text, each with whether it is what is learned."""
    tokenizer, labels = base.tokenizer, example["labels"]
    asked = (str(tokenizer.decode(example["input_ids"])), False)
    if task_of(base.model) == "SEQ_CLS":
        return [asked, (labels_of(base.model)[labels[0]], True)]
    if answers_apart(base.model):
        return [asked, (str(tokenizer.decode(labels)), True)]
    return marked(base.reader, example)


def marked(tokenizer: Reader, example: Mapping[str, list[Any]]) -> list[tuple[str, bool]]:
    """The row of a causal model as pieces of text, each with whether the loss covers it."""
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        trained = label != IGNORED
        if not pieces or pieces[-1][1] != trained:
            pieces.append(([], trained))
        pieces[-1][0].append(token)
    decode = tokenizer_of(tokenizer).decode
    return [(shown(tokenizer, str(decode(ids))), trained) for ids, trained in pieces]


def coverage(live: PeftModel) -> dict[str, Any]:
    """What is adapted of what can be, by kind, with numbers of weights and of parameters.

    `adapted` and `not_adapted` are linear layers and stacks of experts; `share` is the part of
    their parameters that is adapted. `trained` are rows of embedding and head that train in full,
    and by module the head of a classifier, which counts nowhere else. `others` have more than one
    dimension too, but no adapter goes on them: embeddings, routers, convolutions. A weight that two
    layers share counts once. Kinds outside the language model of one that reads pictures have the
    name of their part before them.
    """
    found: dict[str, dict[str, list[int]]] = {
        part: {} for part in ("adapted", "not_adapted", "trained", "others")
    }
    matrices = adapted_matrices(live)
    seen, beside = set(), outside_language_model(live.base_model.model)  # type: ignore[arg-type]
    for name, matrix in matrices.items():
        kind = part_of(name, beside) + kind_of(name)
        found["adapted"].setdefault(kind, []).append(math.prod(matrix.shape))
        if not matrix.packed:
            seen.add(matrix.weight.data_ptr())
    for name, rows in adapter.trained_rows(live).items():
        kind = part_of(name, beside) + kind_of(name.rpartition(".")[0])
        found["trained"].setdefault(kind, []).append(rows.values.numel())
    head = adapter.head_of(live)
    for name, tensors in head.items():
        found["trained"][name] = [tensor.numel() for tensor in tensors.values()]
    modules = base_modules(live).items()
    # An embedding and the head that is tied to it are an embedding.
    for name, module in sorted(modules, key=lambda pair: isinstance(pair[1], nn.Linear)):
        if any(f"{name}.".startswith(f"{part}.") for part in head):
            continue
        shape = linear_shape(module)
        if shape and is_packed(module):
            if name not in matrices:
                found["not_adapted"].setdefault(kind_of(name), []).append(math.prod(shape))
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or parameter.data_ptr() in seen:
                continue
            seen.add(parameter.data_ptr())
            stacked = is_stack(parameter) and not isinstance(module, nn.Conv1d)
            part = "not_adapted" if stacked or isinstance(module, nn.Linear | Conv1D) else "others"
            kind = part_of(name, beside) + (kind_of(name) if key == "weight" else key)
            for one in parameter if stacked else (parameter,):
                found[part].setdefault(kind, []).append(one.numel())
    sizes = {part: sum(map(sum, kinds.values())) for part, kinds in found.items()}
    return {
        **{
            part: {k: {"weights": len(v), "parameters": sum(v)} for k, v in kinds.items()}
            for part, kinds in found.items()
        },
        "share": sizes["adapted"] / (sizes["adapted"] + sizes["not_adapted"]),
    }


def covered_lines(covered: Mapping[str, Any]) -> list[list[str]]:
    """The same as rows of a table: kind, weights, parameters, share of the kind."""
    adapted, left = covered["adapted"], covered["not_adapted"]
    rows = []
    for kind in dict.fromkeys((*adapted, *left)):
        mine, rest = (
            {"weights": 0, "parameters": 0} | part.get(kind, {}) for part in (adapted, left)
        )
        every = {key: mine[key] + rest[key] for key in mine}
        share = mine["parameters"] / every["parameters"]
        rows.append([kind, *(f"{mine[key]:,} of {every[key]:,}" for key in every), f"{share:.1%}"])
    return rows


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
