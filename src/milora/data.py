"""From files in the shapes people have to token ids with a loss mask on the answers only.

read_rows     file or hub id -> conversations, every row checked, errors with file and row
encode        one conversation -> token ids and labels
prepare       many of them, with counts of what was kept, shortened and refused
Collator      batches; the language-model head is computed at trained positions only
"""

import csv
import functools
import inspect
import io
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from milora.errors import UserError
from milora.vision import (
    COLUMNS,
    MARK,
    Picture,
    Reader,
    expand,
    image_tokens,
    pictures_of,
    pixels,
    render,
    texts_of_parts,
    tokenizer_of,
)

IGNORED = -100  # label of a token without loss, as in torch's cross entropy

FORMATS: dict[str, tuple[str, ...]] = {  # by the columns that must be there; first match wins
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "classification": ("label",),
    "text": ("text",),
}
# What a classifier reads, one text or two, by the names of GLUE and SuperGLUE; first match wins.
TEXTS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text", "text_pair"),
    ("sentence",),
    ("text",),
    ("question",),
)
OPTIONAL = {
    "alpaca": ("input", "system"),
    "classification": tuple(dict.fromkeys(itertools.chain(*TEXTS))),
}
MESSAGE_KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
# Alpaca's template (Taori et al., 2023), as in the code bases of the paper.
PLAIN_SYSTEM = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)

Message = dict[str, str]


class Row(NamedTuple):
    """A conversation and where it came from.

    Plain text is one message with role "text"; a row of a classifier is one or two of those, and
    the label's name as the answer.
    """

    messages: list[Message]
    place: str  # "train.jsonl, line 7"
    pictures: tuple[Picture, ...] = ()  # in the order of the marks in the messages


class Rows(NamedTuple):
    rows: list[Row]
    format: str
    unused: list[str]  # columns of the file, and keys of messages, that the format does not take
    skipped: list[str]  # the sentence for each row that on_bad_row="skip" left out


class Encoded(NamedTuple):
    input_ids: list[int]
    labels: list[int]  # IGNORED where there is no loss
    shortened: bool
    pictures: list[str]  # paths
    token_type_ids: list[int] = []  # noqa: RUF012  (of models that tell two texts apart so)

    def example(self) -> dict[str, list[Any]]:
        """What the collators take."""
        found: dict[str, list[Any]] = {"input_ids": self.input_ids, "labels": self.labels}
        also: dict[str, list[Any]] = {
            "pictures": self.pictures, "token_type_ids": self.token_type_ids,
        }  # fmt: skip
        return found | {name: values for name, values in also.items() if values}


class Prepared(NamedTuple):
    examples: list[dict[str, list[Any]]]  # the usable rows, as the collators take them
    kept: int
    shortened: int
    refused: dict[str, int]  # reason -> rows
    refused_places: list[str]  # the first few
    tokens: int
    trained_tokens: int


# (reader, row, max_length) -> what the model is given, or why the row cannot be used
Encode = Callable[[Reader, Row, int], Encoded | str]


