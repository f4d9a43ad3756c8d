"""Real data sets, in the shapes they are published in. Skipped where the folder is absent."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import SHARED_DATA, make_tokenizer
from tiny_run import run, settings

from milora.artefacts import export_run
from milora.data import prepare
from milora.files import read_json
from milora.grade import grader
from milora.pretrained import load_pretrained
from milora.rows import overlap, questions_of, read_rows
from milora.verify import open_adapter, verify

pytestmark = pytest.mark.skipif(
    not SHARED_DATA.is_dir(), reason=f"the public data sets are not in {SHARED_DATA} (SHARED_DATA)"
)
ROOT = Path(__file__).resolve().parent.parent

PAIR = {"completion": "answer"}
FILES = [
    ("commonsense/ARC-Challenge_train.json", {}, "alpaca", 1119, ["answer"]),
    ("commonsense/boolq_test.json", {}, "alpaca", 3270, ["answer"]),
    ("instruct_en/alpaca_en_demo.json", {}, "alpaca", 999, []),
    ("instruct_en/identity.json", {}, "alpaca", 91, []),
    ("gsm8k/train.jsonl", PAIR | {"prompt": "question"}, "prompt-completion", 7473, []),
    ("math/metamath_GSM8K_test.jsonl", {"prompt": "query", "completion": "response"},
     "prompt-completion", 1319, []),
    ("general_text/c4_demo.jsonl", {}, "text", 300, []),
    ("vision_language/mllm_demo.json", {}, "messages", 6, ["images"]),
]  # fmt: skip


@pytest.mark.parametrize(("file", "columns", "format", "count", "unused"), FILES)
def test_published_files_are_read(
    file: str, columns: dict[str, str], format: str, count: int, unused: list[str]
) -> None:
    found = read_rows(str(SHARED_DATA / file), columns=columns)
    assert (found.format, len(found.rows), found.unused) == (format, count, unused)
    prepared = prepare(make_tokenizer(), found.rows[:50], 4096, file)
    assert prepared.kept + sum(prepared.refused.values()) == min(50, count)


def test_a_leak_is_counted() -> None:
    columns = {"prompt": "original_text", "completion": "equation"}
    train, test = (
        read_rows(str(SHARED_DATA / "math_words" / f"mawps_{part}.json"), columns=columns).rows
        for part in ("train", "test")
    )
    questions = set[str]().union(*map(questions_of, train))
    assert overlap(questions, test) >= 25  # 28 when punctuation is ignored as well


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/tasks.py, on the data that is here."""
    module = benchmark("tasks")
    monkeypatch.setattr(module, "DATA", SHARED_DATA)
    return module


@pytest.mark.slow
def test_a_real_encoder_learns_classes(
    tasks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """all-MiniLM-L6-v2 on the six kinds of question of TREC, from the files to the export."""
    model = benchmark("weights").minilm()
    monkeypatch.chdir(tmp_path)
    files = tasks.label_files("trec", 640, 160, 200)
    asked = settings(
        model, tmp_path,
        data={"train": files["train"], "eval": files["held_out"], "max_length": 64},
        lora={"r": 8, "lora_dropout": 0.0, "target_modules": ["query", "key", "value"]},
        training={
            "max_steps": 80, "save_steps": 80, "eval_steps": 80, "learning_rate": 2e-3,
            "per_device_train_batch_size": 16,
        },
        evaluate={"tasks": [{"file": files["test"], "name": "trec"}]},
    )  # fmt: skip
    record = run(asked)
    assert record["labels"] == sorted(tasks.LABELS["trec"])
    assert record["base"]["unchanged"]
    assert record["step0"]["difference"] <= 1e-5
    assert record["coverage"]["trained"] == {"classifier": {"weights": 2, "parameters": 6 * 385}}
    evaluation = read_json(tmp_path / "run" / "evaluation.json")
    task = evaluation["tasks"]["trec"]
    assert task["tuned"]["interval"][0] > task["majority"] + 0.2
    assert task["tuned"]["f1_interval"][0] > task["base"]["f1_interval"][1]
    assert 0 < evaluation["knowledge"][0]["moved"] < 1
    assert all(check.holds for check in verify(tmp_path / "run"))
    export_run(tmp_path / "run", tmp_path / "merged", "merged")
    ids = torch.tensor([[101, 2054, 2003, 1996, 3007, 1997, 2605, 102]])
    with torch.no_grad():
        wanted = open_adapter(tmp_path / "run").model(input_ids=ids).logits
        found = load_pretrained(str(tmp_path / "merged")).model(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["polarity", "subjectivity", "trec", "mawps"])
def test_the_benchmark_trains_on_nothing_it_tests(task: str, tasks: ModuleType) -> None:
    parts = tasks.split(task, 640, 160, 200)
    sizes = [len(rows) for rows in (parts.train, parts.held_out, parts.test)]
    assert sizes == [640, 160, 200]
    seen = [{tasks.plain(row.question) for row in rows} for rows in parts[:3]]
    for first, second in itertools.combinations(seen, 2):
        assert not first & second
    if task == "mawps":
        assert parts.leaks >= 60  # 28 + 39, less a few without a plain equation
        grade = grader("math")
        assert grade
        assert all(grade(row.answer, row.answer) == "right" for row in parts.test)
        for text in ("", "the answer is 14", "1/0", "__import__('os')", "9**9**9", "(" * 10_000):
            assert tasks.calculate(text) is None
