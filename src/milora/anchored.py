"""W x + s (B A x - B0 A0 x) from W x: the forward and backward of an anchored layer. torch only.

As two LoRA layers this reads x twice and the output three times, and keeps what the frozen half
needs no gradient for. Here it is one product with each of two stacked factors,

    B A - B0 A0  =  (B - B0) A + B0 (A - A0)  =  [B - B0, B0] [A; A - A0]

Of the ways to stack, this one is exact at step 0 whatever the order in which a product is summed:
both differences are zeros. [B, -B0] [A; A0] would cancel only to rounding, and goes on losing what
B A and B0 A0 have in common as A and B move away.

With h = s g [B - B0, B0] for the gradient g of the output, and h1, h2 its halves:

    dx = h [A; A - A0]        dA = (h1 + h2)ᵀ x        dB = s gᵀ (A x)

so that x, in its own dtype, and A x (t, r) are all that is kept. Dropout is on the trained half,
B A D x - B0 A0 x = [B - B0, B0] [A D x; A D x - A0 x]; of D the mask is kept, a byte per entry.
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
        with torch.autocast(x.device.type, enabled=False):
            rows, mask = x.reshape(-1, x.shape[-1]).to(dtype), None
            wide = _wide(B, minus_B0, scaling, dtype)
            if dropout:
                rows0 = rows
                rows, mask = torch.native_dropout(rows, dropout, True)
                kept = rows @ A.to(dtype).T
                inner = torch.cat((kept, kept - rows0 @ A0.to(dtype).T), 1)
            else:
                inner = rows @ _tall(A, A0, dtype).T
                kept = inner[:, : len(A)].contiguous()
            flat = result.reshape(-1, result.shape[-1])
            # No view, since a model may write into what a layer gave (Falcon does).
            out = torch.empty(result.shape, dtype=result.dtype, device=result.device)
            if flat.dtype == dtype:
                torch.addmm(flat, inner, wide.T, out=out.view(flat.shape))
            else:
                torch.add(flat, inner @ wide.T, out=out.view(flat.shape))
        ctx.save_for_backward(x, kept, mask, A, B, A0, minus_B0)
        ctx.scaling, ctx.dropout, ctx.dtype = scaling, dropout, dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, kept, mask, A, B, A0, minus_B0 = ctx.saved_tensors
        dtype = ctx.dtype
        g = grad.reshape(-1, grad.shape[-1]).to(dtype)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        h = g @ _wide(B, minus_B0, ctx.scaling, dtype)
        h2 = h[:, len(A) :]
        both = h[:, : len(A)] + h2
        dx = dA = dB = None
        if mask is not None:
            mask = mask.to(dtype).mul_(1 / (1 - ctx.dropout))
        if ctx.needs_input_grad[1]:
            if mask is None:
                dx = h @ _tall(A, A0, dtype)
            else:
                dx = (both @ A.to(dtype)).mul_(mask).addmm_(h2, A0.to(dtype), alpha=-1)
            dx = dx.to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[2]:
            dA = (both.T @ (rows if mask is None else rows * mask)).to(A.dtype)
        if ctx.needs_input_grad[3]:
            dB = (g.T @ kept).to(B.dtype).mul_(ctx.scaling)
        return grad, dx, dA, dB, None, None, None, None, None


def _wide(B: Tensor, minus_B0: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """s [B - B0, B0] (m, 2r)."""
    return torch.cat((B + minus_B0, -minus_B0), 1).mul_(scaling).to(dtype)


def _tall(A: Tensor, A0: Tensor, dtype: torch.dtype) -> Tensor:
    """[A; A - A0] (2r, n)."""
    return torch.cat((A, A - A0)).to(dtype)
