"""Stay near the base on general text: a soft constraint on the outputs, a hard one on the inputs.

Soft: KL(base ‖ tuned) per token of a few pieces of the text joins the loss every few steps. The
base is the same model with its adapter off.

Hard: the directions in which the text enters each adapted weight, the largest right singular
vectors of its inputs X (tokens, n), are kept out of A (protect.py). Then dW x = s B A x is zero for
the part of x in them (the idea of LoRA-Null, arXiv 2503.02659, held in every step and not at the
start alone).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from milora.adapter import TRAINED, base_only
from milora.errors import UserError
from milora.matrices import Matrix

LENGTH = 256  # tokens of a piece
AT_ONCE = 2 * 2**30  # bytes of covariances that are held at the same time


class Keep(NamedTuple):
    """The soft constraint: where in the text a step is, and what it adds to the loss."""

    pieces: Sequence[Sequence[int]]  # token ids, all of one length
    weight: float
    every: int  # steps
    tokens: int  # of each time

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def batch(self, step: int) -> Tensor:
        """(b, t) the pieces of this step; it depends on the step alone, so that a run resumes."""
        count = max(1, self.tokens // len(self.pieces[0]))
        first = step // self.every * count
        return torch.tensor([self.pieces[(first + i) % len(self.pieces)] for i in range(count)])


def cut(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], longest: int, key: str = "milora.text"
) -> list[list[int]]:
    """The texts as pieces of LENGTH tokens, or of as many as the model takes, the rest left out.

    Raises UserError when there is not one whole piece.
    """
    length, pieces = min(LENGTH, longest), []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        pieces += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if not pieces:
        raise UserError(f"{key}: it has fewer than {length} tokens, of which a piece is made")
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


@torch.no_grad()
def input_directions(
    model: PeftModel, matrices: Mapping[str, Matrix], pieces: Sequence[Sequence[int]], count: int
) -> dict[str, Tensor]:
    """Vh (count, n) fp32, orthonormal rows: the largest right singular vectors of each weight's
    inputs on the pieces, of the base, from the covariances XᵀX, which are summed as the text runs.

    Raises UserError for a weight with too few inputs to leave the adapter its rank, and for
    experts, to which inputs are routed.
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
    layers = {name: (matrix.layer, matrix.shape[1]) for name, matrix in matrices.items()}
    found = {}
    with base_only(model):
        for name, total in covariances(model, layers, pieces):
            vectors = torch.linalg.eigh(total.double()).eigenvectors
            found[name] = vectors[:, -count:].T.float().contiguous()
    return {name: found[name] for name in matrices}


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
        total.addmm_(X.T, X)

    return hook
