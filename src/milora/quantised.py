"""Bases of packed numbers: which weights are packed, how they are asked for, what they take.

A packed weight (nf4 and the like) is used and hashed as it is, and never decomposed: its components
come from the full-precision file that it was made from.
"""

import difflib
import importlib.util
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from milora.errors import UserError

FULL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# What PEFT puts a LoRA on and transformers can train through, with what has to be installed.
# (PEFT wants optimum beside gptqmodel for both; transformers for gptq.)
METHODS = {
    "bitsandbytes": (("bitsandbytes",), "pip install 'milora[quantised]'"),
    "torchao": (("torchao",), "pip install torchao"),
    "gptq": (("gptqmodel", "optimum"), "pip install gptqmodel optimum"),
    "awq": (("gptqmodel", "optimum"), "pip install gptqmodel optimum"),
}
ON_LOAD = ("bitsandbytes", "torchao")  # the others need data to quantise by
SHORT: dict[str, dict[str, Any]] = {
    # QLoRA's (arXiv 2305.14314); int8 is LLM.int8().
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}
ALIKE = 0.5  # of ||W||: packing to 2 bits loses 0.4 of it, and two different weights differ by 1.4


def quantization_config(asked: str | Mapping[str, Any], dtype: torch.dtype) -> Any:
    """transformers' configuration object for the key `quantization`: a name of SHORT or its keys.

    What is computed with a weight is computed in `dtype`, unless the keys say otherwise.

    Raises UserError for a method that cannot be trained through, and for keys that it has not.
    """
    values = dict(SHORT[asked]) if isinstance(asked, str) else dict(asked)
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        values.setdefault("quant_method", "bitsandbytes")
    method = values.get("quant_method")
    if method not in ON_LOAD:
        raise UserError(
            f"quantization.quant_method is {method!r}: known are {', '.join(ON_LOAD)}; or write "
            f"quantization: {' or '.join(SHORT)}"
        )
    require(method)
    if method == "bitsandbytes" and not (values.get("load_in_4bit") or values.get("load_in_8bit")):
        raise UserError("quantization: set load_in_4bit or load_in_8bit to true")
    try:
        if method == "bitsandbytes":
            values.setdefault("bnb_4bit_compute_dtype", str(dtype).removeprefix("torch."))
            _check_keys(values)
            return BitsAndBytesConfig(**{k: v for k, v in values.items() if k != "quant_method"})
        return AutoQuantizationConfig.from_dict(values)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"quantization: {' '.join(str(error).split())}") from error


def _check_keys(values: Mapping[str, Any]) -> None:
    # BitsAndBytesConfig only logs those that it does not know.
    known = {key for key in BitsAndBytesConfig().to_dict() if not key.startswith("_")}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"quantization.{key} is not an option of BitsAndBytesConfig{hint}")


def method_of(config: Any) -> str | None:
    """The quantisation method in a model's configuration; None for full precision."""
    settings = getattr(config, "quantization_config", None)
    if not settings:
        return None
    kind = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(kind, "value", kind))


def require(method: str) -> None:
    """Raise UserError when a library that reads weights of that kind is not installed."""
    libraries, install = METHODS[method]
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise UserError(f"{method} weights need {library}, which is not installed: {install}")


