"""Singular components of one weight matrix: the linear algebra of the method. torch only.

W = U S Vᵀ with S descending. MiLoRA (Wang et al., NAACL 2025, arXiv 2406.09044, section 3) starts
the adapter from the r smallest components, PiSSA (Meng et al., 2024) from the r largest. Every
choice of r components is returned in the same form, so that the adapter need not know which it is.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Component = Literal["minor", "principal", "middle", "random"]


class Components(NamedTuple):
    """r singular triplets of W (m, n), S descending, all fp64 on the device of W."""

    U: Tensor  # (m, r) orthonormal columns
    S: Tensor  # (r,)
    Vh: Tensor  # (r, n) orthonormal rows
    norm: float  # the largest singular value of W

    @property
    def zero(self) -> Tensor:
        """(r,) bool: singular values that are zero to working precision (fp64, NumPy's rule)."""
        size = max(self.U.shape[0], self.Vh.shape[1])
        return size * torch.finfo(torch.float64).eps * self.norm >= self.S


def minor_components(weight: Tensor, rank: int) -> Components:
    """The `rank` smallest singular triplets of `weight` (m, n).

    Equivalent to the last `rank` triplets of `torch.linalg.svd(weight.double())`. The weight may
    have any floating dtype; it is lifted to fp64 first, since the minor subspace is
    ill-conditioned: in bf16 its vectors move by as much as 0.1.

    Raises ValueError when the weight is no matrix, has a NaN or infinite entry, or has fewer than
    `rank` singular values.
    """
    return components(weight, rank, "minor")


def components(weight: Tensor, rank: int, component: Component, seed: int = 0) -> Components:
    """`rank` singular triplets of `weight` (m, n), chosen by `component`.

    "minor" the smallest (MiLoRA), "principal" the largest (PiSSA), "middle" those centred in the
    spectrum, "random" drawn without replacement from all of them by `seed` (paper, Table 6).
    Raises ValueError as `minor_components` does.
    """
    if component not in get_args(Component):
        raise ValueError(f"component {component!r}: use one of {', '.join(get_args(Component))}")
    if weight.ndim != 2:
        raise ValueError(f"a matrix is needed, not a tensor of shape {tuple(weight.shape)}")
    count = min(weight.shape)
    if not 1 <= rank <= count:
        raise ValueError(
            f"rank {rank} does not fit a {weight.shape[0]} x {weight.shape[1]} weight: "
            f"choose 1 to {count}"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinite entries")
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        U, S, Vh = _full_svd(weight.double())
    picked: slice | Tensor
    if component == "minor":
        picked = slice(count - rank, count)
    elif component == "principal":
        picked = slice(0, rank)
    elif component == "middle":
        first = (count - rank) // 2
        picked = slice(first, first + rank)
    else:
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randperm(count, generator=generator)[:rank].sort().values.to(S.device)
    norm = float(S[0])
    U, S, Vh = U[:, picked], S[picked], Vh[picked]
    # Singular vectors have no sign of their own; fixing it makes the factors reproducible.
    largest = Vh.abs().argmax(dim=1, keepdim=True)
    sign = torch.where(Vh.gather(1, largest) < 0, -1.0, 1.0).to(Vh)  # (r, 1)
    return Components(U * sign.mT, S.clamp_min(0), Vh * sign, norm)


def _full_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # LAPACK's divide and conquer can fail to converge on one orientation and not on the other.
    try:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return U, S, Vh
    except RuntimeError:  # torch.linalg.LinAlgError is one
        V, S, Uh = torch.linalg.svd(weight.mT.contiguous(), full_matrices=False)
        return Uh.mT, S, V.mT
