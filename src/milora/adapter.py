"""Put the components on a PEFT model: initial factors, anchor, step-0 check, fingerprints.

The base weight W is never changed. Two LoRA adapters of PEFT are active on every target:

    y = W x + s B A x - s B0 A0 x        s = lora_alpha / r  (or / sqrt(r) with rsLoRA)

One (A, B) trains and starts as a copy of the initial factors (A0, B0); the `anchor` (A0, -B0) holds
buffers, which nobody's switches make trainable. At step 0 they cancel, and the gradients are those
of the paper's rewritten base W - s B0 A0 plus a LoRA at (A0, B0).

A run that continues another has that one's update dW' as a third pair, frozen too (`previous`):
its components are those of W + dW', and step 0 is W x + dW' x.
"""

import copy
import difflib
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from milora.anchored_layers import compute_as_one
from milora.errors import UserError
from milora.files import write_bytes
from milora.matrices import (
    ANCHOR,
    PREVIOUS,
    TRAINED,
    Matrix,
    Weights,
    adapted_layers,
    adapted_matrices,
    base_modules,
    components_of_parts,
    is_suffix,
    kind_of,
    name_in_base,
    stacks,
    without_expert,
)
from milora.quantised import (
    check_alike,
    check_trainable,
    is_packed,
    keep_packing,
    linear_shape,
    plain_tensors,
)
from milora.spectra import apart, span
from milora.svd import Component, Components, Decompose, components
from milora.vision import leave_tower_alone, outside_language_model, part_of, projectors

SAVED = "modules_to_save"  # PEFT's word for what is trained in full, in the names of tensors
HEADS = ["classifier", "score"]  # what PEFT itself trains in full in a classifier
COMPONENT: dict[str, Component] = {
    "milora": "minor",
    "pissa": "principal",
    "middle": "middle",
    "random": "random",
}
Begin = Literal["published", "directions", "balanced"]  # as initial_factors takes them
FORMAT = "milora initial factors 1"

# What of peft.LoraConfig keeps a plain LoRA on an untouched base; the rest is refused by name.
LORA_OPTIONS = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "target_parameters",
    "modules_to_save",
}  # fmt: skip

# Others that a user may look for, and what does it here.
INSTEAD = {"trainable_token_indices": "name the tokens in tokenizer.tokens"}


class Factors(NamedTuple):
    A: Tensor  # (r, n) fp32, on the CPU
    B: Tensor  # (m, r) fp32, on the CPU


class Target(NamedTuple):
    """A weight that an adapter goes on."""

    shape: tuple[int, ...]  # of W (out, in)
    rank: int
    transposed: bool  # stored as (in, out), as in GPT-2
    parts: list[Tensor]  # see Matrix


class Start(NamedTuple):
    """The state every run starts from; what init/factors.safetensors holds."""

    method: str
    factors: dict[str, Factors]  # by module name in the base
    scaling: dict[str, float]  # s of each module
    sha256: dict[str, str]  # of the base weight that each came from
    spectra: dict[str, dict[str, Any]]


def initial_factors(found: Components, scaling: float, begin: Begin = "published") -> Factors:
    """The factors that the components U, S, Vᵀ give, in fp32.

    "published": B0 = U √(S/s), A0 = √(S/s) Vᵀ, so that s B0 A0 = U S Vᵀ (paper, eq. 5). What one of
    them gains at a rate goes by the size of the other, √S, which differs from weight to weight.
    "directions": B0 = 0, A0 = Vᵀ, as LoRA starts, from these input directions for random ones.
    "balanced": B0 = U / √6, A0 = Vᵀ / √6, so that |A|² + |B|² of a pair is that of LoRA's start
    (1/3: PEFT draws the n entries of a row from ±1/√n), whatever S is.

    A singular value of zero would leave a dead rank, A_i = B_i = 0 with no gradient for either.
    Those get B_i = 0 and A_i of ordinary size: the product is still zero, and they learn.
    """
    if begin == "directions":
        return _kept(found.Vh, torch.zeros_like(found.U))
    if begin == "balanced":
        return _kept(found.Vh / 6**0.5, found.U / 6**0.5)
    zero = found.zero
    S = torch.where(zero, 0.0, found.S)
    alive = S[~zero]
    size = alive.median() if len(alive) else torch.tensor(found.norm or 1.0).to(S)
    B = found.U * (S / scaling).sqrt()
    A = torch.where(zero, size, S).div(scaling).sqrt()[:, None] * found.Vh
    return _kept(A, B)


