"""Where an update acts in the spectrum of its weight, from the factors alone. torch only.

With P (m, q) and Q (q, n) the update is dW = P Q, never formed. Its norm and its share in a
subspace come from products of size q: ||P Q||² = <PᵀP, Q Qᵀ>, in fp64, so that B A - B0 A0 may
cancel to a thousandth of either and the result still has eight digits.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Interference(NamedTuple):
    """Of one weight. Shares are of ||dW||² (Frobenius) and lie in [0, 1]; 0 for no update."""

    left: float  # within the top-k left singular vectors: ||U_kᵀ dW||² / ||dW||²
    right: float  # within the top-k right ones: ||dW V_k||² / ||dW||²
    minor: float | None  # from and into the minor subspace: ||U_mᵀ dW V_m||² / ||dW||²
    size: float  # ||dW|| / ||W||


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
    return Interference(_share(left), _share(right), inside, total**0.5 / norm)


def _share(value: float) -> float:
    return min(1.0, max(0.0, value))


def directions(factors_A: Tensor, factors_B: Tensor) -> tuple[Tensor, Tensor]:
    """U (m, r) and Vh (r, n), fp64, of initial factors B0 = U √(S/s), A0 = √(S/s) Vᵀ."""
    tiny = torch.finfo(torch.float64).tiny
    U, Vh = factors_B.double(), factors_A.double()
    return U / U.norm(dim=0).clamp_min(tiny), Vh / Vh.norm(dim=1, keepdim=True).clamp_min(tiny)
