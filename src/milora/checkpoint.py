"""The weights of a model read one at a time from its files, without holding the model.

safetensors, in one file or in shards, from a folder or the hub (each shard is fetched when its
first weight is read), and GGUF files, whose weights are dequantised one by one.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from milora.errors import UserError
from milora.pretrained import BUNDLED, bundled, check_hub_id, refuse_quantised

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
        if not model.endswith(".gguf"):
            refuse_quantised(model, config)
        with torch.device("meta"):
            skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model: {model} cannot be opened: {reason}") from error
    return skeleton


def _safetensors(source: str, skeleton: PreTrainedModel) -> Checkpoint:
    paths: dict[str, Path | None] = {}

    def path_of(file: str) -> Path | None:
        """Where a file of a folder or a hub model is on this machine, fetched if need be."""
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
        with _opened(single) as handle:
            files: Any = dict.fromkeys(handle.keys(), SINGLE)
    elif index:
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is damaged ({error}): fetch it again") from error
        if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
            raise UserError(f"{index} is damaged (no weight_map of file names): fetch it again")
    else:
        raise UserError(f"model: {source} has neither {SINGLE} nor {INDEX}: convert it first")
    prefix = f"{skeleton.base_model_prefix}."

    def stored_name(module: str) -> str | None:
        own = f"{module}.weight"
        names = (own, own.removeprefix(prefix), prefix + own)
        return next((name for name in names if name in files), None)

    def read(module: str) -> Tensor:
        name = stored_name(module)
        if name is None:
            raise KeyError(module)
        path = path_of(files[name])
        if not path:
            raise UserError(
                f"{source} has no {files[name]}, which its {INDEX} names: fetch it again"
            )
        # Opened anew each time, so that no more than one weight stays mapped.
        with _opened(path) as handle:
            try:
                tensor: Tensor = handle.get_tensor(name).clone()
            except Exception as error:
                raise UserError(
                    f"{path} has no {name}, though {INDEX} says so ({error}): fetch both again"
                ) from error
        return tensor

    return Checkpoint(skeleton, lambda module: stored_name(module) is not None, read, False)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own types, not exported under one base
        raise UserError(
            f"{path} cannot be read ({error}): it is truncated or damaged, fetch it again"
        ) from error


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
