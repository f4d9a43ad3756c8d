"""From conversations to token ids with a loss mask on the answers only.

encode        one conversation -> token ids and labels
prepare       many of them, with counts of what was kept, shortened and refused
Collator      batches; the language-model head is computed at trained positions only
"""

import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from milora.errors import UserError
from milora.rows import Message, Row
from milora.vision import (
    MARK,
    Picture,
    Reader,
    expand,
    image_tokens,
    pixels,
    render,
    tokenizer_of,
)

IGNORED = -100  # label of a token without loss, as in torch's cross entropy

# Alpaca's template (Taori et al., 2023), as in the code bases of the paper.
PLAIN_SYSTEM = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
# As a chat template, so that it can lie beside the weights: what renders it says what was trained.
PLAIN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '" + PLAIN_SYSTEM + "\\n\\n' }}{% endif %}"
    "{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' }}"
    "{% elif message['role'] == 'tool' %}{{ '### Tool:\\n' }}{% endif %}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)


class Encoded(NamedTuple):
    input_ids: list[int]
    labels: list[int]  # IGNORED where there is no loss
    shortened: bool
    pictures: list[str]  # paths
    token_type_ids: list[int] = []  # noqa: RUF012  (of models that tell two texts apart so)

    def example(self) -> dict[str, list[Any]]:
        """What the collators take."""
        found: dict[str, list[Any]] = {"input_ids": self.input_ids, "labels": self.labels}
        also: dict[str, list[Any]] = {
            "pictures": self.pictures, "token_type_ids": self.token_type_ids,
        }  # fmt: skip
        return found | {name: values for name, values in also.items() if values}


class Prepared(NamedTuple):
    examples: list[dict[str, list[Any]]]  # the usable rows, as the collators take them
    kept: int
    shortened: int
    refused: dict[str, int]  # reason -> rows
    refused_places: list[str]  # the first few
    tokens: int
    trained_tokens: int


# (reader, row, max_length) -> what the model is given, or why the row cannot be used
Encode = Callable[[Reader, Row, int], Encoded | str]


def prompt_text(tokenizer: Reader, messages: Sequence[Message]) -> str:
    """What the model reads before it answers: `messages` and the start of its own turn."""
    try:
        return _render(tokenizer, messages, answer_next=True)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses the conversation: {error}") from error


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """PLAIN_TEMPLATE to lie beside the weights: servers leave the BOS to the template."""
    return "{{ bos_token }}" * len(begins_with(tokenizer)) + PLAIN_TEMPLATE


def plain_form(tokenizer: Reader) -> str | None:
    """A question and its answer as trained, where no chat template came with the model."""
    if tokenizer.chat_template or tokenizer_of(tokenizer).chat_template:
        return None
    prompt = prompt_text(tokenizer, [{"role": "user", "content": "QUESTION"}])
    return f"{prompt}ANSWER{tokenizer_of(tokenizer).eos_token}"


def prompt_ids(
    tokenizer: Reader, messages: Sequence[Message], pictures: Sequence[Picture] = ()
) -> list[int]:
    """Token ids of `prompt_text`, with exactly one BOS where the model wants one."""
    text = prompt_text(tokenizer, messages)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        try:
            text, _, _ = expand(tokenizer, text, pictures)
        except ValueError as error:
            raise UserError(str(error)) from error
    return _tokenize(tokenizer_of(tokenizer), text)[0]


