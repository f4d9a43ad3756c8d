"""SmolLM2 on three small tasks, lora against milora: what was learned, what was kept.

    python benchmarks/learned_and_kept.py run     # one JSON a run in benchmarks/results/, resumable
    python benchmarks/learned_and_kept.py table   # docs/results.md from those JSON files

The data is read from the folder SHARED_DATA (default ../shared/data). Leaks between training and
test rows are removed. One seed, r = alpha = 16, one epoch of 640 rows in 40 steps of 16.
"""

import argparse
import ast
import io
import json
import operator
import os
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
RESULTS = Path(__file__).resolve().parent / "results"
WORK = ROOT / "build" / "learned_and_kept"
TRAIN_ROWS, TEST_ROWS = 640, 200

# (task, method, learning rate): MiLoRA at about a third of LoRA's rate.
RUNS = (
    ("polarity", "lora", 5e-4),
    ("polarity", "milora", 1.7e-4),
    ("trec", "lora", 1e-3),
    ("trec", "milora", 3e-4),
    ("mawps", "lora", 1e-3),
    ("mawps", "milora", 3e-4),
)
CLASSES = {
    "ABBR": "abbreviation",
    "ENTY": "entity",
    "DESC": "description",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}
Rows = list[dict[str, str]]


def plain(text: str) -> str:
    """Case, spaces and punctuation removed, to find the same question twice."""
    return "".join(c for c in text.lower() if c.isalnum())


def polarity() -> tuple[Rows, Rows]:
    rows = []
    with zipfile.ZipFile(DATA / "classification" / "sentence_polarity.zip") as archive:
        for label, ending in (("positive", ".pos"), ("negative", ".neg")):
            name = next(n for n in archive.namelist() if n.endswith(ending))
            text = archive.read(name).decode("latin-1")
            rows += [row(line.strip(), label) for line in text.splitlines() if line.strip()]
    random.Random(0).shuffle(rows)
    return rows[TEST_ROWS:], rows[:TEST_ROWS]


def trec() -> tuple[Rows, Rows]:
    parts = []
    with zipfile.ZipFile(DATA / "classification" / "trec_qc.zip") as archive:
        for wanted in ("train", "test"):
            name = next(n for n in archive.namelist() if wanted in n and n.endswith(".txt"))
            rows = []
            for line in io.StringIO(archive.read(name).decode("latin-1")):
                label, _, question = line.strip().partition(" ")
                if question:
                    rows.append(row(question, CLASSES[label.partition(":")[0]]))
            random.Random(0).shuffle(rows)
            parts.append(rows)
    return parts[0], parts[1][:TEST_ROWS]


def mawps() -> tuple[Rows, Rows]:
    parts = []
    for name in ("train", "test"):
        rows = []
        for item in json.loads((DATA / "math_words" / f"mawps_{name}.json").read_text()):
            left, _, right = item["equation"].partition("=")
            expression = right if left.strip().lower() == "x" else left
            value, answer = calculate(expression), calculate(str(item["ans"]))
            # A few equations are no plain right-hand side, or disagree with the stated answer.
            if value is not None and answer is not None and abs(value - answer) < 1e-4:
                rows.append(row(item["original_text"], expression.replace(" ", "")))
        random.Random(0).shuffle(rows)
        parts.append(rows)
    return parts[0], parts[1][:TEST_ROWS]


def row(question: str, answer: str) -> dict[str, str]:
    return {"input": question, "output": answer}


INSTRUCTION = {
    "polarity": "Is this sentence of a film review positive or negative? Answer with one word.",
    "trec": "What does the question ask for: abbreviation, entity, description, human, location "
    "or number? Answer with one word.",
    "mawps": "Write the arithmetic expression that solves the problem, and nothing else.",
}
SETS: dict[str, Callable[[], tuple[Rows, Rows]]] = {
    "polarity": polarity,
    "trec": trec,
    "mawps": mawps,
}
MAX_NEW_TOKENS = {"polarity": 6, "trec": 6, "mawps": 32}

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


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


def grade_word(answer: str, reference: str) -> str:
    words = CLASSES.values() if reference in CLASSES.values() else ("positive", "negative")
    word = answer.strip().strip(".").lower()
    return "right" if word == reference else "wrong" if word in words else "format"


def grade_expression(answer: str, reference: str) -> str:
    found, wanted = calculate(answer), calculate(reference)
    if found is None or wanted is None:
        return "format"
    return "right" if abs(found - wanted) <= 1e-4 * max(1.0, abs(wanted)) else "wrong"


def files(task: str) -> tuple[Path, Path, dict[str, int]]:
    """Train and test as JSONL; rows of train that also stand in test are left out."""
    train, test = SETS[task]()
    if task == "mawps":  # its validation set is left out as well
        valid = json.loads((DATA / "math_words" / "mawps_valid.json").read_text())
        barred = {plain(item["original_text"]) for item in valid}
    else:
        barred = set()
    barred |= {plain(item["input"]) for item in test}
    clean = [item for item in train if plain(item["input"]) not in barred]
    counts = {"leaks_removed": len(train) - len(clean), "train": TRAIN_ROWS, "test": len(test)}
    assert len(clean) >= TRAIN_ROWS, (task, len(clean))
    assert len(test) >= TEST_ROWS, (task, len(test))
    paths = []
    for name, rows in (("train", clean[:TRAIN_ROWS]), ("test", test)):
        path = WORK / task / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"instruction": INSTRUCTION[task], **item}) for item in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1], counts


