"""What was learned and what was kept: base against tuned, in one process, on the same prompts.

The base's figures come from the same model with the adapter off (the base is untouched, so that
is the base, bitwise); only full fine-tuning needs a second model.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora.answers import (
    Recall,
    compute_always,
    in_pieces,
    recall_of,
    who_answers,
    with_adapter,
)
from milora.card import short
from milora.choices import (
    PROMPT,
    Encoded,
    Question,
    encode_question,
    log_probabilities,
    read_questions,
)
from milora.classification import (
    ClassTask,
    check_labels,
    class_log_p,
    class_scores,
    label,
    likeliest,
    tokens,
)
from milora.data import begins_with
from milora.errors import UserError
from milora.files import read_json, read_lines, sha256, write_json, write_text
from milora.forms import answers_apart, prompt_for
from milora.generation import Answer, Progress, Prompt, answer_loss, generate
from milora.grade import Grader, Verdict, check_reference, grader, meaning
from milora.harness import HarnessScores, HarnessTask, harness_task, run_harness
from milora.knowledge import knowledge_kept
from milora.logits import Pair
from milora.pretrained import labels_of, positions, task_of
from milora.rows import Row, column_names, read_rows
from milora.vision import Reader, tokenizer_of

LEFT_OUT = {"match": "exact", "protocol": "generate", "max_new_tokens": 64}  # what a task has then
# What `knowledge_kept` finds, for gates.
OF_TEXT = (
    "kl", "kl_p99", "top_token_agreement", "perplexity", "base_perplexity", "tuned_perplexity",
    "tokens", "not_finite",
)  # fmt: skip
OF_CLASSIFIER = ("moved", "similarities", "pieces")
ASKED_ANEW: Mapping[str, Recall] = {"base": compute_always, "tuned": compute_always}


class Task(NamedTuple):
    name: str
    rows: list[Row]  # the last message of each is the reference answer
    grade: Grader | None  # None: the answers are only written down, for a judge
    max_new_tokens: int
    duplicates: int = 0
    match: str = ""  # what `grade` is, for the record
    pattern: str | None = None
    sha256: str | None = None  # of its file; None from the hub


class ChoiceTask(NamedTuple):
    """A task scored by the likelihood of given options."""

    name: str
    questions: list[Question]
    prompt: str  # with {question}
    duplicates: int = 0
    sha256: str | None = None


AnyTask = Task | ChoiceTask | HarnessTask | ClassTask


def task_name(task: str | Mapping[str, Any]) -> str:
    """What `load_task` calls it, whose file need not be there."""
    if isinstance(task, str):
        return harness_name(task) or Path(task).stem
    return str(task.get("name") or task.get("harness") or Path(task["file"]).stem)


def harness_name(task: str | Mapping[str, Any]) -> str:
    """NAME of "harness:NAME"; "" of any other task."""
    given = task if isinstance(task, str) else ""
    return given.removeprefix("harness:") if given.startswith("harness:") else ""


def asked_task(words: str, tasks: Iterable[str | Mapping[str, Any]]) -> str | Mapping[str, Any]:
    """Of a run's tasks the one with this name or file, and its options; else `words` itself."""
    for task in tasks:
        if isinstance(task, str):
            if words == task_name(task):
                return task
            continue  # has no options
        named = words == task_name(task) or words.removeprefix("harness:") == task.get("harness")
        file = task.get("file")
        if named or (file and Path(file).resolve() == Path(words).resolve()):
            return task
    return words


