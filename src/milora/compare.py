"""Methods x learning rates x seeds, compared as one would want to be compared oneself.

Every arm is tried at every rate with the first seed; the rate with the smallest loss on the
held-out rows is its own; the other seeds run at that rate. With all seeds at every rate the mean
over them chooses. The test tasks take no part in the choice. Each run is an ordinary run folder and
leaves one file with all that is needed of it, so that a stopped comparison goes on where it was.

    OUTPUT_DIR/<arm>-<rate>-<seed>/       the runs
    OUTPUT_DIR/<arm>-<rate>-<seed>.json   what each came to
    OUTPUT_DIR/compare.json               all figures
    OUTPUT_DIR/compare.md, compare.html   the tables; the page has the plot too
    OUTPUT_DIR/compare.svg                learned against kept, with the extra `plot`
"""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from milora.arguments import training_arguments
from milora.compare_page import page, plot, tables
from milora.config import Config, load_config
from milora.errors import DivergedError, UserError
from milora.files import read_lines, read_record, write_json, write_text
from milora.fronts import matched
from milora.pages import standalone
from milora.pretrained import dtype_of
from milora.progress import Progress
from milora.ready import check_alone
from milora.recommended import BEFORE, as_before
from milora.train import train

METHODS: tuple[str, ...] = get_args(Config.model_fields["method"].annotation)
WIDEN_AT_MOST = 4  # rates that are added to those given, for each arm

Outcome = dict[str, Any]
Outcomes = dict[tuple[str, float, int], Outcome]  # by arm, learning rate and seed
Make = Callable[[Config, Progress], Outcome]  # does a run; raises DivergedError


# What an arm cannot have of its own, for it to be comparable with the others.
SAME_FOR_ALL = (
    "method", "seed", "output_dir", "training.learning_rate", "model", "dtype", "quantization",
    "trust_remote_code", "tokenizer", "data", "evaluate",
)  # fmt: skip

# What must be equal, since it says how large an update is and how many numbers it has.
SCALE: dict[str, Any] = {
    "lora.r": None, "lora.lora_alpha": None, "lora.use_rslora": False, "lora.alpha_pattern": {}
}  # fmt: skip


class Arm(NamedTuple):
    name: str  # as it was asked for
    overrides: list[str]  # method=..., and what else makes it differ
    rates: Sequence[float] = ()  # of its own, in place of those of all


def arms_of(text: str) -> list[str]:
    """What stands between commas that a method follows: those in a value of an override stay."""
    methods = "|".join(METHODS)
    found = re.split(rf",\s*(?=(?:{methods})\s*(?:[:,]|$)|$)", text)
    return [arm.strip() for arm in found if arm.strip()]


def parse_arm(text: str) -> Arm:
    """METHOD, or METHOD:key=value[:key=value ...] for a variant of it.

    `lora:training.weight_decay=0.1` is LoRA with weight decay. Raises UserError.
    """
    method, more, rest = text.partition(":")
    others = re.split(r":(?=[\w.]+=)", rest) if more else []  # a value may hold a colon too
    if method not in METHODS:
        raise UserError(f"--methods: {method!r} is none of {', '.join(METHODS)}")
    for other in others:
        key, is_pair, _ = other.partition("=")
        if not is_pair:
            raise UserError(f"--methods: {text!r}: {other!r} is not key=value")
        if key in SAME_FOR_ALL or key.partition(".")[0] in SAME_FOR_ALL:
            raise UserError(
                f"--methods: {text!r}: {key} is the same for all arms, or the comparison's to "
                "choose: set it in the configuration, by --seeds or by --learning-rates"
            )
    return Arm(text, [f"method={method}", *others])


