"""Multiple choice by likelihood, against one pass for each option and by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED_DATA, make_tokenizer
from transformers import PreTrainedModel

from milora.choices import Encoded, Question, encode_question, log_probabilities, read_questions
from milora.errors import UserError
from milora.evaluate import ChoiceTask, check_lengths, evaluate_task, load_task
from milora.logits import Pair

Load = Callable[[str], PreTrainedModel]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def questions() -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(2, 258, (length,), generator=generator).tolist()

    sizes = [(5, (1, 3)), (12, (4, 4, 1, 2)), (1, (2, 2)), (7, (1, 1, 1)), (12, (6, 2))]
    return [Encoded(ids(p), [ids(o) for o in options]) for p, options in sizes]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "tied"])
def test_the_same_as_one_pass_for_each_option(kind: str, load: Load) -> None:
    model, asked = load(kind), questions()
    wanted = []
    for prompt, options in asked:
        wanted.append([])
        for option in options:
            ids = torch.tensor([prompt + option])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
            picked = log_p[len(prompt) - 1 : -1].gather(1, torch.tensor(option)[:, None])
            wanted[-1].append(float(picked.sum()))
    for batch_size in (1, 2, 16):
        found = log_probabilities(model, asked, batch_size)
        for a, b in zip(found, wanted, strict=True):
            assert a == pytest.approx(b, abs=1e-4)


def test_scores(load: Load) -> None:
    asked = [
        Question("a, row 1", "2 + 2 = ?", ["4", "five"], 0, ""),
        Question("a, row 2", "Is it?", ["yes", "no", "maybe so"], 2, ""),
        Question("a, row 3", "Why?", ["because", "not"], 0, ""),
    ]
    model, tokenizer = load("llama"), make_tokenizer()
    scores, samples = evaluate_task(
        Pair(model), tokenizer, ChoiceTask("t", asked, "Q: {question}\nA:")
    )
    assert (scores["rows"], scores["majority"]) == (3, pytest.approx(2 / 3))
    assert scores["chance"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3)
    assert scores["base"] == scores["tuned"]
    hits = per_byte = 0
    for question, sample in zip(asked, samples, strict=True):
        log_p = sample["base"]["log_p"]
        assert len(log_p) == len(question.options)
        hits += log_p.index(max(log_p)) == question.right
        normalised = [p / len(o) for p, o in zip(log_p, question.options, strict=True)]
        per_byte += normalised.index(max(normalised)) == question.right
        assert sample["prompt"] == f"Q: {question.question}\nA:"
    assert scores["base"]["accuracy"] == pytest.approx(hits / 3)
    assert scores["base"]["accuracy_normalised"] == pytest.approx(per_byte / 3)


def test_an_option_begins_after_a_space() -> None:
    tokenizer = make_tokenizer()
    found = encode_question(
        tokenizer, Question("p", "Why? {odd}", ["so", "ü"], 0, ""), "{question} A:"
    )
    assert tokenizer.decode(found.prompt) == "Why? {odd} A:"
    assert [tokenizer.decode(option) for option in found.options] == [" so", " ü"]


ADAPTERS = [
    (
        "Please choose the correct answer to the question: What is soft: this?\n\nAnswer1: a b "
        "Answer2: c: d Answer3: e\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
        ("What is soft: this?", ["a b", "c: d", "e"], 1),
    ),
    (
        "Please choose the correct solution to the question: Make it.\n\nSolution1: One.\n\n"
        "Solution2: Two.\n\nAnswer format: solution1/solution2",
        "solution1",
        ("Make it.", ["One.", "Two."], 0),
    ),
    (
        "Please answer the following question with true or false, question: is it so?\n\n"
        "Answer format: true/false",
        "false",
        ("is it so?", ["true", "false"], 1),
    ),
    (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "The _ is big.\n\nOption1: cat Option2: dog Answer format: option1/option2",
        "option2",
        ("The _ is big.", ["cat", "dog"], 1),
    ),
]


@pytest.mark.parametrize(("instruction", "answer", "wanted"), ADAPTERS)
def test_rows_of_llm_adapters(
    instruction: str, answer: str, wanted: tuple[str, list[str], int], tmp_path: Path
) -> None:
    row = {"instruction": instruction, "input": "", "output": "", "answer": answer}
    (found,) = read_questions(write(tmp_path / "a.jsonl", [row]))
    assert (found.question, found.options, found.right) == wanted


def test_a_prompt_of_ones_own(tmp_path: Path) -> None:
    rows = [{"question": q, "choices": ["x", "y"], "answer": 0} for q in ("a?", "{b}?")]
    file = write(tmp_path / "q.jsonl", rows)
    options = {"file": file, "protocol": "likelihood"}
    task = load_task(options | {"prompt": 'As {"is": 0}. {question}'})
    assert isinstance(task, ChoiceTask)
    asked = [encode_question(make_tokenizer(), q, task.prompt).prompt for q in task.questions]
    wanted = [f'As {{"is": 0}}. {q}' for q in ("a?", "{b}?")]
    assert asked == [make_tokenizer()(text)["input_ids"] for text in wanted]
    for prompt in ("No place", "{0}", "{question!r}"):
        with pytest.raises(UserError, match=r"q: prompt .* does not hold \{question\}"):
            load_task(options | {"prompt": prompt})


def test_rows_of_ones_own(tmp_path: Path) -> None:
    rows = [
        {"question": "Why?", "choices": ["a", "b"], "answer": 1},
        {"question": "Why?", "choices": ["a", "b"], "answer": "a"},
    ]
    found = read_questions(write(tmp_path / "a.jsonl", rows))
    assert [q.right for q in found] == [1, 0]
    assert found[1].place.endswith("a.jsonl, line 2")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "", "choices": ["a", "b"], "answer": 0}, "question must be a text"),
        ({"question": "q", "choices": "ab", "answer": 0}, "choices must be a list of texts"),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, "choices must be a list of texts"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least two choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer is 2, but there are 2"),
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, "a choice or its index"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "a choice or its index"),
        ({"question": "\ud800", "choices": ["a", "b"], "answer": 0}, "half a character"),
        ({"question": "q", "choices": ["a", "\udfff"], "answer": 0}, "half a character"),
        ({"text": "q"}, "needs question, choices and answer.*it has text"),
        ({"instruction": "Say it.", "answer": "a"}, "must end in 'Answer format: '"),
        ({"instruction": "Q\n\nAnswer format: a1/a2", "answer": "a1"}, "holds no 'A2: '"),
        ({"instruction": "Q\n\nAnswer format: a1/a2", "answer": "a3"}, "'a3', is one"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1: .*{said}"):
        read_questions(write(tmp_path / "a.jsonl", [row]))


def test_a_question_longer_than_the_model(tmp_path: Path) -> None:
    rows = [{"question": "w" * 90, "choices": ["a", "b" * 20], "answer": 1}]
    file = write(tmp_path / "a.jsonl", rows)
    task = load_task({"file": file, "protocol": "likelihood"})
    assert isinstance(task, ChoiceTask)
    check_lengths(task, make_tokenizer(), 500)
    with pytest.raises(UserError, match=r"line 1: the question and its longest option are 129 tok"):
        check_lengths(task, make_tokenizer(), 100)


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the public data sets are not here")
def test_every_row_of_the_commonsense_sets_is_read() -> None:
    sizes = {"ARC-Easy": 2376, "ARC-Challenge": 1172, "boolq": 3270, "openbookqa": 500,
             "piqa": 1838, "social_i_qa": 1954, "winogrande": 1267}  # fmt: skip
    for name, size in sizes.items():
        found = read_questions(str(SHARED_DATA / "commonsense" / f"{name}_test.json"))
        assert len(found) == size
        assert all("nswer1:" not in q.question for q in found)


def test_an_option_whose_logits_are_not_finite_is_wrong_and_counted(load: Load) -> None:
    model, tokenizer = load("llama"), make_tokenizer()
    whole = log_probabilities(model, questions())
    # A token that is impossible, and pads the shorter options: those keep their values.
    model.lm_head.register_forward_hook(
        lambda module, args, out: torch.cat([torch.full_like(out[..., :1], -torch.inf),
                                             out[..., 1:]], -1)
    )  # fmt: skip
    for found, before in zip(log_probabilities(model, questions()), whole, strict=True):
        assert None not in found
        assert len(found) == len(before)
    model.lm_head.weight.data.fill_(torch.nan)
    assert log_probabilities(model, questions())[0] == [None, None]
    asked = [Question("a, row 1", "2 + 2 = ?", ["4", "five"], 0, "")]
    scores, samples = evaluate_task(Pair(model), tokenizer, ChoiceTask("t", asked, "{question}"))
    assert (scores["tuned"]["accuracy"], scores["tuned"]["not_finite"]) == (0.0, 1.0)
    assert samples[0]["tuned"] == {"log_p": [None, None], "likeliest": None}
