"""What a chain of updates has learned and kept: every release on every task of it.

With R[i][j] the accuracy of the i-th release on task j, b[j] that of the base, and the task j
introduced by the run n(j) of T (Lopez-Paz and Ranzato, 2017, arXiv 1706.08840, eq. 2 to 4, where
run i introduces task i and b is a random model's):

    overall              mean of R[T][j]
    backward transfer    mean of R[T][j] - R[n(j)][j] over the tasks of earlier runs
    forward transfer     mean of R[n(j) - 1][j] - b[j] over those that the first run did not have
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from torch import nn

from milora.adapter import take_off
from milora.errors import UserError
from milora.evaluate import (
    LEFT_OUT,
    AnyTask,
    check_lengths,
    check_task,
    evaluate_all,
    harness_name,
    load_task,
    merge_evaluations,
    save_evaluation,
    task_name,
)
from milora.files import sha256
from milora.forms import answers_apart
from milora.harness import HarnessTask
from milora.knowledge import general_texts
from milora.lineage import Link, chain
from milora.logits import Pair
from milora.pretrained import positions
from milora.progress import Progress
from milora.vision import Reader, image_tokens


class Column(NamedTuple):
    """A task of the chain."""

    name: str
    introduced: int  # the place of the run that had it first
    options: str | Mapping[str, Any]  # as evaluate.tasks has it


def columns(links: Sequence[Link]) -> list[Column]:
    """Every task of the chain once, in the order in which the runs brought them.

    Those of the last run have their own names, since its gates and its card are about them. Another
    that is asked otherwise (another file, another match) under a name that is taken gets that of
    its run with it.
    """
    found: dict[tuple[Any, ...], Column] = {}
    for place, link in enumerate(links):
        for options in link.asked["evaluate"]["tasks"]:
            key = _identity(options, link)
            first = found[key].introduced if key in found else place
            found[key] = Column(task_name(options), first, options)
    last = {_identity(options, links[-1]) for options in links[-1].asked["evaluate"]["tasks"]}
    taken = {found[key].name for key in last}
    for key, column in found.items():
        if key in last:
            continue
        name, number = column.name, 2
        if name in taken:
            name = of_run = f"{name} of {links[column.introduced].name}"
        while name in taken:
            name, number = f"{of_run} ({number})", number + 1
        taken.add(name)
        found[key] = column._replace(name=name)
    return list(found.values())


def _identity(options: str | Mapping[str, Any], link: Link) -> tuple[Any, ...]:
    """What makes two tasks one: a file, its content and all that it is asked by but a name."""
    whole = {"file": options} if isinstance(options, str) else dict(options)
    if harness := whole.get("harness") or harness_name(options):
        return ("harness", harness)
    told = {k: v for k, v in whole.items() if k != "name" and v not in (None, LEFT_OUT.get(k))}
    return (*sorted(told.items()), ("sha256", _sha256(whole["file"], link)))


def _sha256(file: str, link: Link) -> str | None:
    """Of a task's file as the run had it; as it is where the run has not begun; None of the hub."""
    if (recorded := link.record.get("data", {}).get("sha256")) is not None:
        return str(recorded[file]) if file in recorded else None
    return sha256(Path(file)) if Path(file).is_file() else None


def as_now(links: Sequence[Link]) -> list[Link]:
    """The chain with the files of its tasks as they are now, whatever they were in its runs."""
    return [link._replace(record=link.record | {"data": {}}) for link in links]


def unmeasured(links: Sequence[Link], classifies: bool) -> dict[str, str]:
    """The figures of `measures` that this chain cannot have, and why."""
    every, why = columns(links), {}
    if all(one.introduced == len(links) - 1 for one in every):
        why["backward_transfer"] = "no earlier run has a task"
    if all(one.introduced == 0 for one in every):
        why["forward_transfer"] = "every task is the first run's"
    if classifies:
        why["kl"] = "a classifier predicts no tokens"
    return why


def load_tasks(links: Sequence[Link], reader: Reader, limit: int | None = None) -> list[AnyTask]:
    """The tasks of `columns`, by their names. Raises UserError where a file is gone or another."""
    tasks = []
    for column in columns(links):
        link = links[column.introduced]
        try:
            named = link.asked.get("data", {}).get("columns") or {}
            task = load_task(column.options, limit, bool(image_tokens(reader)), named)
        except UserError as error:
            raise UserError(f"the task {column.name} of {link.run}: {error}") from error
        if not isinstance(task, HarnessTask):
            own = column.options if isinstance(column.options, str) else column.options["file"]
            before = _sha256(own, link)
            if task.sha256 != before and before is not None:
                raise UserError(
                    f"the task {column.name} of {link.run}: {own} has sha256 "
                    f"{str(task.sha256)[:12]}, and that run had it with {before[:12]}: put that "
                    "file back and give the new one another name, or write elsewhere with --out"
                )
        tasks.append(task._replace(name=column.name))
    return tasks