def packing(
    model: str, config: Any, asked: str | Mapping[str, Any] | None, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """What from_pretrained needs for a quantised base; empty for any other.

    `config` is the model's configuration, `asked` the key `quantization`. Raises UserError for
    both at once, and for a checkpoint quantised in a way that cannot be trained through.
    """
    method = method_of(config)
    if asked and method:
        raise UserError(f"model: {model} is quantised already ({method}): remove quantization")
    if asked:
        found = quantization_config(asked, dtype)
        return {"quantization_config": found, "device_map": {"": device}}
    if method is None:
        return {}
    if method not in METHODS:
        raise UserError(
            f"model: {model} is quantised ({method}), through which milora cannot train; known "
            f"are {', '.join(METHODS)}: use one of those, or the full-precision checkpoint"
        )
    require(method)
    options: dict[str, Any] = {"device_map": {"": device}}
    if method in ("gptq", "awq"):
        # Most of the kernels that it chooses from have no gradient, and those for a CPU repack the
        # weights at the first evaluation.
        own = config.quantization_config
        settings = dict(own) if isinstance(own, dict) else own.to_dict()
        on_cpu = {"gptq": "gptq_torch", "awq": "torch_awq"}[method]
        options["quantization_config"] = AutoQuantizationConfig.from_dict(
            settings | {"backend": on_cpu if device == "cpu" else "auto_trainable"}
        )
    return options


def is_packed(module: nn.Module) -> bool:
    """Whether the weight of a linear layer is packed, by its class and not by its dtype alone:
    nf4 can be stored as float, and torchao's int8 calls itself float."""
    weight: Any = getattr(module, "weight", None)
    return type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in FULL


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer, packed or not; None for any other module."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    m, n = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(m, int) and isinstance(n, int) and not hasattr(module, "base_layer"):
        return m, n
    return None


def keep_packing(model: nn.Module) -> None:
    """Have bitsandbytes leave 4-bit weights on a CPU as they are.

    On processors that multiply bfloat16 it repacks them at the first evaluation and rounds their
    scales to bfloat16: another base than the one that was trained on, and no way back.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_trainable(model: nn.Module) -> None:
    """Raise UserError for a form of packing without a gradient, such as torchao's 4 bits."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method
        raise UserError(
            f"quantization: what {getattr(method, 'value', method)} makes of these weights cannot "
            "be trained through: use nf4 or int8"
        )


@torch.no_grad()
def unlike(module: nn.Module, weight: Tensor) -> float:
    """||Q - W|| / ||W|| of a packed layer and the weight W (m, n) that it may be made from."""
    packed = next(itertools.chain(module.parameters(), module.buffers()), weight)
    one = torch.eye(weight.shape[1], device=packed.device, dtype=weight.dtype)
    found = module(one).double().T  # (m, n), whatever the format
    bias = getattr(module, "bias", None)
    if bias is not None:
        found = found - bias.double()[:, None]
    W = weight.to(found.device).double()
    return float(torch.linalg.norm(found - W) / torch.linalg.norm(W).clamp_min(1e-30))


def check_alike(name: str, module: nn.Module, weight: Tensor) -> None:
    """Raise UserError when a packed layer cannot have been made from W (m, n)."""
    difference = unlike(module, weight)
    if not difference < ALIKE:
        raise UserError(
            f"milora.factors_from: {name} differs from the quantised one by {difference:.0%} "
            f"(packing loses less than {ALIKE:.0%}): give the checkpoint that the model was "
            "quantised from"
        )


def base_bytes(
    skeleton: PreTrainedModel, config: Any, dtype: torch.dtype
) -> tuple[int, int | None]:
    """What the weights will take, before any is read: (in `dtype`, quantised by `config`).

    `skeleton` is on the meta device and has its layers replaced. The second is None for gptq and
    awq, which do not say what an element takes.
    """
    tied = {id(p): p for p in skeleton.parameters()}.values()
    width = torch.empty((), dtype=dtype).element_size()
    full = sum(p.numel() for p in tied) * width
    if config.quant_method.value in ("gptq", "awq"):
        return full, None
    quantizer = AutoHfQuantizer.from_config(config)
    size = quantizer.quantized_element_size
    # (m, n) of each linear layer before it is replaced, since packed ones have other shapes.
    shapes = {name: linear_shape(module) for name, module in skeleton.named_modules()}
    quantizer.preprocess_model(model=skeleton, device_map=None, dtype=dtype)
    packed = 0.0
    for name, parameter in skeleton.named_parameters():
        shape = shapes.get(name.rpartition(".")[0])
        if shape is None or not quantizer.param_needs_quantization(skeleton, name):
            packed += parameter.numel() * width
        else:
            packed += math.prod(shape) * size + _scales(config, shape)
    return full, round(packed)


def _scales(config: Any, shape: tuple[int, int]) -> float:
    """Bytes of the scales of one weight: one a block of 64 in 4 bit, one a row in 8 bit."""
    if getattr(config, "load_in_4bit", False):
        blocks = math.ceil(math.prod(shape) / 64)
        nested = getattr(config, "bnb_4bit_use_double_quant", False)
        return blocks + 4 * math.ceil(blocks / 256) + 4 * 256 if nested else 4 * blocks
    return 4 * shape[0]


def loaded_bytes(model: nn.Module) -> int:
    """What the tensors of a loaded base take, scales of packed weights included."""
    seen: dict[int, int] = {}
    for tensor in model.state_dict().values():
        for plain in plain_tensors(tensor):
            seen[plain.data_ptr()] = plain.numel() * plain.element_size()
    return sum(seen.values())


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """A tensor, or those that it is a wrapper of (torchao's)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    inner = [getattr(tensor, name) for name in names]
    return [plain for part in inner if part is not None for plain in plain_tensors(part)]
