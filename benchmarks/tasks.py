"""Small real tasks as JSONL, from the public data sets in the folder that SHARED_DATA names.

    classify  TREC (6 classes of question), polarity and subjectivity (2 classes of sentence)
    MAWPS     the arithmetic expression of a word problem, between dollars, so that math-verify
              reads it; right when the value is
    GSM8K     the steps of a word problem in words, and the number after "####"
    mix       BoolQ, ARC-Easy, ARC-Challenge and OpenBookQA in LLM-Adapters' prompts
    kept      ARC-Easy and PIQA, by the likelihood of the options; WikiText-2 and C4 as text

Rows of a training set that also stand in its test set (or in MAWPS's validation set) are left out,
compared without case, spaces and punctuation.
"""

import ast
import io
import json
import operator
import os
import random
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from milora.files import read_lines, write_bytes, write_text

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
BUILD = Path("build/tasks")  # relative to ROOT, since what is recorded must hold on any machine

CLASSES = {
    "ABBR": "abbreviation", "ENTY": "entity", "DESC": "description", "HUM": "human",
    "LOC": "location", "NUM": "number",
}  # fmt: skip
LABELS = {
    "trec": list(CLASSES.values()),
    "polarity": ["positive", "negative"],
    "subjectivity": ["subjective", "objective"],
}
SYSTEM = {  # short, since it is read with every row
    "trec": "Name what is asked for.",
    "polarity": "Positive or negative?",
    "subjectivity": "Subjective or objective?",
    "mawps": "Write the expression.",
    "gsm8k": "Solve it step by step, with #### before the number in the end.",
    "commonsense": "Answer the question.",
}


class Row(NamedTuple):
    question: str
    answer: str


class Split(NamedTuple):
    train: list[Row]
    held_out: list[Row]
    test: list[Row]
    leaks: int  # rows that were left out of the training set


def require_data() -> None:
    if not DATA.is_dir():
        sys.exit(f"{DATA} is not there: set SHARED_DATA to the folder with the data sets")


def plain(text: str) -> str:
    """Case, spaces and punctuation removed, to find the same question twice."""
    return "".join(c for c in text.lower() if c.isalnum())


def _lines(archive: str, wanted: str) -> list[str]:
    with zipfile.ZipFile(DATA / "classification" / archive) as opened:
        (name,) = [n for n in opened.namelist() if n.endswith(wanted) and "__MACOSX" not in n]
        text = io.StringIO(opened.read(name).decode("latin-1"))
        return [line.strip() for line in text if line.strip()]


def trec() -> tuple[list[Row], list[Row]]:
    parts = []
    for name in ("train.txt", "test.txt"):
        rows = []
        for line in _lines("trec_qc.zip", name):
            label, _, question = line.partition(" ")
            rows.append(Row(question, CLASSES[label.partition(":")[0]]))
        random.Random(0).shuffle(rows)
        parts.append(rows)
    return parts[0], parts[1]


def _two_classes(archive: str, endings: dict[str, str]) -> tuple[list[Row], list[Row]]:
    """Sets without a split of their own: 1,000 rows for the test."""
    rows = [Row(line, label) for label, e in endings.items() for line in _lines(archive, e)]
    random.Random(0).shuffle(rows)
    return rows[1000:], rows[:1000]


def polarity() -> tuple[list[Row], list[Row]]:
    return _two_classes("sentence_polarity.zip", {"positive": ".pos", "negative": ".neg"})


def subjectivity() -> tuple[list[Row], list[Row]]:
    # quote: snippets of reviews; plot: summaries of plots
    return _two_classes("subjectivity.zip", {"subjective": "quote.tok.gt9.5000",
                                             "objective": "plot.tok.gt9.5000"})  # fmt: skip


def mawps() -> tuple[list[Row], list[Row]]:
    parts = []
    for name in ("train", "test"):
        rows = []
        for item in json.loads((DATA / "math_words" / f"mawps_{name}.json").read_text()):
            left, _, right = item["equation"].partition("=")
            expression = right if left.strip().lower() == "x" else left
            value, answer = calculate(expression), calculate(str(item["ans"]))
            # A few equations are no plain right-hand side, or disagree with the stated answer.
            if value is not None and answer is not None and abs(value - answer) < 1e-4:
                rows.append(Row(item["original_text"], f"${expression.replace(' ', '')}$"))
        random.Random(0).shuffle(rows)
        parts.append(rows)
    return parts[0], parts[1]


