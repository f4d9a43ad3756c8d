"""Graders, generation and knowledge kept, against independent computations on tiny models."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_adapter import config, perturb
from transformers import PreTrainedModel

from milora.adapter import add_adapter
from milora.data import Row, prompt_ids
from milora.errors import UserError
from milora.evaluate import (
    Pair,
    Task,
    answer_loss,
    check_lengths,
    evaluate_task,
    general_text,
    generate,
    kl,
    knowledge_kept,
    load_task,
    wilson,
)
from milora.grade import grader

Load = Callable[[str], PreTrainedModel]


def test_wilson() -> None:
    # Newcombe 1998, table I: 81 of 263, and 15 of 148.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20)[0] == 0
    assert wilson(20, 20)[1] == 1
    assert wilson(0, 20)[1] > 0.1


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_the_interval_holds_the_share_and_stays_in_bounds(count: int, share: float) -> None:
    right = round(share * count)
    low, high = wilson(right, count)
    assert 0 <= low <= right / count + 1e-12
    assert right / count - 1e-12 <= high <= 1
    assert low < high
    mirrored = wilson(count - right, count)
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-9)


@given(st.integers(2, 9), st.integers(0, 99))
def test_kl_against_fp64(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (4 * torch.randn(5, size, generator=generator) for _ in "pq")
    found = kl(p.log_softmax(-1), q.log_softmax(-1))
    P, Q = p.double().softmax(-1), q.double().softmax(-1)
    wanted = (P * (P.log() - Q.log())).sum(-1)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert kl(p.log_softmax(-1), p.log_softmax(-1)).abs().max() == 0


def test_knowledge_kept(load: Load) -> None:
    tokenizer = make_tokenizer()
    text = "The quick brown fox jumps over the lazy dog. " * 8
    model, _ = add_adapter(load("llama"), config("llama"), "milora")
    same = knowledge_kept(Pair(model), tokenizer, text, chunks=3, length=50)
    assert same["tokens"] == 3 * 49
    assert abs(same["kl"]) < 1e-7  # rounding of step 0 in fp32
    assert same["top_token_agreement"] == 1
    perturb(model)
    found = knowledge_kept(Pair(model), tokenizer, text, chunks=3, length=50)
    # The same by hand, in fp64, and against a second model instead of the adapter off.
    ids = torch.tensor(tokenizer(text)["input_ids"][:150]).view(3, 50)
    base = load("llama")
    with torch.no_grad():
        log_p = base(ids).logits[:, :-1].double().log_softmax(-1)
        log_q = model(ids).logits[:, :-1].double().log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert found["kl"] == pytest.approx(float(each.mean()), abs=1e-6)
    assert found["kl_p99"] == pytest.approx(float(each.flatten().quantile(0.99)), abs=1e-6)
    for name, log in (("base", log_p), ("tuned", log_q)):
        loss = -log.gather(-1, ids[:, 1:, None]).mean()
        assert found[f"{name}_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    other = knowledge_kept(Pair(model, load("llama")), tokenizer, text, chunks=3, length=50)
    assert other == found
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).float().mean()
    assert found["top_token_agreement"] == pytest.approx(float(agreement))


def test_text_that_is_too_short(load: Load) -> None:
    with pytest.raises(UserError, match="fewer than 2 tokens"):
        knowledge_kept(Pair(load("llama")), make_tokenizer(), "a")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_batched_answers_equal_single_ones(kind: str, load: Load) -> None:
    tokenizer, model = make_tokenizer(), load(kind)
    prompts = [tokenizer(text)["input_ids"] for text in ("a", "a longer one", "mid len", "zz")]
    together = generate(model, tokenizer, prompts, 8, batch_size=3)
    for prompt, answer in zip(prompts, together, strict=True):
        assert generate(model, tokenizer, [prompt], 8) == [answer]
        ids = list(prompt)  # and greedy decoding by hand
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        said = ids[len(prompt) :]
        ended = tokenizer.eos_token_id in said
        kept = said[: said.index(tokenizer.eos_token_id)] if ended else said
        assert answer.text == tokenizer.decode(kept, skip_special_tokens=True).strip()
        assert answer.ended == ended


def test_an_answer_stops_at_the_end_token(load: Load) -> None:
    tokenizer, model = make_tokenizer(), load("llama")
    prompt = [5, 6, 7]
    (answer,) = generate(model, tokenizer, [prompt], 5)
    assert not answer.ended
    said = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0, 3:]
    # Chat models have several tokens that end a turn; here the third one said is such.
    model.generation_config.eos_token_id = [9, int(said[2])]
    (answer,) = generate(model, tokenizer, [prompt], 5)
    assert answer.ended
    first = said.tolist().index(int(said[2]))
    assert answer.text == tokenizer.decode(said[:first], skip_special_tokens=True).strip()


def test_a_task_end_to_end(load: Load, tmp_path: Path) -> None:
    tokenizer, model = make_tokenizer(), load("llama")
    rows = [
        Row([{"role": "user", "content": q}, {"role": "assistant", "content": "x"}], q)
        for q in ("one", "two", "three")
    ]
    base = [a.text for a in generate(model, tokenizer, [[*p] for p in _prompts(rows)], 6)]
    right = {"one": base[0]}

    def grade(answer: str, reference: str) -> str:
        return "right" if answer in right.values() else "format"

    scores, samples = evaluate_task(
        Pair(model),
        tokenizer,
        Task("t", rows, grade, 6),  # type: ignore[arg-type]
    )
    assert scores["rows"] == 3
    expected = sum(answer == base[0] for answer in base) / 3
    for state in ("base", "tuned"):
        assert scores[state]["accuracy"] == pytest.approx(expected)
        assert scores[state]["format_failures"] == pytest.approx(1 - expected)
        assert scores[state]["loss"] > 0
    assert [s["row"] for s in samples] == ["one", "two", "three"]
    assert [s["base"]["answer"] for s in samples] == base
    json.dumps(scores), json.dumps(samples)


def test_base_and_tuned_are_scored_each_by_its_own_answers(load: Load) -> None:
    """The references are the base's own answers, so the base is right in every row."""
    tokenizer = make_tokenizer()
    asked = [[{"role": "user", "content": q}] for q in ("one", "two, longer", "three")]
    prompts = [prompt_ids(tokenizer, turns) for turns in asked]
    base = generate(load("llama"), tokenizer, prompts, 6)
    rows = [
        Row([*turns, {"role": "assistant", "content": a.text}], f"row {i}")
        for i, (turns, a) in enumerate(zip(asked, base, strict=True))
    ]
    model, _ = add_adapter(load("llama"), config("llama"), "milora")
    perturb(model)
    tuned = generate(model, tokenizer, prompts, 6)  # type: ignore[arg-type]
    task = Task("own", rows, grader("exact"), 6)
    scores, samples = evaluate_task(Pair(model), tokenizer, task, batch_size=2)
    assert scores["base"]["accuracy"] == 1
    right = sum(a.text == b.text for a, b in zip(base, tuned, strict=True))
    assert right < 3
    assert scores["tuned"]["accuracy"] == pytest.approx(right / 3)
    assert scores["tuned"]["interval"] == wilson(right, 3)
    assert scores["tuned"]["unended"] == sum(not a.ended for a in tuned) / 3
    assert [s["tuned"]["answer"] for s in samples] == [a.text for a in tuned]
    assert [s["prompt"] for s in samples] == ["one", "two, longer", "three"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_that_of_the_answers_alone(kind: str, load: Load) -> None:
    tokenizer, model = make_tokenizer(), load(kind)
    rows, total, count = [], 0.0, 0
    for question, answer in (("q", "a"), ("a longer question", "b c"), ("q q", "a long answer")):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(Row(turns, "x"))
        prompt = prompt_ids(tokenizer, turns[:1])
        said = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            log_p = model(torch.tensor([[*prompt, *said]])).logits[0].double().log_softmax(-1)
        total -= sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(said))
        count += len(said)
    spelled = Row([{"role": "user", "content": "</s>"}, {"role": "assistant", "content": "a"}], "x")
    for size in (1, 2, 16):
        loss, over = answer_loss(model, tokenizer, [*rows, spelled], size)
        assert loss == pytest.approx(total / count, rel=1e-5)
        assert over == 3  # the row that encode refuses is left out, and that is said
    assert math.isnan(answer_loss(model, tokenizer, [spelled])[0])