def run(task: str, method: str, rate: float, out: Path) -> None:
    from milora.adapter import base_only
    from milora.evaluate import Task, load_task, score
    from milora.files import write_json
    from milora.progress import Progress
    from milora.train import train
    from milora.verify import open_adapter

    train_file, test_file, counts = files(task)
    folder = WORK / task / f"{method}-{rate:g}"
    with Progress() as progress:
        record = train(
            model="smollm2-135m",
            method=method,
            output_dir=str(folder),
            dtype="float32",
            data={
                "train": str(train_file),
                "eval": str(test_file),
                "format": "alpaca",
                "columns": {},
                "max_length": 256,
                "on_bad_row": "fail",
            },
            lora={
                "r": 16,
                "lora_alpha": 16,
                "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
            },
            training={
                "learning_rate": rate,
                "num_train_epochs": 1,
                "eval_strategy": "no",
                "save_strategy": "no",
                "train_sampling_strategy": "group_by_length",
            },
            evaluate={
                "tasks": [],
                "knowledge": str(DATA / "general_text" / "wikitext2_test.txt"),
                "chunks": 16,
                "batch_size": 16,
            },
            resume=folder.exists(),
            progress=progress,
        )
        opened = open_adapter(folder)
        loaded = load_task(str(test_file))
        grade: Any = grade_expression if task == "mawps" else grade_word
        graded = Task(task, loaded.rows, grade, MAX_NEW_TOKENS[task])
        scores: dict[str, Any] = {"rows": len(graded.rows), "max_new_tokens": graded.max_new_tokens}
        known = base_scores(task, record["base"]["sha256"])
        model: Any = opened.model
        tokenizer = opened.base.tokenizer
        if known:
            scores["base"] = known
        else:
            with base_only(model):
                scores["base"], _ = score(model, tokenizer, graded, 16, "base", progress)
        scores["tuned"], _ = score(model, tokenizer, graded, 16, "tuned", progress)
    knowledge = json.loads((folder / "evaluation.json").read_text())["knowledge"]
    knowledge["text"] = "WikiText-2 test"
    keys = ("versions", "parameters", "step0", "adapter", "seconds", "peak_memory_bytes")
    write_json(
        out,
        {
            "task": task,
            "method": method,
            "learning_rate": rate,
            "r": 16,
            "lora_alpha": 16,
            "seed": 0,
            "steps": 40,
            "batch": 16,
            "rows": counts,
            "scores": scores,
            "knowledge": knowledge,
            "base_sha256": record["base"]["sha256"],
            **{key: record[key] for key in keys if key in record},
        },
    )


def base_scores(task: str, base_sha256: str) -> dict[str, Any] | None:
    """The untuned model's scores on the task, where an earlier run has measured them."""
    for path in sorted(RESULTS.glob(f"learned_and_kept-{task}-*.json")):
        found = json.loads(path.read_text())
        if found["base_sha256"] == base_sha256:
            scores: dict[str, Any] = found["scores"]["base"]
            return scores
    return None


def wanted() -> Iterator[tuple[str, str, float, Path]]:
    for task, method, rate in RUNS:
        yield task, method, rate, RESULTS / f"learned_and_kept-{task}-{method}-{rate:g}.json"


def table() -> str:
    lines = [
        "| task | method | learning rate | accuracy, base → tuned (95 %) | format failures, base → "
        "tuned | KL(base‖tuned) | perplexity, base → tuned |",
        "|---|---|---|---|---|---|---|",
    ]
    found = [json.loads(path.read_text()) for *_, path in sorted(wanted()) if path.exists()]
    for one in found:
        base, tuned, kept = one["scores"]["base"], one["scores"]["tuned"], one["knowledge"]
        low, high = tuned["interval"]
        lines.append(
            f"| {one['task']} | {one['method']} | {one['learning_rate']:g} "
            f"| {base['accuracy']:.3f} → **{tuned['accuracy']:.3f}** ({low:.3f} to {high:.3f}) "
            f"| {base['format_failures']:.3f} → {tuned['format_failures']:.3f} "
            f"| {kept['kl']:.4f} | {kept['base_perplexity']:.2f} → {kept['tuned_perplexity']:.2f} |"
        )
    return "\n".join(lines)


def short_table() -> str:
    """For the README: one line a task and method, of all runs."""
    lines = [
        "| SmolLM2-135M | accuracy, base → tuned | KL from the base | file |",
        "|---|---|---|---|",
    ]
    for task, method, rate, path in wanted():
        if path.exists():
            one = json.loads(path.read_text())
            base, tuned = (one["scores"][state]["accuracy"] for state in ("base", "tuned"))
            lines.append(
                f"| {task}, {method} at {rate:g} | {base:.3f} → {tuned:.3f} "
                f"| {one['knowledge']['kl']:.4f} | [JSON]({path.relative_to(ROOT)}) |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "table"])
    what = parser.parse_args().what
    if what == "run":
        if not DATA.is_dir():
            sys.exit(f"{DATA} is not there: set SHARED_DATA to the folder with the data sets")
        for task, method, rate, path in wanted():
            if not path.exists():
                run(task, method, rate, path)
                print(f"wrote {path.relative_to(ROOT)}", flush=True)
        return
    for page, name, lines in (
        (ROOT / "docs" / "results.md", "learned_and_kept", table()),
        (ROOT / "README.md", "short", short_table()),
    ):
        text = page.read_text(encoding="utf-8")
        before, begin, rest = text.partition(f"<!-- table: {name} -->")
        _, end, after = rest.partition("<!-- end -->")
        page.write_text(f"{before}{begin}\n{lines}\n{end}{after}", encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main()
