"""PEFT's LoRA layers with an anchor: W x + s (B A x - B0 A0 x) as one forward (anchored.py), and
merged for a while as one sum."""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from milora.anchored import Stacked, anchored, by_hand, product_dtype, stacked
from milora.errors import UserError
from milora.matrices import ANCHOR, PREVIOUS, TRAINED, Matrix
from milora.svd import plain_arithmetic

AT_ONCE = 2**24  # numbers: 64 MB of fp32
# PEFT's layers, of bitsandbytes' and AWQ's weights, that round an update before they add it.
ROUND_FIRST = ("Linear4bit", "Linear8bitLt", "AwqLoraLinear")
AHEAD = "_stacks_ahead"  # in a layer while a forward runs that trains
UNMERGED = "_unmerged"  # in a layer while it is merged: its weight as it was


def compute_as_one(model: PeftModel, layers: Sequence[Any]) -> None:
    """Give the layers of `model` that have an anchor the forward that computes both as one."""
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    alike = list(_alike(layers))
    tuner = model.base_model
    tuner.register_forward_pre_hook(partial(_stack_ahead, alike))
    tuner.register_forward_hook(partial(_forget, layers), always_call=True)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """W x + s (B A x - B0 A0 x), with PEFT's modules as the places of the factors.

    With an update of earlier runs W x + dW' x in place of W x, summed as PEFT sums it, so that step
    0 is to the last bit what their adapter gives.
    """
    if kwargs.get("adapter_names"):
        raise UserError(
            "adapter_names: a batch of several adapters is for plain LoRAs: save_pretrained, and "
            "load what it wrote into the base"
        )
    if ANCHOR not in layer.active_adapters and not layer.disable_adapters:
        alone: Tensor = type(layer).forward(layer, x, *args, **kwargs)  # PEFT's
        return alone
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as PEFT's
    result: Tensor = layer.base_layer(x, *args, **kwargs)
    if layer.disable_adapters or layer.merged:
        return result
    ahead: Ahead | None = layer.__dict__.get(AHEAD)
    if ahead is not None and ahead.active == layer.active_adapters:
        dtype = product_dtype(x.dtype, ahead.factors, x.device.type)
        if ahead.by.tall.dtype == dtype and ahead.training == layer.training:
            return anchored(result, x, ahead.by, ahead.dropout)
    if PREVIOUS in layer.lora_A:
        A, B = layer.lora_A[PREVIOUS], layer.lora_B[PREVIOUS]
        earlier: Tensor = B(A(x.to(A.weight.dtype)))
        if type(layer).__name__ in ROUND_FIRST:
            earlier = earlier.to(result.dtype)
        result = (result + earlier).to(result.dtype)
    # Usually TRAINED; a copy of it, where TRL keeps one as the reference.
    others = ANCHOR, PREVIOUS
    names = [name for name in layer.active_adapters if name in layer.lora_A and name not in others]
    if not names:
        return result
    if len(names) > 1:
        raise UserError(
            f"adapters {', '.join(names)} are active at once, and the anchor belongs to one: "
            "use set_adapter with one name"
        )
    A, B, A0, minus_B0 = _factors(layer, names[0])
    dropout = _dropout(layer, names[0])
    dtype = product_dtype(x.dtype, A.dtype, x.device.type)
    scaling = layer.scaling[ANCHOR]
    if by_hand(A, dropout > 0):
        with torch.no_grad():
            by = stacked(A, B, A0, minus_B0, scaling, False, dtype)
        by = by._replace(trained=(A, B, scaling))
    else:
        by = stacked(A, B, A0, minus_B0, scaling, dropout > 0, dtype)
    return anchored(result, x, by, dropout)


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, B, A0, -B0"""
    A, B, A0, minus_B0 = _modules(layer, adapter)
    return A.weight, B.weight, A0.weight, minus_B0.weight


def _modules(layer: Any, adapter: str) -> tuple[Any, Any, Any, Any]:
    """Of A, B, A0 and -B0."""
    A, B = layer.lora_A, layer.lora_B
    return A[adapter], B[adapter], A[ANCHOR], B[ANCHOR]


def _dropout(layer: Any, adapter: str) -> float:
    dropout = layer.lora_dropout[adapter]
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


class Ahead(NamedTuple):
    """What a layer multiplies by in this forward, and what must be as it was when that was made."""

    active: list[str]  # adapters
    training: bool
    factors: torch.dtype
    by: Stacked
    dropout: float


class _Alike(NamedTuple):
    """Layers whose factors have the same shape and place, and where these are."""

    layers: list[Any]
    modules: list[tuple[Any, Any, Any, Any]]  # as `_modules` gives them


def _alike(layers: Sequence[Any]) -> Iterator[_Alike]:
    """In groups of no more than may be stacked at once."""
    found: dict[Any, list[Any]] = {}
    for layer in layers:
        A, B, _, _ = _factors(layer, TRAINED)
        key = A.shape, B.shape, A.dtype, A.device, layer.scaling[ANCHOR]
        found.setdefault(key, []).append(layer)
    for (A, B, *_), some in found.items():
        count = max(1, AT_ONCE // (A.numel() + B.numel()))
        for group in (some[i : i + count] for i in range(0, len(some), count)):
            yield _Alike(group, [_modules(layer, TRAINED) for layer in group])


def _stack_ahead(alike: Sequence[_Alike], tuner: nn.Module, *_: Any) -> None:
    """The stacks of layers of one shape, in as few kernels as those of one layer.

    Layer by layer it is several times as many, and where a model is small its steps wait for the
    host that starts them. The stacks hold within one forward: nothing writes into the factors
    meanwhile. A layer that has none, as while checkpointing computes it again, makes its own.
    """
    if getattr(tuner, "_is_replica", False):  # whose layers would compute with the original's
        raise UserError(
            "nn.DataParallel does not take an anchor along: use `accelerate launch`, or one GPU by "
            "CUDA_VISIBLE_DEVICES=0"
        )
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    active = [TRAINED, ANCHOR]  # so with no update of earlier runs
    for layers, modules in alike:
        weight = getattr(layers[0].get_base_layer(), "weight", None)
        A: Any = modules[0][0].weight
        whole = type(A) is nn.Parameter and A.numel() and not A.is_meta  # not sharded or away
        if weight is None or not weight.is_floating_point():
            continue
        if not whole or layers[0].active_adapters != active:
            continue
        dropout, training = _dropout(layers[0], TRAINED), layers[0].training
        dtype = product_dtype(weight.dtype, A.dtype, A.device.type)
        factors: list[list[Any]] = [[one.weight for one in each] for each in modules]
        if len({trained.device for trained, *_ in factors}) > 1:
            continue  # moved apart since
        scaling, alone = layers[0].scaling[ANCHOR], by_hand(A, dropout > 0)
        with torch.set_grad_enabled(not alone):
            every_A, every_B, A0, minus_B0 = map(torch.stack, zip(*factors, strict=True))
            all_by = stacked(every_A, every_B, A0, minus_B0, scaling, dropout > 0, dtype)
        each = [one.unbind() for one in all_by if isinstance(one, Tensor)]
        for layer, (own_A, own_B, *_), *by in zip(layers, factors, *each, strict=True):
            stacks = Stacked(*by)
            if alone:
                stacks = stacks._replace(trained=(own_A, own_B, scaling))
            layer.__dict__[AHEAD] = Ahead(active, training, A.dtype, stacks, dropout)


def _forget(layers: Sequence[Any], *_: Any) -> None:
    for layer in layers:
        layer.__dict__.pop(AHEAD, None)


def merge_as_one(layer: Any) -> None:
    """Give a layer with a frozen adapter the merge that rounds once, and its way back.

    PEFT's adds one adapter after the other, rounds each time, and takes them off likewise: in 16
    bit each round trip would leave another base. While it is merged a copy of its weight is kept.
    """
    layer.merge, layer.unmerge = MethodType(_merge, layer), MethodType(_unmerge, layer)


@torch.no_grad()
def _merge(
    layer: Any, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
) -> None:
    frozen = {ANCHOR, PREVIOUS}
    if adapter_names is not None and {*adapter_names} - frozen != {*layer.active_adapters} - frozen:
        raise UserError(
            f"adapter_names={adapter_names}: what is active is merged, and its anchor with it: use "
            "set_adapter, and leave adapter_names out"
        )
    experts = range(layer.num_experts) if hasattr(layer, "parameter_name") else [None]
    matrices = [Matrix(layer, "", expert, []) for expert in experts]
    if matrices[0].packed:
        raise UserError(
            "the base is packed, into which no update can be merged and taken off again exactly: "
            "save the plain LoRA, and serve that on the base"
        )
    names = [name for name in check_adapters_to_merge(layer) if name in layer.lora_A]
    if not names:
        return
    weight = _weight(layer)
    if UNMERGED not in layer.__dict__:
        layer.__dict__[UNMERGED] = weight.detach().clone()
    for matrix in matrices:
        W = matrix.weight
        exact = torch.float32 if W.element_size() < 4 else torch.float64
        total = torch.zeros_like(W, dtype=exact)
        with plain_arithmetic(W.device):
            for name in names:  # each by itself, so that what is equal cancels to the last bit
                A, B = (x.to(W.device, exact) for x in matrix.factors(name))
                total += matrix.scaling(name) * (B @ A)
        W.copy_(total.add_(W))
    if safe_merge and not weight.isfinite().all():
        weight.copy_(layer.__dict__.pop(UNMERGED))
        raise ValueError("the trained factors hold NaN or infinite values")  # as PEFT's
    layer.merged_adapters.extend(names)


@torch.no_grad()
def _unmerge(layer: Any) -> None:
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)  # as PEFT's
        return
    layer.merged_adapters.clear()
    _weight(layer).copy_(layer.__dict__.pop(UNMERGED))


def _weight(layer: Any) -> Tensor:
    """The tensor of the base that a layer adapts: all experts of a stack."""
    name = getattr(layer, "parameter_name", "weight")
    weight: Tensor = getattr(layer.get_base_layer(), name)
    return weight
