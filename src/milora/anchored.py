"""W x + s (B A x - B0 A0 x) from W x: the forward and backward of an anchored layer. torch only.

As two LoRA layers this reads x twice and the output three times, and keeps what the frozen half
needs no gradient for. Here it is one product with each of two stacked factors,

    B A - B0 A0  =  (B - B0) A + B0 (A - A0)  =  [B - B0, B0] [A; A - A0]

Of the ways to stack, this one is exact at step 0 whatever the order in which a product is summed:
both differences are zeros. [B, -B0] [A; A0] would cancel only to rounding, and goes on losing what
B A and B0 A0 have in common as A and B move away.

With h = s g [B - B0, B0] for the gradient g of the output, and h1, h2 its halves:

    dx = h [A; A - A0]        dA = (h1 + h2)ᵀ x        dB = s gᵀ (A x)

so that x, in its own dtype, [A; A - A0] x and the stacks are all that is kept. Dropout is on the
trained half, B A D x - B0 A0 x = [B - B0, B0] [A D x; A D x - A0 x]; of D the mask is kept, a
byte per entry.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def anchored(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    A0: Tensor,
    minus_B0: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """`result` (..., m) plus the update at `x` (..., n), in the dtype of `result`.

    A (r, n) and B (m, r) get gradients, A0 and minus_B0 none. Products are in the dtype of A, in
    bfloat16 where `x` is, or in that of autocast; the differences are taken before the cast, so
    that bfloat16 rounds the update by about 2^-8 of itself, as `result` is rounded anyway, and the
    sum with `result` is rounded once. `dropout` is the probability for the trained half, 0
    outside of training.
    """
    device = x.device.type
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else A.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    out: Tensor = _Anchored.apply(result, x, A, B, A0, minus_B0, scaling, dropout, dtype)  # type: ignore[no-untyped-call]
    return out


class _Anchored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, A: Tensor, B: Tensor, A0: Tensor, minus_B0: Tensor,
        scaling: float, dropout: float, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        rows, mask = x.reshape(-1, x.shape[-1]).to(dtype), None
        wide = _wide(B, minus_B0, dtype)
        if dropout:
            tall, rows0 = torch.cat((A, A0)).to(dtype), rows
            rows, mask = torch.native_dropout(rows, dropout, True)
            kept = rows @ tall[: len(A)].T
            inner = torch.cat((kept, kept - rows0 @ tall[len(A) :].T), 1)
        else:
            tall = _tall(A, A0, dtype)
            inner = rows @ tall.T
        flat = result.reshape(-1, result.shape[-1])
        # No view, since a model may write into what a layer gave (Falcon does).
        out = torch.empty(result.shape, dtype=result.dtype, device=result.device)
        if flat.dtype == dtype:
            torch.addmm(flat, inner, wide, alpha=scaling, out=out.view(flat.shape))
        else:
            torch.add(flat, inner @ wide, alpha=scaling, out=out.view(flat.shape))
        # The stacks are kept too: to make them again takes longer than all else that is small.
        ctx.save_for_backward(x, inner, mask, wide, tall)
        ctx.scaling, ctx.dropout, ctx.factors = scaling, dropout, A.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, inner, mask, wide, tall = ctx.saved_tensors
        dtype, rank = wide.dtype, len(tall) // 2
        g = grad.reshape(-1, grad.shape[-1]).to(dtype)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        h = g @ wide.T
        if ctx.scaling != 1:
            h.mul_(ctx.scaling)
        h2 = h[:, rank:]
        both = h[:, :rank] + h2
        dx = dA = dB = None
        if mask is not None:
            mask = mask.to(dtype).mul_(1 / (1 - ctx.dropout))
        if ctx.needs_input_grad[1]:
            if mask is None:
                dx = h @ tall
            else:
                dx = (both @ tall[:rank]).mul_(mask).addmm_(h2, tall[rank:], alpha=-1)
            dx = dx.to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[2]:
            dA = (both.T @ (rows if mask is None else rows * mask)).to(ctx.factors)
        if ctx.needs_input_grad[3]:
            dB = (g.T @ inner[:, :rank]).to(ctx.factors)
            if ctx.scaling != 1:
                dB.mul_(ctx.scaling)
        return grad, dx, dA, dB, None, None, None, None, None


def _wide(B: Tensor, minus_B0: Tensor, dtype: torch.dtype) -> Tensor:
    """[B - B0, B0]ᵀ (2r, m), so that what is written to is contiguous, as torch.compile asks."""
    rank = B.shape[1]
    wide = torch.empty(2 * rank, len(B), dtype=dtype, device=B.device)
    torch.add(B.T, minus_B0.T, out=wide[:rank])
    torch.mul(minus_B0.T, -1, out=wide[rank:])
    return wide


def _tall(A: Tensor, A0: Tensor, dtype: torch.dtype) -> Tensor:
    """[A; A - A0] (2r, n)."""
    tall = torch.empty(2 * len(A), A.shape[1], dtype=dtype, device=A.device)
    tall[: len(A)] = A
    torch.sub(A, A0, out=tall[len(A) :])
    return tall
