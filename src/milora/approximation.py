"""A smaller LoRA of an exact one: by rank, by error, by a budget over all weights, in 8 bits.

Of every weight the best approximation of a rank in the Frobenius norm (Eckart and Young) comes from
the factors alone: with B = Q R and Aᵀ = P T it is that of R Tᵀ, of the size of the rank, in fp64.
Which rank each weight has is one number for all, which servers like best, or what is best for all
together (`spread`): one more of a weight costs m + n parameters and gains the square of its next
singular value, and the largest gains per parameter are taken first. Singular values fall, so that
no better choice exists, but for the last few parameters, into which no further rank may fit.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from milora.adapter import Factors
from milora.export import PlainLora, Storage

EIGHT = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa: up to 448, normal from 2^-6


class Decomposed(NamedTuple):
    """B A = U diag(S) Vh of one weight, fp64: U (m, q), S (q,) descending, Vh (q, n)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def at(self, rank: int) -> Factors:
        """The best approximation of that rank, balanced, fp32."""
        root = self.S[:rank].sqrt()
        return Factors((root[:, None] * self.Vh[:rank]).float(), (self.U[:, :rank] * root).float())


def decomposed(plain: PlainLora) -> dict[str, Decomposed]:
    """The singular value decomposition of every update, from its factors."""
    found = {}
    for name, (A, B) in plain.factors.items():
        Q, R = torch.linalg.qr(B.double())  # (m, q), (q, q)
        P, T = torch.linalg.qr(A.double().mT)  # (n, q), (q, q)
        U, S, Vh = torch.linalg.svd(R @ T.mT, full_matrices=False)
        found[name] = Decomposed(Q @ U, S, Vh @ P.mT)
    return found


def best_of_rank(plain: PlainLora, rank: int) -> PlainLora:
    """The best approximation of `rank` of an exact update, with the error it makes."""
    parts = decomposed(plain)
    return at_ranks(plain, parts, dict.fromkeys(parts, rank))


def at_ranks(
    plain: PlainLora, parts: Mapping[str, Decomposed], ranks: Mapping[str, int]
) -> PlainLora:
    """The best approximation of an exact update whose weights have those ranks."""
    factors = {name: part.at(ranks[name]) for name, part in parts.items()}
    lost = {
        name: (float(part.S[ranks[name] :].square().sum()), float(part.S.square().sum()))
        for name, part in parts.items()
    }
    return approximate(factors, lost, plain.in_full)


def approximate(
    factors: dict[str, Factors],
    lost: Mapping[str, tuple[float, float]],
    in_full: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
) -> PlainLora:
    """With its errors: `lost` is, by module, what is missing of ||dW||² and all of it."""
    cut, total = (sum(pair[i] for pair in lost.values()) for i in (0, 1))
    errors = {name: _ratio(*pair) for name, pair in lost.items()}
    return PlainLora(factors, _ratio(cut, total), errors, in_full)


def rank_within(parts: Mapping[str, Decomposed], error: float) -> int:
    """The least rank for all weights with ||dW - BA|| <= error ||dW||, over all together."""
    longest = max(len(part.S) for part in parts.values())
    squared = torch.zeros(longest, dtype=torch.float64)
    for part in parts.values():
        squared[: len(part.S)] += part.S.square().cpu()
    left = squared.flip(0).cumsum(0).flip(0)  # what a rank of 0, 1, ... leaves out
    return max(1, int((left > error**2 * left[0]).sum()))


def spread(
    parts: Mapping[str, Decomposed], rank: int | None = None, error: float | None = None
) -> dict[str, int]:
    """Ranks by weight, at least 1 each: as many parameters as `rank` for all would take, or as few
    as keep within `error`.
    """
    costs = {name: part.U.shape[0] + part.Vh.shape[1] for name, part in parts.items()}
    ranks = dict.fromkeys(parts, 1)
    left = sum(costs.values()) * ((rank or 0) - 1)
    lost = sum(float(part.S[1:].square().sum()) for part in parts.values())
    whole = sum(float(part.S.square().sum()) for part in parts.values())
    gains = [
        (gain / costs[name], -place, name, gain)
        for name, part in parts.items()
        for place, gain in enumerate(part.S[1:].square().tolist())
    ]
    full = set[str]()
    for _, _, name, gain in sorted(gains, reverse=True):
        if error is not None and lost <= error**2 * whole:
            break
        if error is None and (name in full or gain == 0 or costs[name] > left):
            full.add(name)  # the next of this weight costs as much
            continue
        ranks[name] += 1
        left, lost = left - costs[name], lost - gain
    return ranks


def in_8_bits(
    exact: PlainLora, parts: Mapping[str, Decomposed], ranks: Mapping[str, int]
) -> tuple[PlainLora, Storage]:
    """The best approximation of those ranks with factors rounded to 8-bit floats, and how to store
    them. The error is that against `exact`, the cut included.

    The factors are the balanced ones: those that were trained are differences of large numbers, of
    which such rounding would leave nothing. Every row of A and column of B is first brought into
    the range of the format by a power of two, the same for all products, which is the scale of the
    LoRA: what loads is exactly what is stated.
    """
    cut = at_ranks(exact, parts, ranks)
    top = max(float((_largest(A, 1) * _largest(B, 0)).max()) for A, B in cut.factors.values())
    # The largest row and column near 2^4: far from 448, and 2^10 above what is not normal.
    power = math.floor(math.log2(top)) - 8 if top > 1e-50 else 0
    factors, lost, scale = {}, {}, 2.0**power
    for name, (A, B) in cut.factors.items():
        apart = torch.log2(_largest(B, 0)) - torch.log2(_largest(A, 1)) - power
        own = torch.round(apart / 2)
        A8 = torch.ldexp(A, own[:, None]).to(EIGHT).float()
        B8 = torch.ldexp(B, -power - own).to(EIGHT).float()
        factors[name] = Factors(A8, B8)
        part = parts[name]
        left = _size(torch.cat([part.Vh, A8]), torch.cat([part.U * part.S, -scale * B8], dim=1))
        lost[name] = left, float(part.S.square().sum())
    return approximate(factors, lost, exact.in_full), Storage(EIGHT, scale)


def full_ranks(parts: Mapping[str, Decomposed]) -> dict[str, int]:
    return {name: len(part.S) for name, part in parts.items()}


def norm(plain: PlainLora) -> float:
    """||dW|| over all modules, Frobenius."""
    return math.sqrt(sum(_size(A, B) for A, B in plain.factors.values()))


def _size(A: Tensor, B: Tensor) -> float:
    """||B A||²."""
    A, B = A.double(), B.double()
    found = float(((B.T @ B) * (A @ A.T)).sum())
    return 0.0 if found < 0 else found  # which lets a NaN pass


def _ratio(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole else 0.0


def _largest(factor: Tensor, dim: int) -> Tensor:
    """Largest entry of each row or column, fp64; of one of zeros next to nothing."""
    return factor.double().abs().amax(dim).clamp_min(1e-30)
