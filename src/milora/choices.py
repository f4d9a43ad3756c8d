"""Multiple choice by likelihood: which option does the model find likeliest after the question?

The protocol of the evaluation harnesses: an option's score is the sum of the log-probabilities of
its tokens after the prompt; normalised, that sum by the bytes of the option. Nothing is generated,
so that no answer can fail by its form.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora.data import pad
from milora.errors import UserError
from milora.rows import check_text, read_records
from milora.vision import COLUMNS

PROMPT = "Question: {question}\nAnswer:"
_LABELS = re.compile(r"\s*Answer format:\s*([\w/]+)\s*$")
_ASKED = re.compile(r"^Please [^:]*?:\s*", re.DOTALL)


class Question(NamedTuple):
    place: str  # "test.json, row 7"
    question: str
    options: list[str]
    right: int  # index of the right option
    asked: str  # all that the record asks, as a row of training would


class Encoded(NamedTuple):
    prompt: list[int]
    options: list[list[int]]


def read_questions(file: str, pictures: bool = False) -> list[Question]:
    """Questions with options from a data file.

    Rows are either {question, choices, answer}, where `answer` is the index or the text of a
    choice, or LLM-Adapters' {instruction, answer}, whose instruction ends in "Answer format:
    answer1/answer2/..." and holds the options as "Answer1: ... Answer2: ...".

    Raises UserError with file, row and what is wrong; with `pictures`, for a model that reads them,
    also for a row that has one.
    """
    records, _ = read_records(file, split="test")
    if not records:
        raise UserError(f"{file} holds no rows")
    seen = (p for record, p in records if any(record.get(c) for c in COLUMNS))
    if pictures and (place := next(seen, None)):
        raise UserError(
            f"{place} has a picture, and the likelihood protocol reads none: write the options "
            "into the question and use match: choice"
        )
    return [_question(record, place) for record, place in records]


def _question(record: Mapping[str, Any], place: str) -> Question:
    if "choices" in record:
        question, options, answer = record.get("question"), record["choices"], record.get("answer")
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{place}: question must be a text, it is {question!r}")
        asked = question
        if not isinstance(options, list) or not all(isinstance(o, str) and o for o in options):
            raise UserError(f"{place}: choices must be a list of texts, it is {options!r}")
        if isinstance(answer, str) and answer in options:
            right = options.index(answer)
        elif isinstance(answer, int) and not isinstance(answer, bool):
            right = answer
        else:
            raise UserError(f"{place}: answer must be a choice or its index, it is {answer!r}")
    elif isinstance(record.get("instruction"), str) and isinstance(record.get("answer"), str):
        asked = record["instruction"]
        question, options, right = _llm_adapters(asked, record["answer"], place)
    else:
        raise UserError(
            f"{place}: the likelihood protocol needs question, choices and answer, or "
            f"LLM-Adapters' instruction and answer; it has {', '.join(map(str, record))}"
        )
    for text in (question, *options):
        check_text(text, place)
    if len(options) < 2:
        raise UserError(f"{place}: at least two choices are needed")
    if not 0 <= right < len(options):
        raise UserError(f"{place}: answer is {right}, but there are {len(options)} choices")
    return Question(place, question.strip(), options, right, asked)


def _llm_adapters(instruction: str, answer: str, place: str) -> tuple[str, list[str], int]:
    ending = _LABELS.search(instruction)
    labels = ending[1].split("/") if ending else []
    if not ending or answer not in labels:
        raise UserError(
            f"{place}: the instruction must end in 'Answer format: ' and labels of which the "
            f"answer, {answer!r}, is one"
        )
    text = instruction[: ending.start()]
    asked = _ASKED.match(text)
    text = text[asked.end() :] if asked else text
    if labels == ["true", "false"]:
        question = text.rpartition("question: ")[2]
        return question, labels, labels.index(answer)
    options, end = list[str](), len(text)
    for label in reversed(labels):  # from behind, since a question may hold such a word itself
        start = text.rfind(f"{label.capitalize()}: ", 0, end)
        if start < 0:
            raise UserError(f"{place}: the instruction holds no '{label.capitalize()}: '")
        options.insert(0, text[start + len(label) + 2 : end].strip())
        end = start
    return text[:end], options, labels.index(answer)


def render(prompt: str, question: Question) -> str:
    """The prompt with the question in it; no other brace means anything."""
    return prompt.replace("{question}", question.question)


def encode_question(
    tokenizer: PreTrainedTokenizerBase, question: Question, prompt: str = PROMPT
) -> Encoded:
    """Token ids of the prompt, and of each option after it (with the space that parts them).

    As in lm-evaluation-harness: prompt and option are tokenised as one text and cut where the
    prompt alone ends.
    """
    text = render(prompt, question)
    known = tokenizer(text)["input_ids"]
    options = [
        tokenizer(f"{text} {option}")["input_ids"][len(known) :] for option in question.options
    ]
    if not all(options):
        raise UserError(f"{question.place}: an option has no tokens of its own")
    return Encoded(list(known), [list(option) for option in options])


def log_probabilities(
    model: PreTrainedModel,
    questions: Sequence[Encoded],
    batch_size: int = 16,
    what: str = "choices",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[list[float | None]]:
    """Sum of log p over the tokens of each option, in nats, in the order of `questions`.

    None where it is not finite.
    The prompt is run once for all of its options; questions of like length go together.
    """
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].prompt))
    found: dict[int, list[float | None]] = {}
    device = model.device
    for first in range(0, len(order), batch_size):
        progress(what, first, len(order))
        chosen = [questions[i] for i in order[first : first + batch_size]]
        ids = pad([q.prompt for q in chosen], 0, left=True).to(device)
        mask = pad([[1] * len(q.prompt) for q in chosen], 0, left=True).to(device)
        with torch.no_grad():
            after_prompt = model(
                input_ids=ids, attention_mask=mask, position_ids=_positions(mask),
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            # One row for each option from here on.
            row = torch.tensor([k for k, q in enumerate(chosen) for _ in q.options], device=device)
            options = [option for q in chosen for option in q.options]
            tokens = pad(options, 0).to(device)
            real = pad([[1] * len(option) for option in options], 0).to(device)
            logits = after_prompt.logits[row]  # (options, 1, vocabulary)
            if tokens.shape[1] > 1:
                # transformers renamed it in 5.2x; the output tells which name this one takes.
                name = "cache" if "cache" in after_prompt else "past_key_values"
                after_prompt[name].batch_select_indices(row)
                whole = torch.cat([mask[row], real[:, :-1]], 1)
                rest = model(
                    input_ids=tokens[:, :-1],
                    attention_mask=whole,
                    position_ids=_positions(whole)[:, mask.shape[1] :],
                    **{name: after_prompt[name]},
                ).logits
                logits = torch.cat([logits, rest], 1)
            log_p = logits.float().log_softmax(-1).gather(2, tokens[:, :, None])[..., 0]
            # A padding token may be impossible, and 0 times that has no value.
            summed = torch.where(real.bool(), log_p.double(), 0.0).sum(1).tolist()
            sums = [value if math.isfinite(value) else None for value in summed]
        for i, q in zip(order[first : first + batch_size], chosen, strict=True):
            found[i], sums = sums[: len(q.options)], sums[len(q.options) :]
    return [found[i] for i in range(len(questions))]


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)
