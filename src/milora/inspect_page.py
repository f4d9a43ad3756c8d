"""What inspection found, for people: tables for the terminal, a plot, an HTML page."""

from collections.abc import Mapping, Sequence
from typing import Any

from milora.compare_page import COLOURS, Table
from milora.pages import inked, inline, render, svg
from milora.progress import duration


def kinds_table(found: Mapping[str, Any], narrow: bool = False) -> Table:
    """One row a kind of weight: medians over the layers. `narrow` fits 80 columns."""
    head = [
        "kind", "weights", "shape", "effective rank", "stable rank",
        f"minor part at r {found['rank']}", "gap", "edge", "r at 0.1 %", "r at 1 %", "k at 50 %",
        "bf16",
    ]  # fmt: skip
    if narrow:
        head = ["kind", "shape", "eff.", "stable", f"minor part, r {found['rank']}", "edge",
                "r .1%", "r 1%", "k 50%", "bf16"]  # fmt: skip
    rows = []
    for kind, one in found["kinds"].items():
        low, high = one["minor_norm_range"]
        hard = one["hard"] > one["weights"] / 2
        cells = [
            kind, str(one["weights"]), ", ".join(one["shapes"]), f"{one['effective_rank']:.0f}",
            f"{one['stable_rank']:.0f}", f"{one['minor_norm']:.1%} ({low:.1%} to {high:.1%})",
            f"{one['gap']:.3f}", "hard" if hard else "soft", f"{one['rank_0.001']:.0f}",
            f"{one['rank_0.01']:.0f}", f"{one['top_0.5']:.0f}", f"{one['rounding']:.1%}",
        ]  # fmt: skip
        if narrow:
            cells[5] = f"{one['minor_norm']:.1%}"
            del cells[6], cells[1]
        rows.append(cells)
    return Table(head, rows)


EXPLAINED = (
    "Medians over the layers. Minor part: the norm of the r smallest components over that of the "
    "weight; an edge is hard where that is below 1 %. Gap: the singular value above the cut over "
    "that below it; near 1, nothing in the spectrum sets the minor part off. r at 0.1 %: the rank "
    "whose components hold that share of the squared norm; k at 50 %: how many of the largest hold "
    "half. bf16: what rewriting the base in bf16 would lose of its minor part.",
    "Effective rank: exp of the entropy of the singular values (Roy and Vetterli, 2007). Stable "
    "rank: squared Frobenius norm over the squared largest singular value.",
)


def advice_lines(found: Mapping[str, Any]) -> list[str]:
    """The advice as sentences, and the keys of a configuration."""
    advice = found["advice"]
    lora = advice["lora"]
    milora, plain = (advice["learning_rates"][method] for method in ("milora", "lora"))
    return [
        f"lora: {{r: {lora['r']}, lora_alpha: {lora['lora_alpha']}, "
        f"target_modules: [{', '.join(lora['target_modules'])}]}}",
        f"milora: {{protect_inputs: {advice['milora']['protect_inputs']}}}   # the default; "
        f"protect: {advice['half']} would hold near half of the weights' energy too",
        f"training: {{learning_rate: {milora[1]:g}}}   # try {_rates(milora)}; "
        f"for lora {_rates(plain)}",
        f"{advice['trained_parameters']:,} trained parameters, "
        f"{advice['training_bytes'] / 2**20:.0f} MB for them, their gradients and Adam, beside the "
        f"base; {duration(advice['decomposition_seconds'])} to decompose, once",
    ]


def _rates(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def page(found: Mapping[str, Any]) -> str:
    """One self-contained page: kinds, advice, spectra, and the minor part by layer."""
    try:
        drawing = plot(found)
    except ImportError:
        drawing = ""
    return render(
        "inspect.html", model=found["model"], kinds=kinds_table(found), explained=EXPLAINED,
        advice=advice_lines(found), because=found["advice"]["because"],
        drawing=inline(drawing, "singular values by kind of weight"),
        heat=heat(found["weights"], "minor_norm"), rank=found["rank"],
    )  # fmt: skip


def heat(rows: Sequence[Mapping[str, Any]], key: str, least: float = 0.0) -> dict[str, Any]:
    """Layers by kinds, each cell its value in per cent and its share of the largest, for colours.

    Where a layer has several weights of a kind, as encoder and decoder have, the cell is of the
    largest value. The largest of all counts as `least` at the least.
    """
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    by_place: dict[tuple[Any, str], float] = {}
    for row in rows:
        place = row["layer"], row["kind"]
        by_place[place] = max(row[key], by_place.get(place, row[key]))
    largest = max(least, *by_place.values()) or 1.0
    return {
        "kinds": kinds,
        "rows": [
            {
                "layer": layer,
                "cells": [_cell(by_place.get((layer, k)), largest) for k in kinds],
            }
            for layer in layers
        ],
    }


def _cell(value: float | None, largest: float) -> dict[str, Any]:
    if value is None:
        return {"text": "", "share": 0}
    return {"text": f"{100 * value:.3g}", "share": round(value / largest, 3)}


def plot(found: Mapping[str, Any]) -> str:
    """SVG: the spectra of every kind, a line a layer. Raises ImportError without matplotlib."""
    with inked():
        sheet, panels = spectra_panels(list(found["kinds"]))
        for kind, panel in panels.items():
            rows = [row for row in found["weights"] if row["kind"] == kind]
            for row in rows:
                places, values = zip(*row["singular_values"], strict=True)
                panel.plot(places, values, lw=0.7, alpha=0.5, color=COLOURS[0])
            cut = min(rows[0]["shape"]) - rows[0]["rank"]
            panel.axvline(cut, lw=0.8, ls=":", color=COLOURS[1])
        return svg(sheet)


def spectra_panels(kinds: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """A figure for singular values, logarithmic, and its panel for every kind of weight."""
    from matplotlib.figure import Figure

    across = min(4, len(kinds))
    down = -(-len(kinds) // across)
    sheet = Figure(figsize=(3.1 * across, 2.5 * down), layout="constrained")
    panels = list(sheet.subplots(down, across, squeeze=False).flat)
    for kind, panel in zip(kinds, panels, strict=False):
        panel.set_yscale("log")
        panel.set_title(kind, fontsize=10, loc="left")
        panel.tick_params(labelsize=8)
        panel.minorticks_off()
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    return sheet, dict(zip(kinds, panels, strict=False))