def compare(
    config: Path,
    overrides: Sequence[str],
    arms: Sequence[Arm],
    seeds: Sequence[int],
    rates: Sequence[float],
    progress: Progress,
    widen: bool = False,
    every_rate: bool = False,
    make: Make | None = None,
) -> dict[str, Any]:
    """Run what is missing and return the content of compare.json; see `grid` for the two switches.

    `make` does one run in place of `milora train`, for methods that it does not have.
    Raises UserError for settings under which there is nothing to choose by or to compare.
    """
    home = Path(load_config(config, overrides).output_dir)
    if (home / "run.json").exists():
        raise UserError(f"output_dir: {home} holds a run: compare in another, output_dir=FOLDER")

    def settings(arm: Arm, rate: float, seed: int) -> Config:
        folder = home / run_name(arm.name, rate, seed)
        return load_config(
            config,
            [*overrides, *arm.overrides, f"training.learning_rate={rate!r}", f"seed={seed}",
             f"output_dir={json.dumps(str(folder))}"],
        )  # fmt: skip

    each = [(arm, rate) for arm in arms for rate in arm.rates or rates]
    _check_given(arms, seeds, rates)
    every = [settings(arm, rate, seed) for arm, rate in each for seed in seeds]
    _check(every)
    for one in every if make is None else ():
        _check_arm(one)

    def run(arm: Arm, rate: float, seed: int) -> Outcome:
        return _outcome(settings(arm, rate, seed), make or trained, progress)

    outcomes = grid(arms, seeds, rates, run, progress, widen, every_rate)
    result = summary(outcomes, seeds)
    write(result, home, progress)
    return result


def grid(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    rates: Sequence[float],
    run: Callable[[Arm, float, int], Outcome],
    progress: Progress,
    widen: bool = False,
    every_rate: bool = False,
) -> Outcomes:
    """The outcomes of every arm at every rate with the first seed, then of all seeds at its best.

    With `widen`, while an arm's best rate is the smallest or largest it was tried at, one more
    beyond it is tried, at the distance of its neighbour, WIDEN_AT_MOST times. With `every_rate` all
    seeds run at all its rates, so that arms can be compared at equal score (fronts.py).
    """
    _check_given(arms, seeds, rates)
    for arm, (rate, *more) in ((arm, arm.rates or rates) for arm in arms):
        if widen and not more:
            raise UserError(
                f"--widen: {arm.name} has one rate, {rate:g}, and the distance to the next comes "
                "from two: give another, for all by --learning-rates"
            )
    outcomes: Outcomes = {}
    first = seeds[0]
    tried = [len(arm.rates or rates) for arm in arms]
    count = sum(n + (n if every_rate else 1) * (len(seeds) - 1) for n in tried)

    def one(arm: Arm, rate: float, seed: int) -> None:
        nth = len(outcomes) + 1
        progress.say(f"--- run {nth} of {max(nth, count)}: {arm.name} at {rate:g}, seed {seed}")
        outcomes[arm.name, rate, seed] = run(arm, rate, seed)

    for arm in arms:
        for rate in arm.rates or rates:
            one(arm, rate, first)
        for _ in range(WIDEN_AT_MOST if widen else 0):
            beyond = _beyond(_losses(outcomes, arm.name, first))
            if beyond is None:
                break
            count += 1
            one(arm, beyond, first)
        again = [chosen_rate(outcomes, arm.name, [first])]
        if every_rate:
            losses = _losses(outcomes, arm.name, first)
            again = [rate for rate, loss in losses.items() if math.isfinite(loss)]
        for rate in again:
            for seed in seeds[1:]:
                one(arm, rate, seed)
    return outcomes


def _losses(outcomes: Outcomes, arm: str, seed: int) -> dict[float, float]:
    """Held-out loss of each rate that was tried with `seed`, infinite where it diverged."""
    found = {}
    for (name, rate, drawn), outcome in outcomes.items():
        if name == arm and drawn == seed:
            loss = outcome["held_out_loss"]
            found[rate] = math.inf if loss is None else loss
    return dict(sorted(found.items()))