def read_rows(
    source: str,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    on_bad_row: str = "fail",
    split: str = "train",
    pictures: bool = False,
) -> Rows:
    """Read a .jsonl, .json, .csv or .parquet file, or a data set of the hub.

    `format` is a key of FORMATS, or "auto" to go by the columns; `columns` maps a column of the
    format to the one in the file ({"prompt": "question"}). `split` is for the hub alone. With
    `pictures` the rows may have them, at paths relative to the file (vision.py).
    Raises UserError with file, row, column and value for the first bad row, unless
    `on_bad_row` is "skip", which leaves such rows out and lists them.
    """
    read, skipped = read_records(source, split, on_bad_row)
    if not read:
        raise UserError(_all_bad(source, skipped) if skipped else f"{source} holds no rows")
    columns = columns or {}
    _check_columns(source, columns, read[0][0])
    moved = {*columns, *columns.values()}
    records = []
    for record, place in read:
        kept = {name: value for name, value in record.items() if name not in moved}
        mapped = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
        records.append((kept | mapped, place))
    if format == "auto":
        format = _recognise(source, records[0][0])
    if format not in FORMATS:
        raise UserError(f"data.format is {format!r}; use auto or one of {', '.join(FORMATS)}")
    rows = []
    for record, place in records:
        try:
            if pictures:
                rows.append(_row_with_pictures(record, format, Path(source).parent, place))
            else:
                rows.append(Row(_messages(record, format, place), place))
        except UserError as error:
            if on_bad_row == "fail":
                raise
            skipped.append(str(error))
    if not rows:
        raise UserError(_all_bad(source, skipped))
    known = (*FORMATS[format], *OPTIONAL.get(format, ()))
    if format == "classification":
        known = ("label", *text_columns(records[0][0]))
    taken = {columns.get(name, name) for name in known}
    taken |= set(COLUMNS) if pictures else set()
    unused = {name for record, _ in read for name in record} - taken
    if format in MESSAGE_KEYS:
        (column,) = FORMATS[format]
        for record, _ in records:
            turns = record.get(column)
            for message in turns if isinstance(turns, list) else []:
                if isinstance(message, Mapping):
                    said = {key for key, value in message.items() if value is not None}
                    unused |= {f"{column}.{key}" for key in said - {*MESSAGE_KEYS[format]}}
    return Rows(rows, format, sorted(unused), skipped)


def _row_with_pictures(record: Mapping[str, Any], format: str, folder: Path, place: str) -> Row:
    marked, named = texts_of_parts(record, place)
    messages = _messages(marked, format, place)
    return Row(messages, place, tuple(pictures_of(marked, named, messages, folder, place)))


def _all_bad(source: str, skipped: Sequence[str]) -> str:
    return f"{source}: all {len(skipped)} rows are bad, the first: {skipped[0]}"


def _check_columns(source: str, columns: Mapping[str, str], first: Mapping[str, Any]) -> None:
    known = dict.fromkeys(itertools.chain(*FORMATS.values(), *OPTIONAL.values()))
    for ours, theirs in columns.items():
        if ours not in known:
            raise UserError(
                f"data.columns: {ours!r} is a column of no format; the key is one of "
                f"{', '.join(known)}, the value a column of {source}"
            )
        if theirs not in first:
            have = ", ".join(map(str, first))
            raise UserError(f"{source} has no column {theirs!r} (data.columns); it has {have}")


def read_records(
    source: str, split: str = "train", on_bad_row: str = "fail"
) -> tuple[list[tuple[dict[str, Any], str]], list[str]]:
    """The rows of a file or hub data set as they stand, each with its place; see `read_rows`."""
    path, skipped = Path(source), list[str]()
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".json", ".csv", ".parquet"):
        if path.exists():
            raise UserError(f"{source}: use a .jsonl, .json, .csv or .parquet file")
        return _read_hub(source, split), []
    if not path.is_file():
        raise UserError(f"{source} does not exist")

    def bad(sentence: str) -> None:
        if on_bad_row == "fail":
            raise UserError(sentence)
        skipped.append(sentence)

    values: list[tuple[Any, str]] = []
    if suffix == ".jsonl":
        for number, line in enumerate(io.StringIO(_text(path), newline=None), 1):
            place = f"{source}, line {number}"
            try:
                if line.strip():
                    values.append((json.loads(line), place))
            except (ValueError, RecursionError) as error:
                bad(f"{place} is not JSON ({_reason(error)}): {_cut(line.strip())}")
    elif suffix == ".json":
        text = _text(path)
        try:
            loaded = json.loads(text)
        except (ValueError, RecursionError) as error:
            where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(
                f"{source}{where} is not JSON ({_reason(error)}); a file with one object a line "
                "must be named .jsonl"
            ) from error
        if not isinstance(loaded, list):
            raise UserError(f"{source} must hold a list of rows, not {_kind(loaded)}")
        values = [(value, f"{source}, row {number}") for number, value in enumerate(loaded, 1)]
    elif suffix == ".csv":
        csv.field_size_limit(2**31 - 1)  # of its own it stops at 131,072 characters
        reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
        try:
            for number, fields in enumerate(reader, 1):
                place = f"{source}, row {number}"
                if None in fields or None in fields.values():
                    bad(f"{place} has another number of fields than the header")
                else:
                    values.append((fields, place))
        except csv.Error as error:
            last = reader.reader.line_num  # the DictReader's own stops at the row before
            raise UserError(f"{source}, line {last} is not CSV: {error}") from error
    else:
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{source} cannot be read as Parquet: {error}") from error
        values = [(v, f"{source}, row {number}") for number, v in enumerate(table.to_pylist(), 1)]
    records = []
    for value, place in values:
        if isinstance(value, dict):
            records.append((value, place))
        else:
            bad(f"{place} is {_kind(value)}; an object with named columns belongs there")
    return records, skipped


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line} is not UTF-8 (byte {error.start} of the file): save it as UTF-8"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).partition(";")[0]  # a number of more than 4300 digits


