"""The base beside what is adapted: at step 0 the two say the same."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Within the block the model is its base, bitwise; afterwards the adapter is as it was."""
    if not isinstance(model, PeftModel):
        yield
        return
    # Not by PEFT's disable_adapter, which first asks every layer for its status: that takes longer
    # than the switching.
    layers = (one for one in model.modules() if isinstance(one, BaseTunerLayer))
    was_on = any(not layer.disable_adapters for layer in layers)
    tuner: Any = model.base_model
    try:
        tuner.disable_adapter_layers()
        yield
    finally:
        if was_on:
            tuner.enable_adapter_layers()


class Pair(NamedTuple):
    """The model in both states. Entering `base()` or `tuned()` gives the one to run."""

    model: nn.Module
    other_base: nn.Module | None = None  # for full fine-tuning, which has no adapter to switch off
    headless: bool = False  # the base came without a head for the classes: it cannot be asked

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        off: AbstractContextManager[None] = nullcontext()
        if self.other_base is None:
            off = base_only(self.model)
        with off:
            yield self.other_base or self.model  # type: ignore[misc]

    @contextmanager
    def tuned(self) -> Iterator[PreTrainedModel]:
        yield self.model  # type: ignore[misc]


def step0_difference(model: PeftModel, batch: Mapping[str, Tensor]) -> float:
    """max |adapted - base| / max |base| over the logits of `batch`; the starting state gives ~0.

    `batch` is as for `logits_of`, and is gone through row by row, since logits of a large
    vocabulary take more memory than anything else. The two states of a classifier have the same
    head.
    """
    training = model.training
    model.eval()
    off, size = [], []
    with torch.no_grad():
        for row in _rows(batch):
            with base_only(model):
                base = logits_of(model, row)
            off.append(logits_of(model, row).sub_(base).abs_().max())
            size.append(base.abs_().max())
    model.train(training)
    return float(torch.stack(off).max() / torch.stack(size).max())  # NaN stays NaN


def step0_bound(dtype: torch.dtype) -> float:
    """What `step0_difference` may be: nothing at all in 16 bit, rounding in fp32."""
    return 0.0 if dtype in (torch.bfloat16, torch.float16) else 1e-5


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """(k, v) in fp32, at every position of `batch` that is not padding; of a classifier (b, v).

    `batch` holds input_ids and attention_mask (b, t), for an encoder-decoder those of the decoder
    too, whose positions are meant then.
    """
    logits: Tensor = model(**batch).logits
    if logits.ndim == 3:
        mask = batch.get("decoder_attention_mask", batch["attention_mask"])
        logits = logits[mask.bool()]
    return logits.float()


def _rows(batch: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
    """One by one; together where there are pictures, of which a row may have any number."""
    rows = len(batch["input_ids"])
    if any(tensor.ndim > 2 or len(tensor) != rows for tensor in batch.values()):
        return [batch]
    return [{name: t[i : i + 1] for name, t in batch.items()} for i in range(rows)]