def chosen_rate(outcomes: Outcomes, arm: str, seeds: Sequence[int]) -> float:
    """The rate with the smallest held-out loss. Raises UserError if the arm diverged at each.

    Of the first seed, or where several rates were run with all `seeds` the mean over these.
    """
    losses = _judged(outcomes, arm, seeds)
    best = min(losses, key=losses.__getitem__)
    if math.isinf(losses[best]):
        raise UserError(f"{arm} diverged at every rate: give lower --learning-rates")
    return best


def _judged(outcomes: Outcomes, arm: str, seeds: Sequence[int]) -> dict[float, float]:
    """What `chosen_rate` chooses by, for every rate: infinite where one of the runs diverged."""
    first = _losses(outcomes, arm, seeds[0])
    if not (whole := _whole(outcomes, arm, seeds)):
        return first
    of = [_losses(outcomes, arm, seed) for seed in seeds]
    return {
        rate: statistics.fmean(one[rate] for one in of) if rate in whole else math.inf
        for rate in first
    }


def _whole(outcomes: Outcomes, arm: str, seeds: Sequence[int]) -> list[float]:
    """The rates that were run with all `seeds`; none where that is the chosen one alone."""
    rates = [rate for name, rate, seed in outcomes if (name, seed) == (arm, seeds[0])]
    whole = [rate for rate in rates if all((arm, rate, seed) in outcomes for seed in seeds)]
    return whole if len(whole) > 1 else []


def _beyond(losses: Mapping[float, float]) -> float | None:
    """The rate to try next when the best is at an edge; `losses` by rate, in order."""
    rates = list(losses)
    best = min(rates, key=losses.__getitem__)
    if math.isinf(losses[best]) or best not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / neighbour:.2g}")