def lora_config(
    options: Mapping[str, Any], task: str | None = "CAUSAL_LM", in_full: Sequence[str] = ()
) -> LoraConfig:
    """peft.LoraConfig from the options under `lora:`; refuses what an exact plain LoRA cannot hold.

    `task` is PEFT's task type; `in_full` are modules to train in full, a classifier's head.
    Raises UserError for an option that PEFT does not know (with the nearest known one) or that
    milora does not support.
    """
    known = set(inspect.signature(LoraConfig).parameters)
    for key in options:
        if key == "init_lora_weights":
            raise UserError("lora.init_lora_weights is set by `method`: remove it and use `method`")
        if key not in known:
            near = difflib.get_close_matches(key, sorted(LORA_OPTIONS), 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"lora.{key} is not an option of peft.LoraConfig{hint}")
        if key in INSTEAD:
            raise UserError(f"lora.{key}: {INSTEAD[key]}")
        if key not in LORA_OPTIONS:
            raise UserError(
                f"lora.{key} is not supported, since the result must be a plain LoRA on the "
                f"untouched base; supported: {', '.join(sorted(LORA_OPTIONS))}"
            )
    try:
        whole = {"modules_to_save": list(in_full)} if in_full else {}
        config = LoraConfig(**{**options, **whole}, task_type=task)
    except (TypeError, ValueError) as error:
        raise UserError(f"lora: {error}") from error
    _check_patterns(config)
    ranks = [
        ("r", config.r),
        *((f"rank_pattern[{k}]", v) for k, v in (config.rank_pattern or {}).items()),
    ]
    for name, rank in ranks:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise UserError(f"lora.{name} is {rank!r}: a whole number of at least 1 is needed")
    alphas = [("lora_alpha", config.lora_alpha)]
    alphas += [(f"alpha_pattern[{k}]", v) for k, v in (config.alpha_pattern or {}).items()]
    for name, alpha in alphas:
        if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise UserError(f"lora.{name} is {alpha!r}: a number above 0 is needed")
    if not config.target_modules and not config.target_parameters:
        raise UserError("lora.target_modules is missing: name the weights to adapt, or all-linear")
    if config.target_parameters and config.lora_dropout:
        raise UserError(
            f"lora.lora_dropout is {config.lora_dropout}: PEFT has none for "
            "lora.target_parameters, so it must be 0"
        )
    return config


def _check_patterns(config: LoraConfig) -> None:
    """Raise UserError for what is neither a name nor a regular expression."""
    patterns: list[tuple[str, Any]] = []
    for option in ("target_modules", "exclude_modules", "target_parameters"):
        value: Any = getattr(config, option) or []
        if isinstance(value, str):
            patterns.append((option, value))
        elif odd := [one for one in value if not isinstance(one, str) or not one]:
            raise UserError(f"lora.{option}: {odd[0]!r} is no name of a module: put it in quotes")
    for option in ("rank_pattern", "alpha_pattern"):
        patterns += [(option, key) for key in getattr(config, option) or {}]
    for option, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(
                f"lora.{option}: {pattern!r} is no regular expression ({error})"
            ) from error


