"""What each arm comes to when all its settings are searched for, on all-MiniLM-L6-v2.

    python benchmarks/search.py polarity [ARM ...]   # or trec, subjectivity; goes on where it was
    python benchmarks/search.py docs                 # the table of docs/results.md

Optuna draws as many settings for every arm (TPE over two aims: the loss on held-out rows, and how
far the embeddings of validation sentences moved). By successive halving the better half of them
runs with a second seed, and half of those with a third. Of LoRA that with the smallest held-out
loss is taken, the mean of its seeds; of every other arm, among those whose loss is no larger than
that of LoRA, the one that moved least. Test rows and texts take no part in it and are read once.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna import Trial
from optuna.samplers import TPESampler
from sentence_classifier import run
from tables import fill
from tasks import ROOT, require_data

from milora.compare import bootstrap, row_means
from milora.compare_page import Table, markdown
from milora.files import read_json, write_json
from milora.fronts import front

RESULTS = Path("benchmarks/results/search")
TASKS = ("polarity", "trec", "subjectivity")
RATES = 1e-4, 1e-2
TRIALS, KEPT = 8, (4, 2)  # settings with the first seed; that go on to the second and the third
LORA = "LoRA"


def _decay(trial: Trial) -> str:
    return f"training.weight_decay={_short(trial.suggest_float('decay', 0.03, 10, log=True))}"


def _inputs(trial: Trial) -> list[str]:
    start = trial.suggest_categorical("start", ["balanced", "directions"])
    inputs = trial.suggest_categorical("inputs", [16, 32, 64, 128, 192])
    return [f"milora.start={start}", f"milora.protect_inputs={inputs}"]


def _keep(trial: Trial) -> str:
    return f"milora.keep.weight={_short(trial.suggest_float('keep', 1, 100, log=True))}"


ARMS: dict[str, Callable[[Trial], list[str]]] = {
    LORA: lambda trial: ["method=lora"],
    "LoRA, weight decay": lambda trial: ["method=lora", _decay(trial)],
    "DoRA": lambda trial: ["method=lora", "lora.use_dora=true"],
    "MiCA": lambda trial: ["method=lora", "lora.init_lora_weights=mica"],
    "MiLoRA, published": lambda trial: ["method=milora"],
    "MiLoRA, inputs held": lambda trial: ["method=milora", *_inputs(trial)],
    "MiLoRA, inputs held, keep": lambda trial: ["method=milora", *_inputs(trial), _keep(trial)],
}


class Tried(NamedTuple):
    number: int
    outcomes: list[dict[str, Any]]  # by seed

    @property
    def loss(self) -> float:
        return statistics.fmean(one["held_out_loss"] for one in self.outcomes)

    @property
    def moved(self) -> float:
        """On the sentences that settings are chosen by."""
        return statistics.fmean(one["validation_moved"] for one in self.outcomes)


def _short(value: float) -> str:
    """Two digits, as one would write it."""
    return f"{value:.2g}"


def folder_of(task: str, arm: str) -> Path:
    return RESULTS / task / "".join(c if c.isalnum() else "-" for c in arm.lower())


def outcome(task: str, arm: str, number: int, overrides: list[str], rate: float, seed: int) -> Any:
    """Of one run, from its file where there is one."""
    file = folder_of(task, arm) / f"{number}-{seed}.json"
    if not file.exists():
        found = run(task, overrides, rate, seed)
        write_json(file, {**found, "overrides": overrides, "learning_rate": rate})
        loss = found["held_out_loss"]
        print(f"{task}, {arm}, {number}, seed {seed}: loss {loss:.4f}", flush=True)
    found = read_json(file)
    if (found["overrides"], found["learning_rate"]) != (overrides, rate):
        raise SystemExit(f"{file} is of other settings: remove {file.parent} and search again")
    return found


def search(task: str, arm: str) -> list[Tried]:
    """All settings of an arm that ran with every seed, from the best on."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=["minimize", "minimize"], sampler=TPESampler(n_startup_trials=6, seed=0)
    )
    tried: list[Tried] = []
    asked: dict[int, tuple[list[str], float]] = {}
    for number in range(TRIALS):
        trial = study.ask()
        rate = float(_short(trial.suggest_float("rate", *RATES, log=True)))
        asked[number] = ARMS[arm](trial), rate
        one = Tried(number, [outcome(task, arm, number, *asked[number], 0)])
        study.tell(trial, [one.loss, one.moved])
        tried.append(one)
    for seed, count in enumerate(KEPT, 1):
        tried = better(tried, count)
        for one in tried:
            one.outcomes.append(outcome(task, arm, one.number, *asked[one.number], seed))
    return better(tried, len(tried))


