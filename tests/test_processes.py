"""Several processes give what one gives, end together, and go on in any number."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import run, settings, write_rows

from milora.cli import main
from milora.config import load_config
from milora.errors import ElsewhereError, UserError
from milora.processes import Processes, put, whole

pytestmark = pytest.mark.slow  # each starts Python and torch two or three times
Tiny = Callable[..., Path]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# What is started for each file of examples/accelerate: accelerate leaves sharding to GPUs.
WAYS = {
    "ddp": ["-m", "milora"],
    "fsdp2": [str(HERE / "sharded_on_cpu.py")],
    "zero3": [str(HERE / "sharded_on_cpu.py")],
}


def config(tiny: Tiny, folder: Path, name: str, rows: int, **changes: Any) -> Path:
    """A run over steps of `rows` rows a process, none of them left over."""
    data = folder / "rows.jsonl"
    if not data.exists():
        write_rows(data, 40)
    changes.setdefault("lora", {}).setdefault("lora_dropout", 0.0)
    training = {"per_device_train_batch_size": rows, "average_tokens_across_devices": True}
    changes["training"] = training | changes.get("training", {})
    asked = settings(tiny("llama"), folder, output_dir=str(folder / name), **changes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(asked))
    return path


def start(way: str, *words: str) -> "subprocess.Popen[str]":
    """Two processes of the command line, with the file of examples/accelerate of that name."""
    file = ROOT / "examples" / "accelerate" / f"{way}.yaml"
    own = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file),
            "--num_processes", "2", "--main_process_port", "0", *WAYS[way], *words,
        ],
        env=own, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    try:
        said, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # and with it what it launched
        process.wait(60)
        raise
    assert (process.returncode == 0) == (code == 0), said
    return said


def alone(path: Path, **options: Any) -> None:
    """The run of a configuration in this process."""
    run(load_config(path, []).model_dump(), **options)


def update(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of the adapter in a run folder, in fp64."""
    found = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {
        name: found[name.replace("lora_A", "lora_B")].double() @ A.double()
        for name, A in found.items()
        if "lora_A" in name
    }


def apart(one: Path, other: Path) -> float:
    """The largest relative difference of an update between two runs."""
    first, second = update(one), update(other)
    assert set(first) == set(second)
    return max(float((first[n] - second[n]).norm() / first[n].norm()) for n in first)