def add_adapter(
    model: PreTrainedModel,
    config: LoraConfig,
    method: str,
    *,
    seed: int = 0,
    start: Start | None = None,
    begin: Begin = "published",
    decompose: Decompose = components,
    weights: Weights | None = None,
    checked: bool = False,
    previous: Mapping[str, Factors] = MappingProxyType({}),
    keep_apart: bool = False,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> tuple[PeftModel, Start]:
    """The model with the adapter of `method` in its starting state, and that state.

    `method` is a key of COMPONENT, or "lora" for PEFT's own initialisation, which needs no anchor.
    With `start`, from a stored file, nothing is decomposed: the factors are put in place after
    the hash of every weight has been compared with the base in hand, unless another process has
    `checked` that, and the weights here may have no values yet. `decompose` is
    svd.components or Store.components; `begin` as in initial_factors; `progress(name, done, total)`
    is called before each.

    On a quantised base `weights` reads the full-precision matrices (checkpoint.full_weights): the
    factors come from them, and so do the hashes. Method lora does without.

    `previous` is a plain LoRA dW = B A of the same base, by module, that this adapter comes on top
    of: the components are those of W + dW, the hashes those of W. With `keep_apart` they are those
    of W + dW outside of what dW reads and writes.

    Raises UserError, before any decomposition, for targets that match nothing, embeddings, a tied
    output head, a rank that a weight does not allow, NaN weights, a `start` of another base, or a
    packed weight without `weights`.
    """
    torch.manual_seed(seed)  # PEFT draws A from the global generator
    check_trainable(model)
    keep_packing(model)
    peft_model = _inject(model, config)
    matrices = adapted_matrices(peft_model, weights)
    if previous:
        _add_previous(peft_model, config, previous)
    if start is None:
        hashes = _hashes(matrices, method)
        start = _start(matrices, method, hashes, seed, begin, decompose, keep_apart, progress)
    elif not checked:
        check_base(start.sha256, _hashes(matrices, method))
    if method in COMPONENT:
        _add_anchor(peft_model, config)
    place(matrices, start)
    peft_model.set_adapter(TRAINED)
    return peft_model, start


def _hashes(matrices: Mapping[str, Matrix], method: str) -> dict[str, str]:
    """Of every weight, once it is known to be whole: of W, or of the packed one where there is no
    W to be had and none is needed."""
    found, kinds = {}, set[str]()
    for name, matrix in matrices.items():
        if matrix.packed and matrix.source is None:
            if method in COMPONENT:
                raise UserError(
                    f"{name} is quantised, and its components must come from full precision: name "
                    "the checkpoint that it was made from (milora.factors_from, or factors_from=)"
                )
            found[name] = packed_sha256(matrix.layer.get_base_layer())
            continue
        weight = matrix.weight
        if tuple(weight.shape) != matrix.shape:
            raise UserError(
                f"{name} is {matrix.shape} in the model and {tuple(weight.shape)} in the "
                "full-precision file: they do not belong together"
            )
        if not torch.isfinite(weight).all():
            raise UserError(f"{name}.weight holds NaN or infinite values: the base is damaged")
        if matrix.packed and kind_of(name) not in kinds:  # one of each, and the first at once
            check_alike(name, matrix.layer.get_base_layer(), weight)
            kinds.add(kind_of(name))
        found[name] = tensor_sha256(weight)
    return found


def packed_hashes(base: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Of those of the modules `names` that are packed, as packed_sha256 gives them."""
    modules = base_modules(base)
    return {n: packed_sha256(modules[n]) for n in names if n in modules and is_packed(modules[n])}


@torch.no_grad()
def place(matrices: Mapping[str, Matrix], start: Start) -> None:
    """A0 and B0 into the adapter that trains, A0 and -B0 into the anchor, if there is one."""
    for name, matrix in matrices.items():
        A0, B0 = start.factors[name]
        for adapter, sign in ((TRAINED, 1), (ANCHOR, -1)):
            if adapter in matrix.layer.lora_A:
                A, B = matrix.factors(adapter)
                A.copy_(A0)
                B.copy_(sign * B0)


def unfused(model: PeftModel) -> None:
    """Compute the update as PEFT does, module by module, as ZeRO-3 gathers them: the same function
    in somewhat more time.
    """
    for layer in adapted_layers(model).values():
        layer.__dict__.pop("forward", None)


def anchor_aside(model: PeftModel, start: Start) -> None:
    """Take the anchor out of the state dict, which FSDP shares out, and place it as a whole.

    Every process has all of it, also where the weights have no values yet.
    """
    for name, matrix in adapted_matrices(model).items():
        if ANCHOR in matrix.layer.lora_A:
            A0, B0 = start.factors[name]
            for linear, value in (
                (matrix.layer.lora_A[ANCHOR], A0),
                (matrix.layer.lora_B[ANCHOR], -B0),
            ):
                value = value.to(linear.weight.dtype)
                linear.register_buffer("weight", value, persistent=False)


@torch.no_grad()
def decay(matrices: Mapping[str, Matrix], share: float) -> None:
    """A <- A - share (A - A0), B <- B - share (B - B0): weight decay that shrinks dW.

    Decay to zero shrinks B A, and with it the minor component that A and B start as: it would take
    that out of the model. Where A = A0 and B = B0 they stay so, to the last bit.
    """
    for matrix in matrices.values():
        A, B = matrix.factors(TRAINED)
        A0, minus_B0 = matrix.factors(ANCHOR)
        A.lerp_(A0, share)
        B.lerp_(-minus_B0, share)


def _add_anchor(peft_model: PeftModel, config: LoraConfig) -> None:
    """The frozen pair beside the one that trains, and the forward that computes both as one."""
    _add_frozen(peft_model, copy.deepcopy(config), ANCHOR)
    # Of experts PEFT adds up the updates by itself.
    matrices = adapted_matrices(peft_model).values()
    compute_as_one(peft_model, [one.layer for one in matrices if one.expert is None])


@torch.no_grad()
def _add_previous(
    peft_model: PeftModel, config: LoraConfig, previous: Mapping[str, Factors]
) -> None:
    """The update that this one comes on top of; nothing of it where `previous` has no factors."""
    matrices = adapted_matrices(peft_model)
    if left := sorted(set(previous) - set(matrices)):
        raise UserError(
            f"lora.target_modules: the run that this one continues adapted {left[0]} ({len(left)} "
            "of its weights are not among the targets here): name all of them"
        )
    frozen = copy.deepcopy(config)
    rank = max(len(A) for A, _ in previous.values())
    frozen.r, frozen.lora_alpha, frozen.use_rslora = rank, rank, False
    frozen.rank_pattern, frozen.alpha_pattern = {}, {}
    _add_frozen(peft_model, frozen, PREVIOUS)
    for name, matrix in matrices.items():
        A, B = matrix.factors(PREVIOUS)
        A.zero_()
        B.zero_()
        if name in previous:
            own = previous[name]
            A[: len(own.A)].copy_(own.A)
            B[:, : len(own.A)].copy_(own.B)


def _add_frozen(peft_model: PeftModel, frozen: LoraConfig, adapter: str) -> None:
    """One more adapter, of buffers, that is active with whichever trains."""
    frozen.lora_dropout = 0.0
    layers = adapted_layers(peft_model)
    if frozen.modules_to_save:  # in which PEFT would find linear layers for all-linear, too
        names = [name for name, one in layers.items() if not hasattr(one, "parameter_name")]
        frozen.target_modules = names or frozen.target_modules
    # What trains in full has its start in the base: nothing is to be taken away from it.
    frozen.modules_to_save = frozen.trainable_token_indices = None
    frozen.ensure_weight_tying, frozen.modules_to_tie = False, None  # type: ignore[attr-defined]
    # Not the method of a classifier's class, which would add a second head.
    PeftModel.add_adapter(peft_model, adapter, frozen)
    for layer in layers.values():
        for linear in (layer.lora_A[adapter], layer.lora_B[adapter]):
            weight = linear.weight.detach()
            del linear.weight
            linear.register_buffer("weight", weight)
    peft_model.save_pretrained = _refuse_bare_pair  # type: ignore[method-assign]
    peft_model.set_adapter = MethodType(_set_adapter, peft_model)  # type: ignore[method-assign]


def without_values(model: PreTrainedModel, config: LoraConfig, method: str) -> PeftModel:
    """As `add_adapter`, for a model on the meta device: layers and shapes, and no factors."""
    peft_model = _inject(model, config)
    if method in COMPONENT:
        _add_anchor(peft_model, config)
    peft_model.set_adapter(TRAINED)
    return peft_model


def _inject(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The model with PEFT's layers in it, once every target is known to be fit for them."""
    if isinstance(model, PeftModel) or any(isinstance(m, LoraLayer) for m in model.modules()):
        raise UserError("the model has an adapter already: load the base again")
    _check_targets(model, config)
    leave_tower_alone(model, config)
    _check_whole(model, config)
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    embedding: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    asked = config.target_modules  # PEFT writes the names that it found over it
    try:
        peft_model = get_peft_model(model, config, adapter_name=TRAINED)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"lora.target_modules: {reason}") from error
    except TypeError as error:
        if not config.trainable_token_indices:
            raise
        raise UserError(
            "lora.target_modules: the head gets rows for the new tokens (tokenizer.tokens), so "
            "that it cannot have an adapter too: leave it out"
        ) from error
    matrices = adapted_matrices(peft_model)
    _check_covered(asked, config, list(matrices))
    names: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name_in_base(path))
    for name, matrix in matrices.items():
        base = matrix.layer.get_base_layer()
        if matrix.expert is None:
            if linear_shape(base) is None:
                raise UserError(
                    f"lora.target_modules: {name} is of class {type(base).__name__}; only linear "
                    f"layers can be adapted: {', '.join(_linear_names(model))}"
                )
            weight = getattr(base, "weight", None)  # some packed layers call theirs otherwise
            if weight is embedding:
                raise UserError(
                    f"lora.target_modules: {name} shares its weight with the input embedding "
                    "(tied), so that merging would change the embedding too: leave it out"
                )
            others = [one for one in names.get(id(weight), []) if one != f"{name}.weight"]
            if others:
                raise UserError(
                    f"lora.target_modules: {name} shares its weight with {', '.join(others)}, so "
                    "that merging would change that too: leave it out"
                )
        m, n = matrix.shape
        if matrix.rank(TRAINED) > min(m, n):
            raise UserError(
                f"lora.r is {matrix.rank(TRAINED)}, but {name} is {m} x {n}: "
                f"at most {min(m, n)} fits (lora.rank_pattern sets it per module)"
            )
    return peft_model


