"""transformers' Trainer with checkpoints of our own, and what it reports while it runs."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.data import Sampler
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from milora.adapter import Start, decay
from milora.data import IGNORED
from milora.errors import UserError
from milora.files import read_json, write_bytes, write_text
from milora.keep import CALIBRATION, Keep, cut, input_directions, kept_loss, sampled
from milora.matrices import ANCHOR, TRAINED, Matrix, adapted_matrices
from milora.pretrained import positions, task_of
from milora.processes import like, put, whole
from milora.progress import Progress
from milora.protect import Held, Top, begin_outside, held, measure, project, worst
from milora.recommended import held_inputs
from milora.spectra import Interference

STATE = "trained.safetensors"


class MiloraTrainer(Trainer):
    """transformers' Trainer with checkpoints of our own: the trainable tensors and no more.

    Its own would hold a folder that loads as a LoRA and is wrong (A, B without the anchor), and
    on resume it restores only the first active adapter and unfreezes the anchor.
    """

    def __init__(self, *args: Any, keep: Keep | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep = keep
        self.heard = torch.zeros(2)  # of an evaluation: the sum of its losses, and of their labels
        self.also: dict[str, float] = {}  # figures that go out with the next line of the log

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, and before the optimizer's step the gradient of `keep` where it is due."""
        loss = super().training_step(model, *args, **kwargs)
        step, live = int(self.state.global_step), self._live()
        if self.keep and self.accelerator.sync_gradients and self.keep.due(step):
            assert isinstance(live, PeftModel)
            with self.compute_loss_context_manager():
                kept = kept_loss(live, self.keep.batch(step).to(self.args.device))
            self.accelerator.backward(self.keep.weight * kept)
            self.also["kept_kl"] = float(kept.detach())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs |= self.also
        self.also = {}
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Of an adapter its factors alone: a head, rows of tokens and modules_to_save hold what the
        base or the seed gave them, which decay would take away.
        """
        names = super().get_decay_parameter_names(model)
        adapted = isinstance(self.model, PeftModel)
        return [name for name in names if not adapted or ".lora_" in name]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return Grouped(sampler, self.args, lambda: int(self.state.epoch or 0))

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """The Trainer's, with the loss per label: its own, the mean of the batches' means, depends
        on how many rows a batch has.
        """
        self.heard = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        kwargs["metric_key_prefix"] = metric_key_prefix
        found = super().evaluation_loop(dataloader, *args, **kwargs)
        loss, labels = self.accelerator.reduce(self.heard, "sum").tolist()
        assert found.metrics is not None
        found.metrics[f"{metric_key_prefix}_loss"] = loss / labels
        return found

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        ended = self.accelerator.gradient_state
        if ended.end_of_dataloader and ended.remainder > 0:  # rows that fill up the last batches
            own = ended.remainder - int(self.args.process_index) * len(inputs["labels"])
            for key in {"labels", "shift_labels"} & set(inputs):
                inputs[key][max(0, own) :] = IGNORED
        count = self._get_num_items_in_batch([inputs], self.args.device)
        if count is None:  # the loss is the mean of this batch, as a causal model takes it
            count = (inputs.get("shift_labels", inputs["labels"][..., 1:]) != IGNORED).sum()
        elif self.args.average_tokens_across_devices:  # the part of one of all that is meant
            count = count / self.args.world_size
        found: tuple[Any, Any, Any] = super().prediction_step(model, inputs, *args, **kwargs)
        if count:
            self.heard += torch.stack([found[0].double() * count, torch.as_tensor(count)])
        return found

    def _live(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_state(folder / STATE, self._live(), write=self.args.should_save)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_state(Path(resume_from_checkpoint) / STATE, self._live())

    def _load_best_model(self) -> None:
        load_state(Path(str(self.state.best_model_checkpoint)) / STATE, self._live())

    # Of shared-out weights the optimizer's state is written as one process would write it, so that
    # any number of processes goes on from it.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self._optimizer().state_dict()
        state["state"] = {
            place: {k: whole(v).cpu() if isinstance(v, Tensor) else v for k, v in values.items()}
            for place, values in state["state"].items()
        }
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self._scheduler().state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = self._optimizer()
        state = torch.load(Path(checkpoint) / "optimizer.pt", "cpu", weights_only=True)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for place, values in state["state"].items():
            own = parameters[place]
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == own.shape:
                    values[key] = like(own, value.to(own.device))
        optimizer.load_state_dict(state)
        self._scheduler().load_state_dict(
            torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        )

    def _save_rng_state(self, output_dir: str) -> None:
        """The Trainer's, and a wait: what says that all is whole comes after every process's."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _optimizer(self) -> torch.optim.Optimizer:
        assert self.optimizer is not None
        return self.optimizer

    def _scheduler(self) -> Any:
        return self.lr_scheduler


