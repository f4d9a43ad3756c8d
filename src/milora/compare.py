"""Methods x learning rates x seeds, compared as one would want to be compared oneself.

Every arm is tried at every rate with the first seed; the rate with the smallest loss on the
held-out rows is its own; the other seeds run at that rate. The test tasks take no part in the
choice. Each run is an ordinary run folder, so that a stopped comparison goes on where it was.

    OUTPUT_DIR/<arm>-<rate>-<seed>/   the runs
    OUTPUT_DIR/compare.json           all figures
    OUTPUT_DIR/compare.md             the tables
    OUTPUT_DIR/compare.png            learned against kept, with the extra `plot`
"""

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from milora.config import Config, load_config
from milora.errors import DivergedError, UserError
from milora.files import read_json, write_json, write_text
from milora.progress import Progress
from milora.train import train

METHODS: tuple[str, ...] = get_args(Config.model_fields["method"].annotation)


class Arm(NamedTuple):
    name: str  # as it was asked for
    overrides: list[str]  # method=..., and what else makes it differ


def parse_arm(text: str) -> Arm:
    """METHOD, or METHOD:key=value[:key=value ...] for a variant of it.

    `lora:training.weight_decay=0.1` is LoRA with weight decay. Raises UserError.
    """
    method, *others = text.split(":")
    if method not in METHODS:
        raise UserError(f"--methods: {method!r} is none of {', '.join(METHODS)}")
    for other in others:
        if "=" not in other:
            raise UserError(f"--methods: {text!r}: {other!r} is not key=value")
    return Arm(text, [f"method={method}", *others])


def compare(
    config: Path,
    overrides: Sequence[str],
    arms: Sequence[Arm],
    seeds: Sequence[int],
    rates: Sequence[float],
    progress: Progress,
) -> dict[str, Any]:
    """Run what is missing and return the content of compare.json.

    Raises UserError for settings under which there is nothing to choose by or to compare.
    """
    home = Path(load_config(config, overrides).output_dir)
    for what, given in (("methods", [arm.name for arm in arms]), ("seeds", seeds),
                        ("learning-rates", rates)):  # fmt: skip
        if not given or len(set(given)) < len(given):
            raise UserError(f"--{what}: each must be given once, and one at least")
    plan = {
        (arm.name, rate, seed): load_config(
            config,
            [*overrides, *arm.overrides, f"training.learning_rate={rate!r}", f"seed={seed}",
             f"output_dir={_folder(home, arm.name, rate, seed)}"],
        )
        for arm in arms for rate in rates for seed in seeds
    }  # fmt: skip
    _check(list(plan.values()))
    losses: dict[str, dict[float, float]] = {}
    first, chosen = seeds[0], dict[str, float]()
    count = len(arms) * (len(rates) + len(seeds) - 1)
    done = 0
    for arm in arms:
        losses[arm.name] = {}
        for rate in rates:
            done += 1
            progress.say(f"--- run {done} of {count}: {arm.name} at {rate:g}, seed {first}")
            losses[arm.name][rate] = _run(plan[arm.name, rate, first], progress)
        tried = losses[arm.name]
        best = min(tried, key=tried.__getitem__)
        if math.isinf(tried[best]):
            raise UserError(f"{arm.name} diverged at every rate: give lower --learning-rates")
        chosen[arm.name] = best
        for seed in seeds[1:]:
            done += 1
            progress.say(f"--- run {done} of {count}: {arm.name} at {best:g}, seed {seed}")
            _run(plan[arm.name, best, seed], progress)
    result = {
        "rates": list(rates),
        "seeds": list(seeds),
        "arms": {
            arm.name: _summary(home, arm.name, losses[arm.name], chosen[arm.name], seeds)
            for arm in arms
        },
    }
    result["base"] = _base(home, arms[0].name, chosen[arms[0].name], first)
    result["pairs"] = _pairs(home, chosen, seeds)
    result["notes"] = _notes(result)
    write_json(home / "compare.json", result)
    write_text(home / "compare.md", tables(result))
    try:
        plot(result, home / "compare.png")
    except ImportError:
        progress.say("compare.png needs matplotlib: pip install 'milora[plot]', and call it again")
    return result


def _folder(home: Path, arm: str, rate: float, seed: int) -> Path:
    return home / f"{re.sub(r'[^A-Za-z0-9.]+', '-', arm)}-{rate:g}-{seed}"


