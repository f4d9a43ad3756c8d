"""Singular components against a truth that is known because the spectrum is drawn."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from milora.svd import Component, components, minor_components, positions


def orthonormal(size: int, count: int, generator: torch.Generator) -> Tensor:
    full = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(full).Q[:, :count]


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W = U diag(S) Vᵀ in fp64 and its factors: m, n up to 24, one of the spectra that occur."""
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    count = min(m, n)
    i = torch.arange(count, dtype=torch.float64)
    kind = draw(st.sampled_from(["flat", "power", "ties", "deficient", "giant", "steep", "linear"]))
    S = {
        "flat": torch.ones(count, dtype=torch.float64),
        "power": (i + 1) ** -1.5,
        "ties": (count - i // 2 * 2 + 1).double(),
        "deficient": torch.where(i < (count + 1) // 2, count - i, 0.0),
        "giant": torch.where(i == 0, 1e6, 1.0 / (i + 1)),
        "steep": 10 ** (-12 * i / max(count - 1, 1)),
        "linear": count - i,
    }[kind]
    S = S * 10.0 ** draw(st.sampled_from([-30, -3, 0, 3, 30]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    U, V = orthonormal(m, count, generator), orthonormal(n, count, generator)
    return (U * S) @ V.T, U, S, V


def norm(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x, 2))


@given(matrices(), st.data(), st.sampled_from(["minor", "principal", "middle", "random"]))
def test_triplets_of_a_known_spectrum(
    made: tuple[Tensor, Tensor, Tensor, Tensor], data: st.DataObject, component: str
) -> None:
    W, _, S, _ = made
    rank = data.draw(st.integers(1, len(S)))
    found = components(W, rank, component, seed=3)  # type: ignore[arg-type]
    eye = torch.eye(rank, dtype=torch.float64)
    assert norm(found.U.T @ found.U - eye) < 1e-12
    assert norm(found.Vh @ found.Vh.T - eye) < 1e-12
    assert (found.S.diff() <= 0).all()
    assert found.norm == pytest.approx(float(S[0]), rel=1e-12)
    # Each is a singular triplet of W ...
    assert norm(W @ found.Vh.T - found.U * found.S) <= 1e-12 * found.norm
    assert norm(W.T @ found.U - found.Vh.T * found.S) <= 1e-12 * found.norm
    # ... and it is the right ones.
    first = {"minor": len(S) - rank, "principal": 0, "middle": (len(S) - rank) // 2}
    if component in first:
        wanted = S[first[component] : first[component] + rank]
        torch.testing.assert_close(found.S, wanted, rtol=1e-9, atol=1e-13 * found.norm)


def reflections(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix, dense, in O(n²)."""
    Q = torch.eye(size, dtype=torch.float64)
    for _ in range(3):
        v = torch.randn(size, 1, generator=generator, dtype=torch.float64)
        Q -= 2 * v @ (v.T @ Q) / (v.T @ v)
    return Q


def spectrum(kind: str, n: int) -> Tensor:
    """(n,) descending: what weights have, and what breaks eigensolvers."""
    i = torch.arange(n, dtype=torch.float64)
    line = (n - i) / n
    high, ones = 1 + line, torch.ones(n, dtype=torch.float64)
    return {
        "hard edge": line,
        "soft edge": 0.05 + line,
        "narrow": 1 + 0.1 * line,
        "flat": ones,
        "repeated": torch.cat([high[:-40], 0.5 * ones[:40]]),
        "twice repeated": torch.cat([high[:-40], 0.5 * ones[:20], 0.3 * ones[:20]]),
        "nearly repeated": torch.cat([high[:-40], 0.99 * ones[:40]]),
        "three values": (2.0 - (3 * i / n).floor() * 0.75),
        "a few zeros": torch.cat([high[:-5], 0 * ones[:5]]),
        "many zeros": torch.cat([high[:-60], 0 * ones[:60]]),
        "cluster at the cut": torch.cat([high[:-90], 1e-3 + 4e-6 * line[-90:]]),
        "one giant": torch.cat([1e6 * ones[:1], line[1:]]),
        "condition 1e6": 10 ** (-6 * i / (n - 1)),
        "condition 1e12": 10 ** (-12 * i / (n - 1)),
        "low rank and noise": torch.where(i < 64, 64 - i, 1e-7 * line),
        "three tiny": torch.cat([high[:-3], torch.tensor([1e-7, 1e-9, 1e-13]).double()]),
        "zero": 0 * ones,
    }[kind]


KINDS = [
    "hard edge", "soft edge", "narrow", "flat", "repeated", "twice repeated", "nearly repeated",
    "three values", "a few zeros", "many zeros", "cluster at the cut", "one giant",
    "condition 1e6", "condition 1e12", "low rank and noise", "three tiny", "zero",
]  # fmt: skip


def check_triplets(W: Tensor, found: object, wanted: Tensor, size: float) -> None:
    """Right by the bounds that the documentation states; nothing is taken from `found.residual`."""
    U, S, Vh, norm_said, said, _ = found  # type: ignore[misc]
    eye = torch.eye(len(S), dtype=torch.float64)
    assert float((U.T @ U - eye).abs().max()) < 1e-12
    assert float((Vh @ Vh.T - eye).abs().max()) < 1e-12
    assert (S.diff() <= 0).all()
    unit = size or 1.0
    residual = max(norm(W @ Vh.T - U * S), norm(W.T @ U - Vh.T * S)) / unit
    assert residual <= 1e-6
    assert residual <= 1.001 * said + 1e-14
    assert 0.88 * size <= norm_said <= size * (1 + 1e-5)
    energy, least = float((S / unit).norm()), float((wanted / unit).norm())
    cut = float(wanted[-1 if wanted[0] == size else 0]) / unit
    # Values within the residual of the cut may stand for each other.
    assert energy == pytest.approx(least, rel=max(1e-6, 2 * residual / (cut or 1)), abs=1e-13)
    # Each of them too, to what the residual allows.
    assert float((S - wanted).abs().max()) <= 1e-6 * size
    assert float((S - wanted).abs().max()) <= max(1e-3 * cut, 1e-13) * unit


@pytest.mark.slow
@settings(max_examples=60)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([(150, 150), (260, 260), (150, 400), (530, 520), (1100, 515)]),
    st.sampled_from([1, 8, 21, 32, 43]),
    st.sampled_from(["minor", "principal"]),
    st.booleans(),
    st.sampled_from([1.0, 1e30, 1e-30]),
    st.integers(0, 99),
)
def test_every_route_on_a_drawn_spectrum(
    kind: str, shape: tuple[int, int], rank: int, component: Component, wide: bool,
    scale: float, seed: int,
) -> None:  # fmt: skip
    (m, n), generator = shape, torch.Generator().manual_seed(seed)
    count = min(m, n)
    S = spectrum(kind, count) * scale
    W = (reflections(m, generator)[:, :count] * S) @ reflections(n, generator)[:count]
    if wide:
        W = W.T
    found = components(W, rank, component)
    wanted = S[-rank:] if component == "minor" else S[:rank]
    check_triplets(W, found, wanted, float(S[0]))


ROUTES = [
    ((300, 300), 20, "soft edge", "minor", "inverse Krylov"),
    ((300, 300), 40, "soft edge", "minor", "inverse Krylov"),
    ((300, 300), 60, "soft edge", "minor", "all eigenvectors, float64"),
    ((800, 520), 20, "soft edge", "minor", "shifted Gram, float32"),
    ((520, 800), 20, "soft edge", "minor", "shifted Gram, float32"),
    ((800, 520), 20, "hard edge", "minor", "shifted Gram, float64"),
    ((800, 520), 40, "soft edge", "minor", "all eigenvectors, float32"),
    ((520, 520), 120, "hard edge", "minor", "all eigenvectors, float32"),
    ((800, 520), 40, "condition 1e6", "minor", "all eigenvectors, float64"),
    ((800, 520), 20, "condition 1e12", "minor", "full SVD"),
    ((300, 300), 20, "a few zeros", "minor", "full SVD"),
    ((100, 100), 4, "soft edge", "minor", "full SVD"),
    ((800, 520), 20, "condition 1e6", "principal", "Krylov"),
    ((800, 520), 20, "narrow", "principal", "all eigenvectors, float32"),
    ((800, 520), 20, "soft edge", "middle", "all eigenvectors, float32"),
    ((800, 520), 20, "soft edge", "random", "all eigenvectors, float32"),
]


@pytest.mark.parametrize(("shape", "rank", "kind", "component", "route"), ROUTES)
def test_which_route_a_weight_takes(
    shape: tuple[int, int], rank: int, kind: str, component: Component, route: str
) -> None:
    (m, n), generator = shape, torch.Generator().manual_seed(0)
    count = min(m, n)
    S = spectrum(kind, count)
    W = (reflections(m, generator)[:, :count] * S) @ reflections(n, generator)[:count]
    found = components(W, rank, component)
    assert found.solver == route
    check_triplets(W, found, S[positions(component, count, rank)], float(S[0]))


@pytest.mark.parametrize("shape", [(300, 300), (800, 520), (150, 400)])
def test_dead_and_duplicate_rows_and_columns(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(shape, generator=generator)
    for change in ("zero rows", "zero columns", "both", "duplicate rows", "a zero row"):
        W = plain.clone()
        if change in ("zero rows", "both"):
            W[5:15] = 0
        if change in ("zero columns", "both"):
            W[:, 20:23] = 0
        if change == "duplicate rows":
            W[1:4] = W[0]
        if change == "a zero row":
            W[7] = 0
        S = torch.linalg.svdvals(W.double())
        check_triplets(W.double(), minor_components(W, 16), S[-16:], float(S[0]))


def test_weights_of_parts_that_do_not_mix() -> None:
    """What the eigenvectors to start from have lost, no iteration on them would find."""
    for low, other, rank in ((1e-5, 2e-5, 64), (2e-2, 2.02e-2, 32), (1e-3, 1.1e-3, 64)):
        generator = torch.Generator().manual_seed(0)
        first = torch.cat([torch.linspace(1, 0.3, 260), torch.full((40,), low)]).double()
        second = torch.cat([torch.linspace(1, 0.3, 200), torch.full((100,), other)]).double()
        S = torch.cat([first, second]).sort(descending=True).values
        for m in (300, 500):
            W = torch.zeros(m + 300, 600, dtype=torch.float64)
            left, right = reflections(m, generator)[:, :300], reflections(300, generator)
            W[:m, :300] = (left * first) @ right
            W[m:, 300:] = torch.diag(second)
            check_triplets(W, minor_components(W, rank), S[-rank:], float(S[0]))


def test_beside_a_giant_the_other_large_ones_are_right_too() -> None:
    for giant in (1e3, 1e5, 1e7):
        generator = torch.Generator().manual_seed(0)
        S = torch.cat([torch.tensor([giant]), torch.linspace(2, 1, 519)]).double()
        W = (reflections(520, generator) * S) @ reflections(520, generator)
        found = components(W, 32, "principal")
        torch.testing.assert_close(found.S, S[:32], rtol=1e-6, atol=0)


def test_the_largest_and_smallest_numbers_of_fp64() -> None:
    for value in (1.7e308, 5e-324):
        W = value * torch.eye(4, dtype=torch.float64)
        assert minor_components(W, 2).S.tolist() == [value, value]


def test_a_default_device_does_not_leak_in() -> None:
    W = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        found = minor_components(W, 8)
        random = components(W, 8, "random", 1)
    assert torch.equal(found.S, minor_components(W, 8).S)
    assert torch.equal(random.S, components(W, 8, "random", 1).S)


def test_a_tighter_tolerance_is_met() -> None:
    for shape in ((300, 300), (800, 520)):
        W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert minor_components(W, 12, tol=1e-11).residual <= 1e-11


def test_neither_autocast_nor_low_precision_products_leak_in() -> None:
    for shape in ((300, 300), (800, 520)):
        W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        wanted = minor_components(W, 12)
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("medium")  # bf16 products where the CPU has them
            with torch.autocast("cpu", torch.bfloat16):
                found = minor_components(W, 12)
            assert torch.get_float32_matmul_precision() == "medium"  # and is given back
        finally:
            torch.set_float32_matmul_precision(before)
        assert found.solver == wanted.solver
        assert all(torch.equal(a, b) for a, b in zip(found[:3], wanted[:3], strict=True))


@given(st.integers(1, 60), st.data(), st.sampled_from(["minor", "principal", "middle", "random"]))
def test_a_smaller_rank_is_part_of_a_larger(
    count: int, data: st.DataObject, component: Component
) -> None:
    large = data.draw(st.integers(1, count))
    small = data.draw(st.integers(1, large))
    inner, outer = positions(component, count, small, 5), positions(component, count, large, 5)
    assert len(set(inner.tolist())) == small
    assert set(inner.tolist()) <= set(outer.tolist())


@given(matrices(), st.data())
def test_minor_and_principal_make_up_the_whole(
    made: tuple[Tensor, Tensor, Tensor, Tensor], data: st.DataObject
) -> None:
    W, _, S, _ = made
    rank = data.draw(st.integers(1, len(S)))
    low = minor_components(W, rank)
    part = (low.U * low.S) @ low.Vh
    assert norm(low.U.T @ (W - part)) <= 1e-12 * low.norm  # what stays frozen is orthogonal
    if rank < len(S):
        high = components(W, len(S) - rank, "principal")
        torch.testing.assert_close(
            part + (high.U * high.S) @ high.Vh, W, rtol=0, atol=1e-12 * low.norm
        )


@given(matrices(), st.data(), st.sampled_from(["minor", "principal", "middle"]))
def test_the_product_is_the_true_one_where_there_is_a_gap(
    made: tuple[Tensor, Tensor, Tensor, Tensor], data: st.DataObject, component: str
) -> None:
    W, U, S, V = made
    rank = data.draw(st.integers(1, len(S)))
    found = components(W, rank, component)  # type: ignore[arg-type]
    first = {"minor": len(S) - rank, "principal": 0, "middle": (len(S) - rank) // 2}[component]
    last = first + rank
    product, size = (found.U * found.S) @ found.Vh, float(S[0])
    # What is left has the rest of the spectrum, gap or not.
    rest = torch.cat([S[:first], S[last:], torch.zeros(rank)]).sort(descending=True).values
    torch.testing.assert_close(
        torch.linalg.svdvals(W - product), rest.double(), rtol=0, atol=1e-12 * size
    )
    edges = [S[k - 1] - S[k] for k in (first, last) if 0 < k < len(S)]
    gap = float(min(edges)) if edges else size
    if gap < 1e-6 * size:
        return  # the product is not determined: every basis of equal singular values is right
    wanted = (U[:, first:last] * S[first:last]) @ V[:, first:last].T
    bound = 1e-12 * size * size / gap  # Wedin: the subspace turns by error / gap
    torch.testing.assert_close(product, wanted, rtol=0, atol=bound)
    flipped = components(W.T, rank, component)  # type: ignore[arg-type]
    torch.testing.assert_close((flipped.U * flipped.S) @ flipped.Vh, wanted.T, rtol=0, atol=bound)


def test_the_same_weight_gives_the_same_bits_and_signs() -> None:
    W = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    a, b = minor_components(W, 5), minor_components(W.clone(), 5)
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))
    largest = a.Vh.gather(1, a.Vh.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_random_draws_without_replacement_by_its_seed() -> None:
    W = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    all_values = torch.linalg.svdvals(W.double())
    drawn = {tuple(components(W, 6, "random", seed).S.tolist()) for seed in range(8)}
    assert len(drawn) > 4
    for values in drawn:
        assert len(set(values)) == 6
        for value in values:
            assert (all_values - value).abs().min() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_lifted_first(dtype: torch.dtype) -> None:
    W = torch.randn(24, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, wanted = minor_components(W, 4), minor_components(W.double(), 4)
    assert found.S.dtype == torch.float64
    assert torch.equal(found.S, wanted.S)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(minor_components(W, 4).S, wanted.S)


def test_zero_is_exact_zero_and_not_small() -> None:
    generator = torch.Generator().manual_seed(2)
    W = torch.randn(16, 10, generator=generator)
    W[:, 7] = W[:, 3]
    W[:, 1] = 0
    assert minor_components(W, 4).zero.tolist() == [False, False, True, True]
    U, V = orthonormal(16, 10, generator), orthonormal(10, 10, generator)
    S = torch.tensor([1.0] * 8 + [1e-9, 1e-10], dtype=torch.float64)
    assert not minor_components((U * S) @ V.T, 3).zero.any()
    assert minor_components(torch.zeros(4, 4), 2).zero.all()


@given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 999), st.sampled_from([1e-4, 1, 1e4]))
def test_every_exact_zero_is_flagged(m: int, n: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = scale * torch.randn(m, n, generator=generator)
    kept = int(torch.randint(1, m, (), generator=generator))
    copies = torch.randint(0, kept, (m - kept,), generator=generator)
    W[kept:] = torch.where(torch.rand(m - kept, 1, generator=generator) < 0.5, W[copies], 0)
    found = minor_components(W, min(m, n))
    assert int((~found.zero).sum()) == min(kept, n)


@pytest.mark.parametrize(
    ("weight", "rank", "said"),
    [
        (torch.ones(4, 3), 0, r"rank 0 does not fit a 4 x 3 weight: choose 1 to 3"),
        (torch.ones(4, 3), 4, r"rank 4 does not fit a 4 x 3 weight: choose 1 to 3"),
        (torch.full((3, 3), float("nan")), 1, "NaN or infinite"),
        (torch.full((3, 3), float("inf")), 1, "NaN or infinite"),
        (torch.ones(2, 3, 4), 1, r"not a tensor of shape \(2, 3, 4\)"),
    ],
)
def test_what_is_refused(weight: Tensor, rank: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        minor_components(weight, rank)


def test_an_unknown_component_is_refused() -> None:
    with pytest.raises(ValueError, match="'major': use one of minor, principal, middle, random"):
        components(torch.ones(3, 3), 1, "major")  # type: ignore[arg-type]


def test_a_failure_to_converge_is_tried_the_other_way_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    W = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    wanted, real, calls = minor_components(W, 2), torch.linalg.svd, []

    def once(*args: Tensor, **kwargs: bool) -> object:
        calls.append(args)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("failed to converge")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", once)
    found = minor_components(W, 2)
    assert len(calls) == 2
    torch.testing.assert_close((found.U * found.S) @ found.Vh, (wanted.U * wanted.S) @ wanted.Vh)