def _render(tokenizer: Reader, messages: Sequence[Message], answer_next: bool) -> str:
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        if tokenizer.chat_template:
            return render(tokenizer, messages, answer_next)
        token, tokenizer = tokenizer.image_token, tokenizer_of(tokenizer)  # type: ignore[attr-defined]
        messages = [{**m, "content": m["content"].replace(MARK, token)} for m in messages]
    # Where no template came with the model it is the plain one, the same in every command.
    return str(
        tokenizer.apply_chat_template(
            list(messages),
            chat_template=None if tokenizer.chat_template else PLAIN_TEMPLATE,
            tokenize=False,
            add_generation_prompt=answer_next,
        )
    )


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, cuts: Sequence[int] = ()
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and character spans. A BOS is put in front when the tokenizer does so and none is there.

    Special tokens in the text (the template's) are taken as such, so that a template that writes
    the BOS itself gives one, not two. No token reaches over one of `cuts`.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} cannot say which characters a token covers, so the "
            "answers cannot be marked: convert it to a fast tokenizer (tokenizer.json)"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = list(found["input_ids"]), [tuple(span) for span in found["offset_mapping"]]
    crossed = [cut for cut in cuts if any(a < cut < b for a, b in spans)]
    if crossed:
        ids, spans = [], []
        for start, end in itertools.pairwise([0, *crossed, len(text)]):
            part = text[start:end]
            found = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
            ids += found["input_ids"]
            spans += [(start + a, start + b) for a, b in found["offset_mapping"]]
    begin = begins_with(tokenizer)
    if begin and ids[:1] != begin:
        ids, spans = [*begin, *ids], [(0, 0), *spans]
    return ids, spans


def begins_with(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] where the tokenizer puts it before a text, as those of Llama and Gemma do; else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def encode(tokenizer: Reader, row: Row, max_length: int) -> Encoded | str:
    """Token ids of a conversation, labels on every assistant turn, its end-of-sequence included.

    Returns the reason as a string when the row cannot be used: nothing to learn is left within
    `max_length`, its text spells a special token, or the chat template refuses it or rewrites
    earlier turns. Too long rows are cut at the end, but never within a picture.
    """
    if spelled := spells(tokenizer, row):
        return spelled
    reader, tokenizer = tokenizer, tokenizer_of(tokenizer)
    eos, pictures_end = tokenizer.eos_token_id, 0
    if row.messages[0]["role"] == "text":
        text = row.messages[0]["content"]
        if not text.strip():
            return "empty text"
        ids, _ = _tokenize(tokenizer, text)
        ids = ids if ids[-1:] == [eos] else [*ids, eos]
        labels = list(ids)
        labels[0] = IGNORED  # nothing predicts it
    else:
        if any(m["role"] == "assistant" and not m["content"].strip() for m in row.messages):
            return "empty answer"
        if row.messages[0]["role"] == "assistant":
            return "it begins with an answer"
        answers = []  # character spans of the assistant's turns
        try:
            whole = _render(reader, row.messages, answer_next=False)
            for index, message in enumerate(row.messages):
                if message["role"] == "assistant":
                    before = _render(reader, row.messages[:index], answer_next=True)
                    until = _render(reader, row.messages[: index + 1], answer_next=False)
                    if not (whole.startswith(until) and until.startswith(before)):
                        return "the chat template changes earlier turns"
                    answers.append((len(before), len(until)))
        except jinja2.TemplateError as error:
            return f"the chat template refuses it: {error}"
        if not isinstance(reader, PreTrainedTokenizerBase):
            try:
                whole, answers, pictures_end = expand(reader, whole, row.pictures, answers)
            except ValueError as error:
                return str(error)
        # A token of both prompt and answer would not be there when the model is asked.
        ids, spans = _tokenize(tokenizer, whole, [first for first, _ in answers])
        labels = [IGNORED] * len(ids)
        for first, last in answers:
            # Some tokenizers give a token of white space no width, at its end.
            inside = [i for i, (a, b) in enumerate(spans) if first <= a and first < b <= last]
            ends = [i for i in inside if ids[i] == eos]
            for i in inside:
                # What a template writes after the end of the turn is never generated.
                if not ends or i <= ends[-1]:
                    labels[i] = ids[i]
        if eos not in labels and row.messages[-1]["role"] == "assistant":
            while labels and labels[-1] == IGNORED:  # white space that the template put last
                ids.pop(), labels.pop()
            ids, labels = [*ids, eos], [*labels, eos]
    shortened = len(ids) > max_length
    if shortened and pictures_end and spans[max_length - 1][1] < pictures_end:
        return f"its pictures do not fit into max_length ({max_length})"
    ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORED for label in labels):
        return f"the question fills max_length ({max_length})"
    return Encoded(ids, labels, shortened, [picture.path for picture in row.pictures])