def test_greedy_whatever_the_model_folder_says(load: Load) -> None:
    """Many models ask for sampling or a repetition penalty in generation_config.json."""
    tokenizer, model = make_tokenizer(), load("llama")
    prompts = [[5, 6, 7, 8]]
    plain = generate(model, tokenizer, prompts, 20)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.num_beams = 2
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    assert generate(model, tokenizer, prompts, 20) == plain
    assert model.generation_config.repetition_penalty == 50.0


def _prompts(rows: list[Row]) -> list[list[int]]:
    return [prompt_ids(make_tokenizer(), row.messages[:-1]) for row in rows]


def test_loading_tasks(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text('{"prompt": "a", "completion": "{}"}\n{"prompt": "b", "completion": "c"}\n')
    task = load_task(str(path))
    assert (task.name, len(task.rows), task.max_new_tokens) == ("qa", 2, 64)
    assert len(load_task(str(path), 1).rows) == 1
    assert len(load_task({"file": str(path), "limit": 1, "name": "n"}).rows) == 1
    with pytest.raises(UserError, match=r"qa.jsonl, line 2: the reference answer is not JSON"):
        load_task({"file": str(path), "match": "json"})
    for deep in ("[" * 99_999, "1" * 5000, "NaN"):
        path.write_text(json.dumps({"prompt": "a", "completion": deep}) + "\n")
        with pytest.raises(UserError, match=r"line 1: the reference answer is not JSON"):
            load_task({"file": str(path), "match": "json"})
    with pytest.raises(UserError, match=r"none.jsonl does not exist"):
        load_task(str(tmp_path / "none.jsonl"))
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant", "user")]
    path.write_text(json.dumps({"messages": turns}))
    with pytest.raises(UserError, match="line 1: a task needs a question and the answer as last"):
        load_task(str(path))
    path.write_text('{"text": "prose"}\n')
    with pytest.raises(UserError, match="line 1: a task needs a question and the answer"):
        load_task(str(path))
    row = Row([{"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "a"}], "r 1")
    with pytest.raises(UserError, match=r"r 1: the question and max_new_tokens \(9\) are 8\d tok"):
        check_lengths(Task("t", [row], grader("exact"), 9), make_tokenizer(), 80)
    refusing = make_tokenizer()
    refusing.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="r 1: the chat template refuses the conversation: no"):
        check_lengths(Task("t", [row], grader("exact"), 9), refusing, 80)


def test_general_text(tmp_path: Path) -> None:
    text, source = general_text("default")
    assert len(text) > 100_000
    assert source.startswith("the help topics of Python 3.")
    (tmp_path / "a.txt").write_text("prose", encoding="utf-8")
    assert general_text(str(tmp_path / "a.txt"))[0] == "prose"
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    assert general_text(str(tmp_path / "a.jsonl"))[0] == "one\n\ntwo"
    with pytest.raises(UserError, match="does not exist"):
        general_text(str(tmp_path / "none.txt"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8"):
        general_text(str(tmp_path / "b.txt"))
