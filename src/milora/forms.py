"""What each kind of model is given: a causal model, an encoder-decoder, a classifier.

causal            one text, the answers in it marked (data.encode)
encoder-decoder   the question to its encoder, the answer to learn to its decoder
classifier        a text or two, and the id of a label (classification.py)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from milora.classification import class_batch, encode_class
from milora.data import (
    IGNORED,
    Collator,
    Encode,
    Encoded,
    encode,
    pad,
    prompt_ids,
    prompt_text,
    spells,
)
from milora.pretrained import labels_of, task_of
from milora.rows import Message, Row
from milora.vision import Picture, Reader, tokenizer_of

Collate = Callable[[Sequence[Mapping[str, list[int]]]], dict[str, Tensor]]


def encoder_for(model: nn.Module) -> Encode:
    """How a row becomes the ids and labels that `model` learns from."""
    task = task_of(model)
    if task == "SEQ_CLS":
        return partial(encode_class, names=labels_of(model))
    return encode_answer if answers_apart(model) else encode


def collator_for(reader: Reader, model: nn.Module) -> Collate:
    """How examples become a batch for `model`, padded on the right."""
    pad_id = tokenizer_of(reader).pad_token_id
    if task_of(model) == "SEQ_CLS":
        return partial(class_batch, pad_id)
    if answers_apart(model):
        return partial(_answer_batch, model, pad_id)
    return Collator(reader, model)


def read_only(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch without what only the loss needs."""
    loss_alone = ("labels", "shift_labels", "logits_to_keep")
    return {name: tensor for name, tensor in batch.items() if name not in loss_alone}


def answers_apart(model: nn.Module) -> bool:
    """Whether the answer stands alone, in a decoder, and not behind the question."""
    return task_of(model) == "SEQ_2_SEQ_LM"


def prompt_for(
    reader: Reader, messages: Sequence[Message], apart: bool, pictures: Sequence[Picture] = ()
) -> list[int]:
    """Token ids of what a model reads before it answers; `apart` as in `answers_apart`."""
    if not apart:
        return prompt_ids(reader, messages, pictures)
    tokenizer = tokenizer_of(reader)
    return list(tokenizer(_question(tokenizer, messages))["input_ids"])


def _question(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """By the chat template, else as it stands: encoder-decoders have no form of instruction."""
    if tokenizer.chat_template:
        return prompt_text(tokenizer, messages)
    return "\n\n".join(message["content"] for message in messages)


def encode_answer(reader: Reader, row: Row, max_length: int) -> Encoded | str:
    """As data.encode, for an encoder-decoder: ids of the question, labels of the one answer.

    Both end as the tokenizer ends a text, the answer in the end of sequence at any rate; each may
    have `max_length` tokens.
    """
    tokenizer = tokenizer_of(reader)
    if spelled := spells(tokenizer, row):
        return spelled
    *question, answer = row.messages
    if answer["role"] != "assistant" or not question:
        return "an encoder-decoder needs a question and an answer"
    if any(message["role"] == "assistant" for message in question):
        return "an encoder-decoder learns one answer a row, and this has several"
    if not answer["content"].strip():
        return "empty answer"
    text = _question(tokenizer, question)
    read, said = tokenizer(text), tokenizer(text_target=answer["content"])
    eos = [tokenizer.eos_token_id]
    labels = said["input_ids"] + eos * (said["input_ids"][-1:] != eos)
    shortened = max(len(read["input_ids"]), len(labels)) > max_length
    if shortened:
        read = tokenizer(text, truncation=True, max_length=max_length)
    return Encoded(read["input_ids"], labels[:max_length], shortened, [])


def _answer_batch(
    model: Any, pad_id: int, examples: Sequence[Mapping[str, list[int]]]
) -> dict[str, Tensor]:
    labels = pad([e["labels"] for e in examples], IGNORED)
    return {
        "input_ids": pad([e["input_ids"] for e in examples], pad_id),
        "attention_mask": pad([[1] * len(e["input_ids"]) for e in examples], 0),
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels),
        "decoder_attention_mask": (labels != IGNORED).long(),
        "labels": labels,
    }


def predictions(model: Any, piece: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Logits (t, v) and the tokens (t,) that they predict, of a piece of running text.

    An encoder-decoder reads the first half and predicts the second.
    """
    ids = torch.tensor([list(piece)], device=model.device)
    given = {"input_ids": ids}
    if answers_apart(model):
        given["input_ids"], following = ids.tensor_split([ids.shape[1] // 2], dim=1)
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=following)
        return model(**given).logits[0], following[0]
    return model(**given).logits[0, :-1], ids[0, 1:]


@torch.no_grad()
def first_token(
    model: Any, ids: Sequence[int], seen: Mapping[str, Tensor] = MappingProxyType({})
) -> Tensor:
    """(v,) log-probabilities in fp32, on the CPU, of the token that follows `ids`, or begins the
    answer of an encoder-decoder, or (classes,) of a classifier. `seen` are pixels."""
    device = next(model.parameters()).device
    given = {"input_ids": torch.tensor([list(ids)]), **seen}
    if answers_apart(model):
        given["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
    logits: Tensor = model(**{name: one.to(device) for name, one in given.items()}).logits[0]
    at_the_end: Tensor = logits[-1] if logits.ndim == 2 else logits
    return at_the_end.float().log_softmax(-1).cpu()


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross-entropy over all labels of a step, however many batches it is accumulated from.

    The classes of encoder-decoders and classifiers take the mean of each batch, and the Trainer
    takes it for the sum.
    """
    logits: Tensor = outputs.logits.flatten(0, -2)
    if num_items_in_batch is None:
        return nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)
    total: Tensor = nn.functional.cross_entropy(
        logits, labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    mean: Tensor = total / num_items_in_batch
    return mean