EVERYTHING = {
    "milora": {
        "protect": 4, "interference": {"top": 4, "every": 2},
        "text": "sampled", "keep": {"tokens": 64}, "protect_inputs": 2,
    },
    "training": {"weight_decay": 0.1, "train_sampling_strategy": "group_by_length"},
}  # fmt: skip


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero3"])
def test_two_give_what_one_gives(way: str, tiny: Tiny, tmp_path: Path) -> None:
    asked = EVERYTHING if way != "zero3" else {}
    alone(config(tiny, tmp_path, "one", 8, **asked))
    training = asked.get("training", {}) | {"per_device_eval_batch_size": 3}
    path = config(tiny, tmp_path, "two", 4, **asked | {"training": training})
    said = finish(start(way, "train", str(path)))
    assert said.count("step 0: ") == 1
    assert said.count("training: 6/6") == 1
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-5
    one, two = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("one", "two"))
    assert two["processes"] == 2
    assert two["rows_per_step"] == one["rows_per_step"] == 8
    assert two["step0"]["difference"] <= (1e-6 if way == "zero3" else 0)
    assert two["interference"]["max"] < 1e-6 or way == "zero3"  # which does without protection
    assert two["base"]["unchanged"]
    assert two["state"] == "done"
    lines = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    assert len(lines[0]) == len(lines[1]) or way == "zero3"
    # 8 rows in batches of 8, and in two of 3: those that fill up the last two are not counted.
    losses = [[m["eval_loss"] for m in map(json.loads, ms) if "eval_loss" in m] for ms in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
def test_a_last_step_that_leads_to_no_numbers_ends_all(
    way: str, tiny: Tiny, tmp_path: Path
) -> None:
    training = {"max_steps": 1, "learning_rate": 1e39, "warmup_steps": 0, "eval_strategy": "no"}
    said = finish(start(way, "train", str(config(tiny, tmp_path, "run", 4, training=training))), 2)
    assert said.count("holds NaN or infinite values at step 1: the run has diverged") == 1
    assert not (tmp_path / "run/checkpoints/trained.safetensors").exists()


@pytest.mark.parametrize("how", ["fold", "same"])
def test_two_go_on_from_a_run_as_one_does(how: str, tiny: Tiny, tmp_path: Path) -> None:
    alone(config(tiny, tmp_path, "first", 8))
    changes: dict[str, Any] = {"continue": {"run": str(tmp_path / "first"), "how": how}}
    if how == "fold":
        changes["milora"] = {"protect": {"tasks": "all"}}
    alone(config(tiny, tmp_path, "one", 8, **changes))
    finish(start("ddp", "train", str(config(tiny, tmp_path, "two", 4, **changes))))
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-5
    if how == "fold":
        three = str(config(tiny, tmp_path, "three", 4, **changes))
        said = finish(start("fsdp2", "train", three), 1)
        assert "continue.run is not for weights that are shared out" in said


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "zero3"])
def test_one_killed_ends_all_and_any_number_resumes(way: str, tiny: Tiny, tmp_path: Path) -> None:
    training = {
        "max_steps": 400, "save_steps": 5, "eval_strategy": "no",
        "lr_scheduler_type": "constant", "warmup_steps": 0,
    }  # fmt: skip
    long = {"training": training}
    folder = tmp_path / "two"
    two = config(tiny, tmp_path, "two", 4, **long)
    process = start(way, "train", str(two))
    while not list((folder / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    [victim, *_] = workers(process.pid)
    os.kill(victim, signal.SIGKILL)
    said = finish(process, 1)
    assert "milora: another process of this run has ended" in said or "Signal 9" in said
    assert not (folder / "adapter").exists()
    reached = max(int(p.name.split("-")[1]) for p in (folder / "checkpoints").glob("checkpoint-*"))
    assert reached < 400
    # Fewer steps now, or it would take minutes; the same in one process from the beginning.
    for name in ("two", "one"):
        rows = 4 if way == "zero3" and name == "two" else 8
        shorter(folder, name, reached + 5, config(tiny, tmp_path, name, rows, **long))
    if way == "zero3":  # whose checkpoints are for one number of processes
        with pytest.raises(UserError, match="checkpoints are for 2 processes, and here are 1"):
            alone(tmp_path / "two.yaml", resume=True)
        finish(start(way, "train", str(two), "--resume"))
    else:
        alone(tmp_path / "two.yaml", resume=True)
    alone(tmp_path / "one.yaml")
    assert apart(tmp_path / "one", folder) < 1e-5


def shorter(folder: Path, name: str, steps: int, path: Path) -> None:
    for file in (path, *([folder / "config.yaml"] if name == "two" else [])):
        asked = yaml.safe_load(file.read_text())
        asked["training"]["max_steps"] = steps
        file.write_text(yaml.safe_dump(asked))


def workers(launcher: int) -> list[int]:
    """The processes that a launcher has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == launcher:
            found.append(int(stat.parent.name))
    return sorted(found)


def test_one_goes_on_shared_out(tiny: Tiny, tmp_path: Path) -> None:
    """From a checkpoint of one process to two with a slice each, and back."""
    path = config(tiny, tmp_path, "run", 8, **EVERYTHING)
    stopped = config(tiny, tmp_path, "stopped", 8, **EVERYTHING)
    alone(path)
    alone(stopped)
    folder = tmp_path / "stopped"
    for gone in ("adapter", "checkpoints/checkpoint-6"):
        for file in (folder / gone).iterdir():
            file.unlink()
        (folder / gone).rmdir()
    for left in ("checkpoints/trained.safetensors", "evaluation.json", "samples.jsonl"):
        (folder / left).unlink()
    config(tiny, tmp_path, "stopped", 4, **EVERYTHING)
    said = finish(start("fsdp2", "train", str(stopped), "--resume"))
    assert "continuing from checkpoint-4" in said
    assert apart(tmp_path / "run", folder) < 1e-5


def test_a_mistake_is_said_once(tiny: Tiny, tmp_path: Path) -> None:
    path = config(tiny, tmp_path, "run", 4)
    said = finish(start("ddp", "train", str(path), "lora.target_modules=[q_prj]"), 2)
    assert said.count("did you mean q_proj") == 1
    assert not (tmp_path / "run").exists()
    said = finish(start("fsdp2", "train", str(path), "method=full"), 2)
    assert said.count("method: full is not for weights that are shared out") == 1


def test_other_verbs_run_in_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["milora", "eval", "runs/none"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "milora eval runs in one process" in capsys.readouterr().err


def test_another_number_of_rows_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = config(tiny, tmp_path, "run", 4)
    alone(path)
    (tmp_path / "run" / "checkpoints" / "trained.safetensors").unlink()
    said = finish(start("ddp", "train", str(path), "--resume"), 2)
    assert "a step was over 4 rows and would be over 8 with 2 processes" in said


def test_alone_there_is_no_one_to_agree_with() -> None:
    one = Processes(0, 1, None)
    assert one.main
    assert one.share(lambda: b"x") == b"x"
    one.wait()
    one.end()
    with pytest.raises(UserError, match="wrong"), one.agree():
        raise UserError("wrong")
    assert ElsewhereError(3).code == 3
    tensor = torch.zeros(2, 3)
    put(tensor, torch.ones(2, 3))
    assert whole(tensor).sum() == 6
