"""What happens between the steps of a run: decay, what is held, the interference, the report."""

import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from milora.adapter import Start, decay
from milora.errors import DivergedError, UserError
from milora.files import write_text
from milora.keep import CALIBRATION, cut, input_directions, left_out, sampled
from milora.loop import MiloraTrainer
from milora.matrices import ANCHOR, TRAINED, Matrix, adapted_matrices
from milora.pretrained import positions, task_of
from milora.processes import put, whole
from milora.progress import Progress
from milora.protect import Held, Top, begin_outside, held, measure, project, worst
from milora.recommended import held_inputs
from milora.spectra import Interference
from milora.training_state import step_of


class Decay(TrainerCallback):
    """Decoupled weight decay towards the start: after a step of rate η, by η times `weight_decay`.

    In place of the optimizer's (Loshchilov and Hutter, 2019), which pulls towards zero.
    """

    def __init__(self, matrices: Mapping[str, Matrix], weight_decay: float) -> None:
        self.matrices, self.weight_decay = matrices, weight_decay

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rate = float(kwargs["optimizer"].param_groups[0]["lr"])
        for some in in_one_piece(self.matrices):
            decay(some, min(1.0, rate * self.weight_decay))


class Hold(TrainerCallback):
    """Keeps the update out of what is held, after every optimizer step."""

    def __init__(self, matrices: Mapping[str, Matrix], holds: Mapping[str, Held]) -> None:
        self.matrices, self.holds = matrices, dict(holds)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.project()

    def project(self) -> None:
        for some in in_one_piece(self.matrices):
            own = {name: self.holds[name] for name in some if name in self.holds}
            self.holds |= project(some, own)


