"""One run on all-MiniLM-L6-v2: an adapter of any method and a classification head, on short text.

The encoder's weights are fp32 as they were trained. The head sits on the mean of the token vectors,
starts at zero and has a rate of its own, the same for every method. Kept is measured on sentences
of other text: how far their embeddings moved, and how far the order of their similarities held.
"""

import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from tasks import DATA, LABELS, Row, split
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, get_scheduler
from weights import minilm

from milora.adapter import COMPONENT, add_adapter, decay
from milora.data import pad
from milora.evaluate import wilson
from milora.keep import input_directions
from milora.matrices import adapted_matrices
from milora.protect import begin_outside, held, measure, project, top_vectors, worst
from milora.svd import components

TRAIN, HELD_OUT, TEST = 1000, 500, 500
BATCH, EPOCHS, HEAD_RATE = 16, 2, 3e-3
WATCHED = 64  # directions that the interference is measured in
TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Pieces = list[list[int]]  # token ids of each sentence


class Classifier(nn.Module):
    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, classes, device=DEVICE)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[:, :, None].to(hidden)
        mean: Tensor = (hidden * weight).sum(1) / weight.sum(1)
        return mean

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(ids, mask))
        return logits


def padded(pieces: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    mask = pad([[1] * len(piece) for piece in pieces], 0)
    return pad(pieces, 0).to(DEVICE), mask.to(DEVICE)


def batches(pieces: Pieces, size: int = 64) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Places, ids and mask, sentences of like length together."""
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
    for first in range(0, len(order), size):
        places = order[first : first + size]
        yield places, *padded([pieces[i] for i in places])


@torch.no_grad()
def over(model: Classifier, pieces: Pieces, what: str) -> Tensor:
    """(sentences, 384) embeddings or (sentences, classes) logits, in order."""
    model.eval()
    found: dict[int, Tensor] = {}
    call = model.embed if what == "embed" else model.forward
    for places, ids, mask in batches(pieces):
        found |= dict(zip(places, call(ids, mask), strict=True))
    return torch.stack([found[i] for i in range(len(pieces))])


def other_sentences(offset: int = 0) -> dict[str, list[str]]:
    """500 sentences of 8 to 40 words a text, of no task's matter; others at another offset."""
    found = {}
    for name in ("wikitext2_test.txt", "c4_demo.jsonl"):
        text = (DATA / "general_text" / name).read_text(encoding="utf-8").replace("\\n", ". ")
        sentences = [s.strip() for line in text.split("\n") for s in line.split(". ")]
        usable = [s for s in sentences if 8 <= len(s.split()) <= 40 and "=" not in s]
        found[name] = usable[offset :: len(usable) // 500][:500]
    return found


def moved(before: Tensor, after: Tensor) -> dict[str, float]:
    """1 - cosine of each embedding with itself, mean; correlation of all pairs' similarities."""
    cosine = nn.functional.cosine_similarity(before, after)
    pairs = torch.triu_indices(len(before), len(before), 1)
    similar = []
    for embeddings in (before, after):
        unit = nn.functional.normalize(embeddings.double().cpu())
        similar.append((unit @ unit.T)[*pairs])
    return {
        "moved": float((1 - cosine).double().mean()),
        "similarities": float(torch.corrcoef(torch.stack(similar))[0, 1]),
    }


class Start(NamedTuple):
    """What every run begins with."""

    tokenizer: Any
    encoder: Any
    other: dict[str, Pieces]  # sentences of other text
    before: dict[str, Tensor]  # and the base's embeddings of them
    general: Pieces  # sentences of the same two texts that take part in runs: milora.text
    general_before: Tensor
    validation: Pieces  # of the same kind, to choose settings by; neither of the above
    validation_before: Tensor


@functools.cache
def start() -> Start:
    folder = minilm()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32).to(DEVICE)

    def ids(sentences: Sequence[str]) -> Pieces:
        found: Pieces = tokenizer(sentences, truncation=True, max_length=128)["input_ids"]
        return found

    other = {name: ids(sentences) for name, sentences in other_sentences().items()}
    general, validation = (
        [piece for sentences in other_sentences(offset).values() for piece in ids(sentences)]
        for offset in (1, 2)
    )
    model = Classifier(encoder, 1)
    before = {name: over(model, pieces, "embed") for name, pieces in other.items()}
    return Start(
        tokenizer, encoder, other, before, general, over(model, general, "embed"),
        validation, over(model, validation, "embed"),
    )  # fmt: skip


class Asked(NamedTuple):
    """An arm's settings, under the names that the configuration file has for them."""

    method: str  # "head" trains no adapter
    weight_decay: float
    protect: int
    protect_inputs: int
    keep: float
    start: Any
    dora: bool
    mica: bool


def asked(overrides: Sequence[str]) -> Asked:
    given = dict(override.split("=") for override in overrides)
    found = Asked(
        given.pop("method"), float(given.pop("training.weight_decay", 0)),
        int(given.pop("milora.protect", 0)), int(given.pop("milora.protect_inputs", 0)),
        float(given.pop("milora.keep.weight", 0)), given.pop("milora.start", "published"),
        given.pop("lora.use_dora", "") == "true", given.pop("lora.init_lora_weights", "") == "mica",
    )  # fmt: skip
    assert not given, given
    return found


class Adapted(NamedTuple):
    """An encoder with its adapter, what follows every step, and what it has come to."""

    encoder: Any
    after_step: Callable[[float], None]  # given the rate
    interference: Callable[[], dict[str, float] | None]


def adapted(of: Asked, seed: int) -> Adapted:
    base, general = start().encoder, start().general
    encoder = copy.deepcopy(base)
    encoder.requires_grad_(of.method == "full")
    config = LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="FEATURE_EXTRACTION")
    if of.method in ("full", "head"):
        return Adapted(encoder, lambda rate: None, lambda: None)
    if of.dora or of.mica:  # PEFT's own, whose update is no plain product of A and B that train
        config.use_dora = of.dora
        config.init_lora_weights = "mica" if of.mica else True
        torch.manual_seed(seed)
        return Adapted(get_peft_model(encoder, config), lambda rate: None, lambda: None)
    encoder, begun = add_adapter(encoder, config, of.method, seed=seed, begin=of.start)
    layers = adapted_matrices(encoder)
    tops = top_vectors(layers, begun, of.protect, WATCHED, seed, components)
    inputs = {}
    if of.protect_inputs:
        inputs = input_directions(encoder, layers, general[::4], of.protect_inputs)
    holds = held(layers, tops, inputs)
    begin_outside(begun, layers, holds)

    def after_step(rate: float) -> None:
        if of.method in COMPONENT and of.weight_decay:
            decay(layers, rate * of.weight_decay)
        project(layers, holds)

    def interference() -> dict[str, float]:
        found = worst(measure(layers, begun, tops))
        return {key: found[key] for key in ("max", "mean", "size")}

    return Adapted(encoder, after_step, interference)


