"""Gates: the grammar, what they are judged by, and the command's exit code."""

import json
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import settings
from transformers import PreTrainedModel

from milora.classification import ClassTask
from milora.cli import main
from milora.errors import UserError
from milora.evaluate import ChoiceTask, Task, evaluate_all, load_task, measured
from milora.gates import check_subjects, judge, parse_gate
from milora.grade import grader
from milora.harness import HarnessTask
from milora.logits import Pair

Tiny = Callable[[str], Path]
Load = Callable[[str], PreTrainedModel]

EVALUATION: dict[str, Any] = {
    "tasks": {
        "mail": {"base": {"accuracy": 0.5, "loss": None},
                 "tuned": {"accuracy": 0.6, "loss": None, "interval": [0.5, 0.7]}},
        "round": {"base": {"accuracy": 0.1}, "tuned": {"accuracy": 0.15}},
        "arc.easy": {"base": {"metrics": {"acc,none": 0.25}},
                     "tuned": {"metrics": {"acc,none": 0.5}}},
        "gsm": {state: {"metrics": {"exact_match,strict-match": 0.2, "exact_match,flexible": 0.4}}
                for state in ("base", "tuned")},
    },
    "knowledge": [
        {"text": "build/w.txt", "kl": 0.01, "base_perplexity": 20.0, "tuned_perplexity": 21.0},
        {"text": "c4.jsonl", "kl": 0.03, "base_perplexity": 30.0, "tuned_perplexity": 30.5,
         "top_token_agreement": 0.9},
        {"text": "labels.txt", "pieces": 3, "moved": 0.2, "similarities": 0.8},  # a classifier's
    ],
}  # fmt: skip
RECORD = {"interference": {"max": 0.02, "mean": 0.01}}


@pytest.mark.parametrize(
    ("gate", "holds", "said"),
    [
        ("mail.accuracy >= 0.6", True, "it is 0.6, the bound is 0.6"),
        ("mail.accuracy > 0.6", False, "it is 0.6, the bound is 0.6"),
        ("mail.accuracy >= base", True, "the bound is 0.5"),
        ("mail.accuracy>=base+0.05", True, "the bound is 0.55"),
        ("round.accuracy >= base + 0.05", True, "it is 0.15, the bound is 0.15"),  # 0.1 + 0.05
        ("round.accuracy > base + 0.05", False, "it is 0.15, the bound is 0.15"),
        ("round.accuracy < base + 0.05", False, "it is 0.15, the bound is 0.15"),
        ("round.accuracy >= base + 0.0500001", False, "the bound is 0.15"),
        ("mail.accuracy >= base * 1.5", False, "the bound is 0.75"),
        ("mail.accuracy >= base - 1e-1", True, "the bound is 0.4"),
        ("arc.easy.acc >= base + .25", True, "it is 0.5, the bound is 0.5"),
        ("gsm.exact_match >= base", True, "it is 0.2, the bound is 0.2"),
        ("gsm.exact_match,strict-match<base-0.1", False, "it is 0.2, the bound is 0.1"),
        ("gsm.exact_match,flexible >= 0.3", True, "it is 0.4"),
        ("knowledge.kl <= 0.02", False, "it is 0.03, the bound is 0.02"),
        ("knowledge.w.kl <= 0.02", True, "it is 0.01"),
        ("knowledge.kl <= base + 0.05", True, "it is 0.03, the bound is 0.05"),
        ("knowledge.perplexity <= base * 1.02", False, "it is 21, the bound is 20.4"),
        ("knowledge.perplexity > 20.5", True, "it is 21"),
        ("knowledge.labels.perplexity <= 100", False, "it was not measured"),
        ("knowledge.top_token_agreement >= base - 0.2", True, "it is 0.9, the bound is 0.8"),
        ("knowledge.moved <= base + 0.3", True, "it is 0.2, the bound is 0.3"),
        ("knowledge.similarities >= base - 0.3", True, "it is 0.8, the bound is 0.7"),
        ("interference.max <= 0.01", False, "it is 0.02"),
        ("interference.size <= 1", False, "it was not measured"),
        ("mail.exactness >= 0", False, "it was not measured"),
        ("post.accuracy >= 0", False, "it was not measured"),
        ("knowledge.x.kl <= 1", False, "it was not measured"),
        ("mail.loss <= 1", False, "it is not finite"),
        ("mail.interval >= 0.1", False, "it is no single number"),
    ],
)
def test_judged(gate: str, holds: bool, said: str) -> None:
    (verdict,) = judge([parse_gate(gate)], EVALUATION, RECORD)
    assert verdict.holds == holds
    assert said in verdict.said


