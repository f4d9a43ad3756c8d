"""Fine-tune in the directions that pretrained weights use least; get a plain LoRA back.

The names below are the library; they are imported when first used, so that `import milora`
alone loads neither torch nor transformers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Components": "svd",
    "Store": "store",
    "UserError": "errors",
    "add_adapter": "adapter",
    "base_only": "logits",
    "components": "svd",
    "get_milora_model": "export",
    "hold_inputs": "callbacks",
    "load_start": "adapter",
    "minor_components": "svd",
    "plain_lora": "export",
    "save_plain_lora": "export",
    "save_start": "adapter",
    "step0_difference": "logits",
    "trained_factors": "adapter",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'milora' has no attribute {name!r}")
    return getattr(import_module(f"milora.{_HOME[name]}"), name)
