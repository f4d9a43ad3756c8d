"""Ranks by layer from the spectra: where the minor part is small, the adapter may be larger."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from milora.errors import UserError
from milora.spectra import rank_within


def ranks(
    spectra: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], wanted: Mapping[str, float]
) -> dict[str, int]:
    """The rank of every weight from `wanted`: {"energy": share} or {"parameters": budget}.

    With an energy, the largest rank whose minor components hold at most that share of ||W||², at
    least 1 and at most half of the weight's. With a budget, the ranks of the one energy under
    which the adapter has at most so many parameters. Raises UserError where not even rank 1 fits.
    """

    def at(share: float) -> dict[str, int]:
        return {
            name: max(1, min(rank_within(S, share), len(S) // 2)) for name, S in spectra.items()
        }

    def size(found: Mapping[str, int]) -> int:
        return sum(rank * sum(shapes[name]) for name, rank in found.items())

    if "energy" in wanted:
        return at(wanted["energy"])
    budget = wanted["parameters"]
    if size(at(0.0)) > budget:
        raise UserError(
            f"milora.rank: {budget:,.0f} parameters are fewer than rank 1 takes everywhere "
            f"({size(at(0.0)):,})"
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(middle)) <= budget else (low, middle)
    return at(low)


def check_ranked(lora: Mapping[str, Any]) -> None:
    """Raise UserError for an option of peft.LoraConfig that says the ranks in another way, and for
    experts, to which PEFT gives one rank.
    """
    for key in ("rank_pattern", "alpha_pattern", "use_rslora"):
        if lora.get(key):
            raise UserError(f"milora.rank sets the ranks: leave lora.{key} out")
    if lora.get("target_parameters"):
        raise UserError(
            "milora.rank: experts have no ranks of their own: leave lora.target_parameters out, or "
            "milora.rank, for lora.r everywhere"
        )


def with_ranks(lora: Mapping[str, Any], found: Mapping[str, int]) -> dict[str, Any]:
    """The options of peft.LoraConfig with those ranks, at the scale s = lora_alpha / r of `lora`.

    Raises UserError as check_ranked does.
    """
    check_ranked(lora)
    scale = lora["lora_alpha"] / lora["r"]
    return {
        **lora,
        "rank_pattern": {re.escape(name): rank for name, rank in found.items()},
        "alpha_pattern": {re.escape(name): scale * rank for name, rank in found.items()},
    }