def _check_whole(model: PreTrainedModel, config: LoraConfig) -> None:
    """Put embedding, head and projector by their full names; a tied pair is one weight."""
    if not config.modules_to_save or config.task_type == "SEQ_CLS":
        return
    layers = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    names = {
        what: name
        for name, module in model.named_modules()
        for what, layer in layers.items()
        if module is layer
    }
    for name in projectors(model):
        names["projector"] = name
    tied = "head" in names and layers["head"].weight is layers["embedding"].weight
    chosen = set()
    for entry in config.modules_to_save:
        found = [what for what, name in names.items() if is_suffix(entry, name)]
        if not found:
            there = " nor the ".join(names)
            raise UserError(
                f"lora.modules_to_save: {entry!r} is neither the {there} "
                f"({', '.join(names.values())}), which can train in full: adapt it by "
                "lora.target_modules, or use method: full"
            )
        chosen |= set(found)
    if tied and chosen == {"head"}:
        raise UserError(
            f"lora.modules_to_save: {names['head']} shares its weight with {names['embedding']} "
            f"(tied), so that both would train: name {names['embedding']} if that is meant"
        )
    if tied and "embedding" in chosen:
        chosen, config.ensure_weight_tying = chosen - {"head"}, True
        config.modules_to_tie = None
    config.modules_to_save = [names[what] for what in sorted(chosen)]


