"""The weights of a model read one at a time from its files, without holding the model.

safetensors, in one file or in shards, from a folder or the hub (each shard is fetched when its
first weight is read), and GGUF files, whose weights are dequantised one by one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from milora.errors import UserError
from milora.pretrained import BUNDLED, bundled, refuse_quantised

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint(NamedTuple):
    """A model without its weights, and a way to each of them."""

    skeleton: PreTrainedModel  # on the meta device
    read: Callable[[str], Tensor]  # module name -> its weight as the files store it, on the CPU
    gguf: bool  # the weights are (out, in) whatever the layer's class


def open_checkpoint(model: str, trust_remote_code: bool = False) -> Checkpoint:
    """The files of `model`, which is as for `load_pretrained`. Only the headers are read.

    Raises UserError when there is no model, when it has no safetensors, or when it is quantised:
    singular components must come from full-precision weights, never from packed ones.
    """
    source = str(bundled()) if model == BUNDLED else model
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if model.endswith(".gguf"):
        path = Path(model)
        if not path.is_file():
            raise UserError(f"model: {model} does not exist")
        source, options["gguf_file"] = str(path.parent), path.name
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if not model.endswith(".gguf"):
            refuse_quantised(model, config)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model: {model} cannot be opened: {reason}") from error
    if model.endswith(".gguf"):
        return Checkpoint(skeleton, _gguf_reader(Path(model), skeleton), True)
    return Checkpoint(skeleton, _safetensors_reader(source, skeleton), False)


def _safetensors_reader(source: str, skeleton: PreTrainedModel) -> Callable[[str], Tensor]:
    index = _path(source, INDEX)
    single = None if index else _path(source, SINGLE)
    if not index and not single:
        raise UserError(f"model: {source} has neither {SINGLE} nor {INDEX}: convert it first")
    files: dict[str, str] = {}
    if index:
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{index} is damaged ({error}): fetch it again") from error
    if single:
        with _opened(single) as handle:
            files = dict.fromkeys(handle.keys(), SINGLE)
    prefix = f"{skeleton.base_model_prefix}."

    def read(module: str) -> Tensor:
        own = f"{module}.weight"
        for name in (own, own.removeprefix(prefix), prefix + own):
            if name in files:
                path = _path(source, files[name])
                if not path:
                    raise UserError(
                        f"{source} has no {files[name]}, which its {INDEX} names: fetch it again"
                    )
                # Opened anew each time, so that no more than one weight stays mapped.
                with _opened(path) as handle:
                    tensor: Tensor = handle.get_tensor(name).clone()
                return tensor
        raise UserError(
            f"the files of {source} hold no {own}: the library fuses or renames it when it loads "
            "the model; `milora train` decomposes the loaded weights"
        )

    return read


def _path(source: str, file: str) -> Path | None:
    """Where `file` of a folder or a hub model is on this machine, fetched if need be."""
    try:
        return Path(str(cached_file(source, file)))
    except OSError:
        return None


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own types, not exported under one base
        raise UserError(
            f"{path} cannot be read ({error}): it is truncated or damaged, fetch it again"
        ) from error


def _gguf_reader(path: Path, skeleton: PreTrainedModel) -> Callable[[str], Tensor]:
    from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map

    try:
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"model: {path} cannot be read as GGUF: {error}") from error
    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise UserError(f"model: the gguf package does not know {architecture}, of {path}")
    config: Any = skeleton.config
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(module: str) -> Tensor:
        name = f"{names.get_name(module)}.weight"
        if name not in tensors:
            raise UserError(f"{path} holds no weight for {module} ({name})")
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

    return read
