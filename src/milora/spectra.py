"""Where an update acts in the spectrum of its weight, from the factors alone. torch only.

With P (m, q) and Q (q, n) the update is dW = P Q, never formed. Its norm and its share in a
subspace come from products of size q: ||P Q||² = <PᵀP, Q Qᵀ>, in fp64, so that B A - B0 A0 may
cancel to a thousandth of either and the result still has eight digits.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Interference(NamedTuple):
    """Of one weight. Shares are of ||dW||² (Frobenius) and lie in [0, 1]; 0 for no update."""

    left: float  # within the top-k left singular vectors: ||U_kᵀ dW||² / ||dW||²
    right: float  # within the top-k right ones: ||dW V_k||² / ||dW||²
    minor: float | None  # from and into the minor subspace: ||U_mᵀ dW V_m||² / ||dW||²
    size: float  # ||dW|| / ||W||; 0 for a weight of zeros, which has no scale


def interference(
    P: Tensor, Q: Tensor, U: Tensor, Vh: Tensor, norm: float, minor: tuple[Tensor, Tensor] | None
) -> Interference:
    """How much of dW = P Q acts in the subspace of U (m, k), Vh (k, n), which are orthonormal.

    P (m, q), Q (q, n), any floating dtype; `norm` is ||W||, Frobenius; `minor` is such a U, Vh of
    the minor subspace. The measure is rho_k of OPLoRA (arXiv 2510.13003), on both sides.
    """
    P, Q, U, Vh = P.double(), Q.double(), U.double(), Vh.double()
    of_P, of_Q = P.T @ P, Q @ Q.T  # (q, q)
    total = float((of_P * of_Q).sum())
    # What rounding leaves of two products that cancel is no update.
    if total <= 1e-28 * float(of_P.trace() * of_Q.trace()):
        return Interference(0.0, 0.0, None if minor is None else 0.0, 0.0)
    X, Y = U.T @ P, Q @ Vh.T  # (k, q), (q, k)
    left = float(((X.T @ X) * of_Q).sum()) / total
    right = float((of_P * (Y @ Y.T)).sum()) / total
    inside = None
    if minor is not None:
        X, Y = minor[0].double().T @ P, Q @ minor[1].double().T
        inside = _share(float(((X.T @ X) * (Y @ Y.T)).sum()) / total)
    return Interference(_share(left), _share(right), inside, total**0.5 / norm if norm else 0.0)


def span(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """U (m, k) and Vh (k, n), orthonormal, fp64: all that B A (m, n) reads and writes.

    The k singular vectors of B A whose value is above 1e-6 of the largest, which fp32 factors have;
    none of products that cancel, such as [B0, -B0] [A0; A0].
    """
    Q, R = torch.linalg.qr(B.double())
    P, T = torch.linalg.qr(A.double().mT)
    U, S, Vh = torch.linalg.svd(R @ T.mT)
    nothing = 1e-12 * float(torch.linalg.norm(T) * torch.linalg.norm(R))
    k = int((max(1e-6 * float(S[0]), nothing) < S).sum())
    return Q @ U[:, :k], Vh[:k] @ P.mT


def apart(weight: Tensor, U: Tensor, Vh: Tensor) -> Tensor:
    """(m, n) fp64 with the components of `weight` outside of U (m, k) and Vh (k, n), and those two
    as its largest: whatever is small in it lies outside of both.
    """
    W, U, Vh = weight.double(), U.to(weight.device).double(), Vh.to(weight.device).double()
    W = W - U @ (U.mT @ W)
    W = W - (W @ Vh.mT) @ Vh
    shifted: Tensor = W + 2 * torch.linalg.norm(W) * (U @ Vh)
    return shifted


def _share(value: float) -> float:
    return value if math.isnan(value) else min(1.0, max(0.0, value))


def directions(factors_A: Tensor, factors_B: Tensor) -> tuple[Tensor, Tensor]:
    """U (m, r) and Vh (r, n), fp64, of initial factors B0 = U √(S/s), A0 = √(S/s) Vᵀ.

    Where the rows of A0 are not orthogonal, as for a weight of several parts, Vh has their span.
    """
    tiny = torch.finfo(torch.float64).tiny
    U, Vh = factors_B.double(), factors_A.double()
    U, Vh = U / U.norm(dim=0).clamp_min(tiny), Vh / Vh.norm(dim=1, keepdim=True).clamp_min(tiny)
    overlap = Vh @ Vh.T - torch.eye(len(Vh), dtype=Vh.dtype, device=Vh.device)
    return U, torch.linalg.qr(Vh.T).Q.T if overlap.abs().max() > 1e-4 else Vh


class Spectrum(NamedTuple):
    """What the singular values of a weight say of it, at rank r."""

    norm: float  # Frobenius
    largest: float
    smallest: float
    effective_rank: float  # exp of the entropy of S / sum S (Roy and Vetterli, 2007)
    stable_rank: float  # ||W||² / s_1²
    minor_norm: float  # norm of the r smallest components / ||W||
    gap: float  # s_(n-r) / s_(n-r+1): how sharply the r smallest are set off; 1 is not at all
    edge: str  # "hard": the minor part is next to nothing; "soft": a real part of the weight
    rounding: float  # what storing W in bf16 changes / the norm of the r smallest components


HARD = 0.01  # of ||W||, below which the minor part counts as next to nothing


def spectrum(weight: Tensor, S: Tensor, rank: int) -> Spectrum:
    """Measures of `weight` (m, n) from its singular values S, descending, at `rank`."""
    S = S.double()
    energy = S.square()
    norm, minor = float(energy.sum().sqrt()), float(energy[-rank:].sum().sqrt())
    p = S / S.sum() if norm else S
    entropy = -float(torch.special.xlogy(p, p).sum())
    share = minor / norm if norm else 0.0
    above = float(S[-rank - 1]) if rank < len(S) else float(S[-rank])
    return Spectrum(
        norm=norm,
        largest=float(S[0]),
        smallest=float(S[-1]),
        effective_rank=torch.tensor(entropy).exp().item() if norm else 0.0,
        stable_rank=float(energy.sum() / energy[0]) if norm else 0.0,
        minor_norm=share,
        gap=above / float(S[-rank]) if S[-rank] > 0 else float("inf"),
        edge="hard" if share < HARD else "soft",
        rounding=_rounding(weight) / minor if minor else float("inf"),
    )


def _rounding(weight: Tensor) -> float:
    """Norm of the error when values of these sizes are rounded to bf16 (uniform within a step)."""
    _, exponent = torch.frexp(weight.float().abs())
    step = torch.ldexp(torch.ones_like(weight, dtype=torch.float32), exponent - 8)
    step = torch.where(weight == 0, 0.0, step).double()
    return float(step.norm()) / 12**0.5


def rank_within(S: Tensor, share: float) -> int:
    """The largest r whose r smallest components hold at most `share` of ||W||²; S descending."""
    energy = S.double().square().flip(0).cumsum(0)
    return int((energy <= share * energy[-1]).sum())


def top_holding(S: Tensor, share: float) -> int:
    """The least k whose k largest components hold at least `share` of ||W||²; S descending."""
    energy = S.double().square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1


def thinned(S: Tensor, points: int = 48) -> list[list[float]]:
    """[place, value] of at most `points` singular values, the ends close together."""
    last = len(S) - 1
    half = torch.logspace(0, torch.tensor(max(last, 2) / 2).log10().item(), points // 2)
    places = sorted({0, last, *(int(x) - 1 for x in half), *(last - int(x) + 1 for x in half)})
    return [[place, float(f"{float(S[place]):.4g}")] for place in places if 0 <= place <= last]
