"""The weights of a model read one at a time from its files, without holding the model.

safetensors, in one file or in shards, from a folder or the hub (each shard is fetched when its
first weight is read), and GGUF files, whose weights are dequantised one by one.
"""

import json
import struct
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.hub import cached_file

from milora.errors import UserError
from milora.matrices import Weights
from milora.pretrained import (
    BUNDLED,
    UNREADABLE,
    bundled,
    check_hub_id,
    check_known,
    dtype_of,
    model_class,
    opened,
    refuse_quantised,
)
from milora.quantised import base_bytes, method_of, packing
from milora.vision import stored_names

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint(NamedTuple):
    """A model without its weights, and a way to each of them."""

    skeleton: PreTrainedModel  # on the meta device
    has: Callable[[str], bool]  # module name -> whether the files hold its weight
    read: Callable[[str], Tensor]  # module name -> its weight as the files store it, on the CPU
    gguf: bool  # the weights are (out, in) whatever the layer's class


def open_checkpoint(model: str, trust_remote_code: bool = False) -> Checkpoint:
    """The files of `model`, which is as for `load_pretrained`. Only the headers are read.

    Raises UserError when there is no model, when it has no safetensors, or when it is quantised:
    singular components must come from full-precision weights, never from packed ones.
    """
    skeleton = open_skeleton(model, trust_remote_code)
    if model.endswith(".gguf"):
        return _gguf(Path(model), skeleton)
    return _safetensors(str(bundled()) if model == BUNDLED else model, skeleton)


