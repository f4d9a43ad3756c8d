"""The matrices that an adapter goes on, whatever the library stores them in.

Most are the weight of a linear layer. GPT-2's Conv1D stores it transposed. Mixtures of experts
stack theirs in one parameter of three dimensions, of which PEFT adapts all at once; here each
expert's is a matrix of its own, named like `model.layers.0.mlp.experts.down_proj.3`, with its own
rows of lora_A and columns of lora_B. What is returned are views: writing to one writes the layer.
The packed weight of a quantised base is none of these; W is then read from the full-precision file.

Some weights are several matrices one above the other: query, key and value, or gate and up. One
LoRA goes on the whole, as PEFT has it; `parts` says which rows are whose.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from milora.quantised import is_packed, linear_shape
from milora.svd import Component, Components, Decompose

Weights = Callable[[str], Tensor]  # module name -> W (m, n) in full precision
TRAINED, ANCHOR = "default", "anchor"
SAVED = "modules_to_save"  # PEFT's word for what is trained in full, in the names of tensors
PREVIOUS = "previous"  # PEFT's name here for the update of the runs that this one continues


class Matrix(NamedTuple):
    """One logical weight W (m, n) and the places of its factors."""

    layer: Any  # PEFT's layer; several matrices share one where experts are stacked
    path: str  # of that layer in the PEFT model's base
    expert: int | None
    parts: list[Tensor]  # the rows of each logical matrix in W; empty when W is one
    source: Callable[[], Tensor] | None = None  # reads W, where the layer has it packed

    @property
    def weight(self) -> Tensor:
        """W (m, n), detached; read from the file each time where the layer has it packed.

        Raises KeyError for a packed one without a source.
        """
        base = self.layer.get_base_layer()
        if self.packed:
            if self.source is None:
                raise KeyError(self.path)
            return self.source()
        if self.expert is None:
            return _upright(base, base.weight.detach())
        return _upright(base, self.layer.get_param().detach()[self.expert])

    @property
    def effective(self) -> Tensor:
        """W, or in fp32 W + dW where the model has the update of earlier runs on it."""
        weight = self.weight
        if PREVIOUS not in self.layer.lora_A:
            return weight
        A, B = (x.detach().to(weight.device) for x in self.factors(PREVIOUS))
        return torch.addmm(weight.float(), B, A, alpha=self.scaling(PREVIOUS))

    @property
    def packed(self) -> bool:
        return self.expert is None and is_packed(self.layer.get_base_layer())

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)"""
        if self.packed and (shape := linear_shape(self.layer.get_base_layer())):
            return shape
        m, n = self.weight.shape
        return m, n

    def rank(self, adapter: str) -> int:
        return int(self.layer.r[adapter])

    def scaling(self, adapter: str) -> float:
        return float(self.layer.scaling[adapter])

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A (r, n) and B (m, r) of one of its adapters."""
        return self.part(self.layer.lora_A[adapter].weight, self.layer.lora_B[adapter].weight)

    def part(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Of the layer's two tensors those that are its own.

        PEFT has them for all experts: the e-th r rows of lora_A (count r, n), and every count-th
        column of lora_B (m, r count).
        """
        if self.expert is None:
            return lora_A, lora_B
        count = self.layer.num_experts
        A = lora_A.view(count, -1, lora_A.shape[1])[self.expert]
        return A, lora_B.view(len(lora_B), -1, count)[:, :, self.expert]


def adapted_matrices(model: PeftModel, weights: Weights | None = None) -> dict[str, Matrix]:
    """Every matrix with an adapter, by its name in the base, in the model's order.

    `weights` reads the matrices that the base has packed.
    """
    found: dict[str, Matrix] = {}
    inner: Any = model.base_model.model
    config = inner.config.get_text_config()  # of a model that reads pictures, the language model's
    for path, layer in adapted_layers(model).items():
        if stacked := getattr(layer, "parameter_name", None):
            name = f"{path.replace('.base_layer', '')}.{stacked}"
            parts = fused_rows(config, name, layer.out_features)
            for expert in range(layer.num_experts):
                found[f"{name}.{expert}"] = Matrix(layer, path, expert, parts)
        else:
            parts = fused_rows(config, path, getattr(layer, "out_features", 0))
            source = partial(weights, path) if weights else None
            found[path] = Matrix(layer, path, None, parts, source)
    return found