def targets(model: PreTrainedModel, config: LoraConfig) -> dict[str, Target]:
    """What `config` adapts in `model`, by module name; the model may be on the meta device.

    The model has PEFT's layers in it afterwards. Raises UserError as `add_adapter` does.
    """
    return {
        name: Target(
            matrix.shape,
            matrix.rank(TRAINED),
            isinstance(matrix.layer.get_base_layer(), Conv1D),
            matrix.parts,
        )
        for name, matrix in adapted_matrices(_inject(model, config)).items()
    }


def module_seed(seed: int, name: str) -> int:
    """Each module draws its own components, or "random" would pick the same places everywhere."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4])


def _start(
    matrices: Mapping[str, Matrix],
    method: str,
    hashes: dict[str, str],
    seed: int,
    begin: Begin,
    decompose: Decompose,
    keep_apart: bool,
    progress: Callable[[str, int, int], None],
) -> Start:
    factors, scaling, spectra = {}, {}, {}
    for done, (name, matrix) in enumerate(matrices.items()):
        scaling[name] = matrix.scaling(TRAINED)
        if method == "lora":
            factors[name] = _kept(*matrix.factors(TRAINED))
            continue
        progress(name, done, len(matrices))
        weight = matrix.effective
        if keep_apart and PREVIOUS in matrix.layer.lora_A:
            weight = apart(weight, *span(*matrix.factors(PREVIOUS)))
        drawn = module_seed(seed, name)
        found = components_of_parts(
            weight, matrix.parts, matrix.rank(TRAINED), COMPONENT[method], drawn, decompose
        )
        factors[name] = initial_factors(found, scaling[name], begin)
        spectra[name] = {
            "shape": list(weight.shape),
            "spectral_norm_at_least": found.norm,
            "frobenius_norm": float(torch.linalg.norm(weight.double())),
            "component_norm": float(found.S.norm()),
            "singular_values": found.S.tolist(),
            "zero": int(found.zero.sum()),
            "solver": found.solver,
            "residual": found.residual,
        }
    return Start(method, factors, scaling, hashes, spectra)


def _set_adapter(model: PeftModel, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """PEFT's, and the anchor with whichever it is, since none of them is right without."""
    type(model).set_adapter(model, adapter_name, *args, **kwargs)
    tuner: Any = model.base_model
    frozen = [name for name in (ANCHOR, PREVIOUS) if name in model.peft_config]
    tuner.set_adapter([adapter_name, *frozen])


def _refuse_bare_pair(*args: Any, **kwargs: Any) -> None:
    raise UserError(
        "save_pretrained would write A, B without the anchor, a LoRA that loads without complaint "
        "and is wrong: use save_plain_lora(folder, plain_lora(start, trained_factors(model)), "
        "model, name), or get_milora_model, whose model writes that LoRA by itself"
    )