def test_a_text_without_a_figure_fails_what_is_asked_of_every_text() -> None:
    kept = [{"text": "a.txt", "kl": 0.01}, {"text": "b.txt", "kl": None}]
    for texts in (kept, kept[::-1]):
        (verdict,) = judge([parse_gate("knowledge.kl <= 0.05")], {"knowledge": texts}, {})
        assert not verdict.holds
        assert verdict.said == "it is not finite"


@pytest.mark.parametrize(
    "gate",
    [
        "", "mail.accuracy", "mail >= 1", "mail.accuracy => 1", "mail.accuracy >= much",
        "mail.accuracy >= base + base", "mail.accuracy >= base / 2", "mail.accuracy >= 1 + 1",
        "__import__('os').system('true') >= 1; x.y >= 1", "mail.accuracy >= 1e999",
        "mail.accuracy >= nan", "interference.max <= base", "a.b >= 1 and c.d >= 1",
        "mail triage >= 1", "mail triage.accuracy => 1", "mail.accuracy of triage >= 1",
    ],
)  # fmt: skip
def test_what_is_no_gate(gate: str) -> None:
    with pytest.raises(UserError, match="gates: "):
        parse_gate(gate)


@given(st.text(max_size=40))
def test_any_text_is_a_gate_or_one_sentence(text: str) -> None:
    with suppress(UserError):
        parse_gate(text)


def test_a_task_that_the_run_does_not_have() -> None:
    names = ["mail", "arc.easy"]
    check_subjects([parse_gate("arc.easy.accuracy > 0"), parse_gate("knowledge.w.kl < 1")], names)
    check_subjects([parse_gate(" mail triage.v2.accuracy>=base + 0.1 ")], ["mail triage.v2"])
    with pytest.raises(UserError, match=r"no task of this run: did you mean mail\?"):
        check_subjects([parse_gate("mial.accuracy > 0")], names)


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ("mail.acuracy >= 1", "mail has accuracy, format_failures, loss,"),
        ("mail.interval >= 0.1", "mail has accuracy"),
        ("mail.x.accuracy >= 1", "is on mail.x, which this run does not measure: use mail, "),
        ("judged.accuracy >= 1", "judged has loss, loss_rows"),
        ("arc.f1 >= 1", "arc has accuracy, accuracy_normalised"),
        ("knowledge.nosuch.kl <= 1", "knowledge.nosuch, which this run does not measure: use mail"),
        ("knowledge.moved <= 1", "knowledge has kl, kl_p99"),
        ("interference.maximum <= 1", "interference has max, mean, size"),
    ],
)
def test_what_will_not_be_measured(gate: str, said: str) -> None:
    tasks: list[Any] = [
        Task("mail", [], grader("exact"), 9), Task("judged", [], None, 9),
        ChoiceTask("arc", [], ""), HarnessTask("gsm", None, None, "gsm"),
    ]  # fmt: skip
    names, texts = [task.name for task in tasks], ["build/w.txt", "the help topics"]
    there = measured(tasks, texts, classifies=False, interference=True)
    with pytest.raises(UserError, match=re.escape(said)):
        check_subjects([parse_gate(gate)], names, there)
    held = ("mail.accuracy > 0", "gsm.exact_match,none > 0", "knowledge.w.kl < 1", "judged.loss<9",
            "interference.size < 1", "continual.cut <= 0", "knowledge.perplexity < 9",
            "knowledge.the help topics.kl < 1")  # fmt: skip
    check_subjects([parse_gate(one) for one in held], names, there)
    classes = measured([ClassTask("c", [])], texts, classifies=True, interference=False)
    check_subjects([parse_gate(x) for x in ("c.f1 > 0", "knowledge.moved < 1")], ["c"], classes)
    with pytest.raises(UserError, match=r"does not measure \(full has none, nor has milora"):
        check_subjects([parse_gate("interference.max <= 1")], ["c"], classes)