def check_tasks(links: Sequence[Link], reader: Reader, model: nn.Module) -> list[AnyTask]:
    """The tasks of the chain. Raises UserError where there are none, or one is not for `model`."""
    tasks = load_tasks(links, reader)
    if not tasks:
        raise UserError(f"no run of the chain of {links[-1].run} has evaluate.tasks")
    apart = answers_apart(model)
    for task in tasks:
        check_task(task, model)
        check_lengths(task, reader, positions(model), apart)
    return tasks


def evaluate_chain(
    links: Sequence[Link], pair: Pair, reader: Reader, progress: Progress, limit: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """evaluation.json of the last run over all tasks of the chain, `continual` in it; and samples.

    `pair` is base and tuned of the last run; the earlier releases take its adapter's place one by
    one, on the same base and with the same tokenizer and template. Nothing that a release has been
    asked before is asked again.
    """
    asked = links[-1].asked["evaluate"]
    tasks = check_tasks(links, reader, pair.model)
    if limit is not None:
        tasks = load_tasks(links, reader, limit)
    texts = general_texts(asked["knowledge"])
    live: Any = pair.model
    results: list[dict[str, Any]] = []
    now = pair  # of whole weights with its other base: there is no adapter to switch off
    for place, link in reversed(list(enumerate(links))):
        if place < len(links) - 1:
            base = take_off(live)
            live = PeftModel.from_pretrained(base, link.run / "adapter").eval()
            now = Pair(live, headless=pair.headless)
            progress.say(f"release {place + 1} of {len(links)}: {link.run}")
        found, own = evaluate_all(
            now, reader, tasks, texts, asked["chunks"], asked["batch_size"], progress
        )
        if not results:
            samples = own
        results.insert(0, found)
    result = results[-1] | {"continual": measures(links, results)}
    if limit is not None:
        result["continual"]["limit"] = limit
    return result, samples


def extend_evaluation(run: Path, pair: Pair, reader: Reader, progress: Progress) -> dict[str, Any]:
    """evaluation.json of `run` with all tasks of its chain, and `continual`; as it is written."""
    result, samples = evaluate_chain(chain(run), pair, reader, progress)
    files = run / "evaluation.json", run / "samples.jsonl"
    whole, kept = merge_evaluations(*files, result, samples)
    save_evaluation(*files, whole, kept)
    return whole


def measures(links: Sequence[Link], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The matrix and the figures of the module's head, from the evaluation of each release.

    None for a figure that the chain has no task for. `knowledge` is the KL of each release on the
    text where it is largest; tasks without an accuracy are left out, by name.
    """
    every = columns(links)
    last = len(links) - 1
    kept = [one for one in every if "accuracy" in results[-1]["tasks"][one.name]["tuned"]]
    R = [[result["tasks"][one.name]["tuned"]["accuracy"] for one in kept] for result in results]
    base = [results[-1]["tasks"][one.name]["base"].get("accuracy") for one in kept]
    backward = [R[last][j] - R[c.introduced][j] for j, c in enumerate(kept) if c.introduced < last]
    forward = [
        R[c.introduced - 1][j] - b
        for j, (c, b) in enumerate(zip(kept, base, strict=True))
        if c.introduced > 0 and b is not None
    ]
    knowledge = [
        max((one["kl"] for one in result["knowledge"] if one.get("kl") is not None), default=None)
        for result in results
    ]
    return {
        "runs": [link.name for link in links],
        "tasks": [one.name for one in kept],
        "introduced": [one.introduced for one in kept],
        "left_out": [one.name for one in every if one not in kept],
        "base": base,
        "matrix": R,
        "knowledge": knowledge,
        "overall": _mean(R[last]),
        "backward_transfer": _mean(backward),
        "forward_transfer": _mean(forward),
        "kl": knowledge[last],
        "cut": links[last].record.get("adapter", {}).get("cut", {}).get("summed_error", 0.0),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the base and every release, on every task; what a run brought is in []."""
    head = ["release", *found["tasks"], "KL"]
    rows = [["base", *(_figure(value) for value in found["base"]), "0"]]
    for place, (name, scores, kl) in enumerate(
        zip(found["runs"], found["matrix"], found["knowledge"], strict=True)
    ):
        marked = [
            f"[{value:.3f}]" if brought == place else f"{value:.3f}"
            for value, brought in zip(scores, found["introduced"], strict=True)
        ]
        rows.append([name, *marked, _figure(kl, 4)])
    return head, rows


def _figure(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def sentences(found: Mapping[str, Any]) -> list[str]:
    """What the table says."""
    about = {
        "overall": "overall, mean of the last release over all tasks",
        "backward_transfer": "backward transfer, what later updates did to earlier tasks",
        "forward_transfer": "forward transfer, what earlier updates did for later tasks",
    }
    said = [
        f"{words}: {found[key]:{'+' if 'transfer' in key else ''}.3f}"
        for key, words in about.items()
        if found[key] is not None
    ]
    if found["left_out"]:
        said.append(f"left out, since they have no accuracy: {', '.join(found['left_out'])}")
    return said
