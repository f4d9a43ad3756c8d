"""Stay near the base on general text: a soft constraint on the outputs, a hard one on the inputs.

Soft: KL(base ‖ tuned) per token of a few pieces of the text joins the loss every few steps. The
base is the same model with its adapter off.

Hard: the directions in which the text enters each adapted weight, the largest right singular
vectors of its inputs X (tokens, n), are kept out of A (protect.py). Then dW x = s B A x is zero for
the part of x in them (the idea of LoRA-Null, arXiv 2503.02659, held in every step and not at the
start alone).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from milora.data import begins_with
from milora.errors import UserError
from milora.files import write_bytes
from milora.logits import base_only
from milora.matrices import TRAINED, Matrix
from milora.svd import plain_arithmetic

LENGTH = 256  # tokens of a piece
AT_ONCE = 2 * 2**30  # bytes of covariances that are held at the same time
FORMAT = "milora general text 1"
SAMPLED = "sampled"  # milora.text: what the base itself writes
AT_A_TIME = 16  # pieces
CALIBRATION, KEPT = 16, 64  # pieces: that inputs are measured on; that the base writes for `Keep`
IN_FULL, OVER = 2048, 16  # inputs; directions beside those that are wanted


Pieces = list[list[int]]  # token ids of each, all of one length


class Keep(NamedTuple):
    """The soft constraint: where in the text a step is, and what it adds to the loss."""

    pieces: Pieces
    weight: float
    every: int  # steps
    tokens: int  # of each time

    def due(self, step: int) -> bool:
        return step % self.every == 0

    @property
    def taken(self) -> int:
        """Whole pieces of each time, one at least."""
        return max(1, self.tokens // len(self.pieces[0]))

    def batch(self, step: int) -> Tensor:
        """(b, t) the pieces of this step; it depends on the step alone, so that a run resumes."""
        count = self.taken
        first = step // self.every * count
        return torch.tensor([self.pieces[(first + i) % len(self.pieces)] for i in range(count)])


def in_pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, begin: Sequence[int]
) -> list[list[int]]:
    """All of a text as pieces of `length` tokens with `begin`, the last of what is left."""
    ids, own = tokenizer(text, add_special_tokens=False)["input_ids"], length - len(begin)
    return [[*begin, *ids[i : i + own]] for i in range(0, len(ids), own)]


def cut(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], longest: int, key: str = "milora.text"
) -> Pieces:
    """The texts as pieces of LENGTH tokens, or of as many as the model takes, the rest left out.

    Each begins as the tokenizer begins a text. Raises UserError when there is not one whole piece.
    """
    length, begin = min(LENGTH, longest), begins_with(tokenizer)
    every = (piece for text in texts for piece in in_pieces(tokenizer, text, length, begin))
    pieces = [piece for piece in every if len(piece) == length]
    if not pieces:
        raise UserError(f"{key}: it has fewer than {length} tokens, of which a piece is made")
    return pieces


@torch.no_grad()
def sampled(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    longest: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pieces:
    """`count` pieces of LENGTH tokens, or of `longest` where that is less, that the base writes.

    Each is drawn token by token from what the base predicts, at temperature 1, after its first
    token (bos, or eos of a model that has none); past an end of text it goes on with the next. The
    seed is fixed: on a CPU it is the same text for every run.
    """
    length = min(LENGTH, longest)
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    if first is None:
        raise UserError(
            "milora.text: the model has no token that a text begins or ends with, from which it "
            "could write one: name a file"
        )
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1,
        remove_invalid_values=True,  # a damaged base is found, and named, at step 0
    )  # fmt: skip
    # What is not set here would come from the model's own: ends, penalties, a time limit.
    training, own, pieces = model.training, inner.generation_config, Pieces()
    model.eval()
    inner.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(0)
            while len(pieces) < count:
                progress(len(pieces), count)
                ids = torch.full((AT_A_TIME, 1), first, device=model.device)
                mask = torch.ones_like(ids)
                written = inner.generate(
                    input_ids=ids, attention_mask=mask, generation_config=settings
                )
                pieces += written.tolist()
    finally:
        inner.generation_config = own
        model.train(training)
    return pieces[:count]


def sampled_name(
    base_sha256: str, tokenizer: PreTrainedTokenizerBase, count: int, longest: int
) -> str:
    """What `sampled` depends on, for the store."""
    first = f"{tokenizer.bos_token_id}-{tokenizer.eos_token_id}"
    return f"{base_sha256}-sampled-{first}-{count}x{min(LENGTH, longest)}"


def save_pieces(path: Path, pieces: Pieces) -> None:
    write_bytes(path, save({"ids": torch.tensor(pieces)}, {"milora": FORMAT}))


def load_pieces(path: Path) -> Pieces:
    """What `save_pieces` wrote. Raises UserError when it is damaged."""
    try:
        pieces: Pieces = load_file(path)["ids"].tolist()
    except Exception as error:  # safetensors raises its own types, not exported under one base
        raise UserError(f"{path} cannot be read ({error}): start the run anew") from error
    return pieces


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(t,) fp64: sum over the vocabulary of p (log p - log q), from log-probabilities (t, v).

    A token that is impossible under p, as some models make padding, adds nothing.
    """
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1, dtype=torch.float64)


