"""From files to token ids: what is read, what is refused and why, and which tokens train."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import CHAT, make_tokenizer, with_bos
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, processors
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora.data import (
    IGNORED,
    PLAIN_SYSTEM,
    PLAIN_TEMPLATE,
    Collator,
    Encoded,
    encode,
    plain_template,
    prepare,
    prompt_ids,
    prompt_text,
)
from milora.errors import UserError
from milora.rows import Message, Row, overlap, questions_of, read_rows, split_rows

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}
SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "alpaca": {"instruction": "Q", "input": "", "output": "A"},
    "prompt-completion": {"prompt": "Q", "completion": "A"},
}


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), "utf-8")
    return str(path)


def refused(source: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(source, **options)
    return str(caught.value)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_recognised_by_their_columns(shape: str, tmp_path: Path) -> None:
    found = read_rows(write(tmp_path / "a.jsonl", SHAPES[shape]))
    assert found.format == shape
    assert found.rows[0].messages == [USER, ANSWER]
    assert found.rows[0].place.endswith("a.jsonl, line 1")


def test_text_alpaca_input_and_columns(tmp_path: Path) -> None:
    found = read_rows(write(tmp_path / "a.jsonl", {"text": "prose"}))
    assert found.rows[0].messages == [{"role": "text", "content": "prose"}]
    row = {"instruction": "I", "input": "X", "output": "A", "system": "S"}
    messages = read_rows(write(tmp_path / "b.jsonl", row)).rows[0].messages
    assert [m["content"] for m in messages] == ["S", "I\n\nX", "A"]
    source = write(tmp_path / "c.jsonl", {"question": "Q", "answer": "A", "text": "T"})
    mapped = read_rows(
        source, columns={"prompt": "question", "completion": "answer"}, format="prompt-completion"
    )
    assert mapped.rows[0].messages == [USER, ANSWER]
    assert mapped.unused == ["text"]
    assert "no column 'frage' (data.columns); it has question, answer" in refused(
        source, columns={"prompt": "frage"}
    )
    assert "'frage' is a column of no format; the key is one of messages, conv" in refused(
        source, columns={"frage": "question"}
    )
    assert "data.format is 'chatml'; use auto or one of messages" in refused(
        source, format="chatml"
    )
    # The order of the formats decides, and can be overruled.
    both = write(tmp_path / "d.jsonl", SHAPES["alpaca"] | {"text": "T"})
    assert read_rows(both).format == "alpaca"
    assert read_rows(both).unused == ["text"]
    assert read_rows(both, format="text").rows[0].messages[0]["content"] == "T"


def test_a_mapped_column_wins_over_one_of_the_same_name(tmp_path: Path) -> None:
    row = {"prompt": "P", "completion": "C", "question": "Q"}
    source = write(tmp_path / "a.jsonl", row, {"prompt": "P", "completion": "C"})
    found = read_rows(source, columns={"prompt": "question"}, on_bad_row="skip")
    assert [m["content"] for m in found.rows[0].messages] == ["Q", "C"]
    assert found.unused == ["prompt"]
    assert len(found.skipped) == 1  # the second row has no question, and P is none
    swapped = read_rows(source, columns={"prompt": "completion", "completion": "prompt"})
    assert [m["content"] for m in swapped.rows[0].messages] == ["C", "P"]
    same = read_rows(source, columns={"prompt": "prompt", "completion": "prompt"})
    assert [m["content"] for m in same.rows[0].messages] == ["P", "P"]


def test_what_messages_hold_besides_is_reported(tmp_path: Path) -> None:
    turns = [USER | {"name": None}, ANSWER | {"weight": 0, "tool_calls": [{}]}]
    found = read_rows(write(tmp_path / "a.jsonl", {"messages": turns, "id": 1}))
    assert found.rows[0].messages == [USER, ANSWER]
    assert found.unused == ["id", "messages.tool_calls", "messages.weight"]


@pytest.mark.parametrize("ending", ["json", "csv", "parquet", "jsonl"])
def test_file_types(ending: str, tmp_path: Path) -> None:
    rows = [{"prompt": 'q "1", ü', "completion": "a\nb"}, {"prompt": "q2", "completion": "語"}]
    path = tmp_path / f"rows.{ending}"
    if ending == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif ending == "jsonl":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    elif ending == "csv":
        with path.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = read_rows(str(path)).rows
    assert [r.messages[0]["content"] for r in found] == ['q "1", ü', "q2"]
    assert [r.messages[1]["content"] for r in found] == ["a\nb", "語"]


BAD = [
    ({"prompt": 3, "completion": "b"}, "'prompt' is an integer 3; a string belongs there"),
    ({"prompt": None, "completion": "b"}, "'prompt' is null None"),
    ({"prompt": "a"}, "'completion' is missing; a string belongs there"),
    ({"prompt": ["a"], "completion": "b"}, "'prompt' is a list ['a']"),
    (["a", "b"], "is a list; an object with named columns belongs there"),
]


@pytest.mark.parametrize(("record", "said"), BAD)
def test_a_bad_row_is_named(record: Any, said: str, tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b"}
    source = write(tmp_path / "a.jsonl", good, record, good)
    assert f"{source}, line 2" in refused(source)
    assert said in refused(source)
    found = read_rows(source, on_bad_row="skip")
    assert len(found.rows) == 2
    assert len(found.skipped) == 1
    assert said in found.skipped[0]
    only = write(tmp_path / "b.jsonl", record, record)
    if not (isinstance(record, dict) and "completion" not in record):  # else of no known format
        assert f"all 2 rows are bad, the first: {only}, line 1" in refused(only, on_bad_row="skip")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b"\n{"text": "c"}\n',
            "line 2 is not JSON (Expecting",
        ),
        (
            "b.jsonl",
            '{"text": "a"}\n\n' + "[" * 99_999 + '\n{"text": "c"}',
            "line 3 is not JSON (nes",
        ),
        ("c.jsonl", '{"text": "a"}\n' + "1" * 5000 + '\n{"text": "c"}', "line 2 is not JSON (Exc"),
        (
            "d.jsonl",
            '{"text": "a"}\n{"text": "b\\ud83d"}\n{"text": "c"}',
            "line 2: 'b\\ud83d' ends in",
        ),
        ("a.json", '[{"text": "a"}, ["b"], {"text": "c"}]', "row 2 is a list; an object"),
        ("b.json", '[{"text": "a"}, null, {"text": "c"}]', "row 2 is null; an object"),
        ("a.csv", "text,n\na,1\nb\nc,3\n", "row 2 has another number of fields"),
        (
            "e.jsonl",
            '{"text": "a"}\n{"text": "b", "text": "d"}\n{"text": "c"}',
            "line 2: the key 'text' is given twice, in {'text': 'd'}",
        ),
        ("b.csv", "text,n\na,1\nb,2,3\nc,3\n", "row 2 has another number of fields"),
    ],
)
def test_a_bad_row_is_refused_or_skipped_whatever_the_file(
    name: str, content: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert said in refused(str(path))
    found = read_rows(str(path), on_bad_row="skip")
    assert [row.messages[0]["content"] for row in found.rows] == ["a", "c"]
    assert len(found.skipped) == 1
    assert said in found.skipped[0]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pyarrow.timestamp("ms"), 2**55),
        (pyarrow.date32(), 2**30),
        (pyarrow.timestamp("s", "Foo/Bar"), 1),
        (pyarrow.string(), b"\xff"),
    ],
)
def test_a_parquet_column_that_cannot_be_read_matters_where_it_is_used(
    kind: Any, value: Any, tmp_path: Path
) -> None:
    if isinstance(value, bytes):
        odd = pyarrow.array([value], pyarrow.binary()).view(kind)
    else:
        odd = pyarrow.array([value], kind)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "odd": odd}), path)
    found = read_rows(str(path))
    assert (found.rows[0].messages[0]["content"], found.unused) == ("a", ["odd"])
    said = refused(str(path), columns={"text": "odd"})
    assert f"{path}: the column 'odd' cannot be read" in said


def test_a_mapping_without_effect_is_said(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"question": "Q", "answer": "A"})
    columns = {"prompt": "question", "completion": "answer", "text": "answer"}
    found = read_rows(source, columns=columns)
    assert (found.format, found.unused) == ("prompt-completion", ["data.columns.text"])


def test_long_fields_and_foreign_line_ends(tmp_path: Path) -> None:
    long = "word " * 60_000  # csv stops at 131,072 characters of its own accord
    (tmp_path / "a.csv").write_text(f'text\r\n"{long}"\r\n', encoding="utf-8", newline="")
    assert read_rows(str(tmp_path / "a.csv")).rows[0].messages[0]["content"] == long
    for end in ("\r\n", "\r"):
        lines = ('{"text": "a\u2028b"}', "", '{"text": "c"}')
        (tmp_path / "a.jsonl").write_text(end.join(lines), encoding="utf-8", newline="")
        found = read_rows(str(tmp_path / "a.jsonl")).rows
        assert [row.messages[0]["content"] for row in found] == ["a\u2028b", "c"]
        assert found[1].place.endswith("line 3")


CONVERSATIONS = [
    ([{"role": "robot", "content": "x"}], "message 1: unknown role 'robot'; use one of system"),
    ([USER, {"role": "assistant", "content": 5}], "message 2: 'content' is an integer 5"),
    ([USER, "A"], "message 2 is a string"),
    ([USER, {"content": "A"}], "message 2: unknown role None"),
    ([], "'messages' must be a list of at least one message"),
    ("Q", "'messages' must be a list"),
    ([USER], "no message of the assistant"),
]


@pytest.mark.parametrize(("turns", "said"), CONVERSATIONS)
def test_a_bad_conversation_is_named(turns: Any, said: str, tmp_path: Path) -> None:
    assert said in refused(write(tmp_path / "a.jsonl", {"messages": turns}))


def test_a_bad_sharegpt_conversation_is_named(tmp_path: Path) -> None:
    turns: list[Any] = [{"from": "human", "value": "Q"}, {"from": "bing", "value": "A"}]
    source = write(tmp_path / "a.jsonl", {"conversations": turns})
    assert "line 1, message 2: unknown role 'bing'; use one of system, human, user, gpt" in refused(
        source
    )
    source = write(tmp_path / "b.jsonl", {"conversations": [*turns[:1], {"from": "gpt"}]})
    assert "message 2: 'value' is null None; a string belongs there" in refused(source)


def test_bad_files(tmp_path: Path) -> None:
    assert "none.jsonl does not exist" in refused(str(tmp_path / "none.jsonl"))
    assert "no data set on the hub" in refused("some/data-set")
    for name, content, said in (
        ("empty.jsonl", b"\n\n", "holds no rows"),
        ("empty.json", b"[]", "holds no rows"),
        ("empty.csv", b"prompt,completion\n", "holds no rows"),
        ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"pro\n', "line 2 is not JSON"),
        ("a.json", b'[{"a": 1},\n{"b" 2}]', "a.json, line 2 is not JSON"),
        ("b.json", b'{"a": 1}\n{"a": 2}', "must be named .jsonl"),
        ("c.json", b'{"a": 1}', "must hold a list of rows, not an object"),
        ("a.csv", b"prompt,completion\na,b\na,b,c\n", "row 2 has another number of fields"),
        ("b.csv", b"prompt,completion\na\n", "row 1 has another number of fields"),
        (
            "semicolon.csv",
            b'"prompt";"completion"\r"a, b";c\r',
            "is separated by ';': save it with",
        ),
        ("tab.csv", b"prompt\tcompletion\na\tb\n", "tab.csv is separated by tabs: save it with"),
        ("twice.csv", b"prompt,,,prompt\na,,,b\n", "two columns have the name 'prompt': rename"),
        (
            "twice.json",
            b'[{"text": "a", "b": 1, "text": "c"}]',
            "json: the key 'text' is given twi",
        ),
        ("c.csv", b'prompt,completion\na,b\na,"b" c\n', "c.csv, line 3 is not CSV"),
        ("latin.jsonl", '{"prompt": "ü"}'.encode("latin-1"), "line 1 is not UTF-8 (byte 12 "),
        (
            "far.csv",
            b"text\n" + b"word\n" * 9000 + b"\xff",
            "far.csv, line 9002 is not UTF-8 (byte 45005 ",
        ),
        ("deep.json", b"[" * 99_999, "deep.json is not JSON (nested too deeply)"),
        ("a.parquet", b"no parquet at all", "cannot be read"),
        ("a.xlsx", b"", "use a .jsonl, .json, .csv or .parquet file"),
        ("odd.jsonl", b'{"frage": "a", "antwort": "b"}', "columns frage, antwort are of no known"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert said in refused(str(path)), name


def trained_text(tokenizer: PreTrainedTokenizerBase, found: Encoded) -> str:
    return str(tokenizer.decode([label for label in found.labels if label != IGNORED]))


def encoded(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int = 4096) -> Encoded:
    found = encode(tokenizer, row, max_length)
    assert isinstance(found, Encoded), found
    assert len(found.input_ids) == len(found.labels)
    pairs = zip(found.input_ids, found.labels, strict=True)
    assert all(label in (IGNORED, token) for token, label in pairs)
    return found


@pytest.mark.parametrize("make", [make_tokenizer, with_bos, lambda: make_tokenizer(chat=False)])
def test_the_loss_covers_every_answer_with_its_end_and_nothing_else(
    make: Callable[[], PreTrainedTokenizerBase],
) -> None:
    tokenizer = make()
    turns = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Second."},
    ]
    found = encoded(tokenizer, Row(turns, "x"))
    assert trained_text(tokenizer, found) == "First.</s>Second.</s>"
    assert found.input_ids.count(0) <= 1
    if tokenizer.chat_template:
        assert found.input_ids[0] == 0
    assert not found.shortened
    # What the model reads before it answers is the same in training and afterwards.
    prompt = prompt_ids(tokenizer, turns[:-1])
    assert found.input_ids[: len(prompt)] == prompt
    assert found.labels[len(prompt)] != IGNORED
    assert found.labels[len(prompt) - 1] == IGNORED


def test_without_a_template_the_plain_one_is_used() -> None:
    tokenizer = make_tokenizer(chat=False)
    text = tokenizer.decode(encoded(tokenizer, Row([USER, ANSWER], "x")).input_ids)
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nQ\n\n### Response:\nA</s>"
    )


SYSTEM = {"role": "system", "content": " Be brief.\n"}
TOOL = {"role": "tool", "content": "{{ 4 }} <b>&'\""}


@pytest.mark.parametrize("first", [[], [SYSTEM]])
@pytest.mark.parametrize("more", [[], [ANSWER], [ANSWER, USER], [ANSWER, TOOL, ANSWER, USER]])
@pytest.mark.parametrize("answer_next", [True, False])
def test_the_plain_template_writes_what_is_trained(
    first: list[Message], more: list[Message], answer_next: bool
) -> None:
    messages = [*first, USER, *more]
    parts = [] if first else [PLAIN_SYSTEM]
    titles = {"user": "### Instruction:\n", "assistant": "### Response:\n", "tool": "### Tool:\n"}
    for message in messages:
        end = "</s>" if message["role"] == "assistant" else ""
        parts.append(titles.get(message["role"], "") + message["content"] + end)
    parts += ["### Response:\n"] * answer_next
    plain, beside = make_tokenizer(chat=False), make_tokenizer(chat=False)
    beside.chat_template = PLAIN_TEMPLATE
    written = beside.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answer_next
    )
    assert written == "\n\n".join(parts)
    if answer_next:
        assert prompt_text(plain, messages) == prompt_text(beside, messages) == written
    elif messages[-1]["role"] == "assistant":
        row = Row(messages, "x")
        found = encoded(plain, row)
        assert found == encoded(beside, row)
        assert plain.decode(found.input_ids) == written


@pytest.mark.parametrize("bos", [True, False])
def test_servers_read_the_tokens_that_were_trained(bos: bool) -> None:
    """A server takes what the template writes, and adds no BOS of its own to that."""
    plain, beside = (with_bos() if bos else make_tokenizer(chat=False) for _ in range(2))
    plain.chat_template, beside.chat_template = None, plain_template(plain)
    messages = [SYSTEM, USER, ANSWER, USER]
    served = beside.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert served == prompt_ids(plain, messages) == prompt_ids(beside, messages)
    assert (served[0] == 0) == bos
    row = Row([*messages, ANSWER], "x")
    assert encoded(plain, row) == encoded(beside, row)


def test_plain_text_trains_on_all_but_the_first_token() -> None:
    row = Row([{"role": "text", "content": "prose"}], "x")
    for tokenizer, whole, trained in (
        (with_bos(), "<s>prose</s>", "prose</s>"),
        (make_tokenizer(), "prose</s>", "rose</s>"),
    ):
        found = encoded(tokenizer, row)
        assert tokenizer.decode(found.input_ids) == whole
        assert trained_text(tokenizer, found) == trained
    cut = encoded(with_bos(), row, 4)
    assert cut.shortened
    assert trained_text(with_bos(), cut) == "pro"
    assert (
        encode(make_tokenizer(), Row([{"role": "text", "content": " \n"}], "x"), 9) == "empty text"
    )


def merging_tokenizer() -> PreTrainedTokenizerBase:
    """Two line ends are one token, as in Qwen's and Llama's vocabularies."""
    tokenizer = make_tokenizer()
    vocabulary = tokenizer.get_vocab() | {"ĊĊ": len(tokenizer)}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")])
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    return tokenizer


@given(st.lists(st.sampled_from(["\n", " ", "a", "語"]), min_size=1, max_size=6).map("".join))
def test_no_token_reaches_from_the_prompt_into_the_answer(answer: str) -> None:
    """The template ends in a line end, and the answer may begin with one."""
    tokenizer = merging_tokenizer()
    answer += "."
    turns = [USER, ANSWER | {"content": answer}, USER, ANSWER]
    found = encoded(tokenizer, Row(turns, "x"))
    prompt = prompt_ids(tokenizer, turns[:1])
    assert found.input_ids[: len(prompt)] == prompt
    assert found.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert trained_text(tokenizer, found) == f"{answer}</s>A</s>"


def test_several_turns_and_their_places_in_the_text() -> None:
    turns = [USER, ANSWER, USER, ANSWER | {"content": "B"}, {"role": "tool", "content": "t"}]
    for tokenizer in (make_tokenizer(), make_tokenizer(chat=False)):
        found = encoded(tokenizer, Row(turns, "x"))
        assert trained_text(tokenizer, found) == "A</s>B</s>"
        assert "t" in tokenizer.decode(found.input_ids)[-4:]


def test_what_a_template_writes_after_the_end_of_a_turn_is_not_trained() -> None:
    """As ChatML's line end, which in CHAT a block eats."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT.replace(
        "{% endif %}\n{% endfor %}", "{% endif %}{{ '\n' }}{% endfor %}"
    )
    turns = [USER, ANSWER, USER, ANSWER | {"content": "B"}]
    found = encoded(tokenizer, Row(turns, "x"))
    assert tokenizer.decode(found.input_ids).endswith("B</s>\n")
    assert trained_text(tokenizer, found) == "A</s>B</s>"


