"""What a run is resumed from: the tensors that train, and the checkpoints that hold them."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import TrainingArguments

from milora.errors import UserError
from milora.files import read_json, write_bytes
from milora.processes import put, whole

STATE = "trained.safetensors"


def save_state(path: Path, model: nn.Module, write: bool = True) -> None:
    """All tensors that train, by parameter name, whole or not at all.

    Of shared-out weights all processes must call it; those that do not `write` give their slices.
    """
    tensors = {name: whole(p).detach().cpu().contiguous() for name, p in _trained(model).items()}
    if write:
        write_bytes(path, save(tensors))


def load_state(path: Path, model: nn.Module) -> None:
    """Put back what `save_state` wrote. Raises UserError when it is of another model."""
    with read_whole(path):
        tensors: dict[str, Tensor] = load_file(path)
    wanted = _trained(model)
    if set(tensors) != set(wanted):
        raise UserError(f"{path} is of another model or configuration than this run")
    for name, parameter in wanted.items():
        put(parameter, tensors[name])


@contextmanager
def read_whole(path: Path) -> Iterator[None]:
    """Raise UserError in place of what the readers of safetensors and torch say of half a file."""
    try:
        yield
    except (SafetensorError, EOFError, OSError, pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        said = " ".join(str(error).split())
        raise UserError(
            f"{path} is damaged ({said}): remove it, and `--resume` goes on from what there is "
            "before it"
        ) from error


def not_finite(model: nn.Module) -> str | None:
    """The first tensor that trains and holds a NaN or an infinity, if there is one.

    Of shared-out weights all processes must call it, and get the same.
    """
    found = (name for name, p in _trained(model).items() if not torch.isfinite(whole(p)).all())
    return next(found, None)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by the names that it has where nothing is wrapped to be computed again."""
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


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
