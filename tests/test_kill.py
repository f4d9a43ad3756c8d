"""Invariant 6: after a kill at any instant, resuming ends with the same adapter, bit for bit."""

import json
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from tiny_run import NOT_SAID, result_hashes, run, run_and_kill, settings

LAST = 60  # a run makes at least so many changes to its folder
Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def unbroken(
    tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, children: ForkServerContext
) -> tuple[Path, dict[str, str], float]:
    """The folder with the data, the hashes of an unbroken run in a child, and its seconds."""
    folder = tmp_path_factory.mktemp("unbroken")
    began = time.monotonic()
    child = children.Process(target=run, args=(settings(tiny("llama"), folder, milora=NOT_SAID),))
    child.start()
    child.join()
    assert child.exitcode == 0
    return folder, result_hashes(folder / "run"), time.monotonic() - began


def check_resumed(
    children: ForkServerContext, arguments: dict[str, object], wanted: dict[str, str]
) -> None:
    folder = Path(str(arguments["output_dir"]))
    child = children.Process(target=run, args=(arguments,), kwargs={"resume": folder.exists()})
    child.start()
    child.join()
    assert child.exitcode == 0
    assert result_hashes(folder) == wanted
    assert json.loads((folder / "run.json").read_text())["state"] == "done"
    assert not [p for p in (folder / "adapter").iterdir() if p.name.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.parametrize("at_write", [24, 1, 2, 3, 4, 5, 6, 40, *range(9, 80, 7)])
def test_killed_at_the_nth_write(
    at_write: int,
    tiny: Tiny,
    tmp_path: Path,
    unbroken: tuple[Path, dict[str, str], float],
    children: ForkServerContext,
) -> None:
    folder, wanted, _ = unbroken
    data = {"train": str(folder / "rows.jsonl")}
    tasks = {"tasks": [{"file": data["train"], "max_new_tokens": 3, "limit": 4}]}
    arguments = settings(tiny("llama"), tmp_path, data=data, evaluate=tasks, milora=NOT_SAID)
    child = children.Process(target=run_and_kill, args=(arguments, False, at_write))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL or at_write > LAST
    # And once more while resuming.
    child = children.Process(
        target=run_and_kill, args=(arguments, Path(str(arguments["output_dir"])).exists(), 5)
    )
    child.start()
    child.join()
    assert child.exitcode in (-signal.SIGKILL, 0)
    check_resumed(children, arguments, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.3, 0.7, 0.9])
def test_killed_at_some_moment(
    share: float,
    tiny: Tiny,
    tmp_path: Path,
    unbroken: tuple[Path, dict[str, str], float],
    children: ForkServerContext,
) -> None:
    folder, wanted, seconds = unbroken
    data = {"train": str(folder / "rows.jsonl")}
    tasks = {"tasks": [{"file": data["train"], "max_new_tokens": 3, "limit": 4}]}
    arguments = settings(tiny("llama"), tmp_path, data=data, evaluate=tasks, milora=NOT_SAID)
    child = children.Process(target=run, args=(arguments,))
    child.start()
    time.sleep(share * seconds)
    child.kill()
    child.join()
    check_resumed(children, arguments, wanted)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_killed_while_it_continues(
    tiny: Tiny,
    tmp_path: Path,
    unbroken: tuple[Path, dict[str, str], float],
    children: ForkServerContext,
) -> None:
    """At any write: the earlier run is as it was, and resuming ends as an unbroken run does."""
    folder, _, _ = unbroken
    before = files(folder / "run")
    rows = str(folder / "rows.jsonl")
    changes = {
        "data": {"train": rows},
        "evaluate": {"tasks": [{"file": rows, "max_new_tokens": 3, "limit": 2}]},
        "milora": {"protect": {"tasks": "all"}},
        "continue": {"run": str(folder / "run"), "rank": 10},
        "training": {"max_steps": 3, "save_steps": 1, "eval_strategy": "no"},
    }
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    arguments = settings(tiny("llama"), tmp_path / "whole", **changes)
    child = children.Process(target=run, args=(arguments,))
    child.start()
    child.join()
    wanted = result_hashes(tmp_path / "whole" / "run")
    arguments = settings(tiny("llama"), tmp_path / "killed", **changes)
    ended = []
    for at_write in (3, 5, 8, 20, 30):
        begun = (tmp_path / "killed" / "run").exists()
        child = children.Process(target=run_and_kill, args=(arguments, begun, at_write))
        child.start()
        child.join()
        ended.append(child.exitcode)
    assert ended[:3] == [-signal.SIGKILL] * 3
    check_resumed(children, arguments, wanted)
    assert files(folder / "run") == before
    record = json.loads((tmp_path / "killed" / "run" / "run.json").read_text())
    assert record["adapter"]["cut"]["rank"] == 10
