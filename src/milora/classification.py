"""Sequence classification: labels learnt from the rows, what a classifier is given, its scores."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora.data import Encoded, pad, spells
from milora.errors import UserError
from milora.logits import logits_of
from milora.rows import Row
from milora.vision import Reader, tokenizer_of

RESAMPLES = 1000  # of the rows, for the interval of F1


class ClassTask(NamedTuple):
    """A task scored by the class that the model gives each row."""

    name: str
    rows: list[Row]
    duplicates: int = 0
    sha256: str | None = None  # of its file; None from the hub


def label_names(rows: Sequence[Row]) -> list[str]:
    """The classes of the training rows in the order of their ids: numbers by size, else by name.

    Raises UserError when there are fewer than two.
    """
    found = {label(row) for row in rows}
    if len(found) < 2:
        raise UserError(
            f"{rows[0].place}: all rows have the label {found.pop()!r}, so there is nothing to "
            "tell apart"
        )
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else sorted(found)


def check_labels(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Raise UserError for the first row whose label is none of `names`, those it is trained on."""
    for row in rows:
        if label(row) not in names:
            known = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
            raise UserError(
                f"{row.place}: the label {label(row)!r} is none of those in the training file: "
                f"{known}"
            )


def label(row: Row) -> str:
    return row.messages[-1]["content"]


def encode_class(reader: Reader, row: Row, max_length: int, names: Sequence[str]) -> Encoded | str:
    """As data.encode, for a classifier: the tokens of its text or two texts, one label a row."""
    tokenizer = tokenizer_of(reader)
    if spelled := spells(tokenizer, row):
        return spelled
    if not all(message["content"].strip() for message in row.messages):
        return "empty text"
    return tokens(tokenizer, row, max_length)._replace(labels=[names.index(label(row))])


def tokens(tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int) -> Encoded:
    """With the tokenizer's own marks of begin, end and between; of two texts the longer is cut."""
    texts = [message["content"] for message in row.messages[:-1]]
    found = tokenizer(*texts)
    shortened = len(found["input_ids"]) > max_length
    if shortened:
        found = tokenizer(*texts, truncation=True, max_length=max_length)
    return Encoded(found["input_ids"], [], shortened, [], found.get("token_type_ids", []))


def class_batch(pad_id: int, examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """input_ids, attention_mask (b, t), padded on the right, and token_type_ids, labels (b,)."""
    batch = {
        "input_ids": pad([e["input_ids"] for e in examples], pad_id),
        "attention_mask": pad([[1] * len(e["input_ids"]) for e in examples], 0),
    }
    if all(e.get("token_type_ids") for e in examples):
        batch["token_type_ids"] = pad([e["token_type_ids"] for e in examples], 0)
    if all(e["labels"] for e in examples):
        batch["labels"] = torch.tensor([e["labels"][0] for e in examples])
    return batch


def class_log_p(
    model: PreTrainedModel,
    pad_id: int,
    rows: Sequence[Encoded],
    batch_size: int = 16,
    what: str = "classes",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[list[float] | None]:
    """Log-probabilities of the classes, in nats, in the order of `rows`; None if not finite."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    found: dict[int, list[float] | None] = {}
    for first in range(0, len(order), batch_size):
        progress(what, first, len(order))
        places = order[first : first + batch_size]
        batch = class_batch(pad_id, [rows[i]._asdict() for i in places])
        with torch.no_grad():
            logits = logits_of(model, {k: v.to(model.device) for k, v in batch.items()})
        for i, values in zip(places, logits.double().log_softmax(-1).tolist(), strict=True):
            found[i] = values if all(map(math.isfinite, values)) else None
    return [found[i] for i in range(len(rows))]


def likeliest(log_p: Sequence[list[float] | None]) -> list[int | None]:
    return [None if each is None else each.index(max(each)) for each in log_p]


def class_scores(
    picked: Sequence[int | None], wanted: Sequence[int], classes: int
) -> dict[str, Any]:
    """F1 of the second of two classes, as GLUE has it, else the mean over classes; its interval.

    A class that is neither named nor there has no F1 and takes no part in the mean. The interval
    is the middle 95 % over resamples of the rows, by a fixed seed.
    """
    table = torch.zeros(classes, classes + 1)  # (there, named); last: no class was named
    for (there, named), count in Counter(zip(wanted, picked, strict=True)).items():
        table[there, classes if named is None else named] = count
    spread = f1(resampled(table, RESAMPLES)).quantile(torch.tensor([0.025, 0.975]).double())
    return {"f1": float(f1(table)), "f1_interval": spread.tolist()}


def f1(table: Tensor) -> Tensor:
    """(...,) from counts (..., classes, classes + 1), see `class_scores`."""
    table = table.double()
    right = table[..., :-1].diagonal(dim1=-2, dim2=-1)
    sizes = table.sum(-1) + table[..., :-1].sum(-2)  # there and named
    each = torch.where(sizes > 0, 2 * right / sizes, 0.0)
    if table.shape[-2] == 2:
        return each[..., 1]
    return each.sum(-1) / (sizes > 0).sum(-1)


def resampled(table: Tensor, count: int) -> Tensor:
    """(count, *table.shape): as drawing its rows anew with replacement would make it, count times.

    Cell after cell by the binomial that is left for it, so that memory does not grow with the rows.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.zeros(count, table.numel(), dtype=torch.float64)
    left = torch.full((count,), float(table.sum()), dtype=torch.float64)
    rest = float(table.sum())
    for place, cell in enumerate(table.flatten().tolist()):
        if cell:
            share = torch.full_like(left, min(1.0, cell / rest))
            drawn[:, place] = torch.binomial(left, share, generator=generator)
            left, rest = left - drawn[:, place], rest - cell
    return drawn.view(count, *table.shape)


def moved(before: Tensor, after: Tensor) -> dict[str, float | None]:
    """How far embeddings (texts, n) went: mean 1 - cosine, correlation of all similarities.

    None for a figure that is not finite; one similarity, that of two texts, has no correlation.
    """
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double())
    pairs = torch.triu_indices(len(before), len(before), 1)
    similar = []
    for embeddings in (before, after):
        unit = torch.nn.functional.normalize(embeddings.double())
        similar.append((unit @ unit.T)[*pairs])
    found = {
        "moved": float((1 - cosine).mean()),
        "similarities": float(torch.corrcoef(torch.stack(similar))[0, 1])
        if len(before) > 2
        else math.nan,
    }
    return {key: value if math.isfinite(value) else None for key, value in found.items()}


def embeddings(model: PreTrainedModel, pieces: Sequence[list[int]]) -> Tensor:
    """(pieces, n) in fp32 on the CPU: the mean over its tokens of the last hidden state of each."""
    found = []
    with torch.no_grad():
        for piece in pieces:
            ids = torch.tensor([piece], device=model.device)
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            found.append(hidden[0].float().mean(0).cpu())
    return torch.stack(found)
