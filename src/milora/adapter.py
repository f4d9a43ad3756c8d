"""Put the components on a PEFT model: initial factors and anchor.

The base weight W is never changed. Two LoRA adapters of PEFT are active on every target:

    y = W x + s B A x - s B0 A0 x        s = lora_alpha / r  (or / sqrt(r) with rsLoRA)

One (A, B) trains and starts as a copy of the initial factors (A0, B0); the `anchor` (A0, -B0) holds
buffers, which nobody's switches make trainable. At step 0 they cancel, and the gradients are those
of the paper's rewritten base W - s B0 A0 plus a LoRA at (A0, B0).

A run that continues another has that one's update dW' as a third pair, frozen too (`previous`):
its components are those of W + dW', and step 0 is W x + dW' x.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import Any, Literal, NamedTuple, get_args

import torch
from peft import LoraConfig, PeftModel
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora.anchored_layers import compute_as_one, merge_as_one
from milora.errors import UserError
from milora.files import write_bytes
from milora.fingerprints import check_base, packed_sha256, tensor_sha256
from milora.matrices import (
    ANCHOR,
    PREVIOUS,
    SAVED,
    TRAINED,
    Matrix,
    Weights,
    adapted_layers,
    adapted_matrices,
    components_of_parts,
    kind_of,
)
from milora.quantised import (
    check_alike,
    check_trainable,
    keep_packing,
)
from milora.spectra import apart, span
from milora.svd import Component, Components, Decompose, components
from milora.targeting import inject

COMPONENT: dict[str, Component] = {
    "milora": "minor",
    "pissa": "principal",
    "middle": "middle",
    "random": "random",
}
Begin = Literal["published", "directions", "balanced"]  # as initial_factors takes them
FORMAT = "milora initial factors 1"
COPIES = ("ref", "teacher")  # of what trains, as TRL's trainers name those that they keep


class Factors(NamedTuple):
    A: Tensor  # (r, n) fp32, on the CPU
    B: Tensor  # (m, r) fp32, on the CPU


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

    Raises UserError, before any decomposition, for an unknown method or `begin`, targets that match
    nothing, embeddings, a tied output head, a rank that a weight does not allow, NaN weights, a
    `start` of another base, or a packed weight without `weights`.
    """
    if method not in (*COMPONENT, "lora"):
        raise UserError(f"method {method!r} is none of {', '.join((*COMPONENT, 'lora'))}")
    if begin not in get_args(Begin):
        raise UserError(f"begin {begin!r} is none of {', '.join(get_args(Begin))}")
    if method == "lora" and begin != "published":
        raise UserError(f"begin={begin!r} is of methods with an anchor: lora starts as PEFT does")
    check_trainable(model)
    keep_packing(model)
    with torch.random.fork_rng(devices=[]):  # PEFT draws A from the global generator
        torch.default_generator.manual_seed(seed)
        peft_model = inject(model, config)
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
    that out of the model. Where A = A0 and B = B0 they stay so, to the last bit. Raises UserError
    for method lora.
    """
    for matrix in matrices.values():
        if ANCHOR not in matrix.layer.lora_A:
            raise UserError(
                "decay: method lora has no start to decay towards: use the optimizer's weight_decay"
            )
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
        merge_as_one(layer)
    peft_model.save_pretrained = _refuse_bare_pair  # type: ignore[method-assign]
    peft_model.set_adapter = MethodType(_set_adapter, peft_model)  # type: ignore[method-assign]


def without_values(model: PreTrainedModel, config: LoraConfig, method: str) -> PeftModel:
    """As `add_adapter`, for a model on the meta device: layers and shapes, and no factors."""
    peft_model = inject(model, config)
    if method in COMPONENT:
        _add_anchor(peft_model, config)
    peft_model.set_adapter(TRAINED)
    return peft_model


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
        effective = weight = matrix.effective
        if keep_apart and PREVIOUS in matrix.layer.lora_A:
            weight = apart(effective, *span(*matrix.factors(PREVIOUS)))
        drawn = module_seed(seed, name)
        found = components_of_parts(
            weight, matrix.parts, matrix.rank(TRAINED), COMPONENT[method], drawn, decompose
        )
        factors[name] = initial_factors(found, scaling[name], begin)
        spectra[name] = {
            "shape": list(weight.shape),
            "spectral_norm_at_least": found.norm if weight is effective else None,
            "frobenius_norm": float(torch.linalg.norm(effective.double())),
            "component_norm": float(found.S.norm()),
            "singular_values": found.S.tolist(),
            "zero": int(found.zero.sum()),
            "solver": found.solver,
            "residual": found.residual,
        }
    return Start(method, factors, scaling, hashes, spectra)


def _set_adapter(model: PeftModel, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """PEFT's, and the anchor with what trains and copies of it; any other is a LoRA by itself."""
    type(model).set_adapter(model, adapter_name, *args, **kwargs)
    if adapter_name in (TRAINED, *COPIES):
        tuner: Any = model.base_model
        frozen = [name for name in (ANCHOR, PREVIOUS) if name in model.peft_config]
        tuner.set_adapter([adapter_name, *frozen], *args, **kwargs)


def _refuse_bare_pair(*args: Any, **kwargs: Any) -> None:
    raise UserError(
        "save_pretrained would write A, B without the anchor, a LoRA that loads without complaint "
        "and is wrong: use save_plain_lora(folder, plain_lora(start, trained_factors(model)), "
        "model, name), or get_milora_model, whose model writes that LoRA by itself"
    )


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
    """The base. PEFT's unload leaves in it what is merged and modules that were trained in full."""
    inner: Any = model.base_model.model
    for layer in adapted_layers(model).values():
        if layer.merged:
            layer.unmerge()
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
