"""What a comparison found (compare.json), for people: Markdown tables, a plot, an HTML page."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from milora.card import figure, harmless, short
from milora.pages import INK, inked, inline, render, svg

# Figures of `knowledge`, the base's own of each, heading, digits.
MEASURES = (
    ("kl", None, "KL(base‖tuned)", 4),
    ("tuned_perplexity", "base_perplexity", "perplexity", 2),
    ("moved", None, "moved (1 − cosine)", 4),
    ("similarities", None, "correlation of similarities", 3),
)
# Okabe and Ito's colours, which most colour-blind readers can tell apart, and a mark for each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
MARKS = "os^Dv*P"
LINES = "-", "--", ":"  # where the colours begin anew, whose marks are hollow then


EQUAL = (
    "At equal score: what each arm forgets where the front through all its rates has the accuracy "
    "that the first arm has at its own rate, and the ratio to what the first arm forgets there; "
    "the rows of the test set are resampled for all arms at once (paired bootstrap)."
)


class Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]


def scores(result: Mapping[str, Any]) -> Table:
    """One row an arm: its rate, the accuracy of each task, and each measure of knowledge kept."""
    base = result["base"]
    names = list(next(iter(result["arms"].values()))["tasks"])
    head = ["arm", "rate", *(f"{name}: accuracy" for name in names)]
    first = ["base", "", *(f"{base['tasks'][name]['accuracy']:.3f}" for name in names)]
    columns = list(_measures(result))
    for place, _, own, label, digits in columns:
        head.append(f"{label}, {short(base['knowledge'][place]['text'])}")
        first.append(figure(base["knowledge"][place][own], digits) if own else "")
    rho = any(found["interference"]["mean"] is not None for found in result["arms"].values())
    if rho:
        head.append("interference, largest")
        first.append("")
    rows = [first]
    if any("majority" in task for task in base["tasks"].values()):
        always = [
            f"{task['majority']:.3f}" if "majority" in task else ""
            for task in base["tasks"].values()
        ]
        rows.append(["the commonest answer", "", *always, *[""] * (len(columns) + rho)])
    for arm, found in result["arms"].items():
        cells = [arm, f"{found['learning_rate']:g}"]
        cells += [plus_minus(found["tasks"][name]["accuracy"], 3) for name in names]
        cells += [
            plus_minus(found["knowledge"][place][key], digits)
            for place, key, _, _, digits in columns
        ]
        if rho:
            largest = found["interference"]["mean"]
            cells.append("" if largest is None else f"{largest:.2g}")
        rows.append(cells)
    return Table(head, rows)


def _measures(result: Mapping[str, Any]) -> Iterator[tuple[int, str, str | None, str, int]]:
    for place, kept in enumerate(next(iter(result["arms"].values()))["knowledge"]):
        for key, own, label, digits in MEASURES:
            if key in kept:
                yield place, key, own, label, digits


def differences(result: Mapping[str, Any]) -> Table:
    """One row a pair of arms and task, with the interval of the paired bootstrap."""
    rows = []
    for pair in result["pairs"]:
        low, high = pair["interval"]
        told = "" if low <= 0 <= high else "yes"
        rows.append(
            [pair["task"], f"{pair['first']} − {pair['second']}", f"{pair['difference']:+.3f}",
             f"{low:+.3f} to {high:+.3f}", told]
        )  # fmt: skip
    return Table(["task", "difference", "accuracy", "95 %", "beyond chance"], rows)


def equal_score(result: Mapping[str, Any]) -> Table | None:
    """One row an arm and task: what it forgets where it scores as the first does at its rate."""
    if "equal_score" not in result:
        return None
    text = short(result["base"]["knowledge"][0]["text"])
    reference = result["equal_score"]["reference"]
    rows = []
    for task, found in result["equal_score"]["tasks"].items():
        for arm, one in found["arms"].items():
            if one["ratio"] is None:
                reached = f"not reached ({one['reached']:.0%} of draws)"
                rows.append([task, f"{found['accuracy']:.3f}", arm, reached, "", ""])
                continue
            low, high = one["interval"]
            told = f"{low:.2f} to {f'{high:.2f}' if high is not None else 'not reached'}"
            rows.append(
                [task, f"{found['accuracy']:.3f}", arm, f"{one['forgotten']:.4f}",
                 f"{one['ratio']:.2f}", "" if arm == reference else told]
            )  # fmt: skip
    label = next(_measures(result))[3]
    return Table(["task", "accuracy", "arm", f"{label}, {text}", f"of {reference}'s", "95 %"], rows)


def rates(result: Mapping[str, Any]) -> Table:
    """Held-out loss of every arm at every rate, by which the rates were chosen."""
    tried = sorted(
        {rate for found in result["arms"].values() for rate in found["tried"]}, key=float
    )
    rows = []
    for arm, found in result["arms"].items():
        cells = [arm]
        for rate in tried:
            loss = found["tried"].get(rate, {"held_out_loss": ""})["held_out_loss"]
            text = "diverged" if loss is None else f"{loss:.4f}" if loss != "" else ""
            cells.append(f"{text} (chosen)" if rate == f"{found['learning_rate']:g}" else text)
        rows.append(cells)
    return Table(["arm", *tried], rows)


def explanation(result: Mapping[str, Any]) -> list[str]:
    seeds = ", ".join(map(str, result["seeds"]))
    return [
        f"Mean ± standard deviation over seeds {seeds}; each arm at the rate with the smallest "
        "loss on held-out rows, that of the first seed or, where all seeds ran at every rate, the "
        "mean over them. Scores are of test rows, which took no part in that.",
        "Differences: each row's score is averaged over the seeds, and the rows are resampled "
        "(paired bootstrap), which says how far another test set would move them, not other seeds. "
        "One in twenty goes beyond chance by chance.",
    ]


def tables(result: Mapping[str, Any]) -> str:
    """compare.json as Markdown."""
    scored, told = explanation(result)
    lines = [*markdown(scores(result)), "", scored, "", "Held-out loss by learning rate:", ""]
    lines += [*markdown(rates(result)), "", *markdown(differences(result)), "", told, ""]
    if equal := equal_score(result):
        lines += [*markdown(equal), "", EQUAL, ""]
    lines += [f"- {harmless(note)}" for note in result["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def markdown(table: Table) -> list[str]:
    """The lines of a table, its cells made harmless."""
    lines = [table.head, ["---"] * len(table.head), *table.rows]
    return [f"| {' | '.join(harmless(cell) for cell in line)} |" for line in lines]


def page(result: Mapping[str, Any], drawing: str) -> str:
    """One self-contained HTML page; `drawing` is SVG of `plot`, or empty."""
    scored, told = explanation(result)
    return render(
        "compare.html",
        arms=list(result["arms"]), scores=scores(result), rates=rates(result),
        differences=differences(result), equal=equal_score(result), equally=EQUAL,
        notes=result["notes"], scored=scored, told=told,
        drawing=inline(drawing, "accuracy against how far the model moved, by arm"),
    )  # fmt: skip


def plot(result: Mapping[str, Any]) -> str:
    """SVG: accuracy of each task against how far the model moved on the first general text.

    A mark an arm at its own rate, with bars of one standard deviation over the seeds; the thin
    line joins all rates that were tried, as means over the seeds where all ran at several, else
    of the first seed. Raises ImportError without matplotlib.
    """
    with inked():
        return _plot(result)


def _plot(result: Mapping[str, Any]) -> str:
    from matplotlib.figure import Figure

    names = list(next(iter(result["arms"].values()))["tasks"])
    kept = next(_measures(result))
    arms, across = len(result["arms"]), max(len(names), 1)
    size = (max(7.6, 4.6 * across), 4.0 + 0.19 * -(-arms // across))
    sheet = Figure(figsize=size, layout="constrained")
    panels = sheet.subplots(1, max(len(names), 1), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=False):
        base = result["base"]["tasks"][name]["accuracy"]
        panel.axhline(base, color="#808080", lw=1, ls=":")
        own = []  # the marks; the frame is theirs, and lines to poorer rates may leave it
        for place, (arm, found) in enumerate(result["arms"].items()):
            colour, again = COLOURS[place % len(COLOURS)], place // len(COLOURS)
            mark = MARKS[(place + again) % len(MARKS)]
            tried = [one for one in found["tried"].values() if one["held_out_loss"] is not None]
            panel.plot(
                [one["knowledge"][kept[0]] for one in tried],
                [one["accuracy"][name] for one in tried], color=colour, lw=0.8, alpha=0.45,
                ls=LINES[again % len(LINES)], marker=".", ms=4,
            )  # fmt: skip
            score, far = found["tasks"][name]["accuracy"], found["knowledge"][kept[0]][kept[1]]
            if far["mean"] is None:
                continue
            own.append((far["mean"], score["mean"]))
            panel.errorbar(
                far["mean"], score["mean"], xerr=far["deviation"], yerr=score["deviation"],
                fmt=mark, color=colour, capsize=3, mfc="white" if again else colour,
                label=f"{label(arm)} at {found['learning_rate']:g}",
            )  # fmt: skip
        panel.set_xscale("log")
        heights = [score for _, score in own]
        room = max(0.02, max(heights) - min(heights))
        low, high = max(-0.02, min(heights) - room), min(1.02, max(heights) + room)
        panel.set_ylim(low, high)
        panel.set_xlim(min(far for far, _ in own) / 3, max(far for far, _ in own) * 3)
        shown = "dotted: base" if low <= base <= high else f"base: {base:.3f}"
        panel.set_title(f"{name} ({shown})", fontsize=11, loc="left")
        panel.set_xlabel(f"{kept[3]}, {short(result['base']['knowledge'][0]['text'])}: forgotten")
        panel.set_ylabel("accuracy: learned")
    handles, labels = panels[0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=9, ncols=across)
    return svg(sheet)


def label(arm: str) -> str:
    """`milora:milora.start=balanced:milora.protect=64` as "milora, start=balanced, protect=64"."""
    method, *others = arm.split(":")
    return ", ".join([method, *(other.partition(".")[2] or other for other in others)])


def plus_minus(found: Mapping[str, Any], digits: int) -> str:
    mean = figure(found["mean"], digits)
    if found["deviation"] is None:
        return mean
    return f"{mean}\u00a0±\u00a0{found['deviation']:.{digits}f}"
