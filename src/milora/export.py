"""From initial and trained factors to the artefact that other tools take: a plain LoRA.

    dW = s (B A - B0 A0) = s [B, -B0] [A; A0]

is one ordinary LoRA of rank 2r on the untouched base. It is built from files or plain tensors,
never from the live model, so that exporting cannot disturb a run.
"""

import copy
import re
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from milora.adapter import (
    COMPONENT,
    Factors,
    Rows,
    Start,
    add_adapter,
    head_of,
    take_off,
    trained_factors,
    trained_rows,
)
from milora.checkpoint import full_weights, open_checkpoint
from milora.errors import UserError
from milora.files import read_json, write_bytes, write_json
from milora.matrices import (
    PREVIOUS,
    TRAINED,
    Matrix,
    adapted_matrices,
    base_modules,
    is_suffix,
    matrix_in,
    skeleton_of,
    without_expert,
)
from milora.pretrained import opened, task_of
from milora.quantised import ON_LOAD, is_packed, linear_shape, method_of
from milora.targeting import check_plain

ADAPTER_FILE = "adapter_model.safetensors"
OWN = ("adapter_config.json", ADAPTER_FILE, "milora.json", "README.md")


class PlainLora(NamedTuple):
    """dW = B A per module, scale included; the ranks may differ until it is saved."""

    factors: dict[str, Factors]
    error: float = 0.0  # ||dW - BA|| / ||dW|| over all modules, Frobenius; 0 when nothing was cut
    errors: Mapping[str, float] = MappingProxyType({})  # each module's own
    # A classifier's head, by module and tensor.
    in_full: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({})

    @property
    def worst(self) -> tuple[str, float]:
        """The module with the largest error of its own."""
        return max(self.errors.items(), key=lambda pair: pair[1], default=("", 0.0))


class Storage(NamedTuple):
    """How the factors lie in the file: dW = scale B A."""

    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    one_rank: bool = True  # smaller ones are padded with zeros


NORMALISED = Storage()


def plain_lora(
    start: Start,
    trained: Mapping[str, Factors],
    in_full: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
    previous: Mapping[str, Factors] = MappingProxyType({}),
) -> PlainLora:
    """The update as one ordinary LoRA per module, and what was trained in full beside it.

    The concatenation above, exact, of rank 2r (r for method lora, which has no anchor); with
    `previous`, the update that this one came on top of, of that one's rank more.
    """
    factors: dict[str, Factors] = {}
    for name, (A, B) in trained.items():
        s = start.scaling[name]
        A0, B0 = start.factors[name]
        if start.method == "lora":
            factors[name] = Factors(A.float(), s * B.float())
        else:
            joined = torch.cat([A, A0]).float(), s * torch.cat([B, -B0], dim=1).float()
            factors[name] = Factors(*joined)
        if name in previous:
            own, (A, B) = factors[name], previous[name]
            factors[name] = Factors(torch.cat([own.A, A]), torch.cat([own.B, B], dim=1))
    return PlainLora(factors, in_full=in_full)


def exact_rank(plain: PlainLora) -> int:
    """The rank that it is saved with."""
    return max(len(A) for A, _ in plain.factors.values())