def _check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    # PEFT refuses a list of which nothing matches, and ignores an entry that matches nothing.
    excluded = config.exclude_modules or ()
    for entry in [excluded] if isinstance(excluded, str) else sorted(excluded):
        only = entry if isinstance(excluded, str) else [entry]
        if entry and not any(_excluded(only, name) for name, _ in model.named_modules()):
            raise UserError(f"lora.exclude_modules: {entry!r} matches no module of this model")
    stacked = stacks(model)
    for entry in sorted(config.target_parameters or ()):
        if not any(is_suffix(entry, name) for name in stacked):
            raise UserError(
                f"lora.target_parameters: {entry!r} matches no stack of experts of this model; "
                f"it has {', '.join(_short(stacked)) or 'none'}"
            )
    if config.target_modules == "all-linear":
        left = [name for name in _short(stacked) if name not in (config.target_parameters or ())]
        if left:
            raise UserError(
                "lora.target_modules: all-linear means linear layers, and this model also has "
                f"stacks of experts: add lora.target_parameters: [{', '.join(_short(stacked))}], "
                "or name the linear layers to leave the experts alone"
            )
        return
    classifies = config.task_type == "SEQ_CLS"
    whole = [*(config.modules_to_save or ()), *HEADS] if classifies else []
    modules = dict(model.named_modules())
    in_full = [name for name in modules if any(f".{one}." in f".{name}." for one in whole)]
    asked_for_all = config.exclude_modules is not None and not config.exclude_modules
    outside = [] if asked_for_all else outside_language_model(model)
    linear = _linear_names(model, {*in_full, *(n for n in modules if part_of(n, outside))})
    eligible = f"its linear layers are {', '.join(linear)}"
    if stacked:
        eligible += f"; of its experts, by lora.target_parameters: {', '.join(_short(stacked))}"
    asked: Any = config.target_modules
    if isinstance(asked, str):
        if not any(re.fullmatch(asked, name) for name in modules):
            a_list = f"as a list, [{asked}], it means the ends of names; "
            raise UserError(
                f"lora.target_modules: as a regular expression {asked!r} matches the full name "
                "of no module of this model; "
                f"{a_list * any(is_suffix(asked, name) for name in modules)}{eligible}"
            )
        return
    for entry in sorted(asked or ()):
        found = [name for name in modules if is_suffix(entry, name)]
        if found and set(found) <= set(in_full):
            raise UserError(
                f"lora.target_modules: {entry!r} is in the head, which is trained in full: leave "
                "it out"
            )
        if not found:
            near = difflib.get_close_matches(entry, linear, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"lora.target_modules: {entry!r} matches no module of this model; {hint}{eligible}"
            )
        if all(linear_shape(modules[name]) is None for name in found):
            raise UserError(
                f"lora.target_modules: {entry!r} means {found[0]}, of class "
                f"{type(modules[found[0]]).__name__}; only linear layers can be adapted, and "
                f"{eligible}"
            )


def _short(stacked: Mapping[str, nn.Parameter]) -> list[str]:
    """experts.down_proj and the like."""
    return sorted({".".join(name.split(".")[-2:]) for name in stacked})


def selects(pattern: str, name: str) -> bool:
    """PEFT's rule for a key of rank_pattern: does it mean the module `name`?"""
    return re.match(rf"(.*\.)?({pattern})$", without_expert(name)) is not None


def _check_covered(
    asked: str | Collection[str] | None, config: LoraConfig, names: Sequence[str]
) -> None:
    """Raise UserError where what is adapted is not what was asked for; PEFT passes over it.

    `asked` is lora.target_modules as the user wrote it, `names` are the adapted weights.
    """
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    for option, pattern in patterns.items():
        for key in pattern or {}:
            if not any(selects(key, name) for name in names):
                raise UserError(
                    f"lora.{option}: {key!r} matches none of the {len(names)} adapted weights, "
                    f"of which one is {names[0]}"
                )
    entries = [] if asked is None or isinstance(asked, str) else sorted(asked)
    regex = asked if isinstance(asked, str) and asked != "all-linear" else ""
    if regex and not any(re.fullmatch(regex, name) for name in names):
        raise UserError(
            f"lora.target_modules: {regex!r} is adapted nowhere, since lora.exclude_modules or "
            "lora.layers_to_transform leaves it out"
        )
    for entry in entries:
        if not any(is_suffix(entry, name) for name in names):
            options = "exclude_modules", "layers_to_transform", "modules_to_save"
            why = " or ".join(f"lora.{key}" for key in options if getattr(config, key))
            raise UserError(
                f"lora.target_modules: {entry!r} is adapted nowhere, since {why} leaves it out"
            )
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return
    layers = [layers] if isinstance(layers, int) else layers
    for index in layers:
        here = [name for name in names if _layer_of(config, name) == index]
        if not here:
            raise UserError(f"lora.layers_to_transform: no adapted weight is in layer {index}")
        for entry in entries:
            if not any(is_suffix(entry, name) for name in here):
                raise UserError(
                    f"lora.target_modules: {entry!r} is in other layers, but not in layer {index} "
                    "of lora.layers_to_transform: leave that layer out, or name the weights in full"
                )
    for name in names:
        if _layer_of(config, name) not in layers:
            raise UserError(
                f"lora.layers_to_transform is {layers}, but {name} is adapted too: PEFT does not "
                "apply it to lora.target_parameters nor to a target named in full"
            )