def test_the_keys_are_those_that_are_measured(load: Load, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    choices = tmp_path / "choices.jsonl"
    choices.write_text('{"question": "a", "choices": ["b", "c"], "answer": 0}\n')
    tasks = [
        load_task(str(rows)), load_task({"file": str(rows), "name": "judged", "match": "none"}),
        load_task({"file": str(choices), "protocol": "likelihood"}),
    ]  # fmt: skip
    texts = [("a text of some length", "w.txt")]
    found, _ = evaluate_all(Pair(load("llama")), make_tokenizer(), tasks, texts, 1, 4)
    there = measured(tasks, ["w.txt"], classifies=False, interference=False)
    for task in tasks:
        single = {k for k, v in found["tasks"][task.name]["tuned"].items() if k[:8] != "interval"}
        assert set(there[task.name] or ()) == single
    assert set(there["knowledge"] or ()) == {*found["knowledge"][0], "perplexity"} - {"text"}


class Run:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["milora", *words])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = self.capsys.readouterr()
        return int(end.value.code or 0), out, err


@pytest.mark.slow
def test_the_command(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Run(monkeypatch, capsys)
    values = settings(tiny("llama"), tmp_path, training={"max_steps": 2, "eval_strategy": "no"})
    values["gates"] = ["rows.accuracy >= base - 1", "knowledge.kl <= 1e-12"]
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    code, out, err = command("train", str(config), "gates=[rows.accuracy >> 1]")
    assert (code, "is no gate: write MEASURE >= BOUND" in err) == (2, True)
    code, out, err = command("train", str(config), "gates=[row.accuracy >= 1]")
    assert (code, "did you mean rows?" in err) == (2, True)
    for gate, said in (
        ("rows.acuracy >= 1", "rows has accuracy, format_failures, loss"),
        ("knowledge.nosuch.kl <= 1", "on knowledge.nosuch, which this run does not measure"),
        ("interference.maximum <= 1", "interference has max, mean, size"),
    ):
        code, out, err = command("train", str(config), f"gates=[{gate}]", "--dry-run")
        assert (code, said in err) == (2, True)
    for change in ("method=full", "milora.interference.top=0"):
        words = "gates=[interference.max <= 1]", change, "--dry-run"
        code, out, err = command("train", str(config), *words)
        assert (code, "which this run does not measure (full has none" in err) == (2, True)
    run = tmp_path / "run"
    assert not run.exists()

    code, out, err = command("train", str(config))
    assert code == 3
    assert "ok    rows.accuracy >= base - 1: it is" in out
    assert "FAIL  knowledge.kl <= 1e-12: it is" in out
    assert "milora: 1 of 2 gates failed: knowledge.kl <= 1e-12 (it is" in err
    assert (run / "adapter").exists()  # made, and said not to be fit
    assert "FAILS: knowledge.kl" in (run / "adapter" / "README.md").read_text()
    held = [one["holds"] for one in json.loads((run / "run.json").read_text())["gates"]]
    assert held == [True, False]

    assert command("gate", str(run))[0] == 3  # the run's own
    assert command("gate", str(run), "--gate", "rows.accuracy >= base - 1")[0] == 0
    code, out, err = command("gate", str(run), "--gate", "other.accuracy >= 0.1")
    assert (code, "it was not measured" in err) == (3, True)
    code, out, err = command("gate", str(run), "--gate", "rows.accuracy")
    assert (code, "is no gate" in err) == (2, True)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"state": "exported"}))
    for verb in ("gate", "report"):  # killed between evaluation.json and the end
        code, out, err = command(verb, str(run))
        assert (code, "is not finished, its state is exported: finish it with" in err) == (2, True)
    code, out, err = command("gate", str(tmp_path))
    assert (code, "is not the folder of a finished run" in err) == (2, True)
