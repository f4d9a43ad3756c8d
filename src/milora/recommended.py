"""What `method: milora` does where the configuration does not say.

`milora: published` is the method as in the paper: the start with the factors of eq. 5, and nothing
that holds the update afterwards. docs/results.md (Learned at what price) shows what that costs and
what the setting here costs: factors of LoRA's size, and A kept out of the directions in which
general text enters each weight (keep.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from milora.errors import UserError
from milora.files import read_yaml
from milora.progress import Progress

PUBLISHED: dict[str, Any] = {"start": "published", "protect_inputs": 0}
BEFORE = PUBLISHED | {"text": "sampled"}  # of runs that began when these could not be said
INPUTS = 64  # directions


def not_said(milora: Mapping[str, Any]) -> bool:
    return any(milora[key] is None for key in PUBLISHED)


def as_before(asked: dict[str, Any], resume: bool) -> dict[str, Any]:
    """`asked` with what it does not say taken from the run that it goes on with, if any.

    For a method other than milora it is said here already: nothing is held.
    """
    folder, earlier = Path(asked["output_dir"]), asked.get("continue", {})
    began = resume and (folder / "config.yaml").is_file()
    if earlier.get("how") == "same" and not began:
        folder, resume = Path(earlier["run"]), True
    milora = asked["milora"]
    if resume and (folder / "config.yaml").is_file():
        milora = _filled(milora, stored_in(folder)["milora"])
    if asked["method"] != "milora":
        milora = _filled(milora, PUBLISHED)
    return asked | {"milora": milora}


def stored_in(run: Path) -> dict[str, Any]:
    """The configuration that a run began with, and BEFORE where it says nothing of these.

    Raises UserError where it is gone or damaged.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{path} is not there: put it back, or begin a new run")
    stored = read_yaml(path)
    block = stored.get("milora", {})
    if not isinstance(block, dict):
        raise UserError(f"{path} is damaged (milora is {block!r}): put the file as written back")
    return stored | {"milora": BEFORE | block}


def recommended(
    milora: Mapping[str, Any], inputs: Sequence[int], unfit: str | None, progress: Progress
) -> dict[str, Any]:
    """`milora` with nothing left unsaid; `inputs` is how many every weight has. `unfit` says for
    what they cannot be held, where they cannot.
    """
    count = held_inputs(inputs)
    if milora["protect_inputs"] is None and unfit:
        progress.say(f"milora.protect_inputs is left out: it is not for {unfit}")
        count = 0
    return _filled(milora, {"start": "balanced", "protect_inputs": count})


def decisive(milora: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What of the block the result depends on, for those who read about it."""
    keys = ["start", "protect_inputs", "keep", "protect", "rank"]
    if milora.get("protect_inputs") or milora.get("keep"):
        keys.append("text")
    return [(f"milora.{key}", milora[key]) for key in keys if milora.get(key)]


def held_inputs(inputs: Iterable[int]) -> int:
    """How many of each weight's, where the narrowest would keep three quarters for the task."""
    return min([INPUTS, *(n // 4 for n in inputs)])


def _filled(milora: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: default[key] if value is None and key in PUBLISHED else value
        for key, value in milora.items()
    }