def save_plain_lora(
    folder: Path,
    plain: PlainLora,
    base: nn.Module,
    base_name: str,
    revision: str | None = None,
    storage: Storage = NORMALISED,
) -> int:
    """Write adapter_config.json and adapter_model.safetensors; returns the (largest) rank.

    `base` is the base, or a PEFT model on it.

    Normalised for servers, which read little of the configuration: lora_alpha == r (the scale is
    in B), one rank for all modules (padded with zeros), no patterns, no rsLoRA, explicit targets,
    only lora_A and lora_B tensors in fp32. The head of a classifier, which the base has not, lies
    beside them as PEFT's modules_to_save. Another `storage` departs from that only as it says.
    """
    factors = one_rank(plain.factors) if storage.one_rank else dict(sorted(plain.factors.items()))
    rank = exact_rank(plain)
    own = {} if storage.one_rank else {re.escape(name): len(A) for name, (A, _) in factors.items()}
    modules = base_modules(base)
    transposed = {isinstance(modules.get(name), Conv1D) for name in factors}
    linear = {name for name in factors if name in modules}
    stacked = {without_expert(name) for name in factors if name not in modules}
    parameters = {
        f"{name}.{own}"
        for name, module in modules.items()
        for own, _ in module.named_parameters(recurse=False)
    }
    config = LoraConfig(
        task_type=task_of(base),
        modules_to_save=sorted(plain.in_full) or None,
        base_model_name_or_path=base_name,
        revision=revision,
        r=rank,
        lora_alpha=rank * storage.scale,  # type: ignore[arg-type]
        rank_pattern=own,
        alpha_pattern={name: rank * storage.scale for name, rank in own.items()},  # type: ignore[misc]
        target_modules=target_names(modules, linear),
        target_parameters=target_names(parameters, stacked, 2) or None,
        fan_in_fan_out=transposed == {True},
        inference_mode=True,
    )
    lora = _tensors(factors, base, modules, config)
    tensors = {key: tensor.to(storage.dtype) for key, tensor in lora.items()} | {
        f"base_model.model.{module}.{name}": tensor
        for module, own in plain.in_full.items()
        for name, tensor in own.items()
    }
    write_bytes(folder / ADAPTER_FILE, save(tensors, {"format": "pt"}))
    settings = sorted(config.to_dict().items())
    written = {key: sorted(v) if isinstance(v, set) else v for key, v in settings}
    write_json(folder / "adapter_config.json", written)
    return rank


def load_plain_lora(folder: Path, skeleton: PreTrainedModel) -> PlainLora:
    """What `save_plain_lora` wrote, matrix by matrix; `skeleton` is the base on the meta device.

    Raises UserError for another base, and for a file that holds anything else, which would be
    lost.
    """
    config = read_config(folder)
    with opened(folder / ADAPTER_FILE):
        tensors = load_file(folder / ADAPTER_FILE)
    if (scale := scale_of(config)) is None:
        raise UserError(
            f"{folder} is not a plain LoRA as milora writes it: its weights differ in scale"
        )
    try:
        with torch.device("meta"):
            model = get_peft_model(skeleton, config)
    except ValueError as error:
        raise UserError(f"wrong base: {folder} does not fit it: {error}") from error
    factors, used = {}, set()
    for name, matrix in adapted_matrices(model).items():
        keys = [f"base_model.model.{matrix.path}.{which}.weight" for which in ("lora_A", "lora_B")]
        try:
            found = [tensors[key].float() for key in keys]
        except KeyError as error:
            raise UserError(f"{folder} has no {error}: it is not the whole adapter") from None
        _check_shapes(folder, name, matrix, *found)
        A, B = matrix.part(*found)
        factors[name] = Factors(A, scale * B)
        used.update(keys)
    whole: dict[str, dict[str, Tensor]] = {}
    for module in config.modules_to_save or ():
        start = f"base_model.model.{module}."
        for key in [key for key in tensors if key.startswith(start)]:
            whole.setdefault(module, {})[key.removeprefix(start)] = tensors[key]
            used.add(key)
    if left := sorted(set(tensors) - used):
        raise UserError(
            f"{folder} also holds {left[0]} ({len(left)} in all), which is no LoRA of a linear "
            "layer or a stack of experts: only PEFT can use it as it is"
        )
    return PlainLora(factors, in_full=whole)


