"""Greedy answers of a model, and its loss on the right ones."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from milora.data import IGNORED, pad
from milora.forms import answers_apart, collator_for, encoder_for
from milora.pretrained import positions
from milora.rows import Row
from milora.vision import Picture, Reader, pixels, tokenizer_of

Progress = Callable[[str, int, int], None]  # (what, done, total)


class Answer(NamedTuple):
    text: str
    ended: bool  # by an end-of-sequence token, not by the limit
    finite: bool = True  # every logit was


class _Finite(LogitsProcessor):
    """Notes the rows of a batch in which a logit was NaN or +inf; those become -inf."""

    def __init__(self) -> None:
        self.broken: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        wrong = scores.isnan() | (scores == math.inf)
        row = wrong.any(1)
        self.broken = row if self.broken is None else self.broken | row
        return scores.masked_fill(wrong, -math.inf)


Prompt = tuple[list[int], Sequence[Picture]]  # token ids, and the pictures they stand for


def generate(
    model: PreTrainedModel,
    tokenizer: Reader,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int = 16,
    what: str = "generating",
    progress: Progress = lambda what, done, total: None,
    pictures: Sequence[Sequence[Picture]] = (),
) -> list[Answer]:
    """Greedy answers, in the order of `prompts` (token ids); computed longest prompt first.

    `pictures` are those of each prompt, where there are any.
    """
    reader, tokenizer = tokenizer, tokenizer_of(tokenizer)
    stops = model.generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, list) else {stops}
    stops = (stops | {tokenizer.eos_token_id}) - {None}
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,  # what is not set here comes from the model's generation_config.json
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=tokenizer.pad_token_id,
    )
    alone = answers_apart(model)  # no prompt before the answer
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[int, Answer] = {}
    run: Any = model.generate
    for first in range(0, len(order), batch_size):
        progress(what, first, len(order))
        chosen = order[first : first + batch_size]
        ids = pad([prompts[i] for i in chosen], tokenizer.pad_token_id, left=not alone)
        mask = pad([[1] * len(prompts[i]) for i in chosen], 0, left=not alone)
        seen = pixels(reader, [[one.path for one in pictures[i]] for i in chosen if pictures])
        watch = _Finite()
        with torch.no_grad():
            whole = run(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                **{name: tensor.to(model.device) for name, tensor in seen.items()},
                generation_config=settings,
                logits_processor=LogitsProcessorList([watch]),
            )
        broken = [False] * len(chosen) if watch.broken is None else watch.broken.tolist()
        said = whole[:, 1 if alone else ids.shape[1] :].tolist()
        for i, row, wrong in zip(chosen, said, broken, strict=True):
            end = next((k for k, token in enumerate(row) if token in stops), None)
            text = tokenizer.decode(row[:end], skip_special_tokens=True)
            answers[i] = Answer(str(text).strip(), end is not None, not wrong)
    return [answers[i] for i in range(len(prompts))]


def answer_loss(
    model: PreTrainedModel,
    tokenizer: Reader,
    rows: Sequence[Row],
    batch_size: int = 16,
    max_length: int = 2048,
) -> tuple[float | None, int]:
    """Mean cross-entropy per answer token, in nats, and how many rows it is over.

    A row is cut at `max_length` tokens, or at what the model takes.
    None where there is no such token or the mean is not finite.
    """
    longest = min(max_length, positions(model))
    encoded = [encoder_for(model)(tokenizer, row, longest) for row in rows]
    usable = [e.example() for e in encoded if not isinstance(e, str)]
    usable.sort(key=lambda e: len(e["input_ids"]))
    collate = collator_for(tokenizer, model)
    total, count = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(usable), batch_size):
            batch = collate(usable[first : first + batch_size])
            tokens = int((batch["labels"] != IGNORED).sum())
            loss = model(**{k: v.to(model.device) for k, v in batch.items()}).loss
            total, count = total + float(loss) * tokens, count + tokens
    mean = total / count if count else math.nan
    return mean if math.isfinite(mean) else None, len(usable)
