"""What a run works on, read and checked before anything is written."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from milora.choices import render
from milora.classification import ClassTask, check_labels, label, label_names
from milora.continual import Earlier, replayed
from milora.data import Prepared, prepare
from milora.errors import UserError
from milora.evaluate import (
    AnyTask,
    ChoiceTask,
    Task,
    check_lengths,
    check_task,
    load_task,
)
from milora.files import sha256
from milora.forms import answers_apart, encoder_for
from milora.harness import HarnessTask
from milora.keep import SAMPLED, Pieces, cut
from milora.knowledge import check_unseen, general_texts
from milora.pretrained import Pretrained, positions, reads_pictures, task_of
from milora.progress import Progress
from milora.rows import Rows, overlap, plainly, questions_of, read_rows, split_rows, training_rows
from milora.tokens import Named, load_with_tokens
from milora.vision import pictures_sha256

NOT_TASKS = ("knowledge", "interference", "continual")  # what else a gate is on


class Material(NamedTuple):
    """Rows, tasks, texts and the base of a run."""

    base: Pretrained
    rows: Rows
    held_skipped: int  # rows of a held-out file that on_bad_row: skip left out
    train: Prepared
    held_out: Prepared
    overlap: int
    test_overlap: dict[str, dict[str, int]]  # by task, how many stand in train and eval too
    tasks: list[AnyTask]
    texts: list[tuple[str, str]]  # (text, where it comes from)
    general: Pieces  # of the files of milora.text
    files: dict[str, str]  # name -> sha256
    base_sha256: str  # of the base as it came
    named: Named  # tokens of the user's own
    replayed: dict[str, int]  # rows of earlier runs among those for training, by run


def read_material(
    asked: Mapping[str, Any], dtype: str, sharded: bool, main: bool, earlier: Earlier | None,
    progress: Progress,
) -> Material:  # fmt: skip
    """What the configuration `asked` names. Raises UserError for whatever cannot be used.

    `earlier` is the run that it continues, whose rows it may train on again.

    `sharded` leaves the base where the files are read, for processes that share it out; its hash
    is then that of the `main` one, and "" in the others, which have no values.
    """
    model, data, evaluate = asked["model"], asked["data"], asked["evaluate"]
    general, trust_remote_code = asked["milora"]["text"], asked["trust_remote_code"]
    pictures = reads_pictures(model, trust_remote_code)
    read = {key: data[key] for key in ("format", "columns", "on_bad_row")} | {"pictures": pictures}
    source, held_out = data["train"], data["eval"]
    rows, held_skipped = read_rows(source, **read), 0
    _say_read(source, rows, progress)
    if isinstance(held_out, str):
        held = read_rows(held_out, **read, split="test")
        _say_read(held_out, held, progress)
        _check_kinds(source, rows.format, held_out, held.format)
        train_rows, held_rows, held_skipped = rows.rows, held.rows, len(held.skipped)
    else:
        train_rows, held_rows = split_rows(rows.rows, held_out, asked["seed"])
    again = None
    if earlier and (share := asked["continue"]["replay"]):
        again = replayed(earlier, share, asked["seed"], pictures)
        train_rows = [*train_rows, *again.rows]
        said = ", ".join(f"{count} of {run}" for run, count in again.counts.items())
        progress.say(f"replayed: {len(again.rows)} rows of earlier runs ({said})")
    tasks = [load_task(task, None, pictures, data["columns"]) for task in evaluate["tasks"]]
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"evaluate.tasks: two tasks have one name ({', '.join(names)}): set name")
    if taken := [name for name in names if name.partition(".")[0] in NOT_TASKS]:
        raise UserError(
            f"evaluate.tasks: gates read {taken[0]!r} as a measure of their own, so that none "
            "could be on this task: set another name"
        )
    texts = general_texts(evaluate["knowledge"])
    kept = general_texts(general, "milora.text") if general and general != SAMPLED else []
    used = [source, held_out, *(text_source for _, text_source in [*texts, *kept])]
    used += [_task_file(task) for task in evaluate["tasks"]]
    files = {f: sha256(Path(f)) for f in used if isinstance(f, str) and Path(f).is_file()}
    check_unseen(texts, files, source, [name for _, name in kept])
    if again:
        files |= again.files
    # In the order of the files: which rows are held out is the seed's to say.
    seen = {"data": [*rows.rows, *(held_rows if isinstance(held_out, str) else ())]}
    seen |= {task.name: task.rows for task in tasks if isinstance(task, Task)}
    for where, found in seen.items():
        if all_pictures := [picture for row in found for picture in row.pictures]:
            files[f"{len(all_pictures)} pictures of {where}"] = pictures_sha256(all_pictures)
    labels = label_names(rows.rows) if rows.format == "classification" else []
    if labels:
        counts = Counter(label(row) for row in rows.rows)
        progress.say("labels: " + ", ".join(f"{name} ({counts[name]})" for name in labels))
        check_labels(held_rows, labels)
        check_labels(again.rows if again else [], labels)
    base, base_sha, named, template = load_with_tokens(
        model, dtype, trust_remote_code, asked.get("tokenizer", {}), asked["quantization"], labels,
        device="cpu" if sharded else None, hashed=main or not sharded,
    )  # fmt: skip
    if (task_of(base.model) == "SEQ_CLS") != bool(labels):
        raise UserError(
            f"model: {model} is a classifier, and {source} holds no labels but {rows.format}"
        )
    if base.fresh:
        progress.say(
            f"{', '.join(base.fresh)}: not in the files of {model}, so drawn at random and trained "
            "in full"
        )
    if template:
        files[template] = sha256(Path(template))
    for note in base.notes:
        progress.say(note)
    if named.ids:
        known = [text for text in named.ids if text not in named.added]
        progress.say(
            f"tokens: {len(named.added)} added, {len(known)} known already"
            + f" ({', '.join(known)})" * bool(known)
            + f"; their rows train in {' and '.join(named.rows)}"
        )
    longest = positions(base.model)
    if data["max_length"] > longest:
        raise UserError(
            f"data.max_length is {data['max_length']}, but {model} has {longest} positions: "
            f"set at most {longest}"
        )
    for task in tasks:
        check_task(task, base.model)
        check_lengths(task, base.reader, longest, answers_apart(base.model))
    encode = encoder_for(base.model)
    prepared = prepare(base.reader, train_rows, data["max_length"], source, encode)
    name = held_out if isinstance(held_out, str) else f"{source} (held out)"
    prepared_held = prepare(base.reader, held_rows, data["max_length"], name, encode)
    embedding: Any = base.model.get_input_embeddings()
    rows_there = len(embedding.weight)
    for example in (*prepared.examples, *prepared_held.examples):
        if (largest := max(example["input_ids"])) >= rows_there:
            raise UserError(
                f"model: {base.tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, but "
                f"the embedding of {model} has {rows_there} rows: name it in tokenizer.tokens"
            )
    in_train, in_held = (set[str]().union(*map(questions_of, s)) for s in (train_rows, held_rows))
    common = overlap(in_train, held_rows)
    for what, part in (("train", prepared), ("eval", prepared_held)):
        progress.say(
            f"{what}: {part.kept} rows kept, {part.shortened} shortened to {data['max_length']} "
            f"tokens, {sum(part.refused.values())} refused; {part.tokens} tokens, "
            f"{part.trained_tokens} of them trained"
        )
        for place in part.refused_places:
            progress.say(f"refused: {place}")
    if common:
        progress.say(f"warning: {common} held-out questions also stand in the training rows")
    test_overlap = {
        task.name: {"train": asked_in(in_train, task), "eval": asked_in(in_held, task)}
        for task in tasks
        if not isinstance(task, HarnessTask)
    }
    for task_name, in_rows in test_overlap.items():
        for where, count in zip(("training", "held-out"), in_rows.values(), strict=True):
            if count:
                progress.say(
                    f"warning: {count} questions of the task {task_name} also stand in the {where} "
                    "rows"
                )
    pieces = cut(base.tokenizer, (text for text, _ in kept), longest) if kept else []
    return Material(
        base, rows, held_skipped, prepared, prepared_held, common, test_overlap, tasks, texts,
        pieces, files, base_sha, named, again.counts if again else {},
    )  # fmt: skip


def trained_questions(
    asked: Mapping[str, Any], files: Mapping[str, str], pictures: bool
) -> set[str] | None:
    """What the rows of data.train ask that a run with the configuration `asked` trained on; None
    where the file is not there as it was, by the hashes in `files`.
    """
    source = asked["data"]["train"]
    if not Path(source).is_file() or sha256(Path(source)) != files.get(source):
        return None
    return set[str]().union(
        *map(questions_of, training_rows(asked["data"], asked["seed"], pictures))
    )


def asked_in(questions: set[str], task: Task | ClassTask | ChoiceTask) -> int:
    """How many rows of `task` ask one of the questions; of options by likelihood in the words of
    their file or in those of the prompt.
    """
    if not isinstance(task, ChoiceTask):
        return overlap(questions, task.rows)
    words = ({plainly(q.asked), plainly(render(task.prompt, q))} for q in task.questions)
    return sum(not questions.isdisjoint(either) for either in words)


def _say_read(source: str, read: Rows, progress: Progress) -> None:
    unused = f"; columns not used: {', '.join(read.unused)}" if read.unused else ""
    progress.say(f"{source}: {len(read.rows)} rows, read as {read.format}{unused}")
    for sentence in read.skipped[:5]:
        progress.say(f"skipped: {sentence}")
    if len(read.skipped) > 5:
        progress.say(f"skipped: {len(read.skipped) - 5} more")


def _check_kinds(source: str, format: str, held_out: str, held_format: str) -> None:
    """Raise UserError where the loss on the held-out file would be of another kind."""
    if format != held_format and not {format, held_format}.isdisjoint(("classification", "text")):
        raise UserError(
            f"data.eval: {held_out} is read as {held_format} and {source} as {format}, so that "
            "the loss on it would be of something else: give a file of the same columns, or set "
            "data.format"
        )


def _task_file(task: Any) -> str | None:
    file: str | None = task if isinstance(task, str) else task["file"]
    return None if file and file.startswith("harness:") else file


def data_record(material: Material) -> dict[str, Any]:
    return {
        "format": material.rows.format,
        "sha256": material.files,
        "skipped": len(material.rows.skipped) + material.held_skipped,
        "overlap": material.overlap,
        "test_overlap": material.test_overlap,
        **({"replayed": material.replayed} if material.replayed else {}),
        **{
            name: {
                "kept": part.kept, "shortened": part.shortened, "refused": part.refused,
                "tokens": part.tokens, "trained_tokens": part.trained_tokens,
            }
            for name, part in (("train", material.train), ("eval", material.held_out))
        },
    }  # fmt: skip
