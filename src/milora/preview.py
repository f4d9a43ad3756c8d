"""What --dry-run shows: samples with their loss mask, coverage, and memory and time on one step."""

import math
import resource
import time
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.pytorch_utils import Conv1D

from milora import adapter
from milora.data import IGNORED, Collator, Prepared
from milora.matrices import Matrix, adapted_matrices, kind_of
from milora.pretrained import Pretrained
from milora.progress import duration
from milora.svd import Component, components


def plan(
    base: Pretrained,
    train: Prepared,
    lora_config: LoraConfig | None,
    method: str,
    arguments: TrainingArguments,
) -> dict[str, Any]:
    """Coverage, parameters, and an estimate of memory and time, measured on one training step."""
    live: nn.Module = base.model
    covered: dict[str, Any] = {}
    decompose = 0.0
    if lora_config is not None:
        adapted, _ = adapter.add_adapter(base.model, lora_config, "lora")  # shapes alone: no SVD
        live = adapted
        covered = coverage(adapted)
        if method in adapter.COMPONENT:
            decompose = decomposition_time(adapted, adapter.COMPONENT[method])
    else:
        base.model.requires_grad_(True)
    size = arguments.per_device_train_batch_size
    examples = sorted(train.examples, key=lambda e: len(e["input_ids"]))
    middle = max(0, len(examples) // 2 - size // 2)
    collate = Collator(base.tokenizer, base.model)
    live.train()
    seconds = 0.0
    # The longest batch shows the memory (and warms up), a middling one the time.
    for chosen in (examples[-size:], examples[middle : middle + size]):
        batch = {k: v.to(base.model.device) for k, v in collate(chosen).items()}
        began = time.monotonic()
        live(**batch).loss.backward()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # it only queues its work
        seconds = time.monotonic() - began
    trainable = sum(p.numel() for p in live.parameters() if p.requires_grad)
    per_epoch = math.ceil(len(examples) / size)
    batches = per_epoch * arguments.num_train_epochs
    if arguments.max_steps > 0:
        batches = arguments.max_steps * arguments.gradient_accumulation_steps
    # Adam's two moments come with the first step; the anchor is as large as the adapter.
    extra = trainable * (8 + (4 if method in adapter.COMPONENT else 0))
    memory = peak_memory() + extra
    return {
        "samples": [marked(base.tokenizer, e) for e in train.examples[:3]],
        "coverage": covered,
        "parameters": {"trainable": trainable},
        "memory_bytes": memory,
        "decomposition_seconds": decompose,
        "training_seconds": batches * seconds,
        "batches": batches,
        "estimate": f"about {duration(decompose)} to decompose, {duration(batches * seconds)} to "
        f"train ({batches:.0f} batches of {size}), {memory / 2**30:.1f} GB of memory",
    }


def decomposition_time(adapted: PeftModel, component: Component) -> float:
    """Seconds without the store, measured on one weight of every shape and rank."""
    alike: dict[tuple[int, ...], list[Matrix]] = {}
    for matrix in adapted_matrices(adapted).values():
        key = (*matrix.weight.shape, matrix.rank(adapter.TRAINED))
        alike.setdefault(key, []).append(matrix)
    total = 0.0
    for (*_, rank), matrices in alike.items():
        began = time.monotonic()
        components(matrices[0].weight, rank, component)
        total += len(matrices) * (time.monotonic() - began)
    return total


def marked(
    tokenizer: PreTrainedTokenizerBase, example: Mapping[str, list[int]]
) -> list[tuple[str, bool]]:
    """The row as pieces of text, each with whether the loss covers it."""
    pieces: list[tuple[list[int], bool]] = []
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        trained = label != IGNORED
        if not pieces or pieces[-1][1] != trained:
            pieces.append(([], trained))
        pieces[-1][0].append(token)
    return [(str(tokenizer.decode(ids)), trained) for ids, trained in pieces]


def coverage(live: PeftModel) -> dict[str, Any]:
    """Which weights are adapted and which are not, by kind, with their numbers of parameters."""
    adapted: dict[str, list[int]] = {}
    left: dict[str, list[int]] = {}
    matrices = adapted_matrices(live)
    owned = {matrix.weight.data_ptr() for matrix in matrices.values()}
    owned.add(live.get_input_embeddings().weight.data_ptr())  # a tied head is no weight of its own
    for name, matrix in matrices.items():
        adapted.setdefault(kind_of(name), []).append(matrix.weight.numel())
    inner: Any = live.base_model.model
    for name, module in inner.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            # Stacked experts are one parameter of three dimensions.
            matrices_here = isinstance(module, nn.Linear | Conv1D) or parameter.ndim == 3
            if parameter.ndim < 2 or not matrices_here or ".lora_" in name:
                continue
            if parameter.data_ptr() in owned:
                continue
            kind = key if parameter.ndim == 3 else name.rpartition(".")[2]
            for part in parameter if parameter.ndim == 3 else (parameter,):
                left.setdefault(kind, []).append(part.numel())
    inside, outside = (sum(sum(v) for v in part.values()) for part in (adapted, left))
    return {
        "adapted": {k: {"weights": len(v), "parameters": sum(v)} for k, v in adapted.items()},
        "not_adapted": {k: {"weights": len(v), "parameters": sum(v)} for k, v in left.items()},
        "share": inside / (inside + outside),
    }


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
