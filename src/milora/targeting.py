"""Which weights of a model an adapter goes on, and what PEFT would pass over in silence."""

import difflib
import inspect
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from milora.errors import UserError
from milora.matrices import (
    TRAINED,
    adapted_matrices,
    is_suffix,
    name_in_base,
    stacks,
    without_expert,
)
from milora.quantised import linear_shape
from milora.vision import leave_tower_alone, outside_language_model, part_of, projectors

HEADS = ["classifier", "score"]  # what PEFT itself trains in full in a classifier

# What of peft.LoraConfig keeps a plain LoRA on an untouched base; the rest is refused by name.
LORA_OPTIONS = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "target_parameters",
    "modules_to_save",
}  # fmt: skip

# What Python's own callers may give for a list of YAML.
LISTS: tuple[type, ...] = (list, tuple, set)

# Others that a user may look for, and what does it here.
INSTEAD = {"trainable_token_indices": "name the tokens in tokenizer.tokens"}

# What of LoraConfig says nothing of the result; rows of tokens are refused where they would train.
ABOUT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "fan_in_fan_out", "runtime_config", "trainable_token_indices",
}  # fmt: skip


class Target(NamedTuple):
    """A weight that an adapter goes on."""

    shape: tuple[int, ...]  # of W (out, in)
    rank: int
    transposed: bool  # stored as (in, out), as in GPT-2
    parts: list[Tensor]  # see Matrix


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
    _check_types(options)
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
        if not _is_number(alpha) or not 0 < alpha < math.inf:
            raise UserError(f"lora.{name} is {alpha!r}: a number above 0 is needed")
    dropout = config.lora_dropout
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise UserError(
            f"lora.lora_dropout is {dropout!r}: a number of at least 0 and below 1 is needed"
        )
    if not config.target_modules and not config.target_parameters:
        raise UserError("lora.target_modules is missing: name the weights to adapt, or all-linear")
    if config.target_parameters and config.lora_dropout:
        raise UserError(
            f"lora.lora_dropout is {config.lora_dropout}: PEFT has none for "
            "lora.target_parameters, so it must be 0"
        )
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_types(options: Mapping[str, Any]) -> None:
    """PEFT takes anything, and goes wrong or by something else much later."""
    for key, value in options.items():
        if value is None:
            continue
        if key == "use_rslora":
            fits, what = isinstance(value, bool), "true or false"
        elif key in ("rank_pattern", "alpha_pattern"):
            fits, what = isinstance(value, Mapping), "a number by pattern, {q_proj: 8},"
        elif key == "layers_to_transform":
            given: Any = value if isinstance(value, LISTS) else [value]
            fits = all(type(one) is int for one in given)
            what = "the number of a layer, or a list of them,"
        elif key in ("modules_to_save", "target_parameters"):
            fits, what = isinstance(value, LISTS), "a list of names"
        elif key in ("target_modules", "exclude_modules", "layers_pattern"):
            fits, what = isinstance(value, (*LISTS, str)), "a list of names, or a pattern,"
        else:
            continue  # a number, checked by its bounds
        if not fits:
            raise UserError(f"lora.{key} is {value!r}: {what} is needed")


def check_plain(config: LoraConfig) -> None:
    """Raise UserError for an option whose result is no plain LoRA on the untouched base."""
    usual = LoraConfig()
    for key in inspect.signature(LoraConfig).parameters:
        value = getattr(config, key, None)
        if key in LORA_OPTIONS or key in ABOUT or value == getattr(usual, key, None):
            continue
        raise UserError(
            f"LoraConfig: {key}={value!r} is not supported, since the result must be a plain LoRA "
            f"on the untouched base; supported: {', '.join(sorted(LORA_OPTIONS))}"
        )


def _check_patterns(config: LoraConfig) -> None:
    """Raise UserError for what is neither a name nor a regular expression."""
    patterns: list[tuple[str, Any]] = []
    lists = "target_modules", "exclude_modules", "target_parameters", "modules_to_save"
    for option in (*lists, "layers_pattern"):
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
        for name, matrix in adapted_matrices(inject(model, config)).items()
    }


def inject(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
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
        raise UserError(f"lora: {reason}") from error
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


def selects(pattern: str, name: str) -> bool:
    """PEFT's rule for a key of rank_pattern: does it mean the module `name`?"""
    return re.match(rf"(.*\.)?({pattern})$", without_expert(name)) is not None


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


def _short(stacked: Mapping[str, nn.Parameter]) -> list[str]:
    """experts.down_proj and the like."""
    return sorted({".".join(name.split(".")[-2:]) for name in stacked})


def _linear_names(model: nn.Module, without: Collection[str] = ()) -> list[str]:
    found = {
        n.rpartition(".")[2]
        for n, m in model.named_modules()
        if linear_shape(m) is not None and n not in without
    }
    return sorted(found - {"base_layer", TRAINED})
