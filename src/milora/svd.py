"""Singular components of one weight matrix: the linear algebra of the method. torch only.

W = U S Vᵀ with S descending. MiLoRA (Wang et al., NAACL 2025, arXiv 2406.09044, section 3) starts
the adapter from the r smallest components, PiSSA (Meng et al., 2024) from the r largest. Every
choice of r components is returned in the same form, so that the adapter need not know which it is.

A full SVD computes n triplets where r are wanted. The routes to just those, by shape (with A the
weight or its transpose, m >= n, in fp64):

    square        LU of A; block Krylov on (AᵀA)⁻¹ = A⁻¹A⁻ᵀ, which never squares the condition
    rectangular   G = AᵀA in fp32; Cholesky of G - shift, which succeeds only below the smallest
                  eigenvalue; block Krylov on its inverse; corrections against A itself in fp64
    any other     (r above n/16, square n/6; n below 512) all eigenvectors of AᵀA, in fp32 and
                  corrected, or in fp64
    the largest   block Krylov on AᵀA

Each ends in a Rayleigh-Ritz step on A in fp64 and is judged by its residual; what does not reach
the tolerance is done again by the next slower route, in the end by a full fp64 SVD. Measured in
docs/decomposition.md.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Component = Literal["minor", "principal", "middle", "random"]
Operator = Callable[[Tensor], Tensor]  # symmetric (n, n), applied to rows: (k, n) -> (k, n)

SOLVER = "1"  # raised when a weight may come out otherwise; part of a stored result's name
TOLERANCE = 1e-6  # of the residual; an fp32 SVD has 2e-7 to 9e-7
EPS = torch.finfo(torch.float64).eps
SMALL = 128  # up to here a full SVD is as fast as anything


class Components(NamedTuple):
    """r singular triplets of W (m, n), S descending, all fp64 on the device of W."""

    U: Tensor  # (m, r) orthonormal columns
    S: Tensor  # (r,)
    Vh: Tensor  # (r, n) orthonormal rows
    norm: float  # the largest singular value of W; from below, to 10 %, by the Krylov routes
    residual: float  # max(|W V - U S|, |Wᵀ U - V S|) / norm, in the spectral norm or above it
    solver: str  # the route that found them

    @property
    def zero(self) -> Tensor:
        """(r,) bool: singular values that are zero to working precision (fp64, NumPy's rule)."""
        size = max(self.U.shape[0], self.Vh.shape[1])
        return size * EPS * self.norm >= self.S


# Weight, rank, component and seed -> the components: `components` below, or a store of them.
Decompose = Callable[[Tensor, int, Component, int], Components]


def minor_components(weight: Tensor, rank: int, tol: float = TOLERANCE) -> Components:
    """The `rank` smallest singular triplets of `weight` (m, n), to a residual of `tol`.

    The weight may have any floating dtype; it is lifted to fp64 first, since the minor subspace
    is ill-conditioned: in bf16 its vectors move by as much as 0.1. U and V are orthonormal to fp64
    rounding whatever `tol` is, and |S| is the least possible to 1e-6 of it, unless many values lie
    within the residual of the largest one found. The same machine and thread count give the same
    bits. Products are computed in full fp32 or fp64 whatever the process has set; that setting is
    the process's, so that no other thread should change it meanwhile.

    Raises ValueError when the weight is no matrix, has a NaN or infinite entry, or has fewer than
    `rank` singular values.
    """
    return components(weight, rank, "minor", tol=tol)


def components(
    weight: Tensor, rank: int, component: Component, seed: int = 0, tol: float = TOLERANCE
) -> Components:
    """`rank` singular triplets of `weight` (m, n), chosen by `component`.

    "minor" the smallest (MiLoRA), "principal" the largest (PiSSA), "middle" those centred in the
    spectrum, "random" drawn without replacement from all of them by `seed` (paper, Table 6).
    Raises ValueError as `minor_components` does.
    """
    if weight.ndim != 2:
        raise ValueError(f"a matrix is needed, not a tensor of shape {tuple(weight.shape)}")
    m, n = weight.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank {rank} does not fit a {m} x {n} weight: choose 1 to {min(m, n)}")
    wanted = positions(component, min(m, n), rank, seed)
    with torch.no_grad(), plain_arithmetic(weight.device):
        A = (weight if m >= n else weight.T).to(torch.float64, copy=True)
        largest = float(A.abs().max())
        if not math.isfinite(largest):
            raise ValueError("the weight holds NaN or infinite entries")
        # A power of two, so that nothing is rounded; squares of 1e30 or 1e-30 would not fit fp32.
        scale = 2.0 ** math.floor(math.log2(largest)) if largest else 1.0
        A.div_(scale)
        found = _first_good(A, wanted, component, tol) if largest else _full_svd(A, wanted)
        U, S, Vh = found.U, found.S.clamp_min(0) * scale, found.Vh
        S, order = S.sort(descending=True, stable=True)
        U, Vh = U[:, order], Vh[order]
        if m < n:
            U, Vh = Vh.T, U.T
        # Singular vectors have no sign of their own; fixing it makes the factors reproducible.
        largest_entry = Vh.abs().argmax(dim=1, keepdim=True)
        sign = torch.where(Vh.gather(1, largest_entry) < 0, -1.0, 1.0).to(Vh)  # (r, 1)
    return found._replace(U=U * sign.T, S=S, Vh=Vh * sign, norm=found.norm * scale)


def positions(component: Component, count: int, rank: int, seed: int = 0) -> Tensor:
    """(rank,) ascending: which of `count` singular values in descending order `component` means.

    Those of a smaller rank are among those of a larger one.
    """
    if component == "minor":
        return torch.arange(count - rank, count, device="cpu")
    if component == "principal":
        return torch.arange(rank, device="cpu")
    if component == "middle":
        first = (count - rank) // 2
        return torch.arange(first, first + rank, device="cpu")
    if component == "random":
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randperm(count, generator=generator, device="cpu")[:rank]
        return drawn.sort().values
    raise ValueError(f"component {component!r}: use one of {', '.join(get_args(Component))}")


def _first_good(A: Tensor, wanted: Tensor, component: Component, tol: float) -> Components:
    """From the fastest route on, the first result whose residual is at most `tol`."""
    (m, n), rank = A.shape, len(wanted)
    routes: list[Callable[[], Components | None]] = []
    if component == "minor" and m == n and n > SMALL and 6 * rank <= n:
        routes.append(lambda: _inverse_krylov(A, rank, tol))
    if component == "minor" and m > n and n >= 512 and 16 * rank <= n:
        routes.append(lambda: _shifted_gram(A, rank, tol, torch.float32))
        routes.append(lambda: _shifted_gram(A, rank, tol, torch.float64))
    if component == "principal" and n >= 512 and 8 * rank <= n:
        routes.append(lambda: _krylov(A, rank, tol))
    if n >= 512:
        routes.append(lambda: _all_eigenvectors(A, wanted, torch.float32))
    if n > SMALL:
        routes.append(lambda: _all_eigenvectors(A, wanted, torch.float64))
    for route in routes:
        try:
            found = route()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # LAPACK did not converge
            continue
        if found is None:
            continue
        cut = found.S.max() if component == "minor" else found.S.min()
        if _good(found, tol, float(cut)):
            return found
    return _full_svd(A, wanted)


def _good(found: Components, tol: float, cut: float) -> bool:
    # What errs by the residual must be small beside the value at the cut too, or values far below
    # the norm would be met within `tol` by anything.
    return found.residual <= min(tol, 1e-4 * cut / found.norm)


# --- the routes; A (m, n) fp64 with m >= n and entries of at most about 1


def _inverse_krylov(A: Tensor, rank: int, tol: float) -> Components | None:
    """Block inverse Krylov through an LU of square A. None when A is singular or it stalls."""
    n = len(A)
    norm = math.sqrt(_largest(lambda X: (X @ A.T) @ A, A))
    LU, pivots, failed = torch.linalg.lu_factor_ex(A.T)  # column-major, as LAPACK wants it
    if failed or LU.diagonal().abs().min() <= n * EPS * norm:
        return None

    def inverse(X: Tensor) -> Tensor:
        half: Tensor = torch.linalg.lu_solve(LU, pivots, X.T)  # A⁻ᵀ
        whole: Tensor = torch.linalg.lu_solve(LU, pivots, half, adjoint=True)
        return whole.T

    candidates: Iterator[Tensor]
    from_eigenvectors = 12 * rank > n
    if not from_eigenvectors:
        # With as many rows as are wanted a repeated singular value is found in all its copies.
        start = inverse(_start(max(rank, 8), A))
        candidates = _ritz_rows(inverse, start, (5, 7, 9, 12), rank + 8)
    else:
        vectors = torch.linalg.eigh(_gram(A, torch.float32)).eigenvectors
        candidates = iter([inverse(vectors.T[: rank + rank // 4 + 16].double())])
    before = math.inf
    for V in candidates:
        # A last step of the iteration takes out what is left of the largest components, which
        # S⁻¹ would blow up in U = A V / S.
        found, _ = _rayleigh_ritz(A, inverse(V), norm, slice(-rank, None), "inverse Krylov")
        if _good(found, tol, float(found.S[0])) or found.residual > before / 3:
            return None if from_eigenvectors and _missed(A, found, inverse) else found
        before = found.residual
    return None


def _shifted_gram(A: Tensor, rank: int, tol: float, dtype: torch.dtype) -> Components | None:
    """Block Krylov on (AᵀA - shift)⁻¹ with AᵀA in `dtype`, and corrections on A in fp64.

    fp32 loses 6e-8 |A|² in the eigenvalues, so that it serves condition numbers up to 100.
    """
    G = _symmetric(_gram(A, dtype))
    norm = math.sqrt(_largest(lambda X: X @ G, G))
    L, failed = torch.linalg.cholesky_ex(G)
    if failed:
        return None
    block = max(-(-rank // 2), 8)
    (nearest,) = _ritz_rows(_cholesky_solve(L), _start(block, G), (6,), 2 * block)
    low = ((nearest @ G) * nearest).sum(1).sort().values
    smallest, spread = float(low[0]), float(low[rank - 1] - low[0])
    if smallest <= (1e-4 if dtype == torch.float32 else 1e-13) * norm**2:
        return None
    # Below the smallest eigenvalue, which Cholesky certifies, and close to it.
    distance = max(0.05 * spread, 1e-3 * smallest)
    failed = True
    while failed and distance < smallest:
        shifted = G.clone()
        shifted.diagonal().sub_(smallest - distance)
        L_shifted, failed = torch.linalg.cholesky_ex(shifted)
        distance *= 2
    inverse = _cholesky_solve(L if failed else L_shifted)
    start, before = nearest[:block] + nearest[block:], math.inf
    for V in _ritz_rows(inverse, start, (12, 14, 16, 18, 21, 24), rank + 8):
        GV = V[:rank] @ G
        low = (GV * V[:rank]).sum(1, keepdim=True)
        residual = float(_norm((GV - low * V[:rank]) / low.clamp_min(0).sqrt())) / norm
        if residual <= tol / 2 or (residual < 1e-4 and residual > before / 2):  # rounding of G
            break
        before = residual
    smallest_of = slice(-rank, None)
    solver = f"shifted Gram, {str(dtype).removeprefix('torch.')}"
    found, miss = _rayleigh_ritz(A, V.double(), norm, smallest_of, solver)
    for _ in range(3):  # Davidson's correction, the miss preconditioned
        if _good(found, tol, float(found.S[0])) or not found.residual < 1e-2:
            break
        correction = inverse((found.S[:, None] * miss).to(dtype)).double()
        V = torch.cat([found.Vh, correction / correction.norm()])
        found, miss = _rayleigh_ritz(A, V, norm, smallest_of, solver)
    return None if _missed(A, found, lambda X: inverse(X.to(dtype)).double()) else found


def _missed(A: Tensor, found: Components, inverse: Operator) -> bool:
    """Whether a singular value well below the largest in `found` was passed over.

    Inverse iteration on other random rows, kept orthogonal to `found`, would turn to it.
    """
    X = _start(4, A, seed=1)
    for _ in range(3):
        X = inverse(_orthonormal(X - (X @ found.Vh.T) @ found.Vh))
    X = _orthonormal(X - (X @ found.Vh.T) @ found.Vh)
    return bool(torch.linalg.svdvals(X @ A.T)[-1] < (1 - 1e-3) * found.S[0])


def _krylov(A: Tensor, rank: int, tol: float) -> Components | None:
    """The largest triplets by block Krylov on AᵀA. None when it stalls."""
    before = math.inf
    start = _start(max(rank, 8), A)
    for V in _ritz_rows(lambda X: (X @ A.T) @ A, start, (4, 6, 8, 11, 14), rank + 8):
        found, _ = _rayleigh_ritz(A, V, None, slice(0, rank), "Krylov")
        if _good(found, tol, float(found.S[-1])) or found.residual > before / 3:
            return found
        before = found.residual
    return None


def _all_eigenvectors(A: Tensor, wanted: Tensor, dtype: torch.dtype) -> Components | None:
    """Triplets at `wanted` from all eigenvectors of AᵀA, found in `dtype`.

    None where the squaring has taken the digits that a wanted singular value needs.
    """
    G = _gram(A, torch.float64)
    values, vectors = torch.linalg.eigh(G.to(dtype))
    norm = math.sqrt(float(values[-1]))
    chosen = torch.zeros(len(G), dtype=torch.bool, device=A.device)
    chosen[len(G) - 1 - wanted.to(A.device)] = True
    V, rest = vectors.T[chosen].double(), vectors.T[~chosen].double()
    if dtype == torch.float32:
        if values[chosen].max() <= 1e-4 * norm**2:
            return None
        # What V has of the other eigenvectors is 6e-8 norm² / gap; a step of Newton's method on
        # its span squares that (Ogita and Aishima 2018). Equal values may stay mixed.
        GV = V @ _symmetric(G)
        own = (GV * V).sum(1, keepdim=True) / (V * V).sum(1, keepdim=True)
        gap = own - values[~chosen].double()
        correction = ((GV - own * V) @ rest.T / gap).masked_fill(gap.abs() <= 1e-6 * norm**2, 0.0)
        V = _orthonormal(V + correction @ rest)
        AV = V @ A.T
        Z = torch.linalg.eigh(AV @ AV.T).eigenvectors.T
        V, AV = Z @ V, Z @ AV
    else:
        AV = V @ A.T
    S = AV.norm(dim=1)
    if S.min() <= 3e-7 * norm:
        return None
    solver = f"all eigenvectors, {str(dtype).removeprefix('torch.')}"
    U = (AV / S[:, None]).T
    overlap = U.T @ U
    skew = float((overlap - torch.eye(len(S), dtype=U.dtype, device=U.device)).norm())
    if not skew < 1e-6:
        return _rayleigh_ritz(A, V, norm, slice(None), solver)[0]
    if skew > 5e-13:
        U = 1.5 * U - 0.5 * (U @ overlap)  # one Newton-Schulz step: orthonormal to skew²
    miss = torch.stack([(U.T @ A - S[:, None] * V).norm(), (AV.T - U * S).norm()]).max()
    return Components(U, S, V, norm, float(miss) / norm, solver)


def _full_svd(A: Tensor, wanted: Tensor) -> Components:
    """Triplets at `wanted` from a full fp64 SVD."""
    driver = "gesvd" if A.is_cuda else None  # CUDA's default, gesvdj, fails on large weights
    try:
        U, S, Vh = torch.linalg.svd(A, full_matrices=False, driver=driver)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # LAPACK's divide and conquer can fail to converge on one form and not on the other.
        Q, R = torch.linalg.qr(A)
        V, S, Uh = torch.linalg.svd(R.T.contiguous(), driver=driver)
        U, Vh = Q @ Uh.T, V.T
    norm, wanted = float(S[0]), wanted.to(A.device)
    U, S, Vh = U[:, wanted], S[wanted], Vh[wanted]
    miss = torch.stack([_norm(A @ Vh.T - U * S), _norm(U.T @ A - S[:, None] * Vh)]).max()
    return Components(U, S, Vh, norm, float(miss) / norm if norm else 0.0, "full SVD")


# --- their parts; vectors are rows, which LAPACK takes as columns without copying


def _ritz_rows(
    operator: Operator, start: Tensor, looks: Sequence[int], keep: int
) -> Iterator[Tensor]:
    """Block Krylov space of `operator` from `start` (b, n), each block made orthogonal to all.

    Yields the Ritz vectors (keep, n) of the largest Ritz values, largest first, each time the
    space has grown to as many blocks as `looks` says and n allows.
    """
    b, n = start.shape
    looks = [look for look in looks if look * b <= n]
    top = looks[-1] * b
    basis = start.new_empty(top, n)
    H = start.new_zeros(top, top)  # the operator within the space, its lower triangle
    basis[:b], size = _orthonormal(start), 0
    for look in looks:
        while size < look * b:
            known = basis[: size + b]
            X = operator(known[size:])
            H[size : size + b, : size + b] = inside = X @ known.T
            size += b
            if size < top:
                X = _orthonormal(X - inside @ known)
                # Again, since little may have been left of X but rounding.
                basis[size : size + b] = _orthonormal(X - (X @ known.T) @ known)
        Z = torch.linalg.eigh(H[:size, :size]).eigenvectors
        yield Z.T[-keep:].flip(0) @ basis[:size]


def _rayleigh_ritz(
    A: Tensor, V: Tensor, norm: float | None, pick: slice, solver: str
) -> tuple[Components, Tensor]:
    """The triplets of A within the span of the rows of V that `pick` takes (of descending S).

    A V = U S holds to rounding whatever V is; what V misses is all in the second value,
    Uᵀ A - S Vᵀ (r, n). `norm` None: the largest singular value found.
    """
    V = _orthonormal(V)
    AV = (V @ A.T).T
    Q, R = torch.linalg.qr(AV)
    P, S, Z = torch.linalg.svd(R)
    norm = float(S[0]) if norm is None else norm
    U, S, Z = Q @ P[:, pick], S[pick], Z[pick]
    Vh = Z @ V
    miss = U.T @ A - S[:, None] * Vh
    residual = float(torch.stack([_norm(miss), _norm(AV @ Z.T - U * S)]).max()) / norm
    return Components(U, S, Vh, norm, residual, solver), miss


def _gram(A: Tensor, dtype: torch.dtype) -> Tensor:
    """AᵀA (n, n) in `dtype`, right only in its lower triangle, which is half of the work."""
    n = A.shape[1]
    G = A.new_zeros(n, n, dtype=dtype)
    width = max(-(-n // 16), 256)
    for part in A.split(2048):
        part = part.to(dtype)
        for j in range(0, n, width):
            G[j:, j : j + width].addmm_(part[:, j:].T, part[:, j : j + width])
    return G


def _symmetric(G: Tensor) -> Tensor:
    """G with its lower triangle mirrored into the upper."""
    G = G.tril()
    return G + G.tril(-1).T


def _largest(operator: Operator, like: Tensor) -> float:
    """The largest eigenvalue of a positive semidefinite operator on rows, from below."""
    (V,) = _ritz_rows(operator, _start(8, like), (3,), 1)
    return float((operator(V) * V).sum())


def _cholesky_solve(L: Tensor) -> Operator:
    """Rows times (L Lᵀ)⁻¹. torch.cholesky_solve copies L at every call."""

    def inverse(X: Tensor) -> Tensor:
        half: Tensor = torch.linalg.solve_triangular(L, X.T, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(L.T, half, upper=True)
        return whole.T

    return inverse


def _start(count: int, like: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    size = (count, like.shape[1])
    drawn = torch.randn(size, generator=generator, dtype=like.dtype, device="cpu")
    return drawn.to(like.device)


def _orthonormal(X: Tensor) -> Tensor:
    """An orthonormal basis (k, n) of the rows of X (k, n)."""
    Q: Tensor = torch.linalg.qr(X.T).Q
    return Q.T


def _norm(X: Tensor) -> Tensor:
    """Spectral norm of X (k, n) or (n, k), k small; from its Gram matrix, to half of the digits."""
    gram = X @ X.T if X.shape[0] < X.shape[1] else X.T @ X
    largest: Tensor = torch.linalg.eigvalsh(gram)[-1]
    return largest.clamp_min(0).sqrt()


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 nor bf16 products in the block, whatever the caller has set."""
    backends: Any = torch.backends
    matmul = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before