def _read_hub(source: str, split: str) -> list[tuple[dict[str, Any], str]]:
    import datasets

    try:
        loaded = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source} is no file here and no data set on the hub: {reason}") from error
    return [(dict(record), f"{source}, row {n}") for n, record in enumerate(loaded, 1)]


def _recognise(source: str, record: Mapping[str, Any]) -> str:
    for format, needed in FORMATS.items():
        if format == "classification" and not text_columns(record):
            continue
        if all(column in record for column in needed):
            return format
    raise UserError(
        f"{source}: the columns {', '.join(record)} are of no known format; set data.format to one "
        f"of {', '.join(FORMATS)}, or map columns with data.columns (for example prompt: question)"
    )


def text_columns(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns that a classifier reads, () when the row has none of TEXTS."""
    return next((names for names in TEXTS if all(name in record for name in names)), ())


def _label(record: Mapping[str, Any], place: str) -> str:
    """The name of a row's class: 1, "1" and 1.0 are one, as files of several kinds have it."""
    value = record.get("label")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        have = "is missing" if "label" not in record else f"is {_kind(value)} {_cut(value)}"
        raise UserError(f"{place}: 'label' {have}; the name or the number of a class belongs there")
    if value.strip() == "-1":
        raise UserError(f"{place}: 'label' is -1, which GLUE writes where there is none: leave out")
    return value.strip()


def _messages(record: Mapping[str, Any], format: str, place: str) -> list[Message]:
    def text(column: str, optional: bool = False) -> str:
        value = record.get(column)
        if value is None and optional:
            return ""
        if not isinstance(value, str):
            have = "is missing" if column not in record else f"is {_kind(value)} {_cut(value)}"
            raise UserError(f"{place}: {column!r} {have}; a string belongs there")
        return value

    def turn(role: str, content: str) -> Message:
        try:
            content.encode()
        except UnicodeEncodeError as error:
            near = content[max(0, error.start - 20) : error.start + 1]
            raise UserError(
                f"{place}: {_cut(near)} ends in half a character (a lone surrogate), which cannot "
                "be stored as text: repair or remove it"
            ) from error
        return {"role": role, "content": content}

    if format == "text":
        return [turn("text", text("text"))]
    if format == "classification":
        columns = text_columns(record)
        if not columns:
            raise UserError(
                f"{place}: beside 'label' one of {', '.join(map(' + '.join, TEXTS))} belongs there"
            )
        read = [turn("text", text(column)) for column in columns]
        return [*read, turn("assistant", _label(record, place))]
    if format == "prompt-completion":
        return [turn("user", text("prompt")), turn("assistant", text("completion"))]
    if format == "alpaca":
        system, extra = text("system", optional=True), text("input", optional=True)
        question = text("instruction") + (f"\n\n{extra}" if extra else "")
        start = [turn("system", system)] if system else []
        return [*start, turn("user", question), turn("assistant", text("output"))]
    column, role_key, content_key = ("messages", "role", "content")
    roles: Mapping[str, str] = {role: role for role in ROLES}
    if format == "sharegpt":
        column, role_key, content_key = ("conversations", "from", "value")
        roles = SHAREGPT_ROLES
    turns = record.get(column)
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{place}: {column!r} must be a list of at least one message")
    messages = []
    for number, message in enumerate(turns, 1):
        at = f"{place}, message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{at} is {_kind(message)}; an object with {role_key!r} belongs there")
        role, content = message.get(role_key), message.get(content_key)
        if not isinstance(role, str) or role not in roles:
            raise UserError(f"{at}: unknown role {_cut(role)}; use one of {', '.join(roles)}")
        if not isinstance(content, str):
            raise UserError(
                f"{at}: {content_key!r} is {_kind(content)} {_cut(content)}; a string belongs there"
            )
        messages.append(turn(roles[role], content))
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{place}: no message of the assistant, so there is nothing to learn")
    return messages