def read_config(folder: Path) -> Any:
    """adapter_config.json of an adapter. Raises UserError for one that is cut or altered."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
        scale_of(config)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder / 'adapter_config.json'} is damaged ({' '.join(str(error).split())}): put "
            "the file as written back"
        ) from error
    return config


def _check_shapes(folder: Path, name: str, matrix: Matrix, A: Tensor, B: Tensor) -> None:
    """Raise UserError unless they are as the configuration says of the base in hand."""
    (key,) = matrix.layer.lora_A
    wanted = [tuple(own[key].weight.shape) for own in (matrix.layer.lora_A, matrix.layer.lora_B)]
    (rank, n), (m, _) = wanted
    if (A.shape[1], len(B)) != (n, m):
        raise UserError(
            f"wrong base: {name} is {m} x {n} there, and the update in {folder} is {len(B)} x "
            f"{A.shape[1]}: give the model that the adapter was trained on"
        )
    if len(A) != rank or B.shape[1] != rank:
        raise UserError(
            f"{folder}: adapter_config.json says rank {matrix.rank(key)} of {name}, and "
            f"{ADAPTER_FILE} has another: put both files as written back"
        )


def scale_of(config: Any) -> float | None:
    """s of dW = s B A, when the LoraConfig has one for all weights."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    scale = float(config.lora_alpha / config.r)
    same = ranks.keys() == alphas.keys() and all(alphas[k] == ranks[k] * scale for k in ranks)
    return scale if same and not config.use_rslora else None


def _tensors(
    factors: Mapping[str, Factors], base: nn.Module, modules: Collection[str], config: LoraConfig
) -> dict[str, Tensor]:
    """By the names that PEFT gives them; experts are stacked as it does."""
    found, stacks = {}, dict[str, list[Factors]]()
    for name, (A, B) in factors.items():
        if name in modules:
            found[f"base_model.model.{name}.lora_A.weight"] = A
            found[f"base_model.model.{name}.lora_B.weight"] = B
    if len(found) == 2 * len(factors):
        return found
    # Where several stacks of one module are adapted PEFT nests its layers: it says how itself.
    inner: Any = base.base_model.model if isinstance(base, PeftModel) else base
    model = get_peft_model(skeleton_of(inner), copy.deepcopy(config))
    for name, matrix in adapted_matrices(model).items():
        if matrix.expert is not None:
            stacks.setdefault(matrix.path, []).append(factors[name])
    for path, experts in stacks.items():
        A, B = torch.cat([A for A, _ in experts]), torch.stack([B for _, B in experts], 2)
        found[f"base_model.model.{path}.lora_A.weight"] = A
        found[f"base_model.model.{path}.lora_B.weight"] = B.flatten(1).contiguous()
    return found


