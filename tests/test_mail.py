"""The demo's data: deterministic, answerable, and nothing of the test in the training rows."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from milora.config import load_config
from milora.gates import check_subjects, parse_gate

PATH = Path(__file__).resolve().parent.parent / "examples" / "mail" / "generate.py"
spec = importlib.util.spec_from_file_location("generate_mail", PATH)
assert spec
assert spec.loader
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert generate.main([str(tmp_path / name), "--seed", str(seed), "--train", "50"]) == 0
    a, b, c = ((tmp_path / n / "train.jsonl").read_bytes() for n in "abc")
    assert a == b
    assert a != c
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_train_and_test_have_nothing_in_common() -> None:
    for table in (generate.FIRST, generate.LAST, generate.PRODUCT, generate.GREETING):
        assert not set(table["train"]) & set(table["test"])
    for table in (generate.CLOSING,):
        assert not set(table["train"]) & set(table["test"])
    bodies = {s: {b for part in generate.BODY[s].values() for b in part} for s in generate.BODY}
    assert not bodies["train"] & bodies["test"]
    train, test = generate.make_rows("train", 500), generate.make_rows("test", 300)
    told = " ".join(row["input"] + row["output"] for row in train)
    for row in test:
        record = json.loads(row["output"])
        for word in (record["product"], *record["customer"].split()):
            assert not re.search(rf"\b{word}\b", told), word


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_record_can_be_read_off_its_mail(split: str) -> None:
    rows = generate.make_rows(split, 400)
    assert len({row["input"] for row in rows}) == 400
    for row in rows:
        record = json.loads(row["output"])
        assert list(record) == ["intent", "customer", "product", "quantity"]
        assert record["intent"] in generate.BODY[split]
        assert record["customer"] in row["input"]
        assert record["product"] in row["input"]
        quantity = record["quantity"]
        words = [str(quantity), *generate.NUMBERS[quantity - 1 : quantity]]
        assert any(re.search(rf"\b{word}\b", row["input"]) for word in words)
    intents = Counter(json.loads(row["output"])["intent"] for row in rows)
    assert set(intents.values()) == {100}


def test_an_impossible_count_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([str(tmp_path / "x"), "--train", "0"]) == 2
    assert "--train is 0: choose 1 to 20000" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["run", "guarded"])
def test_its_configurations(name: str) -> None:
    settings = load_config(PATH.with_name(f"{name}.yaml"))
    folder = str(Path(settings.output_dir).parent)
    assert settings.data.train == f"{folder}/train.jsonl"
    (task,) = settings.evaluate.tasks
    assert task.file == f"{folder}/test.jsonl"
    check_subjects([parse_gate(gate) for gate in settings.gates], [task.name])
    text = PATH.with_name(f"{name}.yaml").read_text(encoding="utf-8")
    assert f"milora train examples/mail/{name}.yaml" in text
    assert f"generate.py {folder}\n" in text
