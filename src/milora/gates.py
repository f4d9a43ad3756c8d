"""Gates: conditions on the measured numbers that a release must meet, read by a small grammar.

    gate     =  measure  (">=" | "<=" | ">" | "<")  bound
    bound    =  number  |  "base"  |  "base" ("+" | "-" | "*") number
    measure  =  TASK "." KEY            of evaluation.json, for example mail.accuracy; a name with
                                        spaces is written as it is
             |  "knowledge." KEY        of every general text, or of one: "knowledge." TEXT "." KEY
             |  "interference." KEY     max, mean or size, of run.json
             |  "continual." KEY        of a run that continues another: backward_transfer and the
                                        rest of TRANSFER, over all tasks of the chain

`base` is the same measure of the base. A measure that is missing, or no number, fails the gate.
What differs from its bound by no more than rounding is equal to it.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from milora.card import short
from milora.errors import UserError
from milora.files import read_record

# What transfer.py measures of a chain of updates.
TRANSFER = ("overall", "backward_transfer", "forward_transfer", "kl", "cut")
COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b, "<": lambda a, b: a < b,
}  # fmt: skip
COMBINE: dict[str, Callable[[float, float], float]] = {
    "": lambda a, b: a, "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
}  # fmt: skip
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_GATE = re.compile(
    rf"\s*(?P<measure>\S+|[^\s<>][^\n<>]*)\.(?P<key>[\w,-]+)\s*(?P<relation>>=|<=|>|<)\s*"
    rf"(?:(?P<number>{_NUMBER})|base(?:\s*(?P<sign>[-+*])\s*(?P<by>{_NUMBER}))?)\s*"
)


class Gate(NamedTuple):
    text: str
    subject: str  # a task, "knowledge", "knowledge.TEXT", "interference" or "continual"
    key: str
    relation: str
    number: float | None  # None: relative to the base
    sign: str
    by: float


class Verdict(NamedTuple):
    gate: str
    holds: bool
    value: float | None
    bound: float | None
    said: str  # figure and bound, or what is missing


def parse_gate(text: str) -> Gate:
    """Raises UserError for what is not in the grammar above."""
    found = _GATE.fullmatch(text)
    if not found:
        raise UserError(
            f"gates: {text!r} is no gate: write MEASURE >= BOUND, for example "
            "'mail.accuracy >= base + 0.05', 'knowledge.kl <= 0.05' or 'interference.max <= 0.01'"
        )
    number = float(found["number"]) if found["number"] else None
    by = float(found["by"]) if found["by"] else 0.0
    if not math.isfinite(number or 0.0) or not math.isfinite(by):
        raise UserError(f"gates: {text!r}: the bound is not finite")
    subject = found["measure"]
    if subject in ("interference", "continual") and number is None:
        raise UserError(f"gates: {text!r}: the base has no {subject}: give a number")
    if subject == "continual" and found["key"] not in TRANSFER:
        raise UserError(f"gates: {text!r}: continual has {', '.join(TRANSFER)}")
    return Gate(text.strip(), subject, found["key"], found["relation"], number,
                found["sign"] or "", by)  # fmt: skip


def check_subjects(
    gates: Sequence[Gate],
    tasks: Sequence[str],
    measured: Mapping[str, Sequence[str] | None] | None = None,
) -> None:
    """Raise UserError for a gate on a task that the run does not have.

    With `measured` also for one on what will not be measured: the keys of each subject but
    "continual", None for any (evaluate.measured).
    """
    for gate in gates:
        others = ("knowledge", "interference", "continual")
        if gate.subject.partition(".")[0] not in (*others, *tasks) and gate.subject not in tasks:
            near = difflib.get_close_matches(gate.subject, [*tasks, *others], 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(
                f"gates: {gate.text!r} is on {gate.subject}, which is no task of this run{hint} "
                f"(its tasks: {', '.join(tasks) or 'none'})"
            )
        if measured is None or gate.subject == "continual":
            continue
        if gate.subject not in measured:
            why = " (full has none, nor has milora.interference.top 0)"
            raise UserError(
                f"gates: {gate.text!r} is on {gate.subject}, which this run does not measure"
                f"{why if gate.subject == 'interference' else ''}: use {', '.join(measured)}"
            )
        keys = measured[gate.subject]
        if keys is not None and gate.key not in keys:
            raise UserError(f"gates: {gate.text!r}: {gate.subject} has {', '.join(keys)}")


def judge(
    gates: Sequence[Gate], evaluation: Mapping[str, Any], record: Mapping[str, Any]
) -> list[Verdict]:
    """Whether each gate holds, by the content of evaluation.json and run.json.

    A gate on every general text holds when it holds on each; the figure is that of the worst.
    """
    verdicts = []
    for gate in gates:
        each = [_judge(gate, pair) for pair in _measured(gate, evaluation, record)]
        if not each:
            each = [Verdict(gate.text, False, None, None, "it was not measured")]
        verdicts.append(min(each, key=lambda verdict: _margin(gate, verdict)))
    return verdicts


def _margin(gate: Gate, verdict: Verdict) -> float:
    if verdict.value is None or verdict.bound is None:
        return -math.inf
    sign = 1 if gate.relation.startswith(">") else -1
    return sign * (verdict.value - verdict.bound)


def _judge(gate: Gate, pair: tuple[Any, Any]) -> Verdict:
    value, base = pair
    if not isinstance(value, int | float):
        said = "it is not finite" if value is None else "it is no single number"
        return Verdict(gate.text, False, None, None, said)
    bound = gate.number
    if bound is None:
        if not isinstance(base, int | float):
            return Verdict(gate.text, False, value, None, f"it is {value:.6g}, the base has none")
        bound = COMBINE[gate.sign](base, gate.by)
    # The sum of two decimals is off by a rounding: 0.1 + 0.05 is more than 0.15.
    equal = math.isclose(value, bound, rel_tol=1e-9, abs_tol=1e-12)
    holds = "=" in gate.relation if equal else COMPARE[gate.relation](value, bound)
    said = f"it is {value:.6g}, the bound is {bound:.6g}"
    return Verdict(gate.text, holds, value, bound, said)


def _measured(
    gate: Gate, evaluation: Mapping[str, Any], record: Mapping[str, Any]
) -> list[tuple[Any, Any]]:
    """(tuned, base) for each thing that the gate is on; empty where there is none."""
    if gate.subject == "interference":
        found = record.get("interference", {})
        return [(found[gate.key], None)] if gate.key in found else []
    if gate.subject == "continual":
        value = evaluation.get("continual", {}).get(gate.key)
        return [] if value is None else [(value, None)]
    first, _, text = gate.subject.partition(".")
    if first == "knowledge":
        kept = [one for one in evaluation["knowledge"] if not text or short(one["text"]) == text]
        if gate.key == "perplexity":
            kept = [one for one in kept if "moved" not in one]  # a classifier has none
            return [(one["tuned_perplexity"], one["base_perplexity"]) for one in kept]
        untouched = {
            "kl": 0.0, "kl_p99": 0.0, "top_token_agreement": 1.0, "moved": 0.0, "similarities": 1.0,
        }.get(gate.key)  # fmt: skip
        return [(one[gate.key], untouched) for one in kept if gate.key in one]
    task = evaluation["tasks"].get(gate.subject)
    if task is None:
        return []
    states = []
    for state in ("tuned", "base"):
        metrics = task[state].get("metrics", {})  # of the harness, as METRIC,FILTER: the first
        bare = {key.partition(",")[0]: value for key, value in reversed(metrics.items())}
        states.append({**bare, **metrics, **task[state]})
    tuned, base = states
    return [(tuned[gate.key], base.get(gate.key))] if gate.key in tuned else []


def read_finished(run: Path, *also: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """run.json and evaluation.json of a run that is done.

    Raises UserError where they or one of `also` are not there, and for a run that was broken off.
    """
    for name in ("run.json", "evaluation.json", *also):
        if not (run / name).exists():
            raise UserError(f"{run} holds no {name}: it is not the folder of a finished run")
    record = read_record(run / "run.json")
    if record["state"] != "done":
        raise UserError(
            f"{run} is not finished, its state is {record['state']}: finish it with "
            "`milora train ... --resume`"
        )
    return record, read_record(run / "evaluation.json")


def sentence(verdict: Verdict) -> str:
    return f"{'ok  ' if verdict.holds else 'FAIL'}  {verdict.gate}: {verdict.said}"
