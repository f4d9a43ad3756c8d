"""What is forgotten at equal score."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milora.fronts import forgotten_at, front, matched

POINTS = st.lists(
    st.tuples(st.floats(0, 1), st.floats(1e-3, 1e3)),
    min_size=1,
    max_size=6,
    unique_by=lambda p: p[0],
)


@given(POINTS)
def test_the_front_is_what_none_beats(points: list[tuple[float, float]]) -> None:
    kept = front(points)
    for score, forgotten in points:
        beaten = any(
            (s > score and f <= forgotten) or (s >= score and f < forgotten) for s, f in points
        )
        assert ((score, forgotten) in kept) != beaten


@given(POINTS, st.floats(0, 1), st.floats(0, 1))
def test_more_score_costs_no_less(
    points: list[tuple[float, float]], one: float, other: float
) -> None:
    low, high = sorted((one, other))
    assert forgotten_at(points, low) <= forgotten_at(points, high) * (1 + 1e-9)
    for score, forgotten in front(points):
        assert forgotten_at(points, score) == pytest.approx(forgotten)
    assert forgotten_at(points, 1.1) == math.inf


def test_between_two_points_the_logarithm_goes_straight() -> None:
    points = [(0.5, 0.01), (0.7, 1.0), (0.6, 5.0)]
    assert forgotten_at(points, 0.6) == pytest.approx(0.1)
    assert forgotten_at(points, 0.2) == 0.01


def test_half_of_what_the_reference_forgets() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = torch.rand(400, generator=generator)
    right = {
        rate: (hard < share).double() for rate, share in ((1e-4, 0.6), (3e-4, 0.7), (1e-3, 0.8))
    }
    moved = {1e-4: 0.01, 3e-4: 0.03, 1e-3: 0.2}
    weak = {rate: (hard < 0.5).double() for rate in right}
    found = matched(
        {"lora": right, "half": right, "weak": weak},
        {"lora": moved, "half": {r: f / 2 for r, f in moved.items()}, "weak": moved},
        "lora", 3e-4,
    )  # fmt: skip
    assert found["accuracy"] == pytest.approx(float(right[3e-4].mean()))
    arms = found["arms"]
    assert arms["lora"]["forgotten"] == pytest.approx(0.03)
    assert arms["half"]["ratio"] == pytest.approx(0.5)
    assert arms["half"]["interval"] == pytest.approx([0.5, 0.5])
    assert arms["half"]["reached"] == 1
    assert arms["weak"]["ratio"] is None
    assert arms["weak"]["reached"] == 0


def test_the_interval_is_the_middle_95_percent() -> None:
    """Accuracy is 0.5, drawn with a deviation of 0.0158, and the other's front is straight."""
    rows = (torch.arange(1000) % 2).double()
    steep = {1e-4: torch.zeros(1000).double(), 1e-3: torch.ones(1000).double()}
    moved = {"lora": {1e-3: 1.0}, "other": {1e-4: 1.0, 1e-3: math.e}}
    found = matched({"lora": {1e-3: rows}, "other": steep}, moved, "lora", 1e-3)["arms"]["other"]
    assert found["ratio"] == pytest.approx(math.exp(0.5))
    low, high = map(math.log, found["interval"])
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 1000**0.5, rel=0.06)


def test_a_reference_that_forgets_nothing() -> None:
    right = {1e-3: torch.ones(10).double()}
    found = matched(
        {"lora": right, "same": right, "other": right},
        {"lora": {1e-3: 0.0}, "same": {1e-3: 0.0}, "other": {1e-3: 0.1}},
        "lora", 1e-3,
    )["arms"]  # fmt: skip
    assert [found[arm]["ratio"] for arm in ("lora", "same", "other")] == [1, 1, None]


def test_as_many_right_answers_are_as_good() -> None:
    """Means of three seeds are thirds, whose sums differ in the last bit by their order."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(0, 4, (500,), generator=generator).double()
        mixed = counts[torch.randperm(500, generator=generator)]
        found = matched(
            {"lora": {1e-3: counts / 3}, "half": {1e-3: mixed / 3}},
            {"lora": {1e-3: 0.2}, "half": {1e-3: 0.1}}, "lora", 1e-3,
        )  # fmt: skip
        assert found["arms"]["half"]["ratio"] == 0.5