def run_name(arm: str, rate: float, seed: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', arm)}-{rate:g}-{seed}"


def _check_given(arms: Sequence[Arm], seeds: Sequence[int], rates: Sequence[float]) -> None:
    for what, given in (("methods", [arm.name for arm in arms]), ("seeds", seeds),
                        ("learning-rates", rates)):  # fmt: skip
        if not given or len(set(given)) < len(given):
            raise UserError(f"--{what}: each must be given once, and one at least")
    for rate in (*rates, *(rate for arm in arms for rate in arm.rates)):
        if not 0 < rate < math.inf:
            raise UserError(f"--learning-rates: {rate:g}: a number above 0 is needed")


def _check(settings: Sequence[Config]) -> None:
    for one in settings:
        if one.training.get("eval_strategy") in ("no", False):
            raise UserError("compare chooses rates by held-out loss: training.eval_strategy is no")
        if not one.evaluate.tasks:
            raise UserError("compare reports on test tasks: name some under evaluate.tasks")
    scales = [_scale(one) for one in settings if one.method != "full"]
    if differ := [key for key in SCALE if any(one[key] != scales[0][key] for one in scales)]:
        said = {", ".join(f"{key} {one[key]}" for key in differ) for one in scales}
        raise UserError(
            f"the arms differ in {', '.join(differ)}, which must be equal: "
            f"{' and '.join(sorted(said))}"
        )
    in_full = {
        one.method == "full" or bool(one.lora.model_dump().get("modules_to_save"))
        for one in settings
    }
    rounded = dtype_of("auto") != torch.float32
    if len(in_full) > 1 and rounded and any(one.dtype == "auto" for one in settings):
        raise UserError(
            "dtype: auto loads what trains in full in fp32 and the base of an adapter in 16 bits "
            "where the device has them: for the same base in all arms set dtype: float32"
        )


def _check_arm(settings: Config) -> None:
    """Raise UserError now for what would end the comparison when the turn of this arm comes."""
    asked = as_before(settings.model_dump(), resume=False)
    milora, run = asked["milora"], Path(settings.output_dir)
    patience = settings.early_stopping_patience
    check_alone(
        asked,
        training_arguments(
            settings.method, settings.training, run, settings.seed, patience, milora["start"]
        ),
    )


def _scale(settings: Config) -> dict[str, Any]:
    lora = {f"lora.{key}": value for key, value in settings.lora.model_dump().items()}
    return {key: lora.get(key) or default for key, default in SCALE.items()}


def _outcome(settings: Config, make: Make, progress: Progress) -> Outcome:
    """What the run came to, from its file, or by doing the run or the rest of it."""
    folder = Path(settings.output_dir)
    file = folder.with_name(folder.name + ".json")
    asked = settings.model_dump(exclude={"output_dir"})
    if file.exists():
        found: Outcome = read_record(file)
        # Through Config, so that a key that is new since then has its default; a run that says
        # nothing of its start was made when there was only the published one.
        before = found["settings"] | {"output_dir": ""}
        before["milora"] = BEFORE | before["milora"]
        stored = Config.model_validate(before).model_dump()
        differ = [key for key in asked if stored[key] != asked[key]]
        if differ:
            raise UserError(
                f"{file} is of other settings ({', '.join(differ)}): choose another output_dir, or "
                "remove it and its folder to do that run again"
            )
        return found
    try:
        outcome = {"settings": asked, **make(settings, progress)}
    except DivergedError as error:
        progress.say(str(error))
        outcome = {"settings": asked, "held_out_loss": None, "diverged": str(error)}
    write_json(file, outcome)
    return outcome


def trained(settings: Config, progress: Progress) -> Outcome:
    """What a run of `milora train` comes to, begun or gone on with; raises DivergedError."""
    folder = Path(settings.output_dir)
    record = train(**settings.model_dump(), resume=folder.exists(), progress=progress)
    return {
        "held_out_loss": held_out_loss(folder, record.get("result_step")),
        "trained_parameters": record["parameters"]["trainable"],
        "seconds": record["seconds"],
        "versions": record["versions"],
        "base_sha256": record["base"]["sha256"],
        "data_sha256": record["data"]["sha256"],
        "test_overlap": record["data"].get("test_overlap", {}),
        "interference": {key: record["interference"][key] for key in ("max", "mean", "size")}
        if "interference" in record
        else None,
        "evaluation": read_record(folder / "evaluation.json"),
        "right": rows_right(folder / "samples.jsonl"),
    }


def held_out_loss(folder: Path, step: int | None = None) -> float:
    """Of the state that a run's result is of, at `step`: the last until then of metrics.jsonl.

    The first of all where it was measured later only; UserError where there is none.
    """
    lines = read_lines(folder / "metrics.jsonl")
    held = [(line["step"], float(line["eval_loss"])) for line in lines if "eval_loss" in line]
    if not held:
        raise UserError(f"{folder} has no held-out loss: its training.eval_strategy never came up")
    until = [loss for at, loss in held if step is None or at <= step]
    return until[-1] if until else held[0][1]


def rows_right(samples: Path) -> dict[str, str]:
    """By task, a 1 for every row that the tuned model had right and a 0 for every other."""
    found: dict[str, list[str]] = {}
    for sample in read_lines(samples):
        tuned = sample["tuned"]
        if "verdict" in tuned:
            right = tuned["verdict"] == "right"
        elif "likeliest" in tuned:
            right = tuned["likeliest"] == sample["right"]
        else:
            continue  # of the harness, whose metrics are its own
        found.setdefault(sample["task"], []).append("01"[right])
    return {task: "".join(values) for task, values in found.items()}


def summary(outcomes: Outcomes, seeds: Sequence[int]) -> dict[str, Any]:
    """The content of compare.json, from the outcomes that `grid` returns for these seeds.

    Raises UserError for an arm without a rate that works, and for runs of several bases or data.
    """
    _check_alike(outcomes)
    arms = list(dict.fromkeys(arm for arm, _, _ in outcomes))
    chosen = {arm: chosen_rate(outcomes, arm, seeds) for arm in arms}
    of_chosen = {arm: [outcomes[arm, rate, seed] for seed in seeds] for arm, rate in chosen.items()}
    for arm, found in of_chosen.items():
        for seed, outcome in zip(seeds, found, strict=True):
            if "diverged" in outcome:
                raise UserError(
                    f"{arm} diverged at {chosen[arm]:g} with seed {seed}, though not with seed "
                    f"{seeds[0]}: give it lower --learning-rates"
                )
    result: dict[str, Any] = {
        "seeds": list(seeds),
        "base": _base(of_chosen[arms[0]][0]["evaluation"]),
        "arms": {},
        "machines": _machines(outcomes),
        "pairs": _pairs(of_chosen),
    }
    for arm in arms:
        losses, whole = _judged(outcomes, arm, seeds), _whole(outcomes, arm, seeds)
        result["arms"][arm] = {
            "learning_rate": chosen[arm],
            "at_the_edge": _beyond(losses) is not None if len(losses) > 1 else False,
            "tried": {
                f"{rate:g}": _tried(
                    [outcomes[arm, rate, seed] for seed in (seeds if rate in whole else seeds[:1])],
                    loss,
                )
                for rate, loss in losses.items()
            },
            **_over_seeds(of_chosen[arm]),
        }  # fmt: skip
    counts = {arm: len(rates) for arm, rates in _on_front(outcomes, arms, seeds).items()}
    if len(arms) > 1 and (equal := _at_equal_score(outcomes, arms, seeds, chosen[arms[0]])):
        result["equal_score"] = {
            "reference": arms[0], "rate": chosen[arms[0]], "tasks": equal, "rates": counts
        }  # fmt: skip
    result["notes"] = [*_notes(result), *_chosen_on_tests(outcomes)]
    few = [arm for arm, count in counts.items() if count < 2]
    if len(arms) > 1 and few and len(few) < len(arms):
        result["notes"].append(
            "there is no table at equal score, since there are fewer than two rates at which all "
            f"seeds ran through of {', '.join(few)}"
        )
    return result


def _at_equal_score(
    outcomes: Outcomes, arms: Sequence[str], seeds: Sequence[int], rate: float
) -> dict[str, Any]:
    """By task: fronts.matched at the accuracy of the first arm at its rate, over the rates that all
    seeds were run at. Empty where there is one rate an arm, or what moved is not measured.
    """
    whole = _on_front(outcomes, arms, seeds)
    if any(len(rates) < 2 for rates in whole.values()) or rate not in whole[arms[0]]:
        return {}
    forgotten = {
        arm: {one: statistics.fmean(map(_forgotten, of)) for one, of in rates.items()}  # type: ignore[arg-type]
        for arm, rates in whole.items()
    }
    return {
        task: matched(
            {arm: {one: row_means(of, task) for one, of in r.items()} for arm, r in whole.items()},
            forgotten, arms[0], rate,
        )
        for task in whole[arms[0]][rate][0]["right"]
    }  # fmt: skip


def _on_front(
    outcomes: Outcomes, arms: Sequence[str], seeds: Sequence[int]
) -> dict[str, dict[float, list[Outcome]]]:
    """By arm and rate the runs of all seeds, where each was made and what moved is a number."""
    whole: dict[str, dict[float, list[Outcome]]] = {arm: {} for arm in arms}
    for arm, one in dict.fromkeys((arm, one) for arm, one, _ in outcomes):
        found = [outcomes.get((arm, one, seed)) for seed in seeds]
        measured = [o for o in found if o and _forgotten(o) is not None]
        if len(measured) == len(seeds):
            whole[arm][one] = measured
    return whole


def _forgotten(outcome: Outcome) -> float | None:
    """On the first general text; None where the run diverged or a figure is not finite."""
    if "diverged" in outcome:
        return None
    kept = outcome["evaluation"]["knowledge"][0]
    value: float | None = kept[measure_of(kept)]
    return value


def _check_alike(outcomes: Outcomes) -> None:
    for what in ("base_sha256", "data_sha256"):
        seen: dict[str, str] = {}
        for (arm, rate, seed), outcome in outcomes.items():
            if what in outcome:
                seen.setdefault(json.dumps(_shared(outcome, what)), run_name(arm, rate, seed))
        if len(seen) > 1:
            first, second, *_ = seen.values()
            raise UserError(
                f"{first}.json and {second}.json are of different {what.partition('_')[0]}: the "
                "model or a file has changed since the comparison began; choose another output_dir"
            )


def _shared(outcome: Outcome, what: str) -> Any:
    """Without the files that an arm may have of its own: milora.text, and those of earlier runs."""
    asked = outcome.get("settings")
    if what != "data_sha256" or asked is None:
        return outcome[what]
    evaluate = asked["evaluate"]
    texts = evaluate["knowledge"]
    tasks = [task if isinstance(task, str) else task["file"] for task in evaluate["tasks"]]
    used = {asked["data"]["train"], asked["data"]["eval"], *tasks}
    used |= {texts} if isinstance(texts, str) else set(texts)
    return {
        file: digest
        for file, digest in outcome[what].items()
        if file in used or " pictures of " in file
    }


def _machines(outcomes: Outcomes) -> dict[str, int]:
    """How many runs were made with which device and torch."""
    found: Counter[str] = Counter()
    for outcome in outcomes.values():
        if "versions" in outcome:
            device = outcome["evaluation"].get("settings", {}).get("device", "cpu")
            found[f"{device}, torch {outcome['versions']['torch'].partition('+')[0]}"] += 1
    return dict(found)


def _tried(runs: Sequence[Outcome], loss: float) -> dict[str, Any]:
    """Means over the runs at a rate, and the loss that the rate was judged by."""
    judged = {"held_out_loss": loss if math.isfinite(loss) else None}
    if any("diverged" in run for run in runs):
        return judged
    means = _over_seeds(runs)
    return judged | {
        "accuracy": {name: task["accuracy"]["mean"] for name, task in means["tasks"].items()},
        "knowledge": [one[measure_of(one)]["mean"] for one in means["knowledge"]],
    }


def measure_of(knowledge: Mapping[str, Any]) -> str:
    """By which figure it is said how far a model moved: KL, or "moved" for sentence embeddings."""
    return "kl" if "kl" in knowledge else "moved"


def _scored(evaluation: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(n, task) for n, task in evaluation["tasks"].items() if "accuracy" in task["tuned"]]


def _over_seeds(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    evaluations = [outcome["evaluation"] for outcome in outcomes]
    tasks = {}
    for name, task in _scored(evaluations[0]):
        each = [evaluation["tasks"][name]["tuned"] for evaluation in evaluations]
        tasks[name] = {
            "rows": task["rows"],
            **{
                key: spread([one[key] for one in each])
                for key in ("accuracy", "format_failures", "accuracy_normalised")
                if key in each[0]
            },
        }
    knowledge = []
    for place, kept in enumerate(evaluations[0]["knowledge"]):
        own = [evaluation["knowledge"][place] for evaluation in evaluations]
        given = ("text", "tokens", "base_perplexity")
        measured = [key for key in kept if key not in given]
        knowledge.append(
            {"text": kept["text"], **{key: spread([one[key] for one in own]) for key in measured}}
        )
    return {
        "trained_parameters": outcomes[0]["trained_parameters"],
        "interference": spread([(one.get("interference") or {}).get("max") for one in outcomes]),
        "training_seconds": spread([one["seconds"].get("training", 0.0) for one in outcomes]),
        "tasks": tasks,
        "knowledge": knowledge,
    }


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (None for one), and each; None where one is None."""
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return {"mean": None, "deviation": None, "each": list(values)}
    deviation = statistics.stdev(finite) if len(finite) > 1 else None
    return {"mean": statistics.fmean(finite), "deviation": deviation, "each": finite}


def _base(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tasks": {
            name: {key: task["base"][key] for key in ("accuracy", "interval")}
            | {key: task[key] for key in ("chance", "majority") if key in task}
            for name, task in _scored(evaluation)
        },
        "knowledge": [
            {key: kept[key] for key in ("text", "base_perplexity") if key in kept}
            for kept in evaluation["knowledge"]
        ],
    }


def _pairs(chosen: Mapping[str, Sequence[Outcome]]) -> list[dict[str, Any]]:
    """Accuracy of the first arm less the second's, for each pair, by a paired bootstrap."""
    found, names = [], list(chosen)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            for task in chosen[first][0]["right"]:
                difference = row_means(chosen[first], task) - row_means(chosen[second], task)
                low, high = bootstrap(difference)
                found.append(
                    {"first": first, "second": second, "task": task,
                     "difference": float(difference.mean()), "interval": [low, high]}
                )  # fmt: skip
    return found


def row_means(outcomes: Sequence[Outcome], task: str) -> Tensor:
    """Each row's mean over the seeds, (rows,) fp64, so that what is resampled is the test set."""
    rows = [[float(digit) for digit in outcome["right"][task]] for outcome in outcomes]
    return torch.tensor(rows, dtype=torch.float64).mean(0)


def bootstrap(values: Tensor, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values` (n,) under resampling of its entries (percentile)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    means = []
    for first in range(0, draws, 1000):
        size = (min(1000, draws - first), len(values))
        means.append(values[torch.randint(len(values), size, generator=generator)].mean(1))
    limits = torch.tensor([0.025, 0.975], dtype=torch.float64)
    # A limit of zero, which differences of accuracies have, comes out of the sums as one of 1e-18.
    low, high = torch.cat(means).double().quantile(limits).round(decimals=12).tolist()
    return low + 0.0, high + 0.0


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
                "so that a better one may lie outside (--widen looks there)"
            )
    counts = result.get("equal_score", {}).get("rates", {})
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{arm} {count}" for arm, count in counts.items())
        notes.append(
            "at equal score every further rate that all seeds ran at is to an arm's advantage, and "
            f"they do not have equally many: {listed}"
        )
    if len(result["machines"]) > 1:
        listed = "; ".join(
            f"{count} with {machine}" for machine, count in result["machines"].items()
        )
        notes.append(f"the runs were made on different machines, which round differently: {listed}")
    if len(result["seeds"]) < 3:
        notes.append(f"{len(result['seeds'])} seed(s): too few to tell methods apart")
    return notes


def _chosen_on_tests(outcomes: Outcomes) -> list[str]:
    """A note for each task of which rows took part in the choice of the rates."""
    most: dict[str, int] = {}  # the held-out rows may be others with each seed
    for outcome in outcomes.values():
        for task, counts in outcome.get("test_overlap", {}).items():
            most[task] = max(most.get(task, 0), counts["eval"])
    return [
        f"{task}: {count} of its questions also stand in the held-out rows, by which the rates "
        "were chosen, so that its scores are not of rows that took no part"
        for task, count in most.items()
        if count
    ]


def write(result: Mapping[str, Any], home: Path, progress: Progress) -> None:
    """compare.json, .md, .html and, where matplotlib is installed, .svg, into `home`."""
    write_json(home / "compare.json", result)
    write_text(home / "compare.md", tables(result))
    drawing = ""
    try:
        drawing = plot(result)
        write_text(home / "compare.svg", standalone(drawing))
    except ImportError:
        progress.say("no plot without matplotlib: pip install 'milora[plot]', and call it again")
    write_text(home / "compare.html", page(result, drawing))