def fused_rows(config: Any, name: str, rows: int) -> list[Tensor]:
    """The rows of each logical matrix within the weight `name` (rows, n) of a model of `config`.

    Empty where the weight is one matrix, or where it is not known to be more.
    """
    kind, model = kind_of(name), getattr(config, "model_type", "")
    every, heads = torch.arange(rows), getattr(config, "num_attention_heads", 0)
    if (model, kind) == ("gpt2", "c_attn"):
        return list(every.chunk(3))
    if kind == "gate_up_proj" and model in HALVES:
        return list(every.chunk(2))
    if (model, kind) == ("phi3", "qkv_proj"):
        grouped = config.num_key_value_heads * rows // (heads + 2 * config.num_key_value_heads)
        return list(every.split([rows - 2 * grouped, grouped, grouped]))
    if kind != "query_key_value" or model not in ("gpt_neox", "falcon"):
        return []
    if model == "falcon" and config.new_decoder_architecture:
        grouped = config.num_kv_heads
        by_group = every.view(grouped, heads // grouped + 2, -1)
        return [part.flatten() for part in (by_group[:, :-2], by_group[:, -2], by_group[:, -1])]
    if model == "falcon" and config.multi_query:
        size = rows // (heads + 2)
        return list(every.split([rows - 2 * size, size, size]))
    return [part.flatten() for part in every.view(heads, 3, -1).unbind(1)]  # head by head


# Gate above up, each half of the rows; others interleave them.
HALVES = ("phi3", "mixtral", "qwen2_moe", "qwen3_moe")


def adapted_layers(model: PeftModel) -> dict[str, Any]:
    """PEFT's LoRA layers by their path in the base with its adapters."""
    inner: Any = model.base_model.model
    return {name: layer for name, layer in inner.named_modules() if isinstance(layer, LoraLayer)}


def skeleton_of(model: Any) -> Any:
    """The layers and shapes of a base, on the meta device."""
    with torch.device("meta"):
        return type(model)(model.config)


def matrix_in(base: nn.Module, name: str) -> Tensor:
    """The matrix `name` (m, n) of a model without adapters: a detached view.

    Raises KeyError when the model has no such linear layer, or has it packed, and no such stack of
    experts.
    """
    try:
        module: Any = base.get_submodule(name)
    except AttributeError:
        module = None
    if isinstance(module, nn.Linear | Conv1D) and not is_packed(module):
        return _upright(module, module.weight.detach())
    stack, _, expert = name.rpartition(".")
    owner, _, parameter = stack.rpartition(".")
    try:
        module = base.get_submodule(owner)
        whole = module.get_parameter(parameter).detach()
        if whole.ndim != 3 or not expert.isdigit() or int(expert) >= len(whole):
            raise KeyError(name)
    except AttributeError:
        raise KeyError(name) from None
    return _upright(module, whole[int(expert)])


def components_of_parts(
    weight: Tensor, parts: Sequence[Tensor], rank: int, component: Component, seed: int,
    decompose: Decompose,
) -> Components:  # fmt: skip
    """`rank` components of `weight` (m, n), shared out evenly over the logical matrices in it.

    The columns of U are orthonormal; the rows of Vh are so within each part.
    """
    if not parts:
        return decompose(weight, rank, component, seed)
    sizes = [0] * len(parts)
    for _ in range(rank):
        room = [i for i, rows in enumerate(parts) if sizes[i] < min(len(rows), weight.shape[1])]
        sizes[min(room, key=sizes.__getitem__)] += 1
    found = {
        i: decompose(weight[parts[i].to(weight.device)], size, component, seed + i)
        for i, size in enumerate(sizes)
        if size
    }
    U = torch.cat([one.U.new_zeros(len(weight), len(one.S)) for one in found.values()], 1)
    for (i, one), columns in zip(found.items(), torch.arange(rank).split(sizes), strict=False):
        U[parts[i][:, None].to(U.device), columns.to(U.device)] = one.U
    every = found.values()
    return Components(
        U, torch.cat([one.S for one in every]), torch.cat([one.Vh for one in every]),
        max(one.norm for one in every), max(one.residual for one in every),
        "; ".join(dict.fromkeys(one.solver for one in every)),
    )  # fmt: skip


def name_in_base(name: str) -> str:
    """Of a module or parameter of the base that PEFT has wrapped: its name before."""
    return re.sub(r"\.(base_layer|token_adapter|original_module)(?=\.|$)", "", name)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model, or of the base of a PEFT model, by their names in the base."""
    inner: Any = model.base_model.model if isinstance(model, PeftModel) else model
    found = {}
    for name, module in inner.named_modules():
        own = ".lora_" not in name and ".modules_to_save" not in name
        if own and not isinstance(module, LoraLayer):
            found[name_in_base(name)] = module
    return found


def _upright(module: nn.Module, weight: Tensor) -> Tensor:
    """(out, in), as the library's Linear has it."""
    transposed = isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
    return weight.T if transposed else weight


def stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of three dimensions by name: the experts, in models that stack them."""
    return {name: weight for name, weight in model.named_parameters() if is_stack(weight)}


def is_stack(weight: Tensor) -> bool:
    """Of matrices, and not a vector that is written with three dimensions (SigLIP's probe)."""
    return weight.ndim == 3 and min(weight.shape) > 1


def is_suffix(entry: str, name: str) -> bool:
    """PEFT's rule for an entry of a list of targets: does it mean `name`?"""
    return name == entry or name.endswith("." + entry)


def without_expert(name: str) -> str:
    """The name of the layer or stack that the matrix `name` is in."""
    return re.sub(r"\.\d+$", "", name)


def kind_of(name: str) -> str:
    """What is counted together over layers and experts: `down_proj`."""
    return without_expert(name).rpartition(".")[2]