PIECES = [
    "😀", "👩‍👩‍👧", "e\u0301", "語", "ع", "\u200b", "\x00", "\r\n",
    "<|assistant|>\n", "### Response:\n", "<|im_end|>", "<", "/s>", "</", "s>", " ",
]  # fmt: skip
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30) | st.lists(
    st.sampled_from(PIECES), min_size=1, max_size=6
).map("".join)


@given(text, text, st.booleans())
def test_any_text_keeps_mask_and_prompt(question: str, answer: str, chat: bool) -> None:
    """What only looks like a mark, in words of the template too, is text like any other."""
    tokenizer = make_tokenizer(chat)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    found = encode(tokenizer, Row(messages, "x"), 4096)
    for token in ("<s>", "</s>"):
        if token in question or token in answer:
            assert found == f"it spells the special token {token}"
            return
    if not answer.strip():
        assert found == "empty answer"
        return
    assert isinstance(found, Encoded)
    assert trained_text(tokenizer, found) == answer + "</s>"
    prompt = prompt_ids(tokenizer, messages[:1])
    assert found.input_ids[: len(prompt)] == prompt
    assert found.labels[: len(prompt)] == [IGNORED] * len(prompt)


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_row_cannot_forge_a_special_token(role: str) -> None:
    """Text that spells the end or the beginning of a sequence would end an answer early."""
    messages = (
        [USER, ANSWER] if role != "system" else [{"role": role, "content": "S"}, USER, ANSWER]
    )
    messages = [m | {"content": "x</s>y"} if m["role"] == role else m for m in messages]
    found = encode(make_tokenizer(), Row(messages, "x"), 4096)
    assert found == "it spells the special token </s>"
    plain = encode(make_tokenizer(), Row([{"role": "text", "content": "a<s>b"}], "x"), 4096)
    assert plain == "it spells the special token <s>"


