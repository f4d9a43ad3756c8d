"""The comparison: rates chosen on held-out rows, nothing done twice, figures as they are."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import settings, write_rows

import milora.compare
from milora.cli import main
from milora.compare import Arm, bootstrap, compare, parse_arm, tables
from milora.errors import UserError
from milora.progress import Progress

Tiny = Callable[[str], Path]


@pytest.fixture
def config(tmp_path: Path, tiny: Tiny) -> Path:
    write_rows(tmp_path / "rows.jsonl")
    values = settings(tiny("llama"), tmp_path)
    del values["method"], values["seed"]
    values["training"] = {
        "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1,
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    values["output_dir"] = str(tmp_path / "grid")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def arms(*names: str) -> list[Arm]:
    return [parse_arm(name) for name in names]


def run(config: Path, names: list[str], seeds: list[int], rates: list[float]) -> dict[str, Any]:
    return compare(config, [], arms(*names), seeds, rates, Progress())


def test_a_grid(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["lora", "lora:training.weight_decay=0.5", "milora"]
    result = run(config, names, [0, 1], [1e-4, 1e-2])
    folders = sorted(path.name for path in (tmp_path / "grid").iterdir() if path.is_dir())
    assert len(folders) == 3 * (2 + 1)  # the second seed at the chosen rate only
    assert "lora-training.weight-decay-0.5-0.01-0" in folders
    for name, found in result["arms"].items():
        losses = found["held_out_loss"]
        assert losses[f"{found['learning_rate']:g}"] == min(losses.values())
        assert len(found["kl"]["each"]) == 2
        assert found["tasks"]["rows"]["accuracy"]["mean"] == pytest.approx(
            sum(found["tasks"]["rows"]["accuracy"]["each"]) / 2
        ), name
    decayed = yaml.safe_load(
        (tmp_path / "grid" / "lora-training.weight-decay-0.5-0.01-0" / "config.yaml").read_text()
    )
    assert decayed["training"]["weight_decay"] == 0.5
    assert len(result["pairs"]) == 3
    assert json.loads((tmp_path / "grid" / "compare.json").read_text()) == result
    page = (tmp_path / "grid" / "compare.md").read_text()
    assert page == tables(result)
    assert (tmp_path / "grid" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "| lora:training.weight_decay=0.5 | " in page
    assert "too few to tell methods apart" in page

    def no_training(**kwargs: Any) -> None:
        raise AssertionError("a run that is done was done again")

    monkeypatch.setattr(milora.compare, "train", no_training)
    assert run(config, names, [0, 1], [1e-4, 1e-2]) == result
    with pytest.raises(AssertionError, match="done again"):  # one seed more is one run more
        run(config, names, [0, 1, 2], [1e-4, 1e-2])


def test_a_stopped_grid_goes_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = milora.compare.train, []

    def stopping(**kwargs: Any) -> Any:
        calls.append(kwargs["output_dir"])
        if len(calls) == 2:
            Path(kwargs["output_dir"]).mkdir(parents=True)  # killed at its very start
            raise KeyboardInterrupt
        return real(**kwargs)

    monkeypatch.setattr(milora.compare, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(config, ["lora"], [0], [1e-4, 1e-3, 1e-2])
    result = run(config, ["lora"], [0], [1e-4, 1e-3, 1e-2])
    assert len(calls) == 4  # the first is not done again
    assert len(result["arms"]["lora"]["held_out_loss"]) == 3


def test_a_rate_at_which_training_diverges_is_left_out(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(config, ["lora"], [0], [1e-3, 1e30])
    assert result["arms"]["lora"]["held_out_loss"]["1e+30"] is None
    assert result["arms"]["lora"]["learning_rate"] == 1e-3
    monkeypatch.setattr(milora.compare, "train", lambda **kwargs: pytest.fail("tried again"))
    assert run(config, ["lora"], [0], [1e-3, 1e30]) == result
    with pytest.raises(UserError, match="lora diverged at every rate"):
        run(config, ["lora"], [0], [1e30])


def test_without_matplotlib_the_figures_are_there(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(config, ["lora"], [0], [1e-3])
    assert "pip install 'milora[plot]'" in capsys.readouterr().err
    assert (tmp_path / "grid" / "compare.md").exists()
    assert not (tmp_path / "grid" / "compare.png").exists()


def test_rows_are_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    first = (torch.rand(400, generator=generator) < 0.6).double()
    # The same rows right but for ten: the paired interval is far narrower than of two shares.
    second = first.clone()
    second[:10] = 1 - second[:10]
    low, high = bootstrap(first - second)
    assert low <= float((first - second).mean()) <= high
    assert high - low < 0.05
    assert bootstrap(torch.zeros(50, dtype=torch.float64)) == (0.0, 0.0)
    spread = math.sqrt(0.25 / 1000)
    low, high = bootstrap((torch.arange(1000) % 2).double())
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "names", "seeds", "rates", "said"),
    [
        ({"evaluate": {"tasks": []}}, ["lora"], [0], [1e-3], "name some under evaluate.tasks"),
        ({"training": {"eval_strategy": "no"}}, ["lora"], [0], [1e-3], "eval_strategy is no"),
        ({}, ["lora", "milora:lora.r=2"], [0], [1e-3], "scale is not equal"),
        ({}, ["lora"], [0, 0], [1e-3], "--seeds: each must be given once"),
        ({}, ["lora"], [0], [], "--learning-rates: each must be given once, and one at least"),
        ({}, ["lora:lora.q=2"], [0], [1e-3], "lora.q is not an option"),
    ],
)
def test_what_cannot_be_compared(
    changes: dict[str, Any], names: list[str], seeds: list[int], rates: list[float], said: str,
    config: Path,
) -> None:  # fmt: skip
    values = yaml.safe_load(config.read_text())
    for key, value in changes.items():
        values[key] |= value
    config.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=said):
        run(config, names, seeds, rates)


def test_arms() -> None:
    assert parse_arm("lora:a=1:b=2") == Arm("lora:a=1:b=2", ["method=lora", "a=1", "b=2"])
    for text, said in (("dora", "'dora' is none of"), ("lora:x", "'x' is not key=value")):
        with pytest.raises(UserError, match=said):
            parse_arm(text)


def test_the_command(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(config), "--methods", "lora,milora", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", ["milora", *words, "--learning-rates", "1e-3"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    out, err = capsys.readouterr()
    assert "| lora | 0.001 |" in out
    assert "run 2 of 2: milora at 0.001, seed 0" in err
    monkeypatch.setattr(sys, "argv", ["milora", *words, "--learning-rates", "fast"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "--learning-rates: 'fast' is no list of numbers" in capsys.readouterr().err
