"""Real data sets, in the shapes they are published in. Skipped where the folder is absent."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import pytest
from conftest import SHARED_DATA, make_tokenizer

from milora.data import overlap, prepare, read_rows
from milora.grade import grader

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
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/tasks.py, on the data that is here."""
    spec = importlib.util.spec_from_file_location("tasks", ROOT / "benchmarks" / "tasks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DATA", SHARED_DATA)
    return module


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