def _excluded(excluded: str | Collection[str], name: str) -> bool:
    """PEFT's rule for lora.exclude_modules."""
    if isinstance(excluded, str):
        return re.fullmatch(excluded, name) is not None
    return any(is_suffix(entry, name) for entry in excluded)


def _layer_of(config: LoraConfig, name: str) -> int | None:
    """PEFT's rule for the number of the layer that `name` is in."""
    patterns = config.layers_pattern or "[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(found[1])
    return None


def _linear_names(model: nn.Module, without: Collection[str] = ()) -> list[str]:
    found = {
        n.rpartition(".")[2]
        for n, m in model.named_modules()
        if linear_shape(m) is not None and n not in without
    }
    return sorted(found - {"base_layer", TRAINED})


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base, bitwise; afterwards the adapter is as it was."""
    if not isinstance(model, PeftModel):
        yield
        return
    with model.disable_adapter():
        yield


class Rows(NamedTuple):
    """Rows of an embedding or a head that train."""

    ids: Tensor  # (k,) int64
    values: Tensor  # (k, n) of them; (k,) of a bias


def trained_rows(model: nn.Module) -> dict[str, Rows]:
    """What trains beside the factors, by parameter name in the base: rows of new tokens, and all
    rows of what lora.modules_to_save names. A plain LoRA cannot hold it. (A classifier's head is
    no such row: `head_of`.)"""
    inner: Any = model.base_model.model if isinstance(model, PeftModel) else model
    found = {}
    for name, module in inner.named_modules():
        if isinstance(module, TrainableTokensWrapper) and not module.token_adapter.tied_adapter:
            adapter = module.token_adapter
            ids = torch.tensor(adapter.token_indices[TRAINED])
            found[f"{name}.weight"] = Rows(ids, adapter.trainable_tokens_delta[TRAINED].detach())
        elif isinstance(module, ModulesToSaveWrapper) and not head_of(model):
            for own, parameter in module.modules_to_save[TRAINED].named_parameters():
                found[f"{name}.{own}"] = Rows(torch.arange(len(parameter)), parameter.detach())
    return found


def trained_factors(model: PeftModel) -> dict[str, Factors]:
    """The adapter A, B as it is now, on the CPU in fp32."""
    return {
        name: _kept(*matrix.factors(TRAINED)) for name, matrix in adapted_matrices(model).items()
    }


def head_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The head of a classifier as it is now, which trains in full: see `in_full`."""
    if isinstance(model, PeftModel) and model.peft_config[TRAINED].task_type == "SEQ_CLS":
        return in_full(dict(model.named_parameters()))
    return {}


