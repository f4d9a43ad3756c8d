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
from milora.compare import (
    Arm,
    arms_of,
    bootstrap,
    chosen_rate,
    compare,
    grid,
    held_out_loss,
    parse_arm,
    spread,
    summary,
)
from milora.compare_page import page, plot, tables
from milora.errors import DivergedError, UserError
from milora.pages import inline, standalone
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


@pytest.mark.slow
def test_a_grid(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["lora", "lora:training.weight_decay=0.5", "milora"]
    result = run(config, names, [0, 1], [1e-4, 1e-2])
    folders = sorted(path.name for path in (tmp_path / "grid").iterdir() if path.is_dir())
    assert len(folders) == 3 * (2 + 1)  # the second seed at the chosen rate only
    assert "lora-training.weight-decay-0.5-0.01-0" in folders
    for name, found in result["arms"].items():
        losses = {rate: one["held_out_loss"] for rate, one in found["tried"].items()}
        assert losses[f"{found['learning_rate']:g}"] == min(losses.values())
        assert len(found["knowledge"][0]["kl"]["each"]) == 2
        assert found["tasks"]["rows"]["accuracy"]["mean"] == pytest.approx(
            sum(found["tasks"]["rows"]["accuracy"]["each"]) / 2
        ), name
    decayed = yaml.safe_load(
        (tmp_path / "grid" / "lora-training.weight-decay-0.5-0.01-0" / "config.yaml").read_text()
    )
    assert decayed["training"]["weight_decay"] == 0.5
    assert len(result["pairs"]) == 3
    assert json.loads((tmp_path / "grid" / "compare.json").read_text()) == result
    text = (tmp_path / "grid" / "compare.md").read_text()
    assert text == tables(result)
    assert "| lora:training.weight_decay=0.5 | " in text
    assert "too few to tell methods apart" in text
    drawing = (tmp_path / "grid" / "compare.svg").read_text()
    assert drawing == standalone(plot(result))  # the same figures, the same bytes
    page = (tmp_path / "grid" / "compare.html").read_text()
    assert inline(plot(result), "accuracy against how far the model moved, by arm") in page
    assert page.count("<svg") == 1

    def no_training(**kwargs: Any) -> None:
        raise AssertionError("a run that is done was done again")

    monkeypatch.setattr(milora.compare, "train", no_training)
    assert run(config, names, [0, 1], [1e-4, 1e-2]) == result
    with pytest.raises(AssertionError, match="done again"):  # one seed more is one run more
        run(config, names, [0, 1, 2], [1e-4, 1e-2])


@pytest.mark.slow
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
    assert len(result["arms"]["lora"]["tried"]) == 3


@pytest.mark.slow
def test_runs_from_before_a_default_are_gone_on_from(config: Path, tmp_path: Path) -> None:
    """They name neither a start, when there was one only, nor a text, which they do not read."""
    first = run(config, ["milora"], [0], [1e-3])
    file = tmp_path / "grid" / "milora-0.001-0.json"
    old = json.loads(file.read_text())
    for key in ("start", "text", "keep", "protect_inputs"):
        del old["settings"]["milora"][key]
    file.write_text(json.dumps(old))
    assert run(config, ["milora"], [0], [1e-3])["arms"] == first["arms"]
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(values | {"milora": {"start": "balanced"}}))
    with pytest.raises(UserError, match=r"is of other settings \(milora\)"):
        run(config, ["milora"], [0], [1e-3])


@pytest.mark.slow
def test_a_rate_at_which_training_diverges_is_left_out(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(config, ["lora"], [0], [1e-3, 1e30])
    assert result["arms"]["lora"]["tried"]["1e+30"] == {"held_out_loss": None}
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
    assert not (tmp_path / "grid" / "compare.svg").exists()
    assert "<h2>The trade" not in (tmp_path / "grid" / "compare.html").read_text()


@pytest.mark.slow
def test_a_run_of_other_settings_is_not_taken(config: Path) -> None:
    run(config, ["lora"], [0], [1e-3])
    values = yaml.safe_load(config.read_text())
    values["training"]["max_steps"] = 3
    config.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"lora-0.001-0.json is of other settings \(training\)"):
        run(config, ["lora"], [0], [1e-3])


