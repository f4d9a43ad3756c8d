"""Graders, generation and knowledge kept, against independent computations on tiny models."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, with_bos
from hypothesis import given
from hypothesis import strategies as st
from test_adapter import config, perturb
from transformers import PreTrainedModel

import milora.knowledge
from milora.adapter import add_adapter
from milora.card import scores_table
from milora.data import prompt_ids
from milora.errors import UserError
from milora.evaluate import (
    ChoiceTask,
    Task,
    asked_task,
    check_lengths,
    evaluate_task,
    load_task,
    save_evaluation,
    score,
    wilson,
)
from milora.forms import predictions
from milora.generation import answer_loss, generate
from milora.grade import grader
from milora.keep import kl
from milora.knowledge import general_texts, knowledge_kept
from milora.logits import Pair
from milora.rows import Row

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


def test_pieces_of_general_text_begin_as_the_tokenizer_begins_a_text(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def noting(model: Any, piece: list[int]) -> Any:
        seen.append(piece)
        return predictions(model, piece)

    monkeypatch.setattr(milora.knowledge, "predictions", noting)
    knowledge_kept(Pair(load("llama")), make_tokenizer(), "a" * 120, chunks=2, length=50)
    assert [len(piece) for piece in seen] == [50] * 4  # of base and tuned
    seen.clear()
    found = knowledge_kept(Pair(load("llama")), with_bos(), "a" * 120, chunks=2, length=50)
    assert [(piece[0], len(piece)) for piece in seen] == [(0, 50)] * 4
    assert found["tokens"] == 2 * 49


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
    # And at the tokenizer's, which it was trained with, though the model's file does not name it.
    model.generation_config.eos_token_id = 9
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(said[2]))
    (answer,) = generate(model, tokenizer, [prompt], 5)
    assert answer.ended


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
    assert answer_loss(model, tokenizer, [spelled]) == (None, 0)
    turns[1]["content"] = "a" * 1000  # of which a model takes 256 or 512
    assert answer_loss(model, tokenizer, rows)[1] == 3


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
    path.write_text('{"question": "a", "reply": "b", "completion": "c", "prompt": "d"}\n')
    for columns, said in (
        ({"prompt": "question", "completion": "reply"}, ["a", "b"]),
        ({"prompt": "none"}, ["d", "c"]),
        ({"prompt": "none", "completion": "reply"}, ["d", "b"]),
    ):  # fmt: skip
        (row,) = load_task(str(path), columns=columns).rows
        assert [message["content"] for message in row.messages] == said
    with pytest.raises(UserError, match=r"none.jsonl does not exist"):
        load_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"for a task of lm-evaluation-harness write harness:gsm8k"):
        load_task("gsm8k")
    path.write_text('{"prompt": "a", "completion": " "}\n')
    with pytest.raises(UserError, match=r"line 1: the reference answer is empty, which every"):
        load_task({"file": str(path), "match": "contains"})
    with pytest.raises(UserError, match="qa: prompt has no effect on generated answers: leave it"):
        load_task({"file": str(path), "prompt": "{question}?"})
    for key, value in (("match", "json"), ("max_new_tokens", 5), ("pattern", "x")):
        with pytest.raises(UserError, match=f"qa: {key} has no effect on options that are scored"):
            load_task({"file": str(path), "protocol": "likelihood", key: value})
    with pytest.raises(UserError, match="arc: name has no effect on tasks of the harness"):
        load_task({"harness": "arc", "name": "mine"})
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


def test_general_texts(tmp_path: Path) -> None:
    ((text, source),) = general_texts("default")
    assert len(text) > 100_000
    assert source.startswith("the help topics of Python 3.")
    (tmp_path / "a.txt").write_text("prose", encoding="utf-8")
    assert general_texts(str(tmp_path / "a.txt"))[0][0] == "prose"
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    assert general_texts(str(tmp_path / "a.jsonl"))[0][0] == "one\n\ntwo"
    with pytest.raises(UserError, match="does not exist"):
        general_texts(str(tmp_path / "none.txt"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8"):
        general_texts(str(tmp_path / "b.txt"))
    both = general_texts([str(tmp_path / "a.txt"), str(tmp_path / "a.jsonl")])
    assert [text for text, _ in both] == ["prose", "one\n\ntwo"]
    for names in ([], ["default", "default"]):
        with pytest.raises(UserError, match="each text must be given once, and one at least"):
            general_texts(names)


def test_a_token_that_is_impossible_adds_nothing() -> None:
    p = torch.tensor([[0.5, -math.inf, 1.0], [0.0, 0.0, 0.0]]).log_softmax(-1)
    q = torch.tensor([[0.1, -math.inf, 0.0], [0.0, -math.inf, 0.0]]).log_softmax(-1)
    found = kl(p, q)
    P, Q = p[0, [0, 2]].double().softmax(-1), q[0, [0, 2]].double().softmax(-1)
    assert float(found[0]) == pytest.approx(float((P * (P / Q).log()).sum()), abs=1e-6)
    assert found[1] == math.inf  # impossible for q alone


def broken(model: PreTrainedModel, token: int, value: float) -> None:
    """Every logit at a position after `token` becomes `value`."""

    def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        logits = output.logits
        seen = (ids == token)[:, -logits.shape[1] :]
        output.logits = torch.where(seen[:, :, None], torch.tensor(value), logits)
        return output

    model.register_forward_hook(spoil, with_kwargs=True)


def task_of(questions: list[str], reference: str = "a") -> Task:
    rows = [
        Row([{"role": "user", "content": q}, {"role": "assistant", "content": reference}], q)
        for q in questions
    ]
    return Task("t", rows, grader("exact"), 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_counted(value: float, load: Load) -> None:
    tokenizer, model = make_tokenizer(), load("llama")
    prompts = [tokenizer(text)["input_ids"] for text in ("first", "second", "third")]
    whole = generate(model, tokenizer, prompts, 4)
    broken(model, prompts[1][-1], value)  # "d" ends the second and the third
    answers = generate(model, tokenizer, prompts, 4)
    assert [answer.finite for answer in answers] == [True, False, False]
    assert answers[0] == whole[0]
    texts = ["bad", "fine", "worse"]
    end = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, return_dict=False
    )[-1]
    broken(model, end, value)  # what every conversation ends in
    scores, graded = score(model, tokenizer, task_of(texts))
    assert (scores["not_finite"], scores["format_failures"], scores["accuracy"]) == (1.0, 1.0, 0.0)
    assert {verdict for _, verdict in graded} == {"format"}
    json.loads(json.dumps(scores), parse_constant=pytest.fail)  # no NaN in what is written


def test_knowledge_where_logits_are_not_finite(load: Load) -> None:
    tokenizer, model = make_tokenizer(), load("llama")
    text = "The quick brown fox jumps over the lazy dog. " * 4
    ids = tokenizer(text)["input_ids"][:100]
    tuned = load("llama")
    broken(tuned, ids[4], math.nan)
    found = knowledge_kept(Pair(tuned, model), tokenizer, text, chunks=2, length=50)
    wrong = ids[:49].count(ids[4]) + ids[50:99].count(ids[4])
    assert 0 < wrong < 98
    assert (found["not_finite"], found["tokens"]) == (wrong, 98)
    assert found["kl"] == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        log_p = model(torch.tensor([ids[:50], ids[50:]])).logits.log_softmax(-1).flatten(0, 1)
    finite = [i for i in range(99) if i != 49 and ids[i] != ids[4]]
    wanted = math.exp(-sum(float(log_p[i, ids[i + 1]]) for i in finite) / len(finite))
    for state in ("base", "tuned"):
        assert found[f"{state}_perplexity"] == pytest.approx(wanted, rel=1e-4)
    tuned.lm_head.weight.data.fill_(math.nan)
    nothing = knowledge_kept(Pair(tuned, model), tokenizer, text, chunks=2, length=50)
    assert nothing["not_finite"] == 98
    assert [nothing[key] for key in ("kl", "kl_p99", "tuned_perplexity")] == [None] * 3
    # A loss whose exponential is no number.
    tuned = load("llama")
    tuned.lm_head.weight.data.mul_(1e6)
    huge = knowledge_kept(Pair(tuned, model), tokenizer, text, chunks=2, length=50)
    assert huge["not_finite"] == 0
    assert huge["tuned_perplexity"] is None
    assert all("not finite" in line or "|" in line for line in scores_table(
        {"tasks": {}, "knowledge": [{"text": "t"} | nothing]}))  # fmt: skip


def test_rows_that_stand_twice_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": q, "completion": "a"} for q in ("one", "two", "one", "one")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(str(file))
    assert isinstance(task, Task)
    assert (len(task.rows), task.duplicates) == (4, 2)
    choices = [{"question": q, "choices": ["a", "b"], "answer": 0} for q in ("one", "one")]
    file.write_text("".join(json.dumps(row) + "\n" for row in choices))
    asked = load_task({"file": str(file), "protocol": "likelihood"})
    assert isinstance(asked, ChoiceTask)
    assert asked.duplicates == 1
    file.write_text("")
    for options in ({}, {"protocol": "likelihood"}):
        with pytest.raises(UserError, match="holds no rows"):
            load_task({"file": str(file)} | options)


def test_answers_for_a_judge(tmp_path: Path, load: Load) -> None:
    rows = [{"instruction": q, "output": "ref", "generator": "x"} for q in ("Say a.", "Say b.")]
    file = tmp_path / "alpaca_eval.json"
    file.write_text(json.dumps(rows))
    task = load_task({"file": str(file), "match": "none", "name": "a/b", "max_new_tokens": 3})
    scores, samples = evaluate_task(Pair(load("llama")), make_tokenizer(), task)
    assert "accuracy" not in scores["tuned"]
    assert "verdict" not in samples[0]["tuned"]
    result = {"tasks": {"a/b": scores}, "knowledge": []}
    save_evaluation(tmp_path / "evaluation.json", tmp_path / "s.jsonl", result, samples)
    for state in ("base", "tuned"):
        written = json.loads((tmp_path / f"evaluation.a-b-{state}.json").read_text())
        assert [one["instruction"] for one in written] == ["Say a.", "Say b."]
        assert [one["output"] for one in written] == [s[state]["answer"] for s in samples]
        assert {one["generator"] for one in written} == {state}
    assert [line for line in scores_table(result) if "loss" in line]


def test_a_task_from_the_hub_is_its_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = {
        "train": [{"prompt": "1", "completion": "1", "question": "q", "choices": ["a", "b"]}],
        "test": [{"prompt": "2", "completion": "2", "question": "t", "choices": ["a", "b"]}],
    }
    for part in rows.values():
        part[0]["answer"] = 0  # type: ignore[assignment]
    monkeypatch.setattr(datasets, "load_dataset", lambda source, split: rows[split])
    task = load_task("some/set")
    assert isinstance(task, Task)
    assert task.rows[0].messages[0]["content"] == "2"
    asked = load_task({"file": "some/set", "protocol": "likelihood"})
    assert isinstance(asked, ChoiceTask)
    assert asked.questions[0].question == "t"


def test_a_task_of_the_run_by_its_name_or_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mail = {"file": "data/mail.jsonl", "name": "post", "match": "number", "harness": None}
    words = {"file": None, "name": None, "harness": "mine", "include": "here"}
    tasks = ["other.jsonl", mail, words]
    assert asked_task("other", tasks) == "other.jsonl"
    for said in (
        "post",
        "data/mail.jsonl",
        "./data/../data/mail.jsonl",
        str(tmp_path / "data/mail.jsonl"),
    ):
        assert asked_task(said, tasks) is mail
    for said in ("mine", "harness:mine"):
        assert asked_task(said, tasks) is words
    for said in ("mail.jsonl", "harness:post", "harness:other"):
        assert asked_task(said, tasks) is said