def prompt_text(tokenizer: Reader, messages: Sequence[Message]) -> str:
    """What the model reads before it answers: `messages` and the start of its own turn."""
    try:
        return _render(tokenizer, messages, answer_next=True)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses the conversation: {error}") from error


def prompt_ids(
    tokenizer: Reader, messages: Sequence[Message], pictures: Sequence[Picture] = ()
) -> list[int]:
    """Token ids of `prompt_text`, with exactly one BOS where the model wants one."""
    text = prompt_text(tokenizer, messages)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        try:
            text, _, _ = expand(tokenizer, text, pictures)
        except ValueError as error:
            raise UserError(str(error)) from error
    return _tokenize(tokenizer_of(tokenizer), text)[0]


def _render(tokenizer: Reader, messages: Sequence[Message], answer_next: bool) -> str:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        if tokenizer.chat_template:
            return render(tokenizer, messages, answer_next)
        token, tokenizer = tokenizer.image_token, tokenizer_of(tokenizer)  # type: ignore[attr-defined]
        messages = [{**m, "content": m["content"].replace(MARK, token)} for m in messages]
    if tokenizer.chat_template:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=answer_next
            )
        )
    # No template came with the model: a plain instruction template, the same in every command.
    parts = []
    if messages[0]["role"] != "system":
        parts.append(PLAIN_SYSTEM)
    titles = {"user": "### Instruction:\n", "assistant": "### Response:\n", "tool": "### Tool:\n"}
    for message in messages:
        end = tokenizer.eos_token if message["role"] == "assistant" else ""
        parts.append(titles.get(message["role"], "") + message["content"] + end)
    if answer_next:
        parts.append(titles["assistant"])
    return "\n\n".join(parts)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, cuts: Sequence[int] = ()
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character spans. A BOS is put in front when the tokenizer does so and none is there.

    Special tokens in the text (the template's) are taken as such, so that a template that writes
    the BOS itself gives one, not two. No token reaches over one of `cuts`.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} cannot say which characters a token covers, so the "
            "answers cannot be marked: convert it to a fast tokenizer (tokenizer.json)"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = list(found["input_ids"]), [tuple(span) for span in found["offset_mapping"]]
    crossed = [cut for cut in cuts if any(a < cut < b for a, b in spans)]
    if crossed:
        ids, spans = [], []
        for start, end in itertools.pairwise([0, *crossed, len(text)]):
            part = text[start:end]
            found = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
            ids += found["input_ids"]
            spans += [(start + a, start + b) for a, b in found["offset_mapping"]]
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    if adds_bos and ids[:1] != [bos]:
        ids, spans = [bos, *ids], [(0, 0), *spans]
    return ids, spans


