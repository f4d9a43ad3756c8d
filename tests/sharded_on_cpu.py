"""`milora` in processes that share the weights out, on CPUs, for test_processes.py.

accelerate shards on accelerators alone, by this one word; all else is its code and torch's.
"""

from typing import Any

import transformers.training_args
from accelerate import PartialState
from accelerate.utils import DistributedType


def state(**options: Any) -> PartialState:
    found = PartialState(**options)
    found.distributed_type = DistributedType.MULTI_GPU
    return found


transformers.training_args.PartialState = state  # type: ignore[assignment,misc]

from milora.cli import main  # noqa: E402

main()
