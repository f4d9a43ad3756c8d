"""lm-evaluation-harness through us, and us against it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SHARED_DATA, make_tokenizer
from transformers import PreTrainedModel

from milora.choices import encode_question, log_probabilities, read_questions
from milora.errors import UserError
from milora.evaluate import evaluate_task, load_task, wilson
from milora.harness import HarnessTask
from milora.logits import Pair
from milora.pretrained import BUNDLED, load_pretrained

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval", reason="the extra `harness` is not installed")


def own_task(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A task file of the harness over `rows` of {question, choices, answer}."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "our_own", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test", "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    (folder / "our_own.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return {"harness": "our_own", "include": str(folder)}


def test_a_task_of_the_harness(tmp_path: Path, load: Callable[[str], PreTrainedModel]) -> None:
    rows = [{"question": f"{i}?", "choices": ["a", "bb", "c"], "answer": i % 3} for i in range(9)]
    task = load_task(own_task(tmp_path, rows), limit=7)
    assert isinstance(task, HarnessTask)
    scores, samples = evaluate_task(Pair(load("llama")), make_tokenizer(), task)
    assert scores["rows"] == len(samples) == 7
    assert scores["base"] == scores["tuned"]
    assert scores["base"]["metrics"]["acc,none"] == scores["base"]["accuracy"]
    assert samples[0]["reference"] == "0"
    with pytest.raises(UserError, match="no task 'our_ow'; did you mean our_own"):
        load_task({"harness": "our_ow", "include": str(tmp_path)})
    with pytest.raises(UserError, match="is not a folder"):
        load_task({"harness": "our_own", "include": str(tmp_path / "none")})


def test_a_tag_is_no_task(tmp_path: Path) -> None:
    options = own_task(tmp_path, [{"question": "a?", "choices": ["b", "c"], "answer": 0}])
    file = tmp_path / "our_own.yaml"
    file.write_text(file.read_text() + "tag: our_tag\n")
    assert load_task(options).name == "our_own"
    with pytest.raises(UserError, match=r"'our_tag' is a tag .* name its tasks: our_own"):
        load_task(options | {"harness": "our_tag"})


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the public data sets are not here")
def test_the_same_choices_as_the_harness(tmp_path: Path) -> None:
    """SmolLM2 on 12 rows of ARC-Easy: every choice, and every log-probability."""
    questions = read_questions(str(SHARED_DATA / "commonsense" / "ARC-Easy_test.json"))[:12]
    rows = [{"question": q.question, "choices": q.options, "answer": q.right} for q in questions]
    loaded = load_pretrained(BUNDLED)
    task = load_task(own_task(tmp_path, rows))
    scores, samples = evaluate_task(Pair(loaded.model), loaded.tokenizer, task)
    encoded = [encode_question(loaded.tokenizer, q) for q in questions]
    ours = log_probabilities(loaded.model, encoded)
    right = 0
    for log_p, sample, question in zip(ours, samples, questions, strict=True):
        theirs = [value for value, _ in sample["base"]["answer"]]
        assert log_p == pytest.approx(theirs, abs=1e-3)
        assert log_p.index(max(log_p)) == theirs.index(max(theirs))
        right += log_p.index(max(log_p)) == question.right
    assert scores["base"]["accuracy"] == pytest.approx(right / 12)
    assert right / 12 > 0.35  # chance is a quarter


def test_a_row_counts_once_whatever_the_filters(
    tmp_path: Path, load: Callable[[str], PreTrainedModel]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"q": f"{i}?", "a": "x"}) + "\n" for i in range(8)))
    filters = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": "(x)"},
                                  {"function": "take_first"}]}
        for name in ("strict-match", "flexible-extract")
    ]  # fmt: skip
    task = {
        "task": "two_filters", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match"}], "filter_list": filters,
    }  # fmt: skip
    (tmp_path / "two_filters.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    task = load_task({"harness": "two_filters", "include": str(tmp_path)})
    assert isinstance(task, HarnessTask)
    scores, samples = evaluate_task(Pair(load("llama")), make_tokenizer(), task)
    assert scores["rows"] == len(samples) == 8
    assert len(scores["base"]["metrics"]) >= 2
    assert scores["base"]["interval"] == wilson(0, 8)