def encode(tokenizer: Reader, row: Row, max_length: int) -> Encoded | str:
    """Token ids of a conversation, labels on every assistant turn, its end-of-sequence included.

    Returns the reason as a string when the row cannot be used: nothing to learn is left within
    `max_length`, its text spells a special token, or the chat template refuses it or rewrites
    earlier turns. Too long rows are cut at the end, but never within a picture.
    """
    if spelled := spells(tokenizer, row):
        return spelled
    reader, tokenizer = tokenizer, tokenizer_of(tokenizer)
    eos, pictures_end = tokenizer.eos_token_id, 0
    if row.messages[0]["role"] == "text":
        text = row.messages[0]["content"]
        if not text.strip():
            return "empty text"
        ids, _ = _tokenize(tokenizer, text)
        ids = ids if ids[-1:] == [eos] else [*ids, eos]
        labels = list(ids)
        labels[0] = IGNORED  # nothing predicts it
    else:
        if any(m["role"] == "assistant" and not m["content"].strip() for m in row.messages):
            return "empty answer"
        if row.messages[0]["role"] == "assistant":
            return "it begins with an answer"
        answers = []  # character spans of the assistant's turns
        try:
            whole = _render(reader, row.messages, answer_next=False)
            for index, message in enumerate(row.messages):
                if message["role"] == "assistant":
                    before = _render(reader, row.messages[:index], answer_next=True)
                    until = _render(reader, row.messages[: index + 1], answer_next=False)
                    if not (whole.startswith(until) and until.startswith(before)):
                        return "the chat template changes earlier turns"
                    answers.append((len(before), len(until)))
        except jinja2.TemplateError as error:
            return f"the chat template refuses it: {error}"
        if not isinstance(reader, PreTrainedTokenizerBase):
            try:
                whole, answers, pictures_end = expand(reader, whole, row.pictures, answers)
            except ValueError as error:
                return str(error)
        # A token of both prompt and answer would not be there when the model is asked.
        ids, spans = _tokenize(tokenizer, whole, [first for first, _ in answers])
        labels = [IGNORED] * len(ids)
        for first, last in answers:
            inside = [i for i, (a, b) in enumerate(spans) if first <= a < b <= last]
            ends = [i for i in inside if ids[i] == eos]
            for i in inside:
                # What a template writes after the end of the turn is never generated.
                if not ends or i <= ends[-1]:
                    labels[i] = ids[i]
        if eos not in labels and row.messages[-1]["role"] == "assistant":
            while labels and labels[-1] == IGNORED:  # white space that the template put last
                ids.pop(), labels.pop()
            ids, labels = [*ids, eos], [*labels, eos]
    shortened = len(ids) > max_length
    if shortened and pictures_end and spans[max_length - 1][1] < pictures_end:
        return f"its pictures do not fit into max_length ({max_length})"
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORED for label in labels):
        return f"the question fills max_length ({max_length})"
    return Encoded(ids, labels, shortened, [picture.path for picture in row.pictures])


def spells(reader: Reader, row: Row) -> str | None:
    """Why the row cannot be used, if it has the text of a special token: of an end, or a turn."""
    said = [message["content"] for message in row.messages]
    if row.pictures:
        said = [piece for content in said for piece in content.split(MARK)]
    reserved = _reserved(tokenizer_of(reader), str(reader.chat_template or ""))
    for token in (*reserved, *image_tokens(reader)):
        if any(token in content for content in said):
            return f"it spells the special token {token}"
    return None