def one_rank(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """By name, the factors of smaller rank filled up with zeros."""
    rank = max(len(A) for A, _ in factors.values())
    return {
        name: Factors(
            nn.functional.pad(A, (0, 0, 0, rank - len(A))).contiguous(),
            nn.functional.pad(B, (0, rank - len(A))).contiguous(),
        )
        for name, (A, B) in sorted(factors.items())
    }


def check_loaded(loaded: PeftModel, plain: PlainLora, storage: Storage = NORMALISED) -> None:
    """Raise RuntimeError unless PEFT has read from the folder just what `save_plain_lora` wrote."""
    wanted = one_rank(plain.factors) if storage.one_rank else plain.factors
    matrices = adapted_matrices(loaded)
    odd = set(wanted) ^ set(matrices)
    for name in set(wanted) & set(matrices):
        matrix, (key,) = matrices[name], loaded.peft_config
        read = zip(matrix.factors(key), wanted[name], strict=True)
        if (
            not all(torch.equal(x.cpu(), y) for x, y in read)
            or matrix.scaling(key) != storage.scale
        ):
            odd.add(name)
    whole = head_of(loaded)
    for module in {*whole, *plain.in_full}:
        own, read_back = plain.in_full.get(module, {}), whole.get(module, {})
        if set(own) != set(read_back) or not all(torch.equal(own[k], read_back[k]) for k in own):
            odd.add(module)
    if odd:
        raise RuntimeError(
            f"the exported adapter, loaded by PEFT, is not the trained one in {len(odd)} of "
            f"{len(wanted) + len(plain.in_full)} weights, the first is {min(odd)}: report this"
        )


def target_names(there: Collection[str], adapted: Collection[str], words: int = 1) -> list[str]:
    """The shortest list of targets that selects exactly `adapted` by PEFT's rule of suffixes.

    `there` are all names that PEFT compares; `words` is how many of the last a target has.
    """
    short = sorted({".".join(name.split(".")[-words:]) for name in adapted})
    selected = {name for name in there if any(is_suffix(entry, name) for entry in short)}
    return short if selected == set(adapted) else sorted(adapted)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Of an adapter what is no weight and no record: tokenizer and chat template."""
    for file in source.iterdir():
        if file.name in OWN or file.name.startswith("."):
            continue
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
        elif file.name == "additional_chat_templates":
            shutil.copytree(file, folder / file.name, dirs_exist_ok=True)


def end_as_trained(
    folder: Path, tokenizer: PreTrainedTokenizerBase, configuration: Mapping[str, Any]
) -> None:
    """Where the run has an end of answers of its own, whole weights in `folder` end there too."""
    if not configuration.get("tokenizer", {}).get("eos_token"):
        return
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    ends = settings.get("eos_token_id", read_json(folder / "config.json").get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    ids = dict.fromkeys(one for one in (tokenizer.eos_token_id, *ends) if one is not None)
    write_json(path, settings | {"eos_token_id": list(ids)})


def merge(
    base: PreTrainedModel, plain: PlainLora, rows: Mapping[str, Rows] = MappingProxyType({})
) -> None:
    """W + dW into the weights of `base`, in place: added in fp64 and rounded once to its dtype.

    `rows`, of `trained_rows`, take the place of those that are there, and a head that was trained
    in full that of the base's.
    """
    for name, (ids, values) in rows.items():
        with torch.no_grad():
            parameter = base.get_parameter(name)
            parameter[ids.to(parameter.device)] = values.to(parameter)
    for name, (A, B) in plain.factors.items():
        try:
            weight = matrix_in(base, name)
        except KeyError:
            raise UserError(f"wrong base: it has no weight {name}") from None
        delta = (B.double() @ A.double()).to(weight.device)
        with torch.no_grad():
            weight.copy_((weight.double() + delta).to(weight.dtype))
    for module, tensors in plain.in_full.items():
        base.get_submodule(module).load_state_dict(dict(tensors))


def get_milora_model(
    model: PreTrainedModel,
    config: LoraConfig,
    method: str = "milora",
    factors_from: str | None = None,
    **options: Any,
) -> PeftModel:
    """As peft.get_peft_model: a PeftModel for your own loop, transformers' Trainer or TRL's.

    `method` and `options` are those of add_adapter, but that milora begins with balanced factors,
    as `milora train` does; begin="published" gives the paper's. hold_inputs adds what else `milora
    train` does by itself. The base is untouched; with the adapter disabled the model is the base,
    which makes it the reference model of TRL's DPOTrainer.
    `save_pretrained(folder)`, a trainer's checkpoint too, writes the plain LoRA of rank 2r, which
    loads with stock PEFT and is a result, not a state to train on from: for runs that can be
    interrupted and resumed there is `milora train`. With `previous`, a plain LoRA that this one
    comes on top of, what is saved and merged is both updates in one. On a quantised model the
    factors come from the full-precision checkpoint `factors_from`, by default the one that it was
    loaded from.

    `merge_adapter()` and `unmerge_adapter()` round once and put the base back to the last bit:
    while it is merged a second copy of the adapted weights is kept. They refuse packed ones. (With
    method lora they are PEFT's own.)

    Raises UserError as add_adapter does, and for an option of `config` that no plain LoRA on an
    untouched base holds.
    """
    check_plain(config)
    packed = any(linear_shape(m) and is_packed(m) for m in model.modules())
    if factors_from and not (packed and method in COMPONENT):
        raise UserError(
            f"factors_from: {factors_from} would not be read, since "
            + (f"method {method} has no factors" if packed else "the model is not packed")
            + ": leave it out"
        )
    if method in COMPONENT and packed:
        name = factors_from or str(model.name_or_path)
        options["weights"] = full_weights(open_checkpoint(name), name)
    if method == "milora":
        options = {"begin": "balanced"} | options
    live, start = add_adapter(model, config, method, **options)
    if rows := trained_rows(live):
        raise UserError(
            f"{', '.join(rows)} would train, which no plain LoRA holds, and that is what this "
            "model saves: use `milora train`, which writes merged weights, or "
            "milora.adapter.add_adapter and, when it is trained, merge_and_unload()"
        )
    # A bound method and an attribute, so that copy.deepcopy takes them along.
    live.start = start  # type: ignore[assignment]
    live.save_pretrained = MethodType(_save_plain, live)  # type: ignore[method-assign]
    live.load_adapter = MethodType(_load_another, live)  # type: ignore[method-assign]
    live.merge_and_unload = MethodType(_merge_plain, live)  # type: ignore[assignment]
    return live


def _load_another(live: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """As PEFT's, but for what trains: what was saved of it is a result in another form."""
    if adapter_name == TRAINED:
        raise UserError(
            f"{model_id} is a result, a plain LoRA, and not the state of this model: leave out "
            "load_best_model_at_end and resume_from_checkpoint, or use `milora train`, which has "
            "both"
        )
    return type(live).load_adapter(live, model_id, adapter_name, *args, **kwargs)


def _save_plain(
    live: Any, save_directory: str | Path, *_: Any, is_main_process: bool = True,
    selected_adapters: Sequence[str] | None = None, **__: Any,
) -> None:  # fmt: skip
    if selected_adapters not in (None, [TRAINED]):
        raise UserError(
            f"selected_adapters={selected_adapters}: what this model saves is the result of "
            f"{TRAINED!r} alone"
        )
    plain = _plain_of(live)
    if not is_main_process:  # what is shared out takes all of them to read
        return
    save_plain_lora(Path(save_directory), plain, live, str(live.base_model.model.name_or_path))


def _merge_plain(
    live: Any, progressbar: bool = False, safe_merge: bool = False,
    adapter_names: Sequence[str] | None = None,
) -> PreTrainedModel:  # fmt: skip
    """As PEFT's, which adds trained and frozen half one after the other and rounds each time.

    Packed weights are PEFT's to merge into, but as one plain LoRA: rounded once too.
    """
    if adapter_names not in (None, [TRAINED]):
        raise UserError(f"adapter_names={adapter_names}: {TRAINED!r} alone can be merged here")
    packed = any(matrix.packed for matrix in adapted_matrices(live).values())
    if packed and (method := method_of(live.base_model.model.config)) not in ON_LOAD:
        raise UserError(
            f"the base is packed by {method}, into which PEFT merges nothing: save_pretrained "
            "writes a plain LoRA, which goes on that base as it is"
        )
    plain = _plain_of(live)
    if safe_merge and not all(x.isfinite().all() for pair in plain.factors.values() for x in pair):
        raise ValueError("the trained factors hold NaN or infinite values")  # as PEFT's
    base = take_off(live)
    if packed:
        return _merged_by_peft(base, plain, progressbar, safe_merge)
    merge(base, plain)
    return base


def _merged_by_peft(
    base: PreTrainedModel, plain: PlainLora, progressbar: bool, safe_merge: bool
) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        save_plain_lora(Path(folder), plain, base, str(base.name_or_path))
        model: Any = PeftModel.from_pretrained(base, folder)
    merged: PreTrainedModel = model.merge_and_unload(progressbar, safe_merge)
    return merged


def _plain_of(live: Any) -> PlainLora:
    """With the initial factors, and an update below this one, as the model has them: to cast it
    rounds the anchor too."""
    factors, previous = {}, {}
    for name, matrix in adapted_matrices(live).items():
        if PREVIOUS in matrix.layer.lora_A:
            previous[name] = Factors(*(x.float().cpu() for x in matrix.factors(PREVIOUS)))
        A, B = matrix.factors(TRAINED)
        A0, B0 = live.start.factors[name]
        factors[name] = Factors(A0.to(A.dtype).float(), B0.to(B.dtype).float())
    start = live.start._replace(factors=factors)
    return plain_lora(start, trained_factors(live), head_of(live), previous)
