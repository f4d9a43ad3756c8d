"""W x + s (B A x - B0 A0 x) from W x: what an anchored layer adds, and by what. torch only.

As two LoRA layers this reads x twice and the output three times, and starts twice the kernels. Here
it is one product with each of two stacked factors,

    B A - B0 A0  =  (B - B0) A + B0 (A - A0)  =  [B - B0, B0] [A; A - A0]

Of the ways to stack, this one is exact at step 0 whatever the order in which a product is summed:
both differences are zeros. [B, -B0] [A; A0] would cancel only to rounding, and goes on losing what
B A and B0 A0 have in common as A and B move away.

x, [A; A - A0] x and the stacks are kept for the backward. Dropout is on the trained half,
B A D x - B0 A0 x = [B - B0, B0] [A D x; A D x - A0 x], which keeps D x and the mask in place of x.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Where the gradients are those of `_Update`. A CPU computes all the time, and saves the products of
# the other r rows; a GPU often waits for its host, which starts fewest kernels by autograd alone.
BY_HAND = ("cpu",)


class Stacked(NamedTuple):
    """The factors of one layer, or with a leading dimension those of several of one shape."""

    tall: Tensor  # [A; A - A0] (2r, n), with dropout A (r, n)
    wide: Tensor  # s [B - B0, B0] (m, 2r)
    frozen: Tensor | None = None  # with dropout -A0 (r, n)
    trained: tuple[Tensor, Tensor, float] | None = None  # A, B and s of one layer, for `_Update`


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


def by_hand(A: Tensor, dropout: bool) -> bool:
    """Whether A and B get their gradients from `_Update`, and their stacks then need none."""
    usual = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return usual and not dropout and A.device.type in BY_HAND


class _Update(torch.autograd.Function):
    """`flat` (t, m) + [B - B0, B0] [A; A - A0] x of `rows` (t, n), with gradients of rank r.

    Those of A and B are (d1 + d2)ᵀ x and s gᵀ A x, where [d1, d2] = g s [B - B0, B0] and g is that
    of the sum. Autograd alone takes the gradients of both stacks, which have twice the rows.
    """

    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, rows: Tensor, A: Tensor, B: Tensor, scaling: float, tall: Tensor,
        wide: Tensor,
    ) -> Tensor:  # fmt: skip
        inner = F.linear(rows, tall)
        ctx.save_for_backward(rows, inner, tall, wide)
        ctx.scaling, ctx.dtypes = scaling, (A.dtype, B.dtype)
        return _added(flat, inner, wide)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, tall, wide = ctx.saved_tensors
        r, g = len(tall) // 2, grad.to(tall.dtype)
        d = g @ wide
        to_A = (d[:, :r] + d[:, r:]).T @ rows
        to_B = g.T @ inner[:, :r]
        to_B = to_B if ctx.scaling == 1 else to_B * ctx.scaling
        to_x = d @ tall if ctx.needs_input_grad[1] else None
        return grad, to_x, to_A.to(ctx.dtypes[0]), to_B.to(ctx.dtypes[1]), None, None, None


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
    (tall, wide, frozen, trained), dtype = by, by.tall.dtype
    rows, flat = _rows(x, dtype), _rows(result, result.dtype)
    if trained is not None:
        out: Tensor = _Update.apply(flat, rows, *trained, tall, wide)  # type: ignore[no-untyped-call]
    elif frozen is not None:
        kept = F.linear(F.dropout(rows, dropout), tall)
        out = _added(flat, torch.cat((kept, torch.addmm(kept, rows, frozen.T)), 1), wide)
    else:
        out = _added(flat, F.linear(rows, tall), wide)
    return out if result.dim() == 2 else out.view(result.shape)


def _added(flat: Tensor, inner: Tensor, wide: Tensor) -> Tensor:
    if flat.dtype == wide.dtype:
        return torch.addmm(flat, inner, wide.T)
    return (flat + F.linear(inner, wide)).to(flat.dtype)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, n); what need not be cast is not asked for, which alone takes the host a while."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.dtype == dtype else flat.to(dtype)