def outcome(
    loss: float | None, right: str = "01", kl: float = 0.1, name: str = "t", **more: Any
) -> dict[str, Any]:
    """As a run leaves it, of one task, with the figures that the summary reads."""
    accuracy = right.count("1") / len(right)
    if loss is None:
        return {"held_out_loss": None, "diverged": "the loss is nan"}
    base = {"accuracy": 0.0, "interval": [0.0, 0.1]}
    task: dict[str, Any] = {
        "rows": len(right),
        "base": base,
        "tuned": base | {"accuracy": accuracy},
    }
    return {
        "held_out_loss": loss, "trained_parameters": 10, "seconds": {"training": 1.0},
        "right": {name: right},
        "evaluation": {
            "tasks": {name: task},
            "knowledge": [{"text": "w.txt", "kl": kl, "base_perplexity": 9.0,
                           "tuned_perplexity": 9.5}],
        },
    } | more  # fmt: skip


def landscape(best: dict[str, float], tried: list[tuple[str, float, int]]) -> Any:
    """A run whose held-out loss has its minimum at the arm's best rate, and diverges above 1."""

    def pretend(arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        tried.append((arm.name, rate, seed))
        return outcome(abs(math.log(rate / best[arm.name])) if rate < 1 else None)

    return pretend


def test_rates_beyond_those_given() -> None:
    tried: list[tuple[str, float, int]] = []
    best = {"lora": 1e-3, "pissa": 3e-6, "milora": 0.5, "full": 1e-12}
    outcomes = grid(
        arms(*best), [7, 8], [3e-4, 1e-3, 3e-3], landscape(best, tried), Progress(), widen=True
    )
    assert [rate for arm, rate, seed in tried if arm == "lora"] == [3e-4, 1e-3, 3e-3, 1e-3]
    downwards = [rate for arm, rate, seed in tried if arm == "pissa" and seed == 7][3:]
    assert downwards == [9e-5, 2.7e-5, 8.1e-6, 2.4e-6]
    assert chosen_rate(outcomes, "pissa", [7, 8]) == 2.4e-6
    # Upwards until it diverges, and four at most.
    assert [rate for arm, rate, seed in tried if arm == "milora" and seed == 7][3:] == [
        0.009, 0.027, 0.081, 0.24,
    ]  # fmt: skip
    result = summary(outcomes, [7, 8])
    edges = {arm: found["at_the_edge"] for arm, found in result["arms"].items()}
    assert edges == {"lora": False, "pissa": True, "milora": True, "full": True}
    assert "full: the chosen rate 2.4e-06 is at the edge" in " ".join(result["notes"])
    with pytest.raises(UserError, match="--widen"):
        grid(arms("lora"), [0], [1e-3], landscape(best, tried), Progress(), widen=True)
    one = arms("lora")[0]._replace(rates=(1e-3,))
    with pytest.raises(UserError, match=r"--widen: lora has one rate, 0\.001"):
        grid([one], [0], [1e-3, 3e-3], landscape(best, tried), Progress(), widen=True)
    two = one._replace(rates=(1e-3, 3e-3))
    assert len(grid([two], [0], [1e-3], landscape(best, tried), Progress(), widen=True)) == 3


def test_rates_of_an_arm_alone(capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[tuple[str, float, int]] = []
    best = {"lora": 1e-3, "milora": 1e-5}
    lora, milora = arms("lora", "milora")
    own = milora._replace(rates=(1e-5, 1e-4))
    outcomes = grid([lora, own], [0, 1], [1e-3, 1e-2], landscape(best, tried), Progress())
    rates = {arm: {rate for name, rate, _ in tried if name == arm} for arm in best}
    assert rates == {"lora": {1e-3, 1e-2}, "milora": {1e-5, 1e-4}}
    assert chosen_rate(outcomes, "milora", [0, 1]) == 1e-5
    assert "run 6 of 6" in capsys.readouterr().err


def test_with_all_seeds_at_every_rate_their_mean_chooses() -> None:
    """And no rate at which one of them diverged."""

    losses = {1e-4: (1.0, 4.0), 1e-3: (2.0, 2.5), 1e-2: (0.5, None), 1e-1: (None, 0.0)}

    def pretend(arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        return outcome(losses[rate][seed], "0001" if seed else "0111", 0.1 + 0.2 * seed)

    outcomes = grid(arms("lora"), [0, 1], list(losses), pretend, Progress(), every_rate=True)
    assert chosen_rate(outcomes, "lora", [0, 1]) == 1e-3
    assert chosen_rate(outcomes, "lora", [0]) == 1e-2
    found = summary(outcomes, [0, 1])["arms"]["lora"]
    assert found["learning_rate"] == 1e-3
    assert not found["at_the_edge"]
    tried = found["tried"]["0.0001"]
    assert tried["held_out_loss"] == 2.5
    assert (tried["accuracy"], tried["knowledge"]) == ({"t": 0.5}, [pytest.approx(0.2)])
    assert found["tried"]["0.01"] == {"held_out_loss": None}
    alone = {
        key: outcomes[key] for key in (("lora", 1e-4, 0), ("lora", 1e-4, 1), ("lora", 1e-3, 0))
    }
    found = summary(alone, [0, 1])["arms"]["lora"]["tried"]
    assert found["0.0001"]["accuracy"] == {"t": 0.75}  # of the first seed, as that of the other is


def test_runs_that_another_function_makes(config: Path, tmp_path: Path) -> None:
    asked: list[Any] = []

    def make(settings: Any, progress: Progress) -> dict[str, Any]:
        asked.append(settings)
        if settings.training["learning_rate"] == 1e-2:
            raise DivergedError("as its loss is NaN")
        return outcome(0.5)

    result = compare(config, [], arms("lora"), [0, 1], [1e-3, 1e-2], Progress(), make=make)
    assert [one.seed for one in asked] == [0, 0, 1]
    assert result["arms"]["lora"]["tried"]["0.01"] == {"held_out_loss": None}
    stored = json.loads((tmp_path / "grid" / "lora-0.001-0.json").read_text())
    assert stored["settings"]["training"]["learning_rate"] == 1e-3
    assert stored["held_out_loss"] == 0.5


def test_every_rate_gives_a_table_at_equal_score() -> None:
    tried: list[tuple[str, float, int]] = []
    rights = {1e-4: "0001", 1e-3: "0011", 1e-2: "0111"}

    def pretend(arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        tried.append((arm.name, rate, seed))
        if arm.name == "milora" and rate == 1e-2 and seed == 7:
            return outcome(None)
        return outcome(
            abs(rate - 1e-3), rights[rate], 10 * rate / (2 if arm.name == "milora" else 1)
        )

    outcomes = grid(arms("lora", "milora"), [7, 8], list(rights), pretend, Progress(), False, True)
    assert len(set(tried)) == len(tried) == 3 * 2 + (3 + 2)  # where it diverged it is not repeated
    result = summary(outcomes, [7, 8])
    equal = result["equal_score"]
    assert (equal["reference"], equal["rate"]) == ("lora", 1e-3)
    assert equal["tasks"]["t"]["accuracy"] == 0.5
    found = equal["tasks"]["t"]["arms"]["milora"]
    assert found["ratio"] == pytest.approx(0.5)
    assert "| t | 0.500 | milora | 0.0050 | 0.50 |" in tables(result)
    assert "At equal score" in page(result, "")
    assert "equal_score" not in summary({k: v for k, v in outcomes.items() if k[1] == 1e-3}, [7, 8])
    few = summary({k: v for k, v in outcomes.items() if k[0] == "lora" or k[1] == 1e-3}, [7, 8])
    assert "no table at equal score" in " ".join(few["notes"])
    assert "at which all seeds ran through of milora" in " ".join(few["notes"])


def test_the_chosen_rate_is_marked_however_it_was_written() -> None:
    rate = 10**-3.5
    result = summary({("lora", rate, 0): outcome(1.0), ("lora", 1e-2, 0): outcome(2.0)}, [0])
    assert "1.0000 (chosen)" in tables(result)


def test_a_folder_may_have_any_name(config: Path, tmp_path: Path) -> None:
    """Which is no YAML: # would begin a comment."""
    made: list[str] = []

    def make(settings: Any, progress: Progress) -> Any:
        made.append(settings.output_dir)
        return outcome(1.0)

    home = tmp_path / "try #2"
    compare(
        config, [f"output_dir='{home}'"], [parse_arm("lora")], [0], [1e-3], Progress(), make=make
    )
    assert made == [str(home / "lora-0.001-0")]


def test_what_is_said_over_seeds_and_of_pairs() -> None:
    assert spread([0.5, 0.7]) == {
        "mean": pytest.approx(0.6), "deviation": pytest.approx(0.02**0.5), "each": [0.5, 0.7],
    }  # fmt: skip
    assert spread([0.5])["deviation"] is None
    outcomes = {
        (arm, 1e-3, seed): outcome(1.0, 25 * right)
        for arm, right in (("a", "1110"), ("b", "1000"))
        for seed in (0, 1)
    }
    (pair,) = summary(outcomes, [0, 1])["pairs"]
    assert (pair["first"], pair["second"], pair["task"]) == ("a", "b", "t")
    assert pair["difference"] == pytest.approx(0.5)  # of the first less the second
    low, high = pair["interval"]
    assert 0.35 < low < 0.45 < 0.55 < high < 0.65


def test_runs_of_several_machines_are_said() -> None:
    here = {"versions": {"torch": "2.13.0+cpu"}}
    there = outcome(2.0) | {"versions": {"torch": "2.11.0"}}
    there["evaluation"]["settings"] = {"device": "NVIDIA H200"}
    result = summary({("lora", 1e-3, 0): outcome(1.0, **here), ("lora", 3e-3, 0): there}, [0])
    assert result["machines"] == {"cpu, torch 2.13.0": 1, "NVIDIA H200, torch 2.11.0": 1}
    said = "1 with cpu, torch 2.13.0; 1 with NVIDIA H200, torch 2.11.0"
    assert said in " ".join(result["notes"])
    alone = summary({("lora", 1e-3, 0): outcome(1.0, **here)}, [0])
    assert "machines" not in " ".join(alone["notes"])


def test_test_rows_that_took_part_in_the_choice_are_said() -> None:
    def run_of(count: int) -> Any:
        return outcome(1.0) | {"test_overlap": {"t": {"train": 5, "eval": count}}}

    result = summary({("lora", 1e-3, 0): run_of(2), ("lora", 1e-3, 1): run_of(3)}, [0, 1])
    assert "t: 3 of its questions also stand in the held-out rows" in " ".join(result["notes"])
    assert "3 of its questions" in tables(result)
    for alone in (run_of(0), outcome(1.0)):
        assert "held-out" not in " ".join(summary({("lora", 1e-3, 0): alone}, [0])["notes"])


def test_a_seed_that_diverges_is_said() -> None:
    outcomes = {("lora", 1e-3, 0): outcome(1.0), ("lora", 1e-3, 1): outcome(None)}
    with pytest.raises(UserError, match=r"lora diverged at 0\.001 with seed 1"):
        summary(outcomes, [0, 1])


@pytest.mark.parametrize("what", ["base", "data"])
def test_runs_of_different_material_are_not_compared(what: str) -> None:
    key = f"{what}_sha256"
    outcomes = {("lora", 1e-3, seed): outcome(1.0) | {key: {"f": seed}} for seed in (0, 1)}
    with pytest.raises(UserError, match=f"lora-0.001-1.json are of different {what}"):
        summary(outcomes, [0, 1])


def test_arms_may_have_general_texts_of_their_own() -> None:
    def run_of(text: str, train: str = "1") -> Any:
        files = {"train.jsonl": train} | ({} if text == "sampled" else {text: "2"})
        files |= {"earlier.jsonl": text}  # of a run that an arm replays
        asked: dict[str, Any] = {"milora": {"text": text}, "data": {"train": "train.jsonl"}}
        asked["data"]["eval"] = 0.1
        asked["evaluate"] = {"tasks": ["t.jsonl", {"file": "u.jsonl"}], "knowledge": "default"}
        return outcome(1.0) | {"settings": asked, "data_sha256": files}

    outcomes = {("a", 1e-3, 0): run_of("wiki.txt"), ("b", 1e-3, 0): run_of("sampled")}
    assert set(summary(outcomes, [0])["arms"]) == {"a", "b"}
    outcomes["c", 1e-3, 0] = run_of("sampled", train="3")
    with pytest.raises(UserError, match="of different data"):
        summary(outcomes, [0])
    outcomes["c", 1e-3, 0] = run_of("sampled")
    outcomes["c", 1e-3, 0]["data_sha256"] |= {"3 pictures of data": "4"}
    with pytest.raises(UserError, match="of different data"):
        summary(outcomes, [0])


HOSTILE = "<script>alert(1)</script>|"


def test_what_stands_in_the_data_is_harmless_on_the_page() -> None:
    found = outcome(1.0, name=HOSTILE)
    found["evaluation"]["knowledge"][0]["text"] = HOSTILE
    outcomes = {(arm, 1e-3, seed): found for arm in ("lora", "a" + HOSTILE) for seed in (0, 1)}
    result = summary(outcomes, [0, 1])
    drawn = plot(result)
    assert "<script" not in page(result, drawn)
    assert "<script" not in drawn
    assert "<script" not in tables(result)
    rows = {line.replace("\\|", "").count("|") for line in tables(result).splitlines()[:4]}
    assert rows == {6}


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
    # Sums of thirds that should be zero are 1e-18, which would be beyond chance.
    generator = torch.Generator().manual_seed(94)
    chances = torch.tensor([0.02, 0.03, 0.07, 0.86, 0.01, 0.01])
    drawn = 3 - torch.multinomial(chances, 200, replacement=True, generator=generator)
    low, high = bootstrap(torch.tensor([x / 3 for x in drawn.tolist()], dtype=torch.float64))
    assert low == 0
    assert high > 0.05
    spread = math.sqrt(0.25 / 1000)
    low, high = bootstrap((torch.arange(1000) % 2).double())
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "names", "seeds", "rates", "said"),
    [
        ({"evaluate": {"tasks": []}}, ["lora"], [0], [1e-3], "name some under evaluate.tasks"),
        ({"training": {"eval_strategy": "no"}}, ["lora"], [0], [1e-3], "eval_strategy is no"),
        (
            {},
            ["lora", "lora:lora.r=2:lora.lora_alpha=2"],  # whose scale is 1 as well
            [0],
            [1e-3],
            "differ in lora.r, lora.lora_alpha, which must be equal: lora.r 2, .* and lora.r ",
        ),
        (
            {},
            ["lora", "lora:lora.lora_alpha=3"],
            [0],
            [1e-3],
            "differ in lora.lora_alpha, which must be equal: lora.lora_alpha 3 and lora.lora_alpha",
        ),
        (
            {},
            ["lora", "milora:lora.use_rslora=true"],
            [0],
            [1e-3],
            "lora.use_rslora False and lora.use_rslora True",
        ),
        ({}, ["lora"], [0, 0], [1e-3], "--seeds: each must be given once"),
        ({}, ["lora"], [0], [], "--learning-rates: each must be given once, and one at least"),
        ({}, ["lora"], [0], [1e-3, -1.0], "--learning-rates: -1: a number above 0 is needed"),
        ({}, ["lora"], [0], [math.nan], "--learning-rates: nan: a number above 0 is needed"),
        ({}, ["lora:lora.q=2"], [0], [1e-3], "lora.q is not an option"),
        # What would end it when the turn of that arm comes.
        ({}, ["lora", "lora:training.weight_decy=1"], [0], [1e-3], "did you mean weight_decay"),
        ({}, ["lora", "pissa:milora.protect=4"], [0], [1e-3], r"milora\.protect"),
        (
            {},
            ["lora", "lora:milora.start=balanced"],
            [0],
            [1e-3],
            "which method lora does not have",
        ),
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


def test_full_and_an_adapter_of_16_bit_bases_are_not_compared(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milora.compare, "dtype_of", lambda name: torch.bfloat16)
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(values | {"dtype": "auto"}))
    with pytest.raises(UserError, match="set dtype: float32"):
        run(config, ["lora", "full"], [0], [1e-3])


def test_arms() -> None:
    assert arms_of("lora, milora:a=[1,2]:b={c: 3, d: lora},pissa,") == [
        "lora", "milora:a=[1,2]:b={c: 3, d: lora}", "pissa"
    ]  # fmt: skip
    assert arms_of("lora,mica") == ["lora,mica"]  # which parse_arm refuses
    assert parse_arm("lora:a=1:b=2") == Arm("lora:a=1:b=2", ["method=lora", "a=1", "b=2"])
    held = "milora.protect={q_proj: 4, v_proj: {energy: 0.1}}"
    assert parse_arm(f"milora:{held}:lora.r=2").overrides == ["method=milora", held, "lora.r=2"]
    for text, said in (
        ("dora", "'dora' is none of"), ("lora:x", "'x' is not key=value"),
        ("lora:method=pissa", "method is the same for all arms"),
        ("lora:lora.r=4:seed=7", "seed is the same"),
        ("lora:training.learning_rate=0.5", "training.learning_rate is the same"),
        ("lora:output_dir=x", "output_dir is the same"), ("lora:model=x", "model is the same"),
        ("lora:data.eval=0.5", "data.eval is the same"),
        ("lora:evaluate.chunks=1", "evaluate.chunks is the same"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            parse_arm(text)


@pytest.mark.slow
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


def test_the_held_out_loss_is_that_of_the_result(tmp_path: Path) -> None:
    lines = [{"step": step, "eval_loss": loss} for step, loss in ((2, 3.0), (4, 1.0), (6, 2.0))]
    text = "".join(json.dumps(line) + "\n" for line in [{"step": 1, "loss": 9.0}, *lines])
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [held_out_loss(tmp_path, step) for step in (None, 6, 5, 4, 1)] == [2, 2, 1, 1, 3]
