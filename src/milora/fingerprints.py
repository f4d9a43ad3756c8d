"""Hashes that tell one base from another: of a tensor, of a packed layer, of all weights."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from milora.errors import UserError
from milora.matrices import SAVED, base_modules, name_in_base
from milora.quantised import is_packed, plain_tensors

AT_ONCE = 8  # tensors hashed; of those on a GPU so many copies are in memory


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


def packed_hashes(base: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Of those of the modules `names` that are packed, as packed_sha256 gives them."""
    modules = base_modules(base)
    return {n: packed_sha256(modules[n]) for n in names if n in modules and is_packed(modules[n])}


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


def composed_sha256(hashes: Mapping[str, str]) -> str:
    """One hash over those of tensors, names included."""
    digest = hashlib.sha256()
    for name in sorted(hashes):
        digest.update(f"{name} {hashes[name]}\n".encode())
    return digest.hexdigest()


def _sha256_of(tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    with ThreadPoolExecutor(min(torch.get_num_threads(), AT_ONCE)) as pool:  # hashing holds no lock
        hashes = pool.map(tensor_sha256, (tensors[name] for name in names))
        return composed_sha256(dict(zip(names, hashes, strict=True)))
