"""What the spectra of a model say before anything is trained, and what follows for a run.

inspect_model   every linear weight of a checkpoint, one at a time, and by kind
advice          rank, targets, directions to protect, rates: where to begin, not what is best
ranks           per-layer ranks from an energy or a budget of parameters
"""

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from milora.checkpoint import Checkpoint, open_checkpoint
from milora.errors import UserError
from milora.matrices import kind_of
from milora.pretrained import task_of
from milora.progress import Progress
from milora.recommended import held_inputs
from milora.spectra import HARD, rank_within, spectrum, thinned, top_holding
from milora.store import Store
from milora.svd import components
from milora.targeting import lora_config, targets

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
MINOR_ENERGY = (0.001, 0.01)  # shares of ||W||² for which the rank is given
TOP_ENERGY = 0.5


def inspect_model(
    model: str, rank: int, store: Store, progress: Progress, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Spectra of all linear weights of `model` (as for load_pretrained), by layer and by kind.

    `rank` is what a minor part is measured at; weights with fewer singular values take all but
    one of theirs. Raises UserError as open_checkpoint does.
    """
    checkpoint = open_checkpoint(model, trust_remote_code)
    options = {"r": 1, "lora_alpha": 1, "target_modules": "all-linear"}
    wanted = targets(checkpoint.skeleton, lora_config(options, task_of(checkpoint.skeleton)))
    # Language models are saved without the pooler that a classifier has.
    wanted = {n: target for n, target in wanted.items() if checkpoint.has(n) or "pooler" not in n}
    missing = [name for name in wanted if not checkpoint.has(name)]
    if missing:
        raise UserError(
            f"the files of {model} hold no weight for {missing[0]} ({len(missing)} in all): the "
            "library fuses or renames it when it loads the model, which inspect cannot follow"
        )
    rows = []
    began = time.monotonic()
    for done, (name, target) in enumerate(wanted.items()):
        progress("inspecting", done, len(wanted), name, free=store.found)
        weight = _weight(checkpoint, name, target.transposed)
        S = store.spectrum(weight.to("cuda" if torch.cuda.is_available() else "cpu"))
        at = min(rank, len(S) - 1)
        found = spectrum(weight, S, at)
        rows.append(
            {
                "module": name, "kind": kind_of(name), "layer": _layer(name),
                "shape": list(target.shape), "rank": at, **found._asdict(),
                **{f"rank_{share:g}": rank_within(S, share) for share in MINOR_ENERGY},
                f"top_{TOP_ENERGY:g}": top_holding(S, TOP_ENERGY),
                "singular_values": thinned(S),
            }
        )  # fmt: skip
    progress("inspecting", len(wanted), len(wanted))
    kinds = _by_kind(rows)
    decompose = {
        kind: _seconds(checkpoint, [row for row in rows if row["kind"] == kind], rank)
        for kind in kinds
    }
    return {
        "model": model,
        "rank": rank,
        "seconds": time.monotonic() - began,
        "parameters": sum(p.numel() for p in checkpoint.skeleton.parameters()),
        "weights": rows,
        "kinds": kinds,
        "advice": advice(rows, kinds, rank, decompose),
    }


def _weight(checkpoint: Checkpoint, name: str, transposed: bool) -> Tensor:
    weight = checkpoint.read(name)
    if not torch.isfinite(weight).all():
        raise UserError(f"{name}.weight holds NaN or infinite values: the base is damaged")
    return weight.T if transposed and not checkpoint.gguf else weight


def _layer(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def _by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians over the layers, and the range of the minor part."""
    kinds: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        middle = {
            key: statistics.median(row[key] for row in own)
            for key in (
                "effective_rank", "stable_rank", "minor_norm", "gap", "rounding", "top_0.5",
                *(f"rank_{share:g}" for share in MINOR_ENERGY),
            )
        }  # fmt: skip
        kinds[kind] = {
            "weights": len(own),
            "shapes": sorted({"x".join(map(str, row["shape"])) for row in own}),
            **middle,
            "minor_norm_range": [min(r["minor_norm"] for r in own),
                                 max(r["minor_norm"] for r in own)],
            "hard": sum(row["edge"] == "hard" for row in own),
        }  # fmt: skip
    return kinds


def _seconds(checkpoint: Checkpoint, rows: Sequence[Mapping[str, Any]], rank: int) -> float:
    """To decompose all of a kind, measured on one weight of every shape."""
    total = 0.0
    for shape in {tuple(row["shape"]) for row in rows}:
        alike = [row for row in rows if tuple(row["shape"]) == shape]
        weight = checkpoint.read(alike[0]["module"])
        began = time.monotonic()
        components(weight, min(rank, min(weight.shape)), "minor")
        total += len(alike) * (time.monotonic() - began)
    return total


def advice(
    rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, Mapping[str, Any]], rank: int,
    seconds: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Where to begin: settings that the spectra speak for, each with its reason."""
    chosen = [kind for kind in DEFAULT_TARGETS if kind in kinds] or list(kinds)
    own = [row for row in rows if row["kind"] in chosen]
    least = min(min(row["shape"]) for row in own)
    held = statistics.median(row["top_0.5"] for row in own)
    room = least - rank
    protect = max(1, min(_two(held), room)) if room > 0 else 0
    trained = sum(rank * sum(row["shape"]) for row in own)
    said = []
    hard = [kind for kind in chosen if kinds[kind]["hard"] > kinds[kind]["weights"] / 2]
    soft = [kind for kind in chosen if kind not in hard]
    if hard:
        said.append(
            f"{', '.join(hard)}: the {rank} smallest components are below {HARD:.0%} of the "
            "weight; the adapter starts from next to nothing there, as LoRA does"
        )
    if soft:
        low = min(kinds[kind]["minor_norm_range"][0] for kind in soft)
        high = max(kinds[kind]["minor_norm_range"][1] for kind in soft)
        said.append(
            f"{', '.join(soft)}: they are {low:.0%} to {high:.0%} of the weight, a real part of "
            "it; with them as they are (milora: published) the rate must be lower than LoRA's"
        )
    rounded = [kind for kind in kinds if kinds[kind]["rounding"] > 0.05]
    if rounded:
        said.append(
            f"{', '.join(rounded)}: rewriting the base in bf16 without its minor part would lose "
            f"{min(kinds[k]['rounding'] for k in rounded):.0%} or more of it to rounding (milora "
            "never rewrites the base)"
        )
    return {
        "lora": {"r": rank, "lora_alpha": rank, "target_modules": chosen},
        "milora": {"protect_inputs": held_inputs(row["shape"][1] for row in own)},
        "half": protect,
        "learning_rates": {"milora": [3e-4, 1e-3, 3e-3], "lora": [1e-4, 3e-4, 1e-3]},
        "trained_parameters": trained,
        "training_bytes": trained * (4 + 4 + 8 + 4),  # A, B; gradient; Adam's moments; anchor
        "decomposition_seconds": sum(seconds[kind] for kind in chosen),
        "because": said,
    }


def _two(value: float) -> int:
    """The power of two nearest below."""
    return 1 << (max(1, int(value)).bit_length() - 1)
