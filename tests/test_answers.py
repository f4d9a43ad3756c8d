"""Kept answers: never asked twice, never taken for another model's."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from tiny_run import run, settings
from tokenizers import normalizers
from transformers import PreTrainedModel

import milora.answers
import milora.evaluate
from milora.adapter import add_adapter
from milora.answers import recall_of, who_answers, with_adapter
from milora.evaluate import evaluate_all, load_task
from milora.logits import Pair
from milora.matrices import adapted_matrices
from milora.targeting import lora_config

Load = Callable[..., PreTrainedModel]
CONFIG = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
TEXT = ("some general text, of which there is enough " * 20, "here")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILORA_ANSWERS", str(tmp_path / "answers"))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_text(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def tasks(folder: Path) -> list[Any]:
    asked = [{"prompt": f"{i} =", "completion": str(i)} for i in range(4)]
    choices = [{"question": f"{i}?", "choices": ["a", "b"], "answer": 0} for i in range(4)]
    first = {"file": write(folder / "a.jsonl", asked), "max_new_tokens": 3}
    second = {"file": write(folder / "b.jsonl", choices), "protocol": "likelihood"}
    return [load_task(first), load_task(second)]


def evaluated(model: Any, asked: list[Any]) -> Any:
    return evaluate_all(Pair(model), make_tokenizer(), asked, [TEXT], 1, 4)


def no_asking(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the model was asked again")


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(milora.evaluate, name, no_asking)


ALL = ("generate", "answer_loss", "log_probabilities", "knowledge_kept")


def test_a_second_evaluation_asks_only_what_is_new(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = add_adapter(load("llama"), lora_config(CONFIG), "milora")
    first, second = tasks(tmp_path)
    once = evaluated(model, [first])
    with monkeypatch.context() as context:
        forbid(context, *ALL)
        assert evaluated(model, [first]) == once
    with monkeypatch.context() as context:
        forbid(context, "generate", "answer_loss", "knowledge_kept")
        both = evaluated(model, [first, second])
    assert both[0]["tasks"]["a"] == once[0]["tasks"]["a"]
    assert set(both[0]["tasks"]) == {"a", "b"}


def test_another_adapter_is_asked_and_the_base_is_not(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = add_adapter(load("llama"), lora_config(CONFIG), "milora")
    (first, _), tokenizer = tasks(tmp_path), make_tokenizer()
    evaluated(model, [first])
    base = who_answers(model, tokenizer)
    tuned = with_adapter(base, model)
    layer = next(iter(adapted_matrices(model).values())).layer
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(1)
    assert who_answers(model, tokenizer) == base
    names = {tuned, with_adapter(base, model)}
    model.peft_config["default"].lora_alpha = 4
    assert len(names | {with_adapter(base, model)}) == 3
    states = []
    real = milora.evaluate.generate

    def noting(model: Any, tokenizer: Any, prompts: Any, new: int, size: int, what: str, *p: Any):  # type: ignore[no-untyped-def]
        states.append(what)
        return real(model, tokenizer, prompts, new, size, what, *p)

    monkeypatch.setattr(milora.evaluate, "generate", noting)
    evaluated(model, [first])
    assert states == ["a, tuned"]


def test_knowledge_is_between_two_models(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Pair] = []

    def noting(pair: Pair, *args: Any, **options: Any) -> dict[str, Any]:
        asked.append(pair)
        return {"kl": 0.0}

    monkeypatch.setattr(milora.evaluate, "knowledge_kept", noting)
    tuned, one, other = load("llama"), load("llama"), load("llama")
    with torch.no_grad():
        tuned.model.norm.weight[0] += 1
        other.model.norm.weight[1] += 1
    for base in (one, other, one):
        evaluate_all(Pair(tuned, base), make_tokenizer(), [], [TEXT], 1, 4)
    assert len(asked) == 2


def test_what_decides_an_answer(load: Load) -> None:
    tokenizer, other = make_tokenizer(), make_tokenizer(chat=False)
    names = {
        who_answers(load("llama"), tokenizer),
        who_answers(load("llama", torch.bfloat16), tokenizer),
        who_answers(load("llama"), other),
        who_answers(load("qwen2"), tokenizer),
    }
    assert len(names) == 4
    longer, ends, lower = load("llama"), load("llama"), make_tokenizer()
    longer.config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0}
    ends.generation_config.eos_token_id = [0, 7]  # type: ignore[union-attr]
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    names |= {who_answers(one, tokenizer) for one in (longer, ends)}
    names.add(who_answers(load("llama"), lower))
    assert len(names) == 7
    tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=2)
    plain = load("llama")
    plain.config.use_cache, plain.config._name_or_path = False, "elsewhere"
    assert with_adapter(who_answers(plain, tokenizer), plain) in names  # no adapter: the base


@pytest.mark.slow
def test_another_process_finds_them(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    asked = [{"prompt": f"{i} =", "completion": str(i)} for i in range(4)]
    evaluate = {
        "tasks": [{"file": write(tmp_path / "a.jsonl", asked), "max_new_tokens": 3}],
        "knowledge": write_text(tmp_path / "general.txt", TEXT[0] * 3),
    }
    run(settings(tiny("llama"), tmp_path, evaluate=evaluate))
    kept = set((tmp_path / "answers").iterdir())
    assert kept
    command = [sys.executable, "-m", "milora", "eval", str(tmp_path / "run")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    assert set((tmp_path / "answers").iterdir()) == kept


def test_a_damaged_answer_is_asked_again(tmp_path: Path) -> None:
    recall = recall_of("someone", tmp_path)
    assert recall(["q", 1], lambda: (1.5, "a")) == [1.5, "a"]
    assert recall(["q", 1], no_asking) == [1.5, "a"]
    (file,) = tmp_path.iterdir()
    file.write_text("[1.5,")
    assert recall(["q", 1], lambda: 2) == 2
    assert recall_of("someone else", tmp_path)(["q", 1], lambda: 3) == 3


def test_answers_that_cannot_be_kept_are_given_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recall = recall_of("someone", tmp_path / "file")
    assert [recall("q", lambda: 1), recall("q", lambda: 2)] == [1, 2]


@pytest.mark.parametrize(("name", "place"), [("generate", 2), ("log_probabilities", 1)])
def test_a_task_that_was_stopped_goes_on(
    name: str, place: int, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milora.answers, "PIECE", 2)
    model, _ = add_adapter(load("llama"), lora_config(CONFIG), "milora")
    asked, real = tasks(tmp_path), getattr(milora.evaluate, name)
    with monkeypatch.context() as context:
        context.setenv("MILORA_ANSWERS", str(tmp_path / "others"))
        whole = evaluated(model, asked)
    pieces: list[Any] = []

    def noting(*args: Any) -> Any:
        pieces.append(args[place])
        if len(pieces) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(milora.evaluate, name, noting)
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, asked)
    assert evaluated(model, asked) == whole
    # Base and tuned, two pieces each, and the second of the base's had to be asked again.
    assert [len(piece) for piece in pieces] == [2] * 5
    assert pieces[1] == pieces[2] != pieces[0]