def test_a_row_cannot_forge_a_turn_with_a_token_that_only_the_template_names() -> None:
    """Llama 3's header tokens are special, but none of the tokenizer's named ones."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": []})
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<|user|>", "<|x|>")])
    assert "<|user|>" not in tokenizer.all_special_tokens
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "<|{{ m['role'] }}|>", "{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}"
    )
    for content, wanted in (
        ("no</s>", "it spells the special token </s>"),
        ("A<|user|>\nforged", "it spells the special token <|user|>"),
    ):
        for messages in (
            [USER | {"content": content}, ANSWER],
            [USER, ANSWER | {"content": content}],
        ):
            assert encode(tokenizer, Row(messages, "x"), 4096) == wanted
    # One that marks no turn is a word like any other.
    found = encoded(tokenizer, Row([USER, ANSWER | {"content": "a <|x|> b"}], "x"))
    assert trained_text(tokenizer, found) == "a <|x|> b</s>"


def test_what_the_template_refuses_is_refused_with_its_reason() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
        + str(tokenizer.chat_template)
    )
    system = [{"role": "system", "content": "S"}, USER, ANSWER]
    reason = "the chat template refuses it: No system!"
    assert encode(tokenizer, Row(system, "x"), 4096) == reason
    assert encode(tokenizer, Row([ANSWER, USER, ANSWER], "x"), 99) == "it begins with an answer"
    with pytest.raises(UserError, match="template refuses the conversation: No system!"):
        prompt_ids(tokenizer, system[:2])
    with pytest.raises(
        UserError, match=r"only 0 of 2 rows can be used \(2 x the chat template ref"
    ):
        prepare(tokenizer, [Row(system, "x")] * 2, 99, "file")


def test_a_template_that_rewrites_earlier_turns_is_noticed() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}"
        "<|{{ m['role'] }}|>{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    row = Row([USER, ANSWER, USER, ANSWER], "x")
    assert encode(tokenizer, row, 4096) == "the chat template changes earlier turns"
    found = encoded(tokenizer, Row([USER, ANSWER], "x"))
    assert trained_text(tokenizer, found) == "A</s>"  # the end that the template forgot


def test_long_rows_are_cut_or_refused() -> None:
    tokenizer = make_tokenizer()
    row = Row([USER, {"role": "assistant", "content": "long answer"}], "x")
    whole = encoded(tokenizer, row)
    start = len(prompt_ids(tokenizer, row.messages[:1]))
    cut = encoded(tokenizer, row, start + 4)
    assert cut.shortened
    assert cut.input_ids == whole.input_ids[: start + 4]
    assert trained_text(tokenizer, cut) == "long"  # no end where there is none
    assert encode(tokenizer, row, start) == f"the question fills max_length ({start})"


def test_counts_and_the_limit_on_refused_rows() -> None:
    tokenizer = make_tokenizer()
    good = [Row([USER, ANSWER], f"r {i}") for i in range(19)]
    long = Row([{"role": "user", "content": "word " * 40}, ANSWER], "r long")
    found = prepare(tokenizer, [*good, long], 40, "file")
    assert (found.kept, found.shortened) == (19, 0)
    assert found.refused == {"the question fills max_length (40)": 1}
    assert found.refused_places == ["r long: the question fills max_length (40)"]
    assert found.trained_tokens == 19 * 2
    assert found.tokens == sum(len(e["input_ids"]) for e in found.examples)
    assert prepare(tokenizer, [*good[:9], long], 40, "file").kept == 9  # a tenth is no more
    with pytest.raises(UserError, match="file: only 0 of 1 rows"):
        prepare(tokenizer, [long], 40, "file")
    longer = Row([USER, ANSWER | {"content": "word " * 40}], "r 20")
    assert prepare(tokenizer, [*good, longer], 40, "file").shortened == 1
    with pytest.raises(UserError) as caught:
        prepare(tokenizer, [*good, *[long] * 3], 40, "file")
    said = str(caught.value)
    assert "file: only 19 of 22 rows can be used (3 x the question fills max_length (40))" in said
    assert "the longest refused row has" in said
    assert "data.max_length is 40" in said


def test_splitting() -> None:
    rows = [Row([USER, ANSWER], str(i)) for i in range(50)]
    train, held = split_rows(rows, 0.1, 7)
    assert len(held) == 5
    assert {r.place for r in train} | {r.place for r in held} == {str(i) for i in range(50)}
    assert split_rows(rows, 0.1, 7) == (train, held)
    assert split_rows(rows, 0.1, 8) != (train, held)
    assert len(split_rows(rows[:2], 0.01, 0)[1]) == 1
    assert len(split_rows(rows[:2], 0.99, 0)[0]) == 1
    assert not {r.place for r in train} & {r.place for r in held}
    with pytest.raises(UserError, match="1 row cannot be split"):
        split_rows(rows[:1], 0.5, 0)


def test_overlap_ignores_case_and_space() -> None:
    train = [Row([{"role": "user", "content": "Is it  so?"}, ANSWER], "a")]
    held = [Row([{"role": "user", "content": "is it so?"}, {**ANSWER, "content": "B"}], "b")]
    assert overlap(set[str]().union(*map(questions_of, train)), held) == 1
    assert overlap(set[str]().union(*map(questions_of, train)), [Row([USER, ANSWER], "c")]) == 0


def test_overlap_knows_every_turn_that_has_an_answer() -> None:
    def said(*words: str) -> list[dict[str, str]]:
        roles = {"s": "system", "u": "user", "a": "assistant"}
        return [{"role": roles[one[0]], "content": one[2:]} for one in words]

    train = Row(said("s Be short.", "u How many?", "a Two.", "u And why?", "a So."), "a")
    seen = questions_of(train)
    for asked in (["u How many?"], ["u And why?"], ["s Be kind.", "u How many?"],
                  ["u How many?", "a Three.", "u And why?"]):  # fmt: skip
        assert overlap(seen, [Row(said(*asked, "a x"), "b")]) == 1, asked
    for asked in (["u Where?"], ["u Two."], ["u How many?", "a Two.", "u Where?"], ["u Be short."]):
        assert overlap(seen, [Row(said(*asked, "a x"), "b")]) == 0, asked


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_fewer_logits_give_the_same_loss(kind: str, load: Callable[[str], PreTrainedModel]) -> None:
    tokenizer, model = make_tokenizer(), load(kind)
    rows = [
        Row([{"role": "user", "content": "q" * n}, {"role": "assistant", "content": "a" * m}], "")
        for n, m in ((3, 9), (20, 2), (8, 5))
    ]
    examples = prepare(tokenizer, rows, 512, "x").examples
    batch = Collator(tokenizer, model)(examples)
    assert batch["attention_mask"].sum(1).tolist() == [len(e["input_ids"]) for e in examples]
    ends = (batch["labels"] == tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [1, 1, 1]  # EOS is the padding token too, and trained all the same
    with torch.no_grad():
        few = model(**batch)
        plain = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
        all_of_them = model(**plain)
    assert few.logits.shape[1] < all_of_them.logits.shape[1]
    torch.testing.assert_close(few.loss, all_of_them.loss)

    class Old(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> None: ...

    assert set(Collator(tokenizer, Old())(examples)) == {"input_ids", "attention_mask", "labels"}


def test_white_space_without_a_width_trains_too() -> None:
    """As post-processors that trim offsets give it."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    code = "def f():\n    return 1\n\n\tx"
    found = encoded(tokenizer, Row([USER, ANSWER | {"content": code}], "x"))
    assert trained_text(tokenizer, found) == f"{code}</s>"