def run(task: str, overrides: Sequence[str], rate: float, seed: int) -> dict[str, Any]:
    """One run's outcome, as milora.compare keeps it; `overrides` as `milora compare` has them."""
    tokenizer, _, other, before, *_ = start()
    of = asked(overrides)
    torch.manual_seed(seed)
    encoder, after_step, interference = adapted(of, seed)
    labels = LABELS[task]
    parts = split(task, TRAIN, HELD_OUT, TEST)

    def encoded(rows: Sequence[Row]) -> tuple[Pieces, Tensor]:
        ids = tokenizer([row.question for row in rows], truncation=True, max_length=128)
        wanted = torch.tensor([labels.index(row.answer) for row in rows], device=DEVICE)
        return ids["input_ids"], wanted

    model = Classifier(encoder, len(labels))
    for name, pieces in other.items():
        step0 = moved(before[name][:50], over(model, pieces[:50], "embed"))["moved"]
        assert step0 < 1e-6, f"step 0 is not the base: {step0}"
    began = time.monotonic()
    trained = [p for p in encoder.parameters() if p.requires_grad]
    fit(model, *encoded(parts.train), trained, rate, seed, of, after_step)
    seconds = time.monotonic() - began
    pieces, wanted = encoded(parts.held_out)
    loss = float(nn.functional.cross_entropy(over(model, pieces, "logits"), wanted))
    pieces, wanted = encoded(parts.test)
    right = over(model, pieces, "logits").argmax(1) == wanted
    score = {
        "accuracy": float(right.double().mean()), "interval": wilson(int(right.sum()), len(right)),
    }  # fmt: skip
    knowledge = [
        {"text": name, **moved(before[name], over(model, pieces, "embed"))}
        for name, pieces in other.items()
    ]
    return {
        "settings": {
            "task": task, "learning_rate": rate, "seed": seed, **of._asdict(), "rows": TRAIN,
            "batch": BATCH, "epochs": EPOCHS, "head_rate": HEAD_RATE,
        },
        "held_out_loss": loss,
        "validation_moved": moved(
            start().validation_before, over(model, start().validation, "embed")
        )["moved"],
        "trained_parameters": sum(p.numel() for p in trained),
        "seconds": {"training": seconds},
        "versions": {"torch": torch.__version__},
        "interference": interference(),
        "evaluation": {
            "settings": {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"},
            "tasks": {task: {"rows": len(right), "tuned": score}}, "knowledge": knowledge,
        },
        "right": {task: "".join("01"[bool(r)] for r in right)},
    }  # fmt: skip


def fit(
    model: Classifier, pieces: Pieces, wanted: Tensor, trained: Sequence[nn.Parameter],
    rate: float, seed: int, of: Asked, after_step: Callable[[float], None],
) -> None:  # fmt: skip
    general, general_before = start().general, start().general_before
    anchored = of.method in COMPONENT  # where weight decay is towards the start, in after_step
    groups: list[Mapping[str, Any]] = [
        {"params": model.head.parameters(), "lr": HEAD_RATE, "weight_decay": 0.0}
    ]
    if trained:
        decayed = 0.0 if anchored else of.weight_decay
        groups.append({"params": trained, "lr": rate, "weight_decay": decayed})
    optimizer = torch.optim.AdamW(groups)
    steps = EPOCHS * (len(pieces) // BATCH)
    schedule = get_scheduler("linear", optimizer, round(0.06 * steps), steps)
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(EPOCHS):
        order = torch.randperm(len(pieces), generator=generator).tolist()
        for first in range(0, len(order) - BATCH + 1, BATCH):
            places = order[first : first + BATCH]
            model.train()
            logits = model(*padded([pieces[i] for i in places]))
            loss = nn.functional.cross_entropy(logits, wanted[places])
            if of.keep:  # as milora.keep, with the distance of embeddings in place of KL
                places = [(step * BATCH + i) % len(general) for i in range(BATCH)]
                model.eval()
                now = model.embed(*padded([general[i] for i in places]))
                near = nn.functional.cosine_similarity(now, general_before[places])
                loss = loss + of.keep * (1 - near).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_([*trained, *model.head.parameters()], 1.0)
            now_at = optimizer.param_groups[-1]["lr"]
            optimizer.step()
            after_step(now_at)
            schedule.step()
            optimizer.zero_grad()
            step += 1