def gsm8k() -> tuple[list[Row], list[Row]]:
    """Without the notes for a calculator, <<48/2=24>>."""
    parts = []
    for name in ("train", "test"):
        items = read_lines(DATA / "gsm8k" / f"{name}.jsonl")
        rows = [Row(i["question"], re.sub("<<.*?>>", "", i["answer"])) for i in items]
        random.Random(0).shuffle(rows)
        parts.append(rows)
    return parts[0], parts[1]


def commonsense() -> tuple[list[Row], list[Row]]:
    """All that there is to train on; for the test as many of each set."""
    parts = []
    for name, each in (("train", None), ("test", 500)):
        rows = []
        for source in ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa"):
            items = json.loads((DATA / "commonsense" / f"{source}_{name}.json").read_text())
            own = [Row(item["instruction"], item["output"]) for item in items]
            random.Random(0).shuffle(own)
            rows += own[:each]
        random.Random(0).shuffle(rows)
        parts.append(rows)
    return parts[0], parts[1]


SETS: dict[str, Callable[[], tuple[list[Row], list[Row]]]] = {
    "trec": trec, "polarity": polarity, "subjectivity": subjectivity, "mawps": mawps,
    "gsm8k": gsm8k, "commonsense": commonsense,
}  # fmt: skip

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def calculate(expression: str) -> float | None:
    """The value of + - * / and brackets over numbers; None for anything else."""

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return float(OPERATORS[type(node.op)](value(node.left), value(node.right)))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return float(node.value)
        raise ValueError(node)

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (ValueError, SyntaxError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def split(task: str, train: int, held_out: int, test: int) -> Split:
    """So many rows of each, none of them in two parts."""
    pool, tested = SETS[task]()
    tested = tested[:test]
    barred = {plain(row.question) for row in tested}
    if task == "mawps":
        valid = json.loads((DATA / "math_words" / "mawps_valid.json").read_text())
        barred |= {plain(item["original_text"]) for item in valid}
    clean: dict[str, Row] = {}
    leaks = 0
    for row in pool:
        key = plain(row.question)
        leaks += key in barred
        if key not in barred:
            clean.setdefault(key, row)
    rows = list(clean.values())
    assert len(rows) >= train + held_out, (task, len(rows))
    assert len(tested) == test, (task, len(tested))
    return Split(rows[:train], rows[train : train + held_out], tested, leaks)


def task_files(task: str, train: int, held_out: int, test: int, folder: str = "") -> dict[str, str]:
    """Paths of train, held_out and test as JSONL in the alpaca format."""
    parts = split(task, train, held_out, test)
    paths = {}
    for name in ("train", "held_out", "test"):
        rows: list[Row] = getattr(parts, name)
        path = BUILD / (folder or f"{task}-{train}") / f"{name}.jsonl"
        lines = [
            json.dumps({"system": SYSTEM[task], "instruction": q, "output": a}) for q, a in rows
        ]
        write_text(path, "\n".join(lines) + "\n")
        paths[name] = str(path)
    return paths


def label_files(task: str, train: int, held_out: int, test: int) -> dict[str, str]:
    """The same rows for a classifier: text and label."""
    parts = split(task, train, held_out, test)
    paths = {}
    for name in ("train", "held_out", "test"):
        path = BUILD / f"{task}-{train}-labels" / f"{name}.jsonl"
        lines = [json.dumps({"text": q, "label": a}) for q, a in getattr(parts, name)]
        write_text(path, "\n".join(lines) + "\n")
        paths[name] = str(path)
    return paths


def graded(task: str, file: str) -> dict[str, Any]:
    """The task under evaluate.tasks."""
    if task == "mawps":
        return {"file": file, "name": task, "match": "math", "max_new_tokens": 32}
    if task == "gsm8k":
        return {"file": file, "name": task, "match": "number", "max_new_tokens": 256}
    if task == "commonsense":
        pattern, longest = r"\b(true|false|answer[1-5])\b", 12
    else:
        pattern, longest = rf"\b({'|'.join(LABELS[task])})\b", 6
    of = {"match": "choice", "pattern": pattern, "max_new_tokens": longest}
    return {"file": file, "name": task, **of}


def kept_tasks(limit: int) -> Iterator[dict[str, Any]]:
    """ARC-Easy and PIQA, by likelihood."""
    for name, file in (("arc-easy", "ARC-Easy_test.json"), ("piqa", "piqa_test.json")):
        path = _copied(DATA / "commonsense" / file)
        yield {"file": path, "name": name, "protocol": "likelihood", "limit": limit}


def text_file(name: str) -> str:
    """A file of DATA/general_text, by a path that holds on any machine."""
    return _copied(DATA / "general_text" / name)


def _copied(path: Path) -> str:
    """Whole or not at all, since another process may be reading it."""
    write_bytes(BUILD / path.name, path.read_bytes())
    return str(BUILD / path.name)