def in_full(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Of a PEFT model's tensors by name those of modules that are trained in full.

    By module, and by the tensor's name in it; copies on the CPU.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(rf"base_model\.model\.(.+)\.{SAVED}\.{TRAINED}\.(.+)", name):
            found.setdefault(match[1], {})[match[2]] = tensor.detach().cpu().clone()
    return found


def take_off(model: PeftModel) -> PreTrainedModel:
    """The base. PEFT's unload leaves the modules that were trained in full in it."""
    inner: Any = model.base_model.model
    original = {
        name: module.original_module
        for name, module in inner.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    base: Any = model.unload()  # type: ignore[operator]
    for name, module in original.items():
        base.set_submodule(name, module)
    base.requires_grad_(False)
    return base  # type: ignore[no-any-return]


def _kept(A: Tensor, B: Tensor) -> Factors:
    """Copies on the CPU in fp32, wherever the model is."""
    plain = torch.contiguous_format
    A, B = (x.detach().float().cpu().clone(memory_format=plain) for x in (A, B))
    return Factors(A, B)


def step0_difference(model: PeftModel, batch: Mapping[str, Tensor]) -> float:
    """max |adapted - base| / max |base| over the logits of `batch`; the starting state gives ~0.

    `batch` is as for `logits_of`, and is gone through row by row, since logits of a large
    vocabulary take more memory than anything else. The two states of a classifier have the same
    head.
    """
    training = model.training
    model.eval()
    off, size = [], []
    with torch.no_grad():
        for row in _rows(batch):
            with base_only(model):
                base = logits_of(model, row)
            off.append(logits_of(model, row).sub_(base).abs_().max())
            size.append(base.abs_().max())
    model.train(training)
    return float(torch.stack(off).max() / torch.stack(size).max())  # NaN stays NaN


def _rows(batch: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
    """One by one; together where there are pictures, of which a row may have any number."""
    rows = len(batch["input_ids"])
    if any(tensor.ndim > 2 or len(tensor) != rows for tensor in batch.values()):
        return [batch]
    return [{name: t[i : i + 1] for name, t in batch.items()} for i in range(rows)]


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(k, v) in fp32, at every position of `batch` that is not padding; of a classifier (b, v).

    `batch` holds input_ids and attention_mask (b, t), for an encoder-decoder those of the decoder
    too, whose positions are meant then.
    """
    logits: Tensor = model(**batch).logits
    if logits.ndim == 3:
        mask = batch.get("decoder_attention_mask", batch["attention_mask"])
        logits = logits[mask.bool()]
    return logits.float()


def step0_bound(dtype: torch.dtype) -> float:
    """What `step0_difference` may be: nothing at all in 16 bit, rounding in fp32."""
    return 0.0 if dtype in (torch.bfloat16, torch.float16) else 1e-5


def tensor_sha256(tensor: Tensor) -> str:
    """Hash of dtype, shape and bytes of a tensor, so that equal means bitwise equal."""
    return blocks_sha256(tensor.dtype, tensor.shape, plain_tensors(tensor.detach()))


def blocks_sha256(dtype: torch.dtype, shape: Sequence[int], blocks: Iterable[Tensor]) -> str:
    """The same of a tensor that comes some rows at a time."""
    digest = hashlib.sha256(f"{dtype} {tuple(shape)}".encode())
    for block in blocks:
        data = block.detach().cpu().contiguous().flatten()  # a column can seem contiguous
        digest.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()


def packed_sha256(module: nn.Module) -> str:
    """Hash of all that a packed layer is made of: the packed numbers and their scales."""
    return _sha256_of(module.state_dict())


def _sha256_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor_sha256(tensor)}\n".encode())
    return digest.hexdigest()


def base_weights(model: nn.Module, without: Sequence[str] = ()) -> dict[str, Tensor]:
    """Every tensor of the base by the base's own names, whatever adapters are on it.

    `without` are modules that are not of the base: a head that it came without.
    """
    inner: Any = model.base_model.model if isinstance(model, PeftModel) else model
    # The last is PEFT's other name for the base layer, where that is packed by GPTQ or AWQ.
    ours = (".lora_", f".{SAVED}.", ".trainable_tokens_", ".quant_linear_module.")
    found = {
        name_in_base(name): tensor
        for name, tensor in inner.state_dict().items()
        if not any(part in name for part in ours)
    }
    return {
        name: tensor
        for name, tensor in found.items()
        if not any(name.startswith(f"{module}.") for module in without)
    }


def base_sha256(model: nn.Module, without: Sequence[str] = ()) -> str:
    """One hash over the `base_weights`, names included."""
    return _sha256_of(base_weights(model, without))


def check_base(stored: Mapping[str, str], hashes: Mapping[str, str]) -> None:
    """Raise UserError unless both name the same modules with the same hashes."""
    if set(stored) != set(hashes):
        odd = sorted(set(stored) ^ set(hashes))
        raise UserError(
            f"the stored factors are for other modules than this run adapts "
            f"({len(odd)} differ, the first is {odd[0]}): use the configuration of that run"
        )
    for name, digest in stored.items():
        if hashes[name] != digest:
            raise UserError(
                f"wrong base: {name}.weight has sha256 {hashes[name][:12]}, but the factors were "
                f"made from {digest[:12]}: use the base (and dtype) of that run"
            )


def save_start(path: Path, start: Start) -> None:
    """Write the starting state as one safetensors file, whole or not at all."""
    tensors = {}
    for name, (A, B) in start.factors.items():
        # Not PEFT's names: nothing here can be loaded as if it were a plain LoRA.
        tensors[f"{name}.initial_A"] = A.cpu()
        tensors[f"{name}.initial_B"] = B.cpu()
    # One key, since safetensors writes several in no fixed order: equal starts, equal bytes.
    about = {
        "format": FORMAT,
        "method": start.method,
        "scaling": start.scaling,
        "sha256": start.sha256,
    }
    write_bytes(path, save(tensors, {"milora": json.dumps(about)}))


def load_start(path: Path) -> Start:
    """Read what `save_start` wrote. Raises UserError when the file is not of that format."""
    try:
        with safe_open(path, framework="pt") as handle:
            about = json.loads((handle.metadata() or {}).get("milora", "{}"))
            if about.get("format") != FORMAT:
                raise UserError(f"{path} is not a file of initial factors ({FORMAT})")
            sha256 = about["sha256"]
            factors = {
                name: Factors(
                    handle.get_tensor(f"{name}.initial_A"), handle.get_tensor(f"{name}.initial_B")
                )
                for name in sha256
            }
    except UserError:
        raise
    except Exception as error:  # safetensors raises its own types, not exported under one base
        raise UserError(f"{path} cannot be read ({error}): start the run anew") from error
    return Start(about["method"], factors, about["scaling"], sha256, {})