def kept_loss(model: PeftModel, ids: Tensor) -> Tensor:
    """() KL(base ‖ tuned) in nats per token of ids (b, t), with its gradient; dropout is off."""
    training = model.training
    model.eval()
    with torch.no_grad(), base_only(model):
        base = model(input_ids=ids).logits.float().log_softmax(-1)
    tuned = model(input_ids=ids).logits.float().log_softmax(-1)
    model.train(training)
    return kl(base.flatten(0, 1), tuned.flatten(0, 1)).mean()


def check_inputs(matrices: Mapping[str, Matrix], count: int) -> None:
    """Raise UserError for a weight with too few inputs to leave the adapter its rank when `count`
    are held, and for experts, to which inputs are routed.
    """
    for name, matrix in matrices.items():
        m, n = matrix.shape
        if matrix.expert is not None:
            raise UserError(
                f"milora.protect_inputs: {name} is an expert, which sees some tokens only: leave "
                "lora.target_parameters out, or milora.protect_inputs at 0"
            )
        if count > n - matrix.rank(TRAINED):
            raise UserError(
                f"milora.protect_inputs is {count}, but {name} is {m} x {n}, and its adapter of "
                f"rank {matrix.rank(TRAINED)} needs inputs of its own: at most "
                f"{n - matrix.rank(TRAINED)}"
            )


@torch.no_grad()
def input_directions(
    model: PeftModel, matrices: Mapping[str, Matrix], pieces: Sequence[Sequence[int]], count: int
) -> dict[str, Tensor]:
    """Vh (count, n) fp32, orthonormal rows: the largest right singular vectors of each weight's
    inputs on the pieces, of the base, from the covariances XᵀX, which are summed as the text runs.

    Weights that no text enters, such as those of a vision tower, have none: see `left_out`. Raises
    UserError where that is all of them, and as check_inputs does.
    """
    check_inputs(matrices, count)
    layers = {name: (matrix.layer, matrix.shape[1]) for name, matrix in matrices.items()}
    found = {}
    with base_only(model):
        for name, total in covariances(model, layers, pieces):
            if total.any():
                found[name] = leading(total, count)
    if not found:
        raise UserError(
            f"milora.protect_inputs: no text enters {next(iter(matrices))} nor any other of the "
            f"{len(matrices)} adapted weights: set it to 0, or adapt the language model"
        )
    return {name: found[name] for name in matrices if name in found}


def left_out(matrices: Mapping[str, Matrix], inputs: Mapping[str, Tensor]) -> str:
    """What is to be said of the weights that `input_directions` found none for, if any."""
    none = [name for name in matrices if name not in inputs]
    if not none:
        return ""
    return (
        f"no text enters {len(none)} of {len(matrices)} adapted weights, the first is {none[0]}: "
        "their inputs are not held"
    )


def leading(total: Tensor, count: int) -> Tensor:
    """(count, n) fp32, orthonormal rows: the leading eigenvectors of a covariance (n, n).

    Of a large one by the randomised iteration of Halko et al. (arXiv 0909.4061), since a full
    decomposition takes minutes each there.
    """
    if len(total) <= IN_FULL:
        vectors = torch.linalg.eigh(total.double()).eigenvectors[:, -count:]
    else:
        with torch.random.fork_rng([total.device] if total.is_cuda else []):
            torch.manual_seed(0)
            vectors, _, _ = torch.svd_lowrank(total, count + OVER, niter=8)
        vectors = vectors[:, :count]
    rows: Tensor = vectors.T.float().contiguous()
    return rows


@torch.no_grad()
def covariances(
    model: nn.Module, layers: Mapping[str, tuple[nn.Module, int]], pieces: Sequence[Sequence[int]]
) -> Iterator[tuple[str, Tensor]]:
    """Of every layer, of n inputs, XᵀX (n, n) fp32 of what it is given (tokens, n) on the pieces.

    The text runs once for as many layers as fit together in AT_ONCE bytes.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    for names in _groups({name: n for name, (_, n) in layers.items()}):
        sums = {name: torch.zeros([layers[name][1]] * 2, device=device) for name in names}
        with ExitStack() as stack:
            for name in names:
                hook = layers[name][0].register_forward_pre_hook(_adding(sums[name]))
                stack.callback(hook.remove)
            for piece in pieces:
                model(input_ids=torch.tensor([piece], device=device))
        for name in names:
            yield name, sums.pop(name)
    model.train(training)


def _groups(inputs: Mapping[str, int]) -> Iterator[list[str]]:
    """Names whose covariances fit together in AT_ONCE bytes: each group is one pass of the text."""
    group: list[str] = []
    size = 0
    for name, n in inputs.items():
        own = 4 * n**2
        if group and size + own > AT_ONCE:
            yield group
            group, size = [], 0
        group.append(name)
        size += own
    yield group


def _adding(total: Tensor) -> Any:
    def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
        X = inputs[0].flatten(0, -2).float()
        with plain_arithmetic(X.device):
            total.addmm_(X.T, X)

    return hook