def spells(reader: Reader, row: Row) -> str | None:
    """Why the row cannot be used, if it has the text of a special token: of an end, or a turn."""
    said = [message["content"] for message in row.messages]
    if row.pictures:
        said = [piece for content in said for piece in content.split(MARK)]
    reserved = _reserved(tokenizer_of(reader), str(reader.chat_template or ""))
    for token in (*reserved, *image_tokens(reader)):
        if any(token in content for content in said):
            return f"it spells the special token {token}"
    return None


@functools.lru_cache(maxsize=4)
def _reserved(tokenizer: PreTrainedTokenizerBase, template: str) -> list[str]:
    """The tokenizer's named special tokens, and those with which the chat template marks turns."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return [*tokenizer.all_special_tokens, *(text for text in added if text in template)]


def prepare(
    tokenizer: Reader,
    rows: Sequence[Row],
    max_length: int,
    source: str,
    encode: Encode = encode,
) -> Prepared:
    """Encode all rows. Raises UserError when none is left or more than a tenth was refused."""
    examples: list[dict[str, list[Any]]] = []
    refused, places, longest, shortened = Counter[str](), [], 0, 0
    for row in rows:
        found = encode(tokenizer, row, max_length)
        if isinstance(found, str):
            refused[found] += 1
            places.append(f"{row.place}: {found}")
            longest = max(longest, full_length(tokenizer, row))
        else:
            examples.append(found.example())
            shortened += found.shortened
    if len(examples) < 0.9 * len(rows):
        reasons = "; ".join(f"{count} x {reason}" for reason, count in refused.most_common())
        raise UserError(
            f"{source}: only {len(examples)} of {len(rows)} rows can be used ({reasons}); the "
            f"longest refused row has {longest} tokens, data.max_length is {max_length}, the first "
            f"is {places[0]}"
        )
    return Prepared(
        examples,
        len(examples),
        shortened,
        dict(refused),
        places[:5],
        sum(len(example["input_ids"]) for example in examples),
        sum(label != IGNORED for example in examples for label in example["labels"]),
    )


def full_length(tokenizer: Reader, row: Row) -> int:
    """Tokens of the whole row, uncut; 0 when the chat template refuses it."""
    text = row.messages[0]["content"]
    try:
        if row.messages[0]["role"] != "text":
            text = _render(tokenizer, row.messages, answer_next=False)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            text, _, _ = expand(tokenizer, text, row.pictures)
    except (jinja2.TemplateError, ValueError):
        return 0
    return len(_tokenize(tokenizer_of(tokenizer), text)[0])


class Collator:
    """Pads a batch on the right and asks for logits at trained positions only.

    A small model's head is a third of its work (SmolLM2: 28 of 135 M parameters, 49,152 logits a
    token), and the loss needs it only where an answer stands. `logits_to_keep` and `shift_labels`
    are transformers' own arguments; a model without them gets plain `labels`.
    """

    def __init__(self, tokenizer: Reader, model: nn.Module) -> None:
        self.reader = tokenizer
        self.pad = tokenizer_of(tokenizer).pad_token_id
        self.trim = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, examples: Sequence[Mapping[str, list[Any]]]) -> dict[str, Tensor]:
        ids = pad([e["input_ids"] for e in examples], self.pad)  # (b, t)
        labels = pad([e["labels"] for e in examples], IGNORED)  # (b, t)
        lengths = torch.tensor([len(e["input_ids"]) for e in examples])
        mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.trim:
            following = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
            kept = (following != IGNORED).any(dim=0).nonzero()[:, 0]
            batch |= {"logits_to_keep": kept, "shift_labels": following[:, kept].contiguous()}
        return batch | pixels(self.reader, [e.get("pictures", ()) for e in examples])


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """(b, t) of int64 from lists of unequal length."""
    width = max(len(row) for row in rows)
    full = [
        [value] * (width - len(row)) + list(row) if left else [*row, *[value] * (width - len(row))]
        for row in rows
    ]
    return torch.tensor(full)