def better(tried: Sequence[Tried], count: int) -> list[Tried]:
    """So many, front after front of (loss, moved), and by loss within one."""
    left, found = list(tried), list[Tried]()
    while len(found) < count:
        best = set(front([(-one.loss, one.moved) for one in left]))
        leading = [one for one in left if (-one.loss, one.moved) in best]
        found += sorted(leading, key=lambda one: one.loss)
        left = [one for one in left if one not in leading]
    return found[:count]


def chosen(finalists: dict[str, list[Tried]]) -> dict[str, Tried]:
    taken = {LORA: min(finalists[LORA], key=lambda one: one.loss)}
    for arm, tried in finalists.items():
        if arm != LORA:
            level = [one for one in tried if one.loss <= taken[LORA].loss]
            taken[arm] = min(level or tried, key=lambda one: one.moved if level else one.loss)
    return taken


def rows(task: str, finalists: dict[str, list[Tried]]) -> Iterator[list[str]]:
    taken = chosen(finalists)
    reference = taken[LORA]
    for arm, one in taken.items():
        settings = [key for key in one.outcomes[0]["overrides"] if not key.startswith("method")]
        settings = [key.replace("milora.", "").replace("training.", "") for key in settings]
        apart = row_means(one.outcomes, task) - row_means(reference.outcomes, task)
        low, high = bootstrap(apart)
        moved, theirs = (_test_moved(each) for each in (one, reference))
        yield [
            task, arm, ", ".join([f"{one.outcomes[0]['learning_rate']:g}", *settings]),
            f"{one.loss:.3f}", f"{float(row_means(one.outcomes, task).mean()):.3f}",
            "" if arm == LORA else f"{float(apart.mean()):+.3f} ({low:+.3f} to {high:+.3f})",
            f"{moved:.4f}", f"{moved / theirs:.2f}",
        ]  # fmt: skip


def _test_moved(one: Tried) -> float:
    return statistics.fmean(each["evaluation"]["knowledge"][0]["moved"] for each in one.outcomes)


def finished(task: str) -> dict[str, list[Tried]]:
    """The arms whose search is whole, from their files alone."""
    found = {}
    for arm in ARMS:
        if len(list(folder_of(task, arm).glob("*.json"))) == TRIALS + sum(KEPT):
            found[arm] = search(task, arm)
    return found


def docs() -> None:
    head = ["task", "arm", "rate, settings", "held-out loss", "accuracy", "less LoRA's (95 %)"]
    head += ["moved", "of LoRA's"]
    found = {task: finished(task) for task in TASKS}
    every = [row for task in TASKS if LORA in found[task] for row in rows(task, found[task])]
    fill(Path("docs/results.md"), {"search": markdown(Table(head, every))})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=[*TASKS, "docs"])
    parser.add_argument("arms", nargs="*", help=f"of {'; '.join(ARMS)}; all where none is named")
    given = parser.parse_args()
    os.chdir(ROOT)
    require_data()
    if given.task == "docs":
        docs()
        return
    for arm in given.arms or ARMS:
        search(given.task, arm)


if __name__ == "__main__":
    main()
