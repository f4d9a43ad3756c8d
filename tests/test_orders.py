"""The demo's data: the same every time, every answer in its mail, nothing shared by the splits."""

import importlib.util
import json
import re
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "orders" / "generate.py"
SPEC = importlib.util.spec_from_file_location("orders_generate", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)

COUNTS = {"train": 480, "test": 300}
KEYS = ["intent", "customer", "product", "quantity", "order_no"]
ROWS = {split: generate.make_rows(split, count) for split, count in COUNTS.items()}
RECORDS = {split: [json.loads(row["output"]) for row in rows] for split, rows in ROWS.items()}
PAIRS = [
    (row["input"], record)
    for split in COUNTS
    for row, record in zip(ROWS[split], RECORDS[split], strict=True)
]
FRAMES = ("GREETINGS", "INTROS", "LEADS", "TAILS", "SIGN_OFFS", "FAREWELLS")


def templates(split: str) -> list[str]:
    """Every piece of text that a mail of the split can be made of."""
    frames = chain.from_iterable(getattr(generate, frame)[split] for frame in FRAMES)
    return [*frames, *chain.from_iterable(generate.BODIES[split].values())]


def words(text: str) -> list[str]:
    return re.findall(r"\w[\w'-]*", text.lower())


def runs(texts: list[str], length: int) -> set[tuple[str, ...]]:
    """Every run of so many words, slots left out (they stand for what differs anyway)."""
    found: set[tuple[str, ...]] = set()
    for text in texts:
        for piece in re.split(r"\{\w+\}", text):
            said = words(piece)
            found |= {tuple(said[i : i + length]) for i in range(len(said) - length + 1)}
    return found


def values(split: str, key: str) -> set[Any]:
    return {record[key] for record in RECORDS[split]} - {None}


def numbers_in(mail: str) -> list[int]:
    spelled = {word: number for number, word in enumerate(generate.NUMBERS)}
    found = (int(word) if word.isdecimal() else spelled.get(word) for word in words(mail))
    return [number for number in found if number is not None]


@pytest.mark.parametrize("split", COUNTS)
def test_the_seed_decides(split: str) -> None:
    assert generate.make_rows(split, COUNTS[split]) == ROWS[split]
    other = generate.make_rows(split, COUNTS[split], seed=1)
    assert {row["input"] for row in other} != {row["input"] for row in ROWS[split]}


def test_tables_are_large_enough_and_hold_nothing_twice() -> None:
    sizes = {"FIRST_NAMES": (40, 40), "SURNAMES": (40, 40), "PRODUCTS": (30, 30)}
    for table, least in sizes.items():
        for split, size in zip(COUNTS, least, strict=True):
            entries = getattr(generate, table)[split]
            assert len(entries) >= size
            assert len(set(entries)) == len(entries)
    for split, size in (("train", 12), ("test", 8)):
        assert set(generate.BODIES[split]) == set(generate.INTENTS)
        assert all(len(bodies) >= size for bodies in generate.BODIES[split].values())
        assert len(set(templates(split))) == len(templates(split))


def test_splits_share_no_table_entry() -> None:
    for table in ("FIRST_NAMES", "SURNAMES", "PRODUCTS"):
        train, test = (set(words(" ".join(getattr(generate, table)[split]))) for split in COUNTS)
        assert train.isdisjoint(test), table  # not even the "oak" of an oak stool
    names = [{*generate.FIRST_NAMES[split], *generate.SURNAMES[split]} for split in COUNTS]
    assert names[0].isdisjoint(names[1])
    assert set(templates("train")).isdisjoint(templates("test"))
    assert not runs(templates("train"), 4) & runs(templates("test"), 4)


def test_splits_share_nothing_in_the_rows() -> None:
    for key in ("customer", "product", "order_no"):
        assert values("train", key).isdisjoint(values("test", key))
    for part in (0, 1):
        train, test = (
            {name.split()[part] for name in values(split, "customer")} for split in COUNTS
        )
        assert train.isdisjoint(test)
        assert min(len(train), len(test)) >= 40
    mails = [row["input"] for rows in ROWS.values() for row in rows]
    assert len(set(mails)) == len(mails) == sum(COUNTS.values())
    lines = [{line for row in ROWS[split] for line in row["input"].split("\n")} for split in COUNTS]
    assert lines[0].isdisjoint(lines[1])


