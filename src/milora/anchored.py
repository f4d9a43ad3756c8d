"""W x + s (B A x - B0 A0 x) from W x: what an anchored layer adds, and by what. torch only.

As two LoRA layers this reads x twice and the output three times, and starts twice the kernels. Here
it is one product with each of two stacked factors,

    B A - B0 A0  =  (B - B0) A + B0 (A - A0)  =  [B - B0, B0] [A; A - A0]

Of the ways to stack, this one is exact at step 0 whatever the order in which a product is summed:
both differences are zeros. [B, -B0] [A; A0] would cancel only to rounding, and goes on losing what
B A and B0 A0 have in common as A and B move away.

x, [A; A - A0] x and the stacks are what autograd keeps. Dropout is on the trained half,
B A D x - B0 A0 x = [B - B0, B0] [A D x; A D x - A0 x], which keeps D x and the mask in place of x.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Stacked(NamedTuple):
    """The factors of one layer, or with a leading dimension those of several of one shape."""

    tall: Tensor  # [A; A - A0] (2r, n), with dropout A (r, n)
    wide: Tensor  # s [B - B0, B0] (m, 2r)
    frozen: Tensor | None = None  # with dropout -A0 (r, n)


def stacked(
    A: Tensor, B: Tensor, A0: Tensor, minus_B0: Tensor, scaling: float, dropout: bool,
    dtype: torch.dtype,
) -> Stacked:  # fmt: skip
    """Of A (..., r, n) and B (..., m, r), which get gradients through it, and the frozen pair.

    The differences are taken before the cast to `dtype`, that of the products: bfloat16 rounds
    the update by about 2^-8 of itself.
    """
    # TRL casts what trains on a quantised base to bfloat16: the start is then A0 and B0 so rounded.
    A0, minus_B0 = A0.to(A.dtype), minus_B0.to(B.dtype)
    with torch.autocast(A.device.type, enabled=False):  # which knows no cat of some dtypes
        wide = torch.cat((B + minus_B0, -minus_B0), -1)
        wide = wide if scaling == 1 else wide * scaling
        if dropout:
            return Stacked(A.to(dtype), wide.to(dtype), -A0.to(dtype))
        return Stacked(torch.cat((A, A - A0), -2).to(dtype), wide.to(dtype))


def product_dtype(x: torch.dtype, factors: torch.dtype, device: str) -> torch.dtype:
    """Of the products: that of the factors, bfloat16 where x is, or that of autocast."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.bfloat16 if x == torch.bfloat16 else factors


def anchored(result: Tensor, x: Tensor, by: Stacked, dropout: float = 0.0) -> Tensor:
    """`result` (..., m) plus the update at `x` (..., n), in the dtype of `result`.

    The sum is rounded once. `dropout` is the probability for the trained half, 0 outside of
    training.
    """
    (tall, wide, frozen), dtype = by, by.tall.dtype
    rows = _rows(x, dtype)
    if frozen is not None:
        kept = F.linear(F.dropout(rows, dropout), tall)
        inner = torch.cat((kept, torch.addmm(kept, rows, frozen.T)), 1)
    else:
        inner = F.linear(rows, tall)
    flat = _rows(result, result.dtype)
    if result.dtype == dtype:
        out = torch.addmm(flat, inner, wide.T)
    else:
        out = (flat + F.linear(inner, wide)).to(result.dtype)
    return out if result.dim() == 2 else out.view(result.shape)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, n); what need not be cast is not asked for, which alone takes the host a while."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.dtype == dtype else flat.to(dtype)