def hold_inputs(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str] = (),
    count: int | None = None,
) -> Hold:
    """`milora.protect_inputs` for a model of get_milora_model, before its first step.

    `count` directions in which general text enters each adapted weight, by default as `milora
    train` chooses them, are kept out of the update. `texts` are that text, joined; without them the
    base writes it. Returns a callback of transformers' Trainer and of TRL's; in a loop of your own
    call its `project()` after each step of the optimizer. Raises UserError as
    milora.keep.input_directions does, without texts where the model writes none or where several
    processes train, which must not each write their own, and once the model has been trained or
    a trainer has copied its start. Weights that no text enters are not held, and warned of.
    """
    texts, task = [texts] if isinstance(texts, str) else list(texts), task_of(model)
    if task == "SEQ_2_SEQ_LM":
        raise UserError("hold_inputs: it is not for encoder-decoders, which read no text alone")
    if not texts and task != "CAUSAL_LM":
        raise UserError("hold_inputs: this model writes no text: give texts")
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not texts and (together or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UserError("hold_inputs: every process would write a text of its own: give texts")
    start: Start = model.start  # type: ignore[assignment]
    matrices, longest = adapted_matrices(model), positions(model)
    if set(model.peft_config) - {TRAINED, ANCHOR} or not _at_start(matrices, start):
        raise UserError(
            "hold_inputs: call it before the first step, and before a trainer is made that keeps a "
            "copy of the start: it moves the start out of what is held"
        )
    if count is None:
        count = held_inputs(matrix.shape[1] for matrix in matrices.values())
    if count < 1:
        raise UserError(f"hold_inputs: count is {count}: 1 at least")
    pieces = cut(tokenizer, ["\n\n".join(texts)], longest, "hold_inputs: texts") if texts else []
    pieces = pieces[:CALIBRATION] or sampled(model, tokenizer, CALIBRATION, longest)
    inputs = input_directions(model, matrices, pieces, count)
    if said := left_out(matrices, inputs):
        warnings.warn(f"hold_inputs: {said}", stacklevel=2)
    holds = held(matrices, {}, inputs)
    begin_outside(start, matrices, holds)
    return Hold(matrices, holds)


def _at_start(matrices: Mapping[str, Matrix], start: Start) -> bool:
    return all(
        torch.equal(own, first.to(own))
        for name, matrix in matrices.items()
        for own, first in zip(matrix.factors(TRAINED), start.factors[name], strict=True)
    )


class Watch(TrainerCallback):
    """Measures the interference every few steps, before a checkpoint is written and at the end.

    Where it passes `limit` a warning is said; with `stop` the run ends there without a checkpoint,
    so that the last one there is lies below the limit.
    """

    def __init__(
        self, matrices: Mapping[str, Matrix], start: Start, tops: Mapping[str, Top],
        every: int, limit: float | None, stop: bool, path: Path, progress: Progress,
    ) -> None:  # fmt: skip
        self.matrices, self.start, self.tops = matrices, start, tops
        self.every, self.limit, self.stop = every, limit, stop
        self.path, self.progress = path, progress
        self.trainer: MiloraTrainer | None = None  # whose trackers get the figures
        self.measured = 0  # the last step that was
        self.passed = 0  # the step at which the run was stopped
        self.warned = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (
            state.global_step % self.every == 0
            or control.should_save
            or control.should_training_stop
        ):
            self._measure(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.passed:  # by then an epoch that ends has asked for a checkpoint
            control.should_save = False
        elif control.should_save and state.global_step != self.measured:
            self._measure(state, control)

    def _measure(self, state: TrainerState, control: TrainerControl) -> None:
        self.measured = state.global_step
        found: dict[str, Interference] = {}
        for some in in_one_piece(self.matrices):
            tops = {name: self.tops[name] for name in some if name in self.tops}
            found |= measure(some, self.start, tops)
        numbers = {name: [_short(value) for value in one] for name, one in found.items()}
        line = {"step": state.global_step, "interference": numbers}
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
        total = worst(found)
        if self.trainer is not None:  # a log of its own would take the place of the loss
            self.trainer.also |= {f"interference_{k}": total[k] for k in ("max", "mean", "size")}
        if self.limit is None or total["max"] <= self.limit:
            return
        if not self.warned:
            self.warned = True
            self.progress.say(
                f"warning: step {state.global_step}: interference is {total['max']:.2g} in "
                f"{total['module']}, above milora.interference.limit ({self.limit:g})"
            )
        if self.stop:
            self.passed = state.global_step
            control.should_save, control.should_training_stop = False, True


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


class Reporter(TrainerCallback):
    """metrics.jsonl, the progress display, and a stop when the loss is no number."""

    def __init__(self, path: Path, checkpoint: Path | None, progress: Progress) -> None:
        self.path, self.progress = path, progress
        self.loss, self.tokens = math.nan, 0
        self.step = step_of(checkpoint) if checkpoint else 0
        self.began: float | None = None
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # Steps after the checkpoint are done again; a last line may be cut by a kill.
        ended = [(line, _parsed(line)) for line in lines]
        kept = [(line, said) for line, said in ended if said and said["step"] <= self.step]
        self.kept = [line for line, _ in kept]
        self.before = max((said.get("seconds", 0.0) for _, said in kept), default=0.0)

    @property
    def seconds(self) -> float:
        """Of training, with what came before the checkpoint that it goes on from."""
        return self.before + self._here()

    def _here(self) -> float:
        return 0.0 if self.began is None else time.monotonic() - self.began

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began, self.tokens = time.monotonic(), int(state.num_input_tokens_seen)
        if state.is_world_process_zero:
            write_text(self.path, "".join(line + "\n" for line in self.kept))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        note = f"{self._rate(state):.0f} tokens/s"
        if not math.isnan(self.loss):
            note = f"loss {self.loss:.3f}  {note}"
        self.progress("training", state.global_step, state.max_steps, note)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = dict(logs or {})
        self.loss = logs.get("loss", self.loss)
        line = {
            "step": state.global_step, "seconds": round(self.seconds, 1),
            "tokens_per_second": round(self._rate(state), 1), **logs,
        }  # fmt: skip
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
        for key in ("loss", "eval_loss", "train_loss"):
            if not math.isfinite(logs.get(key, 0.0)):
                raise diverged(f"{key} is {logs[key]} at step {state.global_step}", args)
        if "eval_loss" in logs:
            self.progress.say(f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}")

    def _rate(self, state: TrainerState) -> float:
        return (int(state.num_input_tokens_seen) - self.tokens) / max(self._here(), 1e-9)


def diverged(what: str, args: TrainingArguments) -> DivergedError:
    """The error of a run with `what`, which is no number."""
    return DivergedError(
        f"{what}: the run has diverged; use a lower training.learning_rate (now "
        f"{args.learning_rate}) and a new output_dir"
    )


def _parsed(line: str) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return said


@torch.no_grad()
def in_one_piece(matrices: Mapping[str, Matrix]) -> Iterator[dict[str, Matrix]]:
    """All matrices at once, or, where they are shared out, those of one layer after another.

    Their factors can be read and written in place meanwhile, by every process alike.
    """
    layers: dict[int, dict[str, Matrix]] = {}
    for name, matrix in matrices.items():
        layers.setdefault(id(matrix.layer), {})[name] = matrix
    pairs = {key: _pair(next(iter(some.values())).layer) for key, some in layers.items()}
    every = [linear.weight for pair in pairs.values() for linear in pair]
    if not any(isinstance(weight, DTensor) for weight in every):
        yield dict(matrices)
        return
    for key, some in layers.items():
        slices = [linear.weight for linear in pairs[key]]
        pieces = [nn.Parameter(whole(own.detach()), own.requires_grad) for own in slices]
        _set(pairs[key], pieces)
        try:
            yield some
        finally:
            _set(pairs[key], slices)
        for own, piece in zip(slices, pieces, strict=True):
            put(own, piece.detach())


def _pair(layer: Any) -> list[Any]:
    """The modules of the two factors that train."""
    return [layer.lora_A[TRAINED], layer.lora_B[TRAINED]]


def _set(modules: Sequence[Any], weights: Sequence[nn.Parameter]) -> None:
    for module, weight in zip(modules, weights, strict=True):
        module.weight = weight