@functools.lru_cache(maxsize=4)
def _reserved(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """The tokenizer's named special tokens, and those with which the chat template marks turns."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return [*tokenizer.all_special_tokens, *(text for text in added if text in template)]


def prepare(
    tokenizer: Reader,
    rows: Sequence[Row],
    max_length: int,
    source: str,
    encode: Encode = encode,
) -> Prepared:
    """Encode all rows. Raises UserError when none is left or more than a tenth was refused."""
    examples: list[dict[str, list[Any]]] = []
    refused, places, longest, shortened = Counter[str](), [], 0, 0
    for row in rows:
        found = encode(tokenizer, row, max_length)
        if isinstance(found, str):
            refused[found] += 1
            places.append(f"{row.place}: {found}")
            longest = max(longest, full_length(tokenizer, row))
        else:
            examples.append(found.example())
            shortened += found.shortened
    if len(examples) < 0.9 * len(rows):
        reasons = "; ".join(f"{count} x {reason}" for reason, count in refused.most_common())
        raise UserError(
            f"{source}: only {len(examples)} of {len(rows)} rows can be used ({reasons}); the "
            f"longest refused row has {longest} tokens, data.max_length is {max_length}, the first "
            f"is {places[0]}"
        )
    return Prepared(
        examples,
        len(examples),
        shortened,
        dict(refused),
        places[:5],
        sum(len(example["input_ids"]) for example in examples),
        sum(label != IGNORED for example in examples for label in example["labels"]),
    )


def full_length(tokenizer: Reader, row: Row) -> int:
    """Tokens of the whole row, uncut; 0 when the chat template refuses it."""
    text = row.messages[0]["content"]
    try:
        if row.messages[0]["role"] != "text":
            text = _render(tokenizer, row.messages, answer_next=False)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            text, _, _ = expand(tokenizer, text, row.pictures)
    except (jinja2.TemplateError, ValueError):
        return 0
    return len(_tokenize(tokenizer_of(tokenizer), text)[0])


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held out): a share of the rows, drawn by `seed`, at least one of each."""
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    if count < 1:
        raise UserError(f"data.eval: {len(rows)} row cannot be split; give a file instead")
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [rows[i] for i in sorted(held_out)]


def overlap(train: Iterable[Row], held_out: Iterable[Row]) -> int:
    """How many held-out questions also stand in the training rows (case and spaces ignored).

    The same question about another picture is another one.
    """

    def key(row: Row) -> str:
        said = [m["content"] for m in row.messages if m["role"] != "assistant"]
        said += [picture.sha256 for picture in row.pictures]
        return " ".join(" ".join(said).lower().split())

    seen = {key(row) for row in train}
    return sum(key(row) in seen for row in held_out)


class Collator:
    """Pads a batch on the right and asks for logits at trained positions only.

    A small model's head is a third of its work (SmolLM2: 28 of 135 M parameters, 49,152 logits a
    token), and the loss needs it only where an answer stands. `logits_to_keep` and `shift_labels`
    are transformers' own arguments; a model without them gets plain `labels`.
    """

    def __init__(self, tokenizer: Reader, model: nn.Module) -> None:
        self.reader = tokenizer
        self.pad = tokenizer_of(tokenizer).pad_token_id
        self.trim = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, examples: Sequence[Mapping[str, list[Any]]]) -> dict[str, Tensor]:
        ids = pad([e["input_ids"] for e in examples], self.pad)  # (b, t)
        labels = pad([e["labels"] for e in examples], IGNORED)  # (b, t)
        lengths = torch.tensor([len(e["input_ids"]) for e in examples])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.trim:
            following = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
            kept = (following != IGNORED).any(dim=0).nonzero()[:, 0]
            batch |= {"logits_to_keep": kept, "shift_labels": following[:, kept].contiguous()}
        return batch | pixels(self.reader, [e.get("pictures", ()) for e in examples])


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """(b, t) of int64 from lists of unequal length."""
    width = max(len(row) for row in rows)
    full = [
        [value] * (width - len(row)) + list(row) if left else [*row, *[value] * (width - len(row))]
        for row in rows
    ]
    return torch.tensor(full)


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _cut(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
