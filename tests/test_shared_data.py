"""Real data sets, in the shapes they are published in. Skipped where the folder is absent."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from conftest import SHARED_DATA, make_tokenizer

from milora.data import overlap, prepare, read_rows

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
    assert overlap(train, test) >= 25  # 28 when punctuation is ignored as well


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    path = ROOT / "benchmarks" / "learned_and_kept.py"
    spec = importlib.util.spec_from_file_location("learned_and_kept", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DATA", SHARED_DATA)
    monkeypatch.setattr(module, "WORK", tmp_path)
    return module


@pytest.mark.parametrize("task", ["polarity", "trec", "mawps"])
def test_the_benchmark_trains_on_nothing_it_tests(task: str, benchmark: ModuleType) -> None:
    train, test, counts = benchmark.files(task)
    questions = [
        {benchmark.plain(json.loads(line)["input"]) for line in path.read_text().splitlines()}
        for path in (train, test)
    ]
    assert not questions[0] & questions[1]
    assert counts["train"] == 640
    assert counts["test"] == 200
    if task == "mawps":
        assert counts["leaks_removed"] >= 60  # 28 + 39, less a few without a plain equation


def test_the_benchmark_grades(benchmark: ModuleType) -> None:
    assert benchmark.grade_expression("(3+4)*2", "14.0") == "right"
    assert benchmark.grade_expression("2*7", "(3+4)*2") == "right"
    assert benchmark.grade_expression("2*8", "(3+4)*2") == "wrong"
    for answer in ("", "the answer is 14", "1/0", "__import__('os')", "9**9**9", "(" * 10_000):
        assert benchmark.grade_expression(answer, "14") == "format"
    assert benchmark.grade_word("Positive.", "positive") == "right"
    assert benchmark.grade_word("negative", "positive") == "wrong"
    assert benchmark.grade_word("The sentence is", "positive") == "format"
    assert benchmark.grade_word("positive", "human") == "format"
