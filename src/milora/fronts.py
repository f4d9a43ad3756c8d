"""Learned against forgotten: what each arm forgets at one and the same score.

A learning rate chooses between the two, so that arms at their own best rates differ in both. Over
all its rates an arm has a front: the points (score, forgotten) that no other of its points beats in
both. Between two neighbours of it the logarithm of what is forgotten is taken to go straight with
the score.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DRAWS = 2000


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (score, forgotten) that none beats in both, by rising score."""
    kept: list[tuple[float, float]] = []
    for score, forgotten in sorted(points, key=lambda point: (point[1], -point[0])):
        if not kept or score > kept[-1][0]:
            kept.append((score, forgotten))
    return kept


def forgotten_at(points: Sequence[tuple[float, float]], score: float) -> float:
    """What is forgotten where the front through `points` has that score; infinite beyond its end.

    Below its beginning it is that of its first point, the least that was tried.
    """
    kept = front(points)
    if not kept or score > kept[-1][0]:
        return math.inf
    before = kept[0]
    for after in kept:
        if after[0] >= score:
            break
        before = after
    if after is before or before[1] <= 0:
        return after[1]
    share = (score - before[0]) / (after[0] - before[0])
    return math.exp((1 - share) * math.log(before[1]) + share * math.log(after[1]))


def matched(
    right: Mapping[str, Mapping[float, Tensor]],
    forgotten: Mapping[str, Mapping[float, float]],
    reference: str,
    rate: float,
) -> dict[str, Any]:
    """What every arm forgets at the accuracy that `reference` has at `rate`, on one task.

    `right[arm][rate]` (rows,) is how often each test row was right, the mean over seeds;
    `forgotten[arm][rate]` a positive figure. The interval is of the ratio to what the reference
    forgets there on a front of its own, from resampling the rows, for all arms at once (paired,
    percentile, 95 %). `reached` is the share of the draws in which the arm gets to that accuracy at
    all; in the others the ratio is infinite.
    """
    places = [(arm, r) for arm, rates in right.items() for r in rates]
    table = torch.stack([right[arm][r] for arm, r in places], 1).double()  # (rows, points)
    rows = len(table)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(rows, (DRAWS, rows), generator=generator)
    counts = torch.zeros(DRAWS, rows, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones(DRAWS, rows, dtype=torch.float64))
    means = torch.cat([table.mean(0, keepdim=True), counts @ table / rows])
    each = means.round(decimals=12).tolist()  # thirds of as many right answers sum differently
    ratios: dict[str, list[float]] = {arm: [] for arm in right}
    at: dict[str, float] = {}
    for scores in each:
        score = dict(zip(places, scores, strict=True))
        wanted = score[reference, rate]
        found = {
            arm: forgotten_at([(score[arm, r], forgotten[arm][r]) for r in rates], wanted)
            for arm, rates in right.items()
        }
        at = at or found  # of all rows, which come first
        for arm, value in found.items():
            ratios[arm].append(_ratio(value, found[reference]))
    own = dict(zip(places, each[0], strict=True))
    return {
        "accuracy": own[reference, rate],
        "arms": {arm: _told(at[arm], ratios[arm]) for arm in right},
    }


def _ratio(value: float, of: float) -> float:
    if of == 0:  # as where a reference learned nothing
        return 1.0 if value == 0 else math.inf
    return value / of


def _told(value: float, ratios: Sequence[float]) -> dict[str, Any]:
    resampled = sorted(ratios[1:])
    low, high = (resampled[round(q * (len(resampled) - 1))] for q in (0.025, 0.975))
    return {
        "forgotten": _finite(value),
        "ratio": _finite(ratios[0]),
        "interval": [_finite(low), _finite(high)],
        "reached": sum(map(math.isfinite, resampled)) / len(resampled),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
