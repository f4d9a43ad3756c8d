"""Smaller LoRAs: the best of their size, with the error that is stated, as PEFT loads them."""

import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_run import run
from tiny_run import settings as run_settings
from torch import Tensor

from milora.adapter import Factors
from milora.approximation import (
    at_ranks,
    best_of_rank,
    decomposed,
    full_ranks,
    in_8_bits,
    norm,
    rank_within,
    spread,
)
from milora.artefacts import export_run
from milora.combine import combine
from milora.errors import UserError
from milora.export import PlainLora
from milora.files import files_sha256, read_json, write_json
from milora.smaller import Smaller, by_layer
from milora.verify import open_adapter, verify

Tiny = Callable[[str], Path]


def drawn(shapes: list[tuple[int, int]], r: int, seed: int, falling: float = 1.0) -> PlainLora:
    """Updates of rank r whose singular values fall, each weight's from another size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    factors = {}
    for place, (m, n) in enumerate(shapes):
        size = 10.0 ** (-place % 3) * falling ** torch.arange(r)
        factors[f"w{place}"] = Factors(normal(r, n), normal(m, r) * size)
    return PlainLora(factors)


def dense(plain: PlainLora, scale: float = 1.0) -> dict[str, Tensor]:
    return {name: scale * B.double() @ A.double() for name, (A, B) in plain.factors.items()}


def distance(one: PlainLora, other: PlainLora, scale: float = 1.0) -> float:
    exact, made = dense(one), dense(other, scale)
    lost = sum(float((exact[name] - made[name]).square().sum()) for name in exact)
    return math.sqrt(lost / sum(float(W.square().sum()) for W in exact.values()))


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("approximation")
    run(run_settings(tiny("llama"), folder))
    return folder / "run"


shapes = st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=4)


@given(shapes, st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_the_stated_error_is_that_of_the_factors(
    sizes: list[tuple[int, int]], r: int, rank: int, seed: int
) -> None:
    exact = drawn(sizes, r, seed, 0.5)
    plain = best_of_rank(exact, rank)
    assert plain.error == pytest.approx(distance(exact, plain), abs=1e-5)
    for name, W in dense(exact).items():
        own = float((W - dense(plain)[name]).norm() / W.norm())
        assert plain.errors[name] == pytest.approx(own, abs=1e-5)
    assert norm(exact) == pytest.approx(
        math.sqrt(sum(float(W.square().sum()) for W in dense(exact).values())), rel=1e-6
    )


@given(shapes, st.integers(1, 5), st.floats(1e-3, 0.9), st.integers(0, 99))
def test_the_least_rank_within_an_error(
    sizes: list[tuple[int, int]], r: int, error: float, seed: int
) -> None:
    exact = drawn(sizes, r, seed, 0.5)
    parts = decomposed(exact)
    rank = rank_within(parts, error)
    assert best_of_rank(exact, rank).error <= error * (1 + 1e-9)
    if rank > 1:
        assert best_of_rank(exact, rank - 1).error > error


@given(shapes, st.integers(1, 5), st.floats(1e-3, 0.9), st.integers(0, 99))
def test_ranks_by_weight_within_an_error_take_no_more_than_one_rank_for_all(
    sizes: list[tuple[int, int]], r: int, error: float, seed: int
) -> None:
    exact = drawn(sizes, r, seed, 0.5)
    parts = decomposed(exact)
    found = spread(parts, error=error)
    assert at_ranks(exact, parts, found).error <= error * (1 + 1e-9)
    same = {name: min(rank_within(parts, error), len(part.S)) for name, part in parts.items()}
    # One weight's last step may overshoot what the bound asks for.
    largest = max(m + n for m, n in sizes)
    assert parameters(sizes, found) < parameters(sizes, same) + largest


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(2, 6), st.integers(2, 6)), min_size=2, max_size=3),
    st.integers(1, 3), st.integers(0, 99),
)  # fmt: skip
def test_a_budget_spread_out_is_as_good_as_any_choice(
    sizes: list[tuple[int, int]], rank: int, seed: int
) -> None:
    exact = drawn(sizes, 3, seed, 0.5)
    parts = decomposed(exact)
    found = spread(parts, rank)
    budget = parameters(sizes, dict.fromkeys(parts, rank))
    assert parameters(sizes, found) <= budget
    error = at_ranks(exact, parts, found).error
    assert error <= best_of_rank(exact, rank).error * (1 + 1e-9)
    # But for a last step that did not fit, no choice is better.
    budget -= max(m + n for m, n in sizes)
    every = itertools.product(*(range(1, len(part.S) + 1) for part in parts.values()))
    for choice in every:
        other = dict(zip(parts, choice, strict=True))
        if parameters(sizes, other) <= budget:
            assert error <= at_ranks(exact, parts, other).error * (1 + 1e-9)


def test_a_budget_goes_where_a_parameter_gains_most() -> None:
    """The singular values are equal, and a component of the small weight costs a tenth."""
    torch.manual_seed(0)
    factors = {}
    for name, n, value in (("small", 4, 1.0), ("large", 40, 1.1)):
        Q = torch.linalg.qr(torch.randn(n, n)).Q[:, :4]
        factors[name] = Factors(Q.T.contiguous(), value * Q)
    assert spread(decomposed(PlainLora(factors)), 2) == {"small": 4, "large": 1}


def parameters(sizes: list[tuple[int, int]], ranks: dict[str, int]) -> int:
    return sum(rank * sum(size) for rank, size in zip(ranks.values(), sizes, strict=True))


@given(shapes, st.integers(1, 5), st.integers(-20, 20), st.floats(1e-6, 1), st.integers(0, 99))
def test_8_bits_lose_what_is_stated_at_any_size(
    sizes: list[tuple[int, int]], r: int, power: int, moved: float, seed: int
) -> None:
    """Of updates as they are trained too, which are small differences of large factors."""
    exact = anchored(drawn(sizes, r, seed, 0.3), moved, 2.0**power, seed)
    parts = decomposed(exact)
    plain, storage = in_8_bits(exact, parts, full_ranks(parts))
    for A, B in plain.factors.values():
        assert torch.equal(A.to(storage.dtype).float(), A)  # as they are stored
        assert torch.equal(B.to(storage.dtype).float(), B)
    assert plain.error == pytest.approx(distance(exact, plain, storage.scale), rel=1e-2)
    assert plain.error < 0.15  # 2^-4 at most of each number, 0.04 in matrices of some size


def anchored(plain: PlainLora, moved: float, size: float, seed: int) -> PlainLora:
    """[B, -B0] [A; A0] with A, B so far from A0, B0 of `plain`, and a rank that is nothing."""
    torch.manual_seed(seed)
    factors = {}
    for name, (A0, B0) in plain.factors.items():
        A, B = (x + moved * torch.randn_like(x) * x.abs().mean() for x in (A0, B0))
        A, B = torch.cat([A, A0, torch.zeros_like(A0[:1])]), torch.cat([B, -B0, 0 * B0[:, :1]], 1)
        factors[name] = Factors(A, size * B)
    return PlainLora(factors)


@pytest.mark.parametrize("rank", [1, 2])
def test_8_bits_and_a_cut_lose_what_is_stated_together(rank: int) -> None:
    exact = drawn([(9, 7), (6, 8)], 4, 0, 0.5)
    parts = decomposed(exact)
    plain, storage = in_8_bits(exact, parts, dict.fromkeys(parts, rank))
    assert plain.error == pytest.approx(distance(exact, plain, storage.scale), rel=1e-3)
    assert plain.error > best_of_rank(exact, rank).error


def test_an_update_of_zeros_has_8_bits_too() -> None:
    for A, B in ((torch.randn(2, 5), torch.zeros(4, 2)), (torch.zeros(2, 5), torch.zeros(4, 2))):
        nothing = PlainLora({"w": Factors(A, B)})
        parts = decomposed(nothing)
        plain, storage = in_8_bits(nothing, parts, full_ranks(parts))
        assert (plain.error, storage.scale) == (0, 1)
        assert not (plain.factors["w"].B @ plain.factors["w"].A).any()


def test_a_number_that_is_none_is_not_taken_for_no_error() -> None:
    assert math.isnan(
        norm(PlainLora({"w": Factors(torch.full((1, 2), math.nan), torch.ones(2, 1))}))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "smaller",
    [
        Smaller(2),
        Smaller(max_error=0.3),
        Smaller(2, spread=True),
        Smaller(max_error=0.3, spread=True),
        Smaller(bits=8),
        Smaller(max_error=0.1, bits=8),
        Smaller(max_error=0.3, spread=True, bits=8),
        Smaller(2, spread=True, bits=8),
    ],
    ids=str,
)
def test_what_export_writes_is_what_it_says(
    smaller: Smaller, finished: Path, tmp_path: Path
) -> None:
    done = export_run(finished, tmp_path / "small", "lora", smaller)
    stored = read_json(tmp_path / "small" / "milora.json")
    exact, small = open_adapter(finished).model, open_adapter(tmp_path / "small").model
    update, made = (
        {
            name: (layer.get_delta_weight("default").double())
            for name, layer in model.named_modules()
            if hasattr(layer, "get_delta_weight")
        }
        for model in (exact, small)
    )
    lost = sum(float((update[name] - made[name]).square().sum()) for name in update)
    whole = sum(float(W.square().sum()) for W in update.values())
    assert stored["approximation_error"] == pytest.approx(math.sqrt(lost / whole), rel=1e-3)
    assert all(check.holds for check in verify(tmp_path / "small"))
    ranks = stored["approximation"]["ranks"]
    head, rows = by_layer(done)
    assert len(rows) * (len(head) - 1) == len(ranks)
    if smaller == Smaller(bits=8):
        assert stored["approximation_error"] < 0.05
    with safe_open(tmp_path / "small" / "adapter_model.safetensors", "pt") as file:
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert kinds == ({"F8_E4M3"} if smaller.bits == 8 else {"F32"})
    if smaller.spread:
        assert done.ranks == ranks
        assert "ranks" in done.said
    if smaller.max_error:
        assert stored["approximation_error"] <= smaller.max_error
    assert "KL from the base" in done.said
    with pytest.raises(UserError, match="is an approximation already"):
        export_run(tmp_path / "small", tmp_path / "twice", "lora", Smaller(1))
    # The small one goes on to other tools as any adapter does.
    merged = export_run(tmp_path / "small", tmp_path / "merged", "merged")
    assert "merged weights" in merged.said
    again = export_run(tmp_path / "small", tmp_path / "gguf", "gguf")
    assert f"rank {max(ranks.values())}, as it is, an approximation of" in again.said
    copied = export_run(tmp_path / "small", tmp_path / "copied", "lora")
    assert "an approximation of relative error" in copied.said
    other = tmp_path / "other"
    shutil.copytree(finished / "adapter", other)
    twice = {k: 2 * v for k, v in load_file(other / "adapter_model.safetensors").items()}
    save_file(twice, other / "adapter_model.safetensors", {"format": "pt"})
    about = read_json(other / "milora.json") | {"files_sha256": files_sha256(other)}
    write_json(other / "milora.json", about)
    both = combine([tmp_path / "small", other], tmp_path / "both")
    assert "of which no longer as trained: small (an approximation" in both
    assert all(check.holds for check in verify(tmp_path / "both"))