def _check(settings: Sequence[Config]) -> None:
    for one in settings:
        if one.training.get("eval_strategy") in ("no", False):
            raise UserError("compare chooses rates by held-out loss: training.eval_strategy is no")
        if not one.evaluate.tasks:
            raise UserError("compare reports on test tasks: name some under evaluate.tasks")
    scale = {
        (str(one.lora.r), str(one.lora.lora_alpha)) for one in settings if one.method != "full"
    }
    if len(scale) > 1:
        raise UserError(
            "the arms differ in lora.r or lora.lora_alpha, so that their scale is not equal: "
            f"{sorted(scale)}"
        )


def _run(settings: Config, progress: Progress) -> float:
    """Do the run unless it is done; its last loss on the held-out rows, infinite if it diverged."""
    folder = Path(settings.output_dir)
    marker = folder.with_name(folder.name + ".diverged")
    if marker.exists():
        return math.inf
    state = read_json(folder / "run.json")["state"] if (folder / "run.json").exists() else None
    if state != "done":
        try:
            train(**settings.model_dump(), resume=folder.exists(), progress=progress)
        except DivergedError as error:
            write_text(marker, f"{error}\n")
            progress.say(str(error))
            return math.inf
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    held = [json.loads(line)["eval_loss"] for line in lines if '"eval_loss"' in line]
    if not held:
        raise UserError(f"{folder} has no held-out loss: its training.eval_strategy never came up")
    return float(held[-1])


def _summary(
    home: Path, arm: str, losses: Mapping[float, float], rate: float, seeds: Sequence[int]
) -> dict[str, Any]:
    folders = [_folder(home, arm, rate, seed) for seed in seeds]
    evaluations = [read_json(folder / "evaluation.json") for folder in folders]
    record = read_json(folders[0] / "run.json")
    tasks = {}
    for name, task in evaluations[0]["tasks"].items():
        if "accuracy" not in task["tuned"]:
            continue
        each = [evaluation["tasks"][name]["tuned"] for evaluation in evaluations]
        tasks[name] = {
            "rows": task["rows"],
            "accuracy": _spread([one["accuracy"] for one in each]),
            **{
                key: _spread([one[key] for one in each])
                for key in ("format_failures", "accuracy_normalised")
                if key in each[0]
            },
        }
    kept = [evaluation["knowledge"] for evaluation in evaluations]
    finite = [r for r in losses if math.isfinite(losses[r])]
    return {
        "held_out_loss": {f"{r:g}": loss if math.isfinite(loss) else None
                          for r, loss in losses.items()},
        "learning_rate": rate,
        "at_the_edge": len(losses) > 2 and rate in (min(finite), max(losses)),
        "trained_parameters": record["parameters"]["trainable"],
        "training_seconds": _spread([read_json(f / "run.json")["seconds"].get("training", 0.0)
                                     for f in folders]),
        "tasks": tasks,
        "kl": _spread([one["kl"] for one in kept]),
        "perplexity": _spread([one["tuned_perplexity"] for one in kept]),
        "top_token_agreement": _spread([one["top_token_agreement"] for one in kept]),
    }  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (None for one), and each."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation, "each": list(values)}


def _base(home: Path, arm: str, rate: float, seed: int) -> dict[str, Any]:
    evaluation = read_json(_folder(home, arm, rate, seed) / "evaluation.json")
    return {
        "tasks": {
            name: {key: task["base"][key] for key in ("accuracy", "interval")}
            | {key: task[key] for key in ("chance", "majority") if key in task}
            for name, task in evaluation["tasks"].items()
            if "accuracy" in task["base"]
        },
        "perplexity": evaluation["knowledge"]["base_perplexity"],
        "text": evaluation["knowledge"]["text"],
    }


