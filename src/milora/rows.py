"""Rows from files in the shapes that people have, every one checked, errors with file and row."""

import csv
import io
import itertools
import json
import random
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

from milora.errors import UserError
from milora.files import why_no_file
from milora.vision import COLUMNS, Picture, pictures_of, texts_of_parts

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
    unused: list[str]  # columns, keys of messages and of data.columns that the format has not
    skipped: list[str]  # the sentence for each row that on_bad_row="skip" left out


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
    columns = columns or {}
    ours = itertools.chain(*FORMATS.values(), *OPTIONAL.values(), COLUMNS)
    read, skipped = read_records(source, split, on_bad_row, {*ours, *columns.values()})
    if not read:
        raise UserError(_all_bad(source, skipped) if skipped else f"{source} holds no rows")
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
    unused |= {f"data.columns.{ours}" for ours in columns if ours not in known}
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


def column_names(source: str, split: str = "train") -> set[str]:
    """The columns of the first row."""
    records, _ = read_records(source, split)
    return {str(name) for record, _ in records[:1] for name in record}


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
    source: str,
    split: str = "train",
    on_bad_row: str = "fail",
    columns: Collection[str] | None = None,
) -> tuple[list[tuple[dict[str, Any], str]], list[str]]:
    """The rows of a file or hub data set as they stand, each with its place; see `read_rows`.

    Of a Parquet file only `columns` are read, where they are given; the others are None.
    """
    path, skipped = Path(source), list[str]()
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".json", ".csv", ".parquet"):
        if path.exists():
            raise UserError(f"{source}: use a .jsonl, .json, .csv or .parquet file")
        return _read_hub(source, split), []
    if not path.is_file():
        raise UserError(f"{source} {why_no_file(path)}")

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
                    values.append((json.loads(line, object_pairs_hook=_object), place))
            except UserError as error:
                bad(f"{place}: {error}")
            except (ValueError, RecursionError) as error:
                bad(f"{place} is not JSON ({_reason(error)}): {_cut(line.strip())}")
    elif suffix == ".json":
        text = _text(path)
        try:
            loaded = json.loads(text, object_pairs_hook=_object)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
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
        text = _text(path)
        _check_separator(source, io.StringIO(text, newline=None).readline())
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            named = [name for name in reader.fieldnames or () if name]
            if twice := [name for name in named if named.count(name) > 1]:
                raise UserError(f"{source}: two columns have the name {twice[0]!r}: rename one")
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
        records_there = _parquet(path, columns)
        values = [(v, f"{source}, row {number}") for number, v in enumerate(records_there, 1)]
    records = []
    for value, place in values:
        if isinstance(value, dict):
            records.append((value, place))
        else:
            bad(f"{place} is {_kind(value)}; an object with named columns belongs there")
    return records, skipped


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"the key {twice!r} is given twice, in {_cut(found)}")
    return found


def _check_separator(source: str, header: str) -> None:
    for separator, name in ((";", "';'"), ("\t", "tabs")):
        if separator in header and "," not in header:
            raise UserError(f"{source} is separated by {name}: save it with commas")


def _parquet(path: Path, columns: Collection[str] | None) -> list[dict[str, Any]]:
    """The rows; of a column that nobody reads, which may hold anything, only the name."""
    import pyarrow.parquet

    unreadable = (pyarrow.ArrowException, OSError, OverflowError, ValueError, KeyError)
    try:
        table = pyarrow.parquet.read_table(path)
    except unreadable as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from error
    values: dict[str, list[Any]] = {}
    for name in table.column_names:
        try:
            needed = columns is None or name in columns
            values[name] = table.column(name).to_pylist() if needed else [None] * len(table)
        except unreadable as error:
            raise UserError(
                f"{path}: the column {name!r} cannot be read ({error}): repair it, or leave it out"
            ) from error
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


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
        check_text(content, place)
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


def check_text(text: str, place: str) -> None:
    """Raise UserError for what cannot be stored as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.start + 1]
        raise UserError(
            f"{place}: {_cut(near)} ends in half a character (a lone surrogate), which cannot "
            "be stored as text: repair or remove it"
        ) from error


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held out): a share of the rows, drawn by `seed`, at least one of each."""
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    if count < 1:
        raise UserError(f"data.eval: {len(rows)} row cannot be split; give a file instead")
    held_out = set(random.Random(seed).sample(range(len(rows)), count))
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [rows[i] for i in sorted(held_out)]


def training_rows(data: Mapping[str, Any], seed: int, pictures: bool = False) -> list[Row]:
    """Those of data.train that are trained on; `data` is the block of a configuration."""
    read = {key: data[key] for key in ("format", "columns", "on_bad_row")}
    rows = read_rows(str(data["train"]), **read, pictures=pictures).rows
    return rows if isinstance(data["eval"], str) else split_rows(rows, data["eval"], seed)[0]


def overlap(questions: Set[str], rows: Iterable[Row]) -> int:
    """How many of the rows ask one of the questions, which are as `questions_of` has them."""
    return sum(not questions.isdisjoint(_asked(row, len(row.messages))) for row in rows)


def questions_of(row: Row) -> set[str]:
    """All that a row has answers to: what is asked before each, and the last of it alone; with and
    without what the system says. Case and spaces are ignored; about another picture it is another
    question.
    """
    found = set[str]()
    for place, message in enumerate(row.messages):
        if message["role"] == "assistant":
            found |= _asked(row, place) | _asked(row, place, max(0, place - 1))
    return found or _asked(row, len(row.messages))


def _asked(row: Row, end: int, begin: int = 0) -> set[str]:
    pictures = [picture.sha256 for picture in row.pictures]
    said = [m for m in row.messages[begin:end] if m["role"] != "assistant"]
    users = [m for m in said if m["role"] != "system"]
    each = ([m["content"] for m in some] for some in (said, users or said))
    return {plainly(" ".join([*words, *pictures])) for words in each if words}


def plainly(text: str) -> str:
    """Without case, and with single spaces."""
    return " ".join(text.lower().split())


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
