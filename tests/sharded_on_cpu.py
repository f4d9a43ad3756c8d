"""`milora` in processes that share the weights out, on CPUs, for test_processes.py.

accelerate shards on accelerators alone, by the word of this state; all else is its code, torch's
and DeepSpeed's.
"""

from typing import Any

import transformers.training_args
from accelerate import PartialState
from accelerate.utils import DistributedType


def state(**options: Any) -> PartialState:
    found = PartialState(**options | {"backend": "gloo"})
    if found.distributed_type == DistributedType.MULTI_CPU:
        found.distributed_type = DistributedType.MULTI_GPU
    return found


transformers.training_args.PartialState = state  # type: ignore[assignment,misc]

from milora.cli import main  # noqa: E402

main()
