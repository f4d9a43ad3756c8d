"""Tasks of lm-evaluation-harness by their names, through that library (the extra `harness`)."""

import difflib
import functools
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora.errors import UserError

ACCURACY = (
    "acc,none",
    "exact_match,strict-match",
    "exact_match,none",
    "prompt_level_strict_acc,none",
)


class HarnessTask(NamedTuple):
    name: str
    limit: int | None
    include: str | None  # a folder of further task files (YAML)
    called: str  # by the harness


class HarnessScores(NamedTuple):
    rows: int
    metrics: dict[str, float]  # as the harness names them, standard errors included
    accuracy: float | None  # the first of ACCURACY that there is
    samples: list[dict[str, Any]]


def harness_task(name: str, limit: int | None = None, include: str | None = None) -> HarnessTask:
    """The task, checked to be known.

    Raises UserError when the harness is not installed, knows no such task (with the nearest), or
    has a tag of that name, which it gives no scores of its own.
    """
    manager = _manager(include)
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise UserError(f"evaluate.tasks: lm-evaluation-harness has no task {name!r}{hint}")
    if name in manager.all_tags:
        entry = manager.task_index[name]  # a dict before lm-eval 0.4.10
        tagged = sorted(entry["task"] if isinstance(entry, dict) else entry.tags)
        raise UserError(
            f"evaluate.tasks: {name!r} is a tag of lm-evaluation-harness and no task: name its "
            f"tasks: {', '.join(tagged[:20])}{', ...' * (len(tagged) > 20)}"
        )
    return HarnessTask(name, limit, include, name)


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: HarnessTask,
    batch_size: int = 16,
) -> HarnessScores:
    """What the harness says of the model as it stands, on its own prompts and metrics."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found: Any = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[task.called],
            limit=task.limit,
            bootstrap_iters=0,
            task_manager=_manager(task.include),
        )
    except (OSError, ConnectionError) as error:  # its data come from the hub
        reason = " ".join(str(error).split())
        raise UserError(f"lm-evaluation-harness cannot load {task.called}: {reason}") from error
    metrics = {
        key: float(value)
        for key, value in found["results"][task.called].items()
        if isinstance(value, int | float)
    }
    key = next((key for key in ACCURACY if key in metrics), "")
    samples = [
        {"row": str(sample["doc_id"]), "reference": str(sample["target"]),
         "answer": sample["filtered_resps"]}
        for own in found["samples"].values()  # a group has several tasks
        for sample in _filtered(own, key.partition(",")[2])
    ]  # fmt: skip
    return HarnessScores(len(samples), metrics, metrics.get(key), samples)


def _filtered(samples: list[dict[str, Any]], wanted: str) -> list[dict[str, Any]]:
    """Each row once, by the filter `wanted` or the first: there is a sample for every filter."""
    filters = [sample.get("filter") for sample in samples]
    chosen = wanted if wanted in filters else next(iter(filters), None)
    return [sample for sample in samples if sample.get("filter") == chosen]


@functools.cache
def _manager(include: str | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            "tasks of lm-evaluation-harness need that library: pip install 'milora[harness]'"
        ) from error
    if include is not None and not Path(include).is_dir():
        raise UserError(f"evaluate.tasks: include: {include} is not a folder")
    return TaskManager(include_path=include)
