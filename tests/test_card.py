"""The model card says what a user must know, and escapes what it was given."""

import re
from typing import Any

import pytest
import yaml

from milora.card import (
    GGUF_TYPES,
    artefact_card,
    model_card,
    scores_table,
    serving,
    smaller_card,
)
from milora.ggufs import ARCHITECTURES

RECORD: dict[str, Any] = {
    "method": "milora",
    "base": {
        "name": "org/base", "license": "mit", "sha256": "ab" * 32, "dtype": "float32",
    },
    "adapter": {"rank": 40},
    "data": {
        "format": "alpaca",
        "sha256": {"train.jsonl": "cd" * 32},
        "train": {"kept": 90, "shortened": 3, "refused": {"empty answer": 2}},
        "eval": {"kept": 10},
    },
    "coverage": {"adapted": {"q_proj": {"weights": 2, "parameters": 8}}},
    "parameters": {"trainable": 1234, "all": 56789},
    "seconds": {"training": 12.3},
    "step0": {"difference": 2e-7, "bound": 1e-5},
}  # fmt: skip
ASKED: dict[str, Any] = {
    "lora": {"r": 20, "lora_alpha": 20}, "seed": 0, "training": {"learning_rate": 1e-4},
    "milora": {"start": "balanced", "protect_inputs": 64, "keep": None, "text": "sampled"},
}  # fmt: skip
STATE = {"accuracy": 0.5, "interval": (0.4, 0.6), "format_failures": 0.1, "loss": 1.0, "unended": 0}
EVALUATION: dict[str, Any] = {
    "tasks": {"mail": {"rows": 100, "base": STATE, "tuned": STATE | {"accuracy": 0.9}}},
    "knowledge": [{
        "text": "wiki", "tokens": 511, "kl": 0.0123, "kl_p99": 0.2, "base_perplexity": 20.0,
        "tuned_perplexity": 20.5, "top_token_agreement": 0.95,
    }],
}  # fmt: skip


def test_the_card_says_what_a_user_must_know() -> None:
    card = model_card(RECORD, ASKED, EVALUATION)
    for wanted in (
        "rank 40", "twice the trained rank 20", "--max-lora-rank 64",
        "90 rows for training (alpaca), 10 held out; 3 shortened, 2 refused", "abababab",
        "`train.jsonl`, sha256 `cdcdcdcd", "method milora, r 20, alpha 20", "learning_rate 0.0001",
        "milora.start balanced", "milora.protect_inputs 64", "milora.text sampled",
        "seed 0", "adapted: q_proj (2)", "0.500 (0.400 to 0.600) | 0.900 (0.400 to 0.600)",
        "0.0123", "20.00 | 20.50", "1,234 trained parameters of 56,789", "licence: mit", "2.0e-07",
    ):  # fmt: skip
        assert wanted in card, wanted
    for rank, there in ((512, False), (1024, True)):
        commands = "\n".join(serving(rank, RECORD["base"]))
        assert "--max-lora-rank 512 " in commands
        assert ("export this/folder --rank 512 --out small" in commands) == there
        assert ("tuned=small" in commands) == there
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "org/base"
    assert head["license"] == "mit"
    assert head["library_name"] == "peft"


def test_the_card_of_a_plain_lora_and_of_an_unknown_licence() -> None:
    base = RECORD["base"] | {"license": "unknown"}
    card = model_card(
        RECORD | {"method": "lora", "base": base, "adapter": {"rank": 20}}, ASKED, None
    )
    assert "Why rank" not in card
    assert "Learned and kept" not in card
    assert "licence: see the card of the base" in card
    assert "license" not in yaml.safe_load(card.split("---\n")[1])
    assert "--max-lora-rank 32" in card


def test_commands_that_cannot_work_are_not_printed() -> None:
    for kind, there in (("llama", True), ("gpt2", False), ("mixtral", False)):
        said = "\n".join(serving(8, RECORD["base"] | {"type": kind}))
        assert "vllm serve" in said
        assert ("--to gguf" in said) == there
    assert {*ARCHITECTURES, None} == set(GGUF_TYPES)
    seq2seq = RECORD["base"] | {"task": "SEQ_2_SEQ_LM"}
    merged = {
        "base": seq2seq, "method": "milora",
        "rounding": {"dtype": "float32", "all": 1e-8, "worst": ["w", 1e-8]},
    }  # fmt: skip
    assert "vllm" in artefact_card(merged | {"base": RECORD["base"]})
    assert "--server" not in artefact_card(merged)
    assert "vllm" not in artefact_card(merged)


def test_the_card_of_a_smaller_one() -> None:
    for base in (RECORD["base"], RECORD["base"] | {"task": "SEQ_2_SEQ_LM"}):
        exact = model_card(RECORD | {"base": base, "adapter": {"rank": 1024}}, ASKED, None)
        card = smaller_card(exact, base, 1024, 8, "plain LoRA of rank 8.")
        assert "A plain LoRA of rank 8 for" in card
        assert "Why rank" not in card
        assert card.count("1024") == card.count("(rank 1024): plain LoRA of rank 8.") == 1
        served = "task" not in base
        assert ("--max-lora-rank 8 " in card) == ("llama.cpp" in card) == served
        assert "--rank 512" not in card
        assert "The scores above" not in card
    exact = model_card(RECORD, ASKED, EVALUATION)
    card = smaller_card(exact, RECORD["base"], 40, 8, "plain LoRA of rank 8.")
    assert "(rank 40): plain LoRA of rank 8. The scores above are of that update, not of" in card


HOSTILE = "a`</code><script>alert(1)</script>\n# x\n---\n[go](javascript:1)|<img src=x onerror=1>"


@pytest.mark.parametrize("place", ["name", "licence", "file", "option", "module", "task", "text"])
def test_the_card_escapes_what_it_was_given(place: str) -> None:
    record, asked, evaluation = RECORD, ASKED, EVALUATION
    if place == "name":
        record = RECORD | {"base": RECORD["base"] | {"name": HOSTILE}}
    elif place == "licence":
        record = RECORD | {"base": RECORD["base"] | {"license": HOSTILE}}
    elif place == "file":
        record = RECORD | {"data": RECORD["data"] | {"sha256": {HOSTILE: "cd" * 32}}}
    elif place == "option":
        asked = ASKED | {"training": {"run_name": HOSTILE}}
    elif place == "module":
        record = RECORD | {"coverage": {"adapted": {HOSTILE: {"weights": 1, "parameters": 1}}}}
    elif place == "task":
        evaluation = EVALUATION | {"tasks": {HOSTILE: EVALUATION["tasks"]["mail"]}}
    else:
        evaluation = EVALUATION | {"knowledge": [EVALUATION["knowledge"][0] | {"text": HOSTILE}]}
    plain, card = model_card(RECORD, ASKED, EVALUATION), model_card(record, asked, evaluation)
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(head)["base_model"] == record["base"]["name"]
    assert "alert(1)" in body
    assert "<" not in body
    assert not re.search(r"(?<!\\)\]\((?!https://arxiv)", body)
    assert body.count("\n#") == plain.count("\n#")  # no heading or rule of its own
    assert "\n---" not in body
    rows = [line.replace("\\|", "").count("|") for line in scores_table(evaluation)]
    assert set(rows) == {4}  # and no column
