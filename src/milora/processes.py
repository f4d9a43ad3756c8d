"""The processes of one run: one decides, the others get to know, and what is wrong is said once.

`accelerate launch` or `torchrun` starts them, accelerate sets up their talking to each other, and
transformers' Trainer shares the rows out. What is here is for what comes before and after: initial
factors are made by one process and sent to the others, and files are written by one.

The weights may be shared out too ("sharded"). Under FSDP 2 each process then holds a slice of every
tensor that trains, a DTensor, which `whole` and `put` read and write. Under DeepSpeed's ZeRO-3 it
is `whole` alone: what would write there, between the optimizer's copy and the model's, is refused.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from milora.errors import ElsewhereError, UserError

# What a launcher sets and a process on its own must not see.
LAUNCHED = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
LONG = timedelta(days=7)  # the others wait while one decomposes, which may take hours


class Processes(NamedTuple):
    """How many there are, and which this is."""

    rank: int
    number: int
    sharded: Literal["fsdp", "zero3"] | None  # how the weights are shared out, not only the rows
    group: Any = None  # for what takes long; None where there is one process

    @property
    def main(self) -> bool:
        """Whether this is the one that decides, writes and speaks."""
        return self.rank == 0

    @contextmanager
    def agree(self) -> Iterator[None]:
        """What the user must change in one process ends all of them.

        Raises the UserError in the first process that has one, and ElsewhereError in the others.
        """
        mine: UserError | None = None
        try:
            yield
        except UserError as error:
            if self.group is None:
                raise
            mine = error
        if self.group is None:
            return
        wrong = [torch.zeros(1, dtype=torch.int64) for _ in range(self.number)]
        dist.all_gather(wrong, torch.tensor([int(mine is not None)]), group=self.group)
        first = next((rank for rank, one in enumerate(wrong) if one), None)
        if first is None:
            return
        if mine is None or self.rank != first:
            raise ElsewhereError
        where = f"process {self.rank} on {socket.gethostname()}: " if self.rank else ""
        raise type(mine)(f"{where}{mine}") from mine

    def share(self, make: Callable[[], bytes]) -> bytes:
        """What `make` gives in the main process, in all of them."""
        if self.group is None:
            return make()
        data = torch.empty(0, dtype=torch.uint8)
        with self.agree():
            if self.main and (made := make()):  # torch takes no empty buffer
                data = torch.frombuffer(bytearray(made), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0, group=self.group)
        if not self.main:
            data = torch.empty(int(size), dtype=torch.uint8)
        if len(data):
            dist.broadcast(data, 0, group=self.group)
        return data.numpy().tobytes()

    def wait(self) -> None:
        """Until all are here."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def end(self) -> None:
        """The last that they do together: from here on each is on its own."""
        if self.group is not None:
            self.wait()
            dist.destroy_process_group()


def processes_of(arguments: TrainingArguments) -> Processes:
    """Those that a launcher has started, connected; one where none has.

    Raises UserError for ways of sharing out that milora does not train with.
    """
    number, rank = int(arguments.world_size), int(arguments.process_index)
    plugin = arguments.deepspeed_plugin
    sharded: Literal["fsdp", "zero3"] | None = None
    if plugin is not None:
        if plugin.zero_stage != 3:
            raise UserError(
                f"DeepSpeed's stage {plugin.zero_stage} shares out the optimizer alone, which is "
                "small for an adapter: use examples/accelerate/ddp.yaml, or zero3.yaml"
            )
        sharded = "zero3"
        unset_hf_deepspeed_config()  # the weights are read whole, and shared out once decomposed
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        sharded = "fsdp"
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError(
                "FSDP 1 splits tensors so that no row of a factor is whole: use fsdp_version: 2 "
                "(examples/accelerate/fsdp2.yaml)"
            )
        state = arguments.distributed_state
        if state is not None and state.distributed_type == DistributedType.MULTI_CPU:
            raise UserError("FSDP is for GPUs, and here are none: use examples/accelerate/ddp.yaml")
    if number == 1 and sharded:
        raise UserError("there is one process, and nothing to share out: start it without FSDP")
    if number == 1 or not dist.is_initialized():
        return Processes(rank, 1, None)
    return Processes(rank, number, sharded, dist.new_group(backend="gloo", timeout=LONG))


def whole(tensor: Any) -> Tensor:
    """All of a tensor of which each process has a slice; any other as it is."""
    if hasattr(tensor, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        found: Tensor = safe_get_full_fp32_param(tensor)
        return found.view(tensor.ds_shape)
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """Write `value`, which all processes have, in place; of a DTensor each its own slice."""
    tensor.copy_(like(tensor, value.to(tensor.device)))


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """`value`, of the shape of `tensor`, shared out as that is, without a word to others."""
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def alone(run: Path) -> None:
    """Finish a trained run in a process that no launcher has started.

    What is left, the export and the evaluation, needs the weights in one piece. Raises
    ElsewhereError with the exit code of that process, if it is not 0.
    """
    kept = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "PARALLELISM_CONFIG_")
    own = {k: v for k, v in os.environ.items() if not k.startswith(kept) and k not in LAUNCHED}
    command = [sys.executable, "-m", "milora", "train", str(run / "config.yaml"), "--resume"]
    if code := subprocess.run(command, env=own, check=False).returncode:
        raise ElsewhereError(code)