class Grouped(Sampler[int]):
    """Rows of like length together, by the seed and the epoch alone.

    The Trainer's own draws from the generator that all else draws from too, so that a run that is
    resumed would train other rows, and groups the rows of one process's step, so that another
    number of processes would.
    """

    def __init__(
        self, own: LengthGroupedSampler, args: TrainingArguments, epoch: Callable[[], int]
    ) -> None:
        own.batch_size *= int(args.world_size)
        self.own, self.seed, self.epoch = own, args.seed, epoch

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[int]:
        self.own.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(self.own)


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
    a trainer has copied its start.
    """
    texts, task = [texts] if isinstance(texts, str) else list(texts), task_of(model)
    if task == "SEQ_2_SEQ_LM":
        raise UserError("hold_inputs: it is not for encoder-decoders, which read no text alone")
    if not texts and task != "CAUSAL_LM":
        raise UserError("hold_inputs: this model writes no text: give texts")
    if not texts and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
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
    holds = held(matrices, {}, input_directions(model, matrices, pieces, count))
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
                raise FloatingPointError(
                    f"{key} is {logs[key]} at step {state.global_step}: the run has diverged; use "
                    f"a lower training.learning_rate (now {args.learning_rate}) and a new "
                    "output_dir"
                )
        if "eval_loss" in logs:
            self.progress.say(f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}")

    def _rate(self, state: TrainerState) -> float:
        return (int(state.num_input_tokens_seen) - self.tokens) / max(self._here(), 1e-9)


def _parsed(line: str) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return said


def save_state(path: Path, model: nn.Module, write: bool = True) -> None:
    """All tensors that train, by parameter name, whole or not at all.

    Of shared-out weights all processes must call it; those that do not `write` give their slices.
    """
    tensors = {name: whole(p).detach().cpu().contiguous() for name, p in _trained(model).items()}
    if write:
        write_bytes(path, save(tensors))


def load_state(path: Path, model: nn.Module) -> None:
    """Put back what `save_state` wrote. Raises UserError when it is of another model."""
    tensors: dict[str, Tensor] = load_file(path)
    wanted = _trained(model)
    if set(tensors) != set(wanted):
        raise UserError(f"{path} is of another model or configuration than this run")
    for name, parameter in wanted.items():
        put(parameter, tensors[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by the names that it has where nothing is wrapped to be computed again."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


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


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole. trainer_state.json is the last file to be written."""
    found = []
    for path in folder.glob("checkpoint-*"):
        # DeepSpeed has a folder in place of the optimizer's file, and names it last.
        optimizer = "latest" if (path / "latest").exists() else "optimizer.pt"
        needed = (STATE, optimizer, "scheduler.pt")
        try:
            step = step_of(path)
            last = read_json(path / "trainer_state.json")["global_step"] == step
        except (OSError, ValueError, KeyError):
            continue
        names = [*(path / name for name in needed), *path.glob("rng_state*.pth")]
        if last and len(names) > len(needed) and all(name.exists() for name in names):
            found.append((step, path))
    return max(found)[1] if found else None


def has_ended(checkpoint: Path) -> bool:
    """Whether training ended, by its last step or by early stopping, when this was written."""
    state = read_json(checkpoint / "trainer_state.json")
    return bool(state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"])


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def best_or_last(checkpoint: Path, arguments: TrainingArguments) -> Path:
    """The checkpoint that a run which ended at `checkpoint` takes its result from."""
    state = read_json(checkpoint / "trainer_state.json")
    if arguments.load_best_model_at_end and state["best_model_checkpoint"]:
        return checkpoint.with_name(Path(state["best_model_checkpoint"]).name)
    return checkpoint