def test_order_numbers_are_disjoint_under_different_seeds() -> None:
    other = [json.loads(row["output"])["order_no"] for row in generate.make_rows("test", 300, 7)]
    assert values("train", "order_no").isdisjoint(other)


@pytest.mark.parametrize("split", COUNTS)
def test_rows_have_the_stated_form(split: str) -> None:
    for row, record in zip(ROWS[split], RECORDS[split], strict=True):
        assert list(row) == ["instruction", "input", "output"]
        assert row["instruction"] == generate.INSTRUCTION
        assert list(record) == KEYS
        compact = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
        assert row["output"] == compact
        assert record["intent"] in generate.INTENTS
        assert record["product"] in generate.PRODUCTS[split]
        assert record["quantity"] is None or type(record["quantity"]) is int
        assert record["order_no"] is None or re.fullmatch(r"K-\d{5}", record["order_no"])
        assert 15 <= len(row["input"].split()) <= 45
        assert not re.search(r"[{}]|  |\n\n", row["input"])


def test_every_answer_is_in_its_mail() -> None:
    for mail, record in PAIRS:
        assert mail.count(record["customer"]) == 1
        assert mail.count(record["product"]) == 1
        assert re.findall(r"K-\d+", mail) == [record["order_no"]] * bool(record["order_no"])
        if record["quantity"] is not None:
            assert record["quantity"] in numbers_in(mail)


def test_the_mails_have_what_makes_reading_them_work() -> None:
    for split in COUNTS:
        pairs = [
            (numbers_in(row["input"]), record["quantity"])
            for row, record in zip(ROWS[split], RECORDS[split], strict=True)
        ]
        assert any(len(numbers) > 1 for numbers, quantity in pairs if quantity)
        assert any(numbers for numbers, quantity in pairs if quantity is None)
        spelled = [set(generate.NUMBERS) & set(words(row["input"])) for row in ROWS[split]]
        assert any(spelled)
        for key in ("quantity", "order_no"):
            share = sum(record[key] is None for record in RECORDS[split]) / COUNTS[split]
            assert 0.2 < share < 0.8


@pytest.mark.parametrize("split", COUNTS)
@pytest.mark.parametrize("count", [1, 7, 300])
def test_intents_are_balanced(split: str, count: int) -> None:
    rows = generate.make_rows(split, count)
    tally = Counter(json.loads(row["output"])["intent"] for row in rows)
    sizes = [tally[intent] for intent in generate.INTENTS]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


def test_the_instruction_defines_the_task() -> None:
    assert len(generate.INSTRUCTION.split()) <= 30
    assert {*KEYS, *generate.INTENTS} <= set(words(generate.INSTRUCTION))


def test_a_split_can_be_used_up() -> None:
    rows = generate.make_rows("test", generate.capacity("test"))
    assert len({row["input"] for row in rows}) == len(rows) == generate.capacity("test")


def test_command_line_writes_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "orders"
    assert generate.main([str(folder)]) == 0
    first = {split: (folder / f"{split}.jsonl").read_bytes() for split in COUNTS}
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{COUNTS[split]} rows: {folder / split}.jsonl" for split in COUNTS]
    for split, data in first.items():
        lines = data.decode("utf-8").removesuffix("\n").split("\n")
        assert [json.loads(line) for line in lines] == ROWS[split]
    assert generate.main([str(folder), "--train", "480", "--test", "300", "--seed", "0"]) == 0
    assert {split: (folder / f"{split}.jsonl").read_bytes() for split in COUNTS} == first
    assert generate.main([str(folder), "--seed", "1"]) == 0
    assert all((folder / f"{split}.jsonl").read_bytes() != first[split] for split in COUNTS)
    assert sorted(path.name for path in folder.iterdir()) == ["test.jsonl", "train.jsonl"]


@pytest.mark.parametrize("bad", [("--train", "1000000"), ("--test", "1000000"), ("--test", "0")])
def test_command_line_refuses_an_impossible_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: tuple[str, str]
) -> None:
    assert generate.main([str(tmp_path / "orders"), *bad]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert bad[1] in message
    assert not (tmp_path / "orders").exists()


def test_command_line_refuses_a_file_as_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("not a folder")
    assert generate.main([str(taken)]) == 2
    assert str(taken) in capsys.readouterr().err


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="train or test"):
        generate.make_rows("dev", 5)
