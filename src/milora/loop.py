"""transformers' Trainer with checkpoints of our own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from milora.data import IGNORED
from milora.keep import Keep, kept_loss
from milora.processes import like, whole
from milora.training_state import STATE, load_state, read_whole, save_state


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

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """The Trainer's, of all rows: dataloader_drop_last is for training."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop

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
            with read_whole(Path(checkpoint or "")):
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = self._optimizer()
        with read_whole(Path(checkpoint)):
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

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with read_whole(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)

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
