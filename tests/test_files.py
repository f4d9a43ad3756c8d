"""A file or folder is whole or absent."""

import os
from pathlib import Path

import pytest

from milora.card import model_card
from milora.files import new_folder, write_bytes, write_json


def test_a_failing_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with new_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("1")
            assert not (tmp_path / "a").exists()
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert not list(tmp_path.iterdir())
    (tmp_path / ".a.123.tmp").mkdir()  # of a killed process
    for content in ("1", "2"):
        with new_folder(tmp_path / "a") as folder:
            (folder / "x").write_text(content)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "2"


def test_the_card_says_what_a_user_must_know_and_escapes_what_it_was_given(tmp_path: Path) -> None:
    record = {
        "method": "milora",
        "base": {
            "name": "org/<b>base</b>", "license": "mit", "sha256": "ab" * 32, "dtype": "float32",
        },
        "adapter": {"rank": 40},
        "data": {
            "format": "alpaca",
            "sha256": {"<script>alert(1)</script>.jsonl": "cd" * 32},
            "train": {"kept": 90, "shortened": 3, "refused": {"empty answer": 2}},
            "eval": {"kept": 10},
        },
        "coverage": {"adapted": {"q_proj": {"weights": 2, "parameters": 8}}},
        "parameters": {"trainable": 1234, "all": 56789},
        "seconds": {"training": 12.3},
        "step0": {"difference": 2e-7, "bound": 1e-5},
    }  # fmt: skip
    asked = {
        "lora": {"r": 20, "lora_alpha": 20}, "seed": 0,
        "training": {"learning_rate": 1e-4, "run_name": "| [x](javascript:alert) <img>"},
    }  # fmt: skip
    state = {
        "accuracy": 0.5, "interval": (0.4, 0.6), "format_failures": 0.1, "loss": 1.0, "unended": 0,
    }  # fmt: skip
    evaluation = {
        "tasks": {"mail": {"rows": 100, "base": state, "tuned": state | {"accuracy": 0.9}}},
        "knowledge": {
            "text": "wiki", "tokens": 511, "kl": 0.0123, "kl_p99": 0.2, "base_perplexity": 20.0,
            "tuned_perplexity": 20.5, "top_token_agreement": 0.95,
        },
    }  # fmt: skip
    card = model_card(record, asked, evaluation)
    for wanted in (
        "license: mit", "rank 40", "twice the trained rank 20", "--max-lora-rank 64",
        "90 rows for training (alpaca), 10 held out; 3 shortened, 2 refused", "abababab",
        "cdcdcdcd", "learning\\_rate 0.0001", "0.900 (0.400 to 0.600)", "0.0123", "1,234 trained",
        "licence: mit",
    ):  # fmt: skip
        assert wanted.replace("\\_", "_") in card, wanted
    for bad in ("<script>", "<b>", "<img>", "[x]("):
        assert bad not in card.partition("---\n\n")[2]
    write_json(tmp_path / "x.json", {"ü": 1})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "ü": 1\n}\n'