def open_skeleton(model: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """`model` on the meta device, from its config alone. Raises UserError as `open_checkpoint`."""
    _, config = _configuration(model, trust_remote_code)
    if not model.endswith(".gguf"):
        refuse_quantised(model, config)
    check_known(model, config)
    try:
        with torch.device("meta"):
            skeleton: PreTrainedModel = model_class(config).from_config(
                config, trust_remote_code=trust_remote_code
            )
    except UNREADABLE as error:
        raise _unopened(model, error) from error
    return skeleton


def _configuration(model: str, trust_remote_code: bool) -> tuple[str, Any]:
    """Where the files of `model` are (of a GGUF file, its folder), and its configuration."""
    source, options = model, dict[str, Any]()
    if model == BUNDLED:
        source = str(bundled())
    elif model.endswith(".gguf"):
        if not Path(model).is_file():
            raise UserError(f"model: {model} does not exist")
        source, options["gguf_file"] = str(Path(model).parent), Path(model).name
    elif not Path(model).is_dir():
        check_hub_id(model)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    except (*UNREADABLE, IndexError, struct.error) as error:
        raise _unopened(model, error) from error
    return source, config


def _unopened(model: str, error: Exception) -> UserError:
    return UserError(f"model: {model} cannot be loaded: {' '.join(str(error).split())}")


class Original(NamedTuple):
    """The full-precision checkpoint behind a quantised base."""

    name: str | None
    weights: Weights | None  # its matrices; None where none was named and none is needed
    label: str  # nf4, int8 or the method
    full_bytes: int  # what the base would take in the run's dtype
    packed_bytes: int | None  # what it takes quantised, where the method says that beforehand


def original_of(
    model: str,
    quantization: str | Mapping[str, Any] | None,
    factors_from: str | None,
    *,
    dtype: str = "auto",
    needed: bool = True,
    trust_remote_code: bool = False,
) -> Original | None:
    """What a quantised base was made from, or will be; None when the base is not quantised.

    `model`, `dtype` and `quantization` are those of load_pretrained. Nothing is loaded. A
    checkpoint that comes packed needs `factors_from`, unless no weight is `needed`.

    Raises UserError when it is missing, quantised itself, or named for a base in full precision.
    """
    # The weights of a GGUF file are dequantised, once, before anything is done with them. Its
    # configuration takes as much memory to read as all its tokens, which stays with the process.
    gguf = model.endswith(".gguf")
    config: Any = None
    if quantization or not gguf:
        _, config = _configuration(model, trust_remote_code)
    packed = None if gguf else config
    method = method_of(packed)
    if method is None and not quantization:
        if factors_from:
            raise UserError(
                f"milora.factors_from: {model} is not quantised, its own weights give the factors: "
                "remove it, or set quantization"
            )
        return None
    settings = packing(model, packed, quantization, dtype_of(dtype), "cpu").get(
        "quantization_config"
    ) or AutoQuantizationConfig.from_dict(_as_dict(config.quantization_config))
    label = quantization if isinstance(quantization, str) else settings.quant_method.value
    name = factors_from or (model if quantization else None)
    if name is None and needed:
        refuse_quantised(model, config)
    weights = full_weights(open_checkpoint(name, trust_remote_code), name) if name else None
    with torch.device("meta"):
        skeleton = model_class(config).from_config(config, trust_remote_code=trust_remote_code)
    return Original(name, weights, label, *base_bytes(skeleton, settings, dtype_of(dtype)))


def _as_dict(settings: Any) -> dict[str, Any]:
    return dict(settings) if isinstance(settings, dict) else settings.to_dict()


def full_weights(checkpoint: Checkpoint, name: str) -> Weights:
    """The matrices of a checkpoint, read anew each time: (m, n), in the dtype of its files.

    They come on the device that decomposes. `checkpoint.skeleton` is without adapters as yet.

    Raises UserError for a module that the files lack.
    """
    transposed = {n for n, m in checkpoint.skeleton.named_modules() if isinstance(m, Conv1D)}
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def weight(module: str) -> Tensor:
        if not checkpoint.has(module):
            raise UserError(
                f"milora.factors_from: the files of {name} hold no weight for {module}: they are "
                "of another model, or the library renames it when it loads the model"
            )
        found = checkpoint.read(module)
        if module in transposed and not checkpoint.gguf:
            found = found.T
        return found.to(device)

    return weight


class Shards(NamedTuple):
    """Where the tensors of a checkpoint are."""

    files: dict[str, str]  # tensor -> the name of its file
    path_of: Callable[[str], Path | None]  # that file, or another of the model, on this machine


def open_shards(source: str) -> Shards:
    """The safetensors files of a folder or a hub model; each is fetched when it is asked for.

    Raises UserError when there are none, or their index is damaged.
    """
    paths: dict[str, Path | None] = {}

    def path_of(file: str) -> Path | None:
        if file not in paths:
            try:
                # One that is not there gives None; a full disk or a lost network raises.
                found = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
            except OSError as error:
                raise UserError(
                    f"{file} of {source} cannot be fetched: {' '.join(str(error).split())}"
                ) from error
            paths[file] = Path(str(found)) if found else None
        return paths[file]

    # The library's order, so that both read the same weights where a folder has both.
    single = path_of(SINGLE)
    index = None if single else path_of(INDEX)
    if single:
        with opened(single) as handle:
            files: Any = dict.fromkeys(handle.keys(), SINGLE)
    elif index:
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is damaged ({error}): fetch it again") from error
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise UserError(f"{index} is damaged (no weight_map of file names): fetch it again")
        if odd := [file for file in files.values() if Path(file).name != file]:
            raise UserError(f"{index} names {odd[0]}, which is not a file beside it: not used")
    else:
        raise UserError(f"model: {source} has neither {SINGLE} nor {INDEX}: convert it first")
    return Shards(files, path_of)


def stored_name(skeleton: PreTrainedModel, parameter: str, files: Container[str]) -> str | None:
    """The tensor that holds `parameter`, with the model's prefix or without, or None."""
    prefix = f"{skeleton.base_model_prefix}."
    names = [parameter, parameter.removeprefix(prefix), prefix + parameter]
    names += stored_names(skeleton, parameter)
    return next((name for name in names if name in files), None)


def _safetensors(source: str, skeleton: PreTrainedModel) -> Checkpoint:
    files, path_of = open_shards(source)

    def stored(module: str) -> str | None:
        return stored_name(skeleton, f"{module}.weight", files)

    def read(module: str) -> Tensor:
        name = stored(module)
        if name is None:
            raise KeyError(module)
        path = path_of(files[name])
        if not path:
            raise UserError(
                f"{source} has no {files[name]}, which its {INDEX} names: fetch it again"
            )
        # Opened anew each time, so that no more than one weight stays mapped.
        with opened(path) as handle:
            try:
                tensor: Tensor = handle.get_tensor(name).clone()
            except Exception as error:
                raise UserError(
                    f"{path} has no {name}, though {INDEX} says so ({error}): fetch both again"
                ) from error
        return tensor

    return Checkpoint(skeleton, lambda module: stored(module) is not None, read, False)


def _gguf(path: Path, skeleton: PreTrainedModel) -> Checkpoint:
    from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map

    try:
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise UserError(f"model: {path} cannot be read as GGUF: {error}") from error
    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise UserError(f"model: the gguf package does not know {architecture}, of {path}")
    config: Any = skeleton.config
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(module: str) -> Tensor:
        name = f"{names.get_name(module)}.weight"
        found = tensors[name]
        weight = torch.from_numpy(dequantize(found.data, found.tensor_type).copy())
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            # GGUF has the two halves of each head's rotary pairs interleaved for this family.
            heads = config.num_attention_heads
            if ".attn_k." in name:
                heads = config.num_key_value_heads or heads
            pairs = weight.view(heads, -1, 2, weight.shape[1])  # head, pair, half, in
            weight = pairs.transpose(1, 2).reshape(weight.shape).contiguous()
        return weight

    return Checkpoint(
        skeleton, lambda module: f"{names.get_name(module)}.weight" in tensors, read, True
    )