def _pairs(home: Path, chosen: Mapping[str, float], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Accuracy of the first arm less the second's, for each pair, by a paired bootstrap."""
    rows = {
        arm: [_row_scores(_folder(home, arm, rate, seed)) for seed in seeds]
        for arm, rate in chosen.items()
    }
    found, names = [], list(chosen)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            for task in rows[first][0]:
                # Each row's mean over the seeds, so that what is resampled is the test set.
                difference = torch.stack([run[task] for run in rows[first]]).mean(0)
                difference -= torch.stack([run[task] for run in rows[second]]).mean(0)
                low, high = bootstrap(difference)
                found.append(
                    {"first": first, "second": second, "task": task,
                     "difference": float(difference.mean()), "interval": [low, high]}
                )  # fmt: skip
    return found


def _row_scores(folder: Path) -> dict[str, Tensor]:
    """1 for every row that the tuned model had right, else 0, in fp64, by task."""
    found: dict[str, list[float]] = {}
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        tuned = sample["tuned"]
        if "verdict" in tuned:
            right = tuned["verdict"] == "right"
        elif "likeliest" in tuned:
            right = tuned["likeliest"] == sample["right"]
        else:
            continue  # of the harness, whose metrics are its own
        found.setdefault(sample["task"], []).append(float(right))
    return {task: torch.tensor(values, dtype=torch.float64) for task, values in found.items()}


def bootstrap(values: Tensor, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values` (n,) under resampling of its entries (percentile)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    means = []
    for first in range(0, draws, 1000):
        size = (min(1000, draws - first), len(values))
        means.append(values[torch.randint(len(values), size, generator=generator)].mean(1))
    limits = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.cat(means).double().quantile(limits).tolist()
    return low, high


def _notes(result: Mapping[str, Any]) -> list[str]:
    notes = []
    sizes = {arm: found["trained_parameters"] for arm, found in result["arms"].items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{arm} {size:,}" for arm, size in sizes.items())
        notes.append(f"the arms do not train equally many parameters: {listed}")
    for arm, found in result["arms"].items():
        if found["at_the_edge"]:
            notes.append(
                f"{arm}: the chosen rate {found['learning_rate']:g} is at the edge of those tried, "
                "so that a better one may lie outside"
            )
    if len(result["seeds"]) < 3:
        notes.append(f"{len(result['seeds'])} seed(s): too few to tell methods apart")
    return notes


def tables(result: Mapping[str, Any]) -> str:
    """compare.json as Markdown."""
    base, lines = result["base"], list[str]()
    names = list(base["tasks"])
    head = ["arm", "rate", *(f"{name}: accuracy" for name in names), "KL(base‖tuned)", "perplexity"]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    cells = ["base", "", *(f"{base['tasks'][name]['accuracy']:.3f}" for name in names), "0",
             f"{base['perplexity']:.2f}"]  # fmt: skip
    lines.append(f"| {' | '.join(cells)} |")
    for arm, found in result["arms"].items():
        cells = [arm, f"{found['learning_rate']:g}"]
        cells += [_pm(found["tasks"][name]["accuracy"], 3) for name in names]
        cells += [_pm(found["kl"], 4), _pm(found["perplexity"], 2)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Mean ± standard deviation over seeds {', '.join(map(str, result['seeds']))}; each arm at "
        "the rate with the smallest held-out loss. KL and perplexity on " + base["text"] + ".",
        "",
    ]
    head = ["task", "difference", "accuracy", "95 % (paired bootstrap over rows)"]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for pair in result["pairs"]:
        low, high = pair["interval"]
        lines.append(
            f"| {pair['task']} | {pair['first']} − {pair['second']} | {pair['difference']:+.3f} | "
            f"{low:+.3f} to {high:+.3f} |"
        )
    lines += ["", *(f"- {note}" for note in result["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy of each task against KL from the base, a point an arm, bars over the seeds.

    Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    names = list(result["base"]["tasks"])
    figure = Figure(figsize=(1 + 4.2 * max(len(names), 1), 4.2), layout="constrained")
    panels = figure.subplots(1, max(len(names), 1), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=False):
        panel.axhline(result["base"]["tasks"][name]["accuracy"], color="#6B6B6B", lw=1, ls=":")
        for arm, found in result["arms"].items():
            score, kl = found["tasks"][name]["accuracy"], found["kl"]
            drawn = panel.errorbar(
                kl["mean"], score["mean"], xerr=kl["deviation"], yerr=score["deviation"],
                fmt="o", capsize=3,
            )  # fmt: skip
            panel.annotate(
                f"{arm}\n{found['learning_rate']:g}", (kl["mean"], score["mean"]),
                xytext=(6, 4), textcoords="offset points", fontsize=9,
                color=drawn.lines[0].get_color(),
            )  # fmt: skip
        panel.set_title(f"{name} (dotted: base)", fontsize=11, loc="left")
        panel.set_xlabel("KL(base‖tuned) per token: forgotten")
        panel.set_ylabel("accuracy: learned")
        panel.margins(0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def _pm(found: Mapping[str, Any], digits: int) -> str:
    mean = f"{found['mean']:.{digits}f}"
    if found["deviation"] is None:
        return mean
    return f"{mean} ± {found['deviation']:.{digits}f}"