def load_task(
    task: str | Mapping[str, Any], limit: int | None = None, pictures: bool = False,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> AnyTask:  # fmt: skip
    """A task from its file's path, "harness:NAME", or the keys of config.TaskFile.

    With `pictures`, for a model that reads them, its rows may have some. `columns` are those of
    data.columns: of them the ones that the file has are read in their places. Raises UserError for
    rows that cannot be asked or graded, and for options that have no effect or no meaning.
    """
    options: dict[str, Any] = {"file": task} if isinstance(task, str) else dict(task)
    if harness := harness_name(task):
        options = {"harness": harness}
    limit = limit or options.get("limit")
    if options.get("harness"):
        _check_options(options, options["harness"], ("harness", "include"), "tasks of the harness")
        return harness_task(options["harness"], limit, options.get("include"))
    file = options["file"]
    name = task_name(options)
    digest = sha256(Path(file)) if Path(file).is_file() else None
    if options.get("protocol") == "likelihood":
        _check_options(options, name, ("protocol", "prompt"), "options that are scored")
        questions = read_questions(file, pictures)[:limit]
        asked = [(q.question, *q.options) for q in questions]
        prompt = options.get("prompt") or PROMPT
        if "{question}" not in prompt:
            raise UserError(
                f"evaluate.tasks: {name}: prompt {prompt!r} does not hold {{question}}, so that "
                "every question would be the same: put it where the question belongs"
            )
        return ChoiceTask(name, questions, prompt, _again(asked), digest)
    try:
        there = column_names(file, split="test") if columns else ()
        mapped = {ours: theirs for ours, theirs in columns.items() if theirs in there}
        read = read_rows(file, split="test", pictures=pictures, columns=mapped)
    except UserError as error:
        if Path(file).suffix or "/" in file or Path(file).exists():
            raise
        hint = f"for a task of lm-evaluation-harness write harness:{file}"
        raise UserError(f"evaluate.tasks: {error}; {hint}") from error
    rows = read.rows[:limit]
    if read.format == "classification":
        _check_options(options, name, (), "rows with a label")
        return ClassTask(name, rows, _again([repr(row.messages[:-1]) for row in rows]), digest)
    _check_options(options, name, ("match", "pattern", "max_new_tokens"), "generated answers")
    for row in rows:
        if row.messages[-1]["role"] != "assistant" or len(row.messages) < 2:
            raise UserError(f"{row.place}: a task needs a question and the answer as last message")
    match = options.get("match") or "exact"
    grade = grader(match, options.get("pattern"))
    for row in rows:
        reason = check_reference(match, row.messages[-1]["content"])
        if reason:
            raise UserError(f"{row.place}: the reference answer {reason}")
    again = _again([repr((row.messages[:-1], [p.sha256 for p in row.pictures])) for row in rows])
    return Task(
        name, rows, grade, options.get("max_new_tokens") or 64, again, match,
        options.get("pattern"), digest,
    )  # fmt: skip


def _check_options(options: Mapping[str, Any], name: str, own: Sequence[str], what: str) -> None:
    """Raise UserError for an option that `what` does not go by."""
    of_a_file = () if options.get("harness") else ("file", "name")
    for key, value in options.items():
        if key not in ("limit", *of_a_file, *own) and value not in (None, LEFT_OUT.get(key)):
            raise UserError(f"evaluate.tasks: {name}: {key} has no effect on {what}: leave it out")


def _again(asked: Sequence[Any]) -> int:
    """How many stand earlier in the list already."""
    return len(asked) - len(set(asked))


def evaluate_task(
    pair: Pair,
    tokenizer: Reader,
    task: AnyTask,
    batch_size: int = 16,
    progress: Progress = lambda what, done, total: None,
    recall: Mapping[str, Recall] = ASKED_ANEW,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores of base and tuned, and the samples: what each said to every row.

    `recall` looks for what each of the two has answered before; by default nothing is kept.
    """
    if isinstance(task, ClassTask):
        return evaluate_classes(pair, tokenizer_of(tokenizer), task, batch_size, progress, recall)
    if isinstance(task, ChoiceTask):
        return evaluate_choices(pair, tokenizer_of(tokenizer), task, batch_size, progress, recall)
    if isinstance(task, HarnessTask):
        return evaluate_harness(pair, tokenizer_of(tokenizer), task, batch_size, progress, recall)
    samples: list[dict[str, Any]] = [
        {
            "task": task.name,
            "row": row.place,
            "prompt": row.messages[-2]["content"],
            "reference": row.messages[-1]["content"],
            **({"pictures": [p.path for p in row.pictures]} if row.pictures else {}),
        }
        for row in task.rows
    ]
    references = Counter(
        meaning(task.match, task.pattern, row.messages[-1]["content"]) for row in task.rows
    )
    scores: dict[str, Any] = {
        "rows": len(task.rows),
        "duplicates": task.duplicates,
        "max_new_tokens": task.max_new_tokens,
        "match": task.match,
        "pattern": task.pattern,
        "majority": max(references.values()) / len(task.rows),
    }
    for state, entered in (("base", pair.base), ("tuned", pair.tuned)):
        with entered() as model:
            scores[state], graded = score(
                model, tokenizer, task, batch_size, state, progress, recall[state]
            )
        for sample, (answer, verdict) in zip(samples, graded, strict=True):
            sample[state] = {"answer": answer} | ({"verdict": verdict} if verdict else {})
    return scores, samples


def evaluate_classes(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    task: ClassTask,
    batch_size: int = 16,
    progress: Progress = lambda what, done, total: None,
    recall: Mapping[str, Recall] = ASKED_ANEW,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Accuracy, F1 and loss of the classes that base and tuned name, and each of their answers.

    A base without a head for the classes names always the commonest of the rows (`headless`). Rows
    longer than the model has positions are cut, and counted in `shortened`.
    """
    names, count = labels_of(pair.model), len(task.rows)
    wanted = [names.index(label(row)) for row in task.rows]
    common = max(range(len(names)), key=wanted.count)
    encoded = [tokens(tokenizer, row, positions(pair.model)) for row in task.rows]
    samples: list[dict[str, Any]] = [
        {"task": task.name, "row": row.place, "reference": label(row),
         "prompt": "\n\n".join(message["content"] for message in row.messages[:-1])}
        for row in task.rows
    ]  # fmt: skip
    scores: dict[str, Any] = {
        "rows": count,
        "duplicates": task.duplicates,
        "protocol": "classification",
        "labels": {name: wanted.count(place) for place, name in enumerate(names)},
        "f1_of": names[1] if len(names) == 2 else None,
        "shortened": sum(one.shortened for one in encoded),
        "headless": pair.headless,
        "majority": wanted.count(common) / count,
    }
    for state, entered in (("base", pair.base), ("tuned", pair.tuned)):
        picked: list[int | None] = [common] * count
        lost = {}
        if state == "tuned" or not pair.headless:
            with entered() as model:
                what = f"{task.name}, {state}"

                def compute(
                    piece: Sequence[Any], before: int, model: Any = model, what: str = what
                ) -> Any:
                    further = _further(progress, before, count)
                    return class_log_p(
                        model, tokenizer.pad_token_id, piece, batch_size, what, further
                    )

                log_p = in_pieces(
                    recall[state], "classes", encoded, lambda one: len(one.input_ids), compute
                )
            picked = likeliest(log_p)
            of_right = [None if p is None else -p[w] for p, w in zip(log_p, wanted, strict=True)]
            losses = [value for value in of_right if value is not None]
            lost = {
                "loss": sum(losses) / len(losses) if losses else None,
                "not_finite": picked.count(None) / count,
            }
        right = sum(p == w for p, w in zip(picked, wanted, strict=True))
        scores[state] = {
            "accuracy": right / count,
            "interval": wilson(right, count),
            **class_scores(picked, wanted, len(names)),
            **lost,
        }
        for sample, place, there in zip(samples, picked, wanted, strict=True):
            verdict = "format" if place is None else "right" if place == there else "wrong"
            answer = "" if place is None else names[place]
            sample[state] = {"answer": answer, "verdict": verdict}
    return scores, samples


def evaluate_choices(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    task: ChoiceTask,
    batch_size: int = 16,
    progress: Progress = lambda what, done, total: None,
    recall: Mapping[str, Recall] = ASKED_ANEW,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How often the right option is the likeliest, for base and tuned, and every log-probability.

    `accuracy` compares sums of log-probabilities, `accuracy_normalised` those per byte of the
    option; `majority` is what always naming the most frequent place would score. A question with
    an option whose log-probability is not finite is wrong, and counted in `not_finite`.
    """
    encoded = [encode_question(tokenizer, question, task.prompt) for question in task.questions]
    right = [question.right for question in task.questions]
    samples: list[dict[str, Any]] = [
        {"task": task.name, "row": q.place, "prompt": task.prompt.replace("{question}", q.question),
         "options": q.options, "right": q.right}
        for q in task.questions
    ]  # fmt: skip
    count = len(right)
    scores: dict[str, Any] = {
        "rows": count,
        "duplicates": task.duplicates,
        "protocol": "likelihood",
        "prompt": task.prompt,
        "chance": sum(1 / len(q.options) for q in task.questions) / count,
        "majority": max(right.count(place) for place in set(right)) / count,
    }
    for state, entered in (("base", pair.base), ("tuned", pair.tuned)):
        with entered() as model:
            what = f"{task.name}, {state}"

            def compute(
                piece: Sequence[Encoded], before: int, model: Any = model, what: str = what
            ) -> Any:
                return log_probabilities(
                    model, piece, batch_size, what, _further(progress, before, count)
                )

            log_p = in_pieces(
                recall[state], "likelihood", encoded, lambda one: len(one.prompt), compute
            )
        per_byte = [
            [
                None if value is None else value / len(option.encode())
                for value, option in zip(each, q.options, strict=True)
            ]
            for each, q in zip(log_p, task.questions, strict=True)
        ]
        likeliest, normalised = _places_of_largest(log_p), _places_of_largest(per_byte)
        hits, hits_normalised = (
            sum(a == b for a, b in zip(places, right, strict=True))
            for places in (likeliest, normalised)
        )
        scores[state] = {
            "accuracy": hits / count,
            "interval": wilson(hits, count),
            "accuracy_normalised": hits_normalised / count,
            "interval_normalised": wilson(hits_normalised, count),
            "not_finite": likeliest.count(None) / count,
        }
        for sample, each, pick in zip(samples, log_p, likeliest, strict=True):
            rounded = [None if value is None else round(value, 4) for value in each]
            sample[state] = {"log_p": rounded, "likeliest": pick}
    return scores, samples


def _places_of_largest(rows: Sequence[Sequence[float | None]]) -> list[int | None]:
    """None for a row with a value that is None."""
    found: list[int | None] = []
    for row in rows:
        values = [value for value in row if value is not None]
        found.append(values.index(max(values)) if len(values) == len(row) else None)
    return found


def _further(progress: Progress, before: int, total: int) -> Progress:
    """`progress` for a piece that `before` others of `total` came before."""
    return lambda what, done, _: progress(what, before + done, total)


def evaluate_harness(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    task: HarnessTask,
    batch_size: int = 16,
    progress: Progress = lambda what, done, total: None,
    recall: Mapping[str, Recall] = ASKED_ANEW,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The harness's metrics for base and tuned, and its samples."""
    scores: dict[str, Any] = {"protocol": "lm-evaluation-harness"}
    samples: list[dict[str, Any]] = []
    for place, (state, entered) in enumerate((("base", pair.base), ("tuned", pair.tuned))):
        progress(f"{task.name} by the harness", place, 2)
        with entered() as model:
            asked = ["harness", version("lm_eval"), task.called, task.limit]
            # Task files of one's own may have changed.
            ask = compute_always if task.include else recall[state]
            found = HarnessScores(
                *ask(asked, partial(run_harness, model, tokenizer, task, batch_size))
            )
        scores["rows"] = found.rows
        scores[state] = {"metrics": found.metrics}
        if found.accuracy is not None:
            right = round(found.accuracy * found.rows)
            scores[state] |= {
                "accuracy": found.accuracy, "interval": wilson(right, found.rows)
            }  # fmt: skip
        if not samples:
            samples = [
                {"task": task.name, "row": s["row"], "reference": s["reference"]}
                for s in found.samples
            ]
        for sample, own in zip(samples, found.samples, strict=True):
            sample[state] = {"answer": own["answer"]}
    return scores, samples


def score(
    model: PreTrainedModel,
    tokenizer: Reader,
    task: Task,
    batch_size: int = 16,
    state: str = "model",
    progress: Progress = lambda what, done, total: None,
    recall: Recall = compute_always,
) -> tuple[dict[str, Any], list[tuple[str, Verdict | None]]]:
    """The model's scores on one task, and its answer to every row with the verdict on it.

    An answer during which a logit was not finite is a format failure, whatever it says.
    """
    apart = answers_apart(model)
    prompts = [(_prompt(tokenizer, row, apart), row.pictures) for row in task.rows]
    count, what = len(prompts), f"{task.name}, {state}"

    def compute(piece: Sequence[Prompt], before: int) -> Any:
        further = _further(progress, before, count)
        ids, pictures = zip(*piece, strict=True)
        return generate(
            model, tokenizer, ids, task.max_new_tokens, batch_size, what, further, pictures
        )

    asked = ["generate", task.max_new_tokens]
    answers = [
        Answer(*one) for one in in_pieces(recall, asked, prompts, lambda p: len(p[0]), compute)
    ]
    loss, loss_rows = recall(
        ["loss", [(row.messages, row.pictures) for row in task.rows]],
        lambda: answer_loss(model, tokenizer, task.rows, batch_size),
    )
    scores = {
        "unended": sum(not a.ended for a in answers) / count,
        "not_finite": sum(not a.finite for a in answers) / count,
        "loss": loss,
        "loss_rows": loss_rows,  # fewer than rows where encode refuses some
    }
    if task.grade is None:
        return scores, [(a.text, None) for a in answers]
    verdicts: list[Verdict] = [
        task.grade(a.text, row.messages[-1]["content"]) if a.finite else "format"
        for a, row in zip(answers, task.rows, strict=True)
    ]
    right = verdicts.count("right")
    scores = {
        "accuracy": right / count,
        "interval": wilson(right, count),
        "format_failures": verdicts.count("format") / count,
        **scores,
    }
    return scores, [(a.text, verdict) for a, verdict in zip(answers, verdicts, strict=True)]


def evaluate_all(
    pair: Pair,
    tokenizer: Reader,
    tasks: Sequence[AnyTask],
    texts: Sequence[tuple[str, str]],
    chunks: int,
    batch_size: int,
    progress: Progress = lambda what, done, total: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Every task and the knowledge kept: the content of evaluation.json, and the samples.

    `texts` are general texts, each with its name (see `general_texts`).
    What either model has been asked before is not asked again (answers.py).
    """
    scores, samples = {}, []
    adapter_off = who_answers(pair.model, tokenizer)
    base = who_answers(pair.other_base, tokenizer) if pair.other_base else adapter_off
    who = {"base": base, "tuned": with_adapter(adapter_off, pair.model)}
    recall = {state: recall_of(name) for state, name in who.items()}
    for task in tasks:
        found, own = evaluate_task(pair, tokenizer, task, batch_size, progress, recall)
        scores[task.name] = found | {"sha256": file_sha256(task)}
        samples += own
    knowledge = []
    for text, name in texts:
        kept = recall["tuned"](
            ["knowledge", who["base"], text, chunks, *begins_with(tokenizer_of(tokenizer))],
            partial(knowledge_kept, pair, tokenizer_of(tokenizer), text, chunks, progress=progress),
        )
        knowledge.append({"text": name, **kept})
    weight = next(pair.model.parameters())
    settings = {
        "batch_size": batch_size,
        "chunks": chunks,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else "cpu",
        "versions": {name: version(name) for name in ("milora", "torch", "transformers")},
    }
    return {"tasks": scores, "knowledge": knowledge, "settings": settings}, samples


def merge_evaluations(
    file: Path, samples_file: Path, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """What the two files hold, with the tasks and texts of `result` added or put in their place.

    Raises UserError as check_files does.
    """
    check_files(file, {name: one.get("sha256") for name, one in result["tasks"].items()})
    stored = read_json(file)
    tasks = stored["tasks"] | result["tasks"]
    texts = {one["text"]: one for one in [*stored["knowledge"], *result["knowledge"]]}
    lines = read_lines(samples_file) if samples_file.exists() else []
    kept = [one for one in lines if one["task"] not in result["tasks"]]
    whole = {**stored, **result, "tasks": tasks, "knowledge": list(texts.values())}
    return whole, [*kept, *samples]


def check_files(evaluation: Path, tasks: Mapping[str, str | None]) -> None:
    """Raise UserError for a task that had another file in `evaluation`; tasks: name -> sha256."""
    stored = read_json(evaluation)["tasks"]
    for name, digest in tasks.items():
        before = stored.get(name, {}).get("sha256", digest)
        if before != digest:
            now, then = ((one or "none of a file")[:14] for one in (digest, before))
            raise UserError(
                f"the file of {name} (sha256 {now}) is not the file that the task {name} of "
                f"{evaluation} had ({then}): give it another name, or write elsewhere with --out"
            )


def file_sha256(task: AnyTask) -> str | None:
    """None for a task that is not of a file."""
    return None if isinstance(task, HarnessTask) else task.sha256


def save_evaluation(
    file: Path, samples_file: Path, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> None:
    """The two parts of `evaluate_all` as files; the result last, so that it says all is there.

    The answers to a task without a grader go beside it, in the format that AlpacaEval's judge takes
    as its model outputs: <stem>.<task>-base.json and -tuned.json.
    """
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_text(samples_file, lines)
    for name, task in result["tasks"].items():
        if "protocol" in task or "accuracy" in task["tuned"]:
            continue
        own = [sample for sample in samples if sample["task"] == name]
        for state in ("base", "tuned"):
            answers = [
                {"instruction": s["prompt"], "output": s[state]["answer"], "generator": state}
                for s in own
            ]
            plain = re.sub(r"[^\w.-]+", "-", name)
            write_json(file.with_name(f"{file.stem}.{plain}-{state}.json"), answers)
    write_json(file, result)


def measured(
    tasks: Sequence[AnyTask], texts: Sequence[str], classifies: bool, interference: bool
) -> dict[str, Sequence[str] | None]:
    """What a run with these tasks and named general texts will have for gates: subject -> keys.

    None for any: the metrics of a harness's task are its own. `interference` is whether it is
    measured.
    """
    kept = OF_CLASSIFIER if classifies else OF_TEXT
    found: dict[str, Sequence[str] | None] = {task.name: _keys(task) for task in tasks}
    found |= {"knowledge": kept}
    found |= {f"knowledge.{name}": kept for name in map(short, texts)}
    return found | ({"interference": ("max", "mean", "size")} if interference else {})


def _keys(task: AnyTask) -> Sequence[str] | None:
    """What `evaluate_task` finds of base and tuned, single numbers alone."""
    if isinstance(task, HarnessTask):
        return None
    if isinstance(task, ChoiceTask):
        return ("accuracy", "accuracy_normalised", "not_finite")
    if isinstance(task, ClassTask):
        return ("accuracy", "f1", "loss", "not_finite")
    graded = ("accuracy", "format_failures") if task.grade else ()
    return (*graded, "loss", "loss_rows", "unended", "not_finite")


def check_task(task: AnyTask, model: nn.Module) -> None:
    """Raise UserError for a task that is not for a model of this kind, or of other labels."""
    kind = task_of(model)
    if (kind == "SEQ_CLS") != isinstance(task, ClassTask):
        needs, here = "a label", "is a classifier"
        if isinstance(task, ClassTask):
            needs, here = "a question and an answer", "writes text"
        raise UserError(
            f"evaluate.tasks: {task.name}: the model {here}, for which rows need {needs}"
        )
    if kind == "SEQ_2_SEQ_LM" and isinstance(task, ChoiceTask | HarnessTask):
        raise UserError(
            f"evaluate.tasks: {task.name}: of an encoder-decoder answers are scored, not the "
            "likelihood of options: use protocol: generate"
        )
    if isinstance(task, ClassTask):
        check_labels(task.rows, labels_of(model))


def check_lengths(task: AnyTask, tokenizer: Reader, limit: int, apart: bool = False) -> None:
    """Raise UserError for a question that, with its answer, is longer than the model can take.

    `apart`: question and answer have `limit` tokens each (forms.answers_apart).
    """
    if isinstance(task, HarnessTask | ClassTask):
        return  # the harness cuts prompts from the left and says so; evaluate_classes counts
    if isinstance(task, ChoiceTask):
        for question in task.questions:
            known, options = encode_question(tokenizer_of(tokenizer), question, task.prompt)
            length = len(known) + max(len(option) for option in options)
            if length > limit:
                raise UserError(
                    f"{question.place}: the question and its longest option are {length} tokens, "
                    f"the model has {limit} positions: leave it out"
                )
        return
    for row in task.rows:
        asked = len(_prompt(tokenizer, row, apart))
        length = max(asked, task.max_new_tokens) if apart else asked + task.max_new_tokens
        if length > limit:
            raise UserError(
                f"{row.place}: the question and max_new_tokens ({task.max_new_tokens}) are "
                f"{length} tokens, the model has {limit} positions: shorten one of them"
            )


def _prompt(tokenizer: Reader, row: Row, apart: bool) -> list[int]:
    try:
        return prompt_for(tokenizer, row.messages[:-1], apart, row.pictures)
    except UserError as error:
        raise UserError(f"{row.place}: {error}") from error


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); it stays within [0, 1]."""
    z, p = 1.959964, right / count
    centre = p + z * z / (2 * count)
    spread = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
