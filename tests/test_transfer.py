"""The matrix of a chain: every release on every task, and the figures of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import run, settings
from typer.testing import CliRunner

from milora.cli import app
from milora.continual import Earlier, replayed
from milora.errors import UserError
from milora.gates import judge, parse_gate
from milora.lineage import Link, chain, history, read_link
from milora.report import report
from milora.rows import read_rows, split_rows
from milora.transfer import as_now, columns, measures, sentences, table, unmeasured
from milora.verify import open_run

Tiny = Callable[[str], Path]


def link(name: str, *tasks: str) -> Link:
    asked = {"evaluate": {"tasks": [{"file": f"{task}.jsonl", "name": task} for task in tasks]}}
    return Link(Path("runs") / name, {"state": "done"}, asked, {})


def evaluation(base: dict[str, float], tuned: dict[str, float], kl: float) -> dict[str, Any]:
    tasks = {
        name: {"base": {"accuracy": base[name]}, "tuned": {"accuracy": value}}
        for name, value in tuned.items()
    }
    return {"tasks": tasks, "knowledge": [{"text": "t", "kl": kl}]}


def test_the_figures_are_those_of_lopez_paz_and_ranzato() -> None:
    """By hand: T = 3, R as below, b = 0.1, 0.2, 0.3."""
    links = [link("one", "a"), link("two", "b"), link("three", "c")]
    base = {"a": 0.1, "b": 0.2, "c": 0.3}
    R = [[0.8, 0.25, 0.2], [0.7, 0.9, 0.5], [0.6, 0.85, 0.95]]
    results = [
        evaluation(base, dict(zip("abc", row, strict=True)), kl)
        for row, kl in zip(R, (0.01, 0.02, 0.04), strict=True)
    ]
    found = measures(links, results)
    assert found["matrix"] == R
    assert found["overall"] == pytest.approx((0.6 + 0.85 + 0.95) / 3)
    assert found["backward_transfer"] == pytest.approx(((0.6 - 0.8) + (0.85 - 0.9)) / 2)
    assert found["forward_transfer"] == pytest.approx(((0.25 - 0.2) + (0.5 - 0.3)) / 2)
    assert (found["knowledge"], found["kl"]) == ([0.01, 0.02, 0.04], 0.04)
    head, rows = table(found)
    assert head == ["release", "a", "b", "c", "KL"]
    assert rows[0] == ["base", "0.100", "0.200", "0.300", "0"]
    assert rows[2] == ["two", "0.700", "[0.900]", "0.500", "0.0200"]
    assert "backward transfer, what later updates did to earlier tasks: -0.125" in sentences(found)
    (verdict,) = judge(
        [parse_gate("continual.backward_transfer >= -0.02")], {"continual": found}, {}
    )
    assert not verdict.holds
    assert verdict.value == pytest.approx(-0.125)


def test_a_task_of_several_runs_is_of_the_first() -> None:
    """A team that retrains on one task: what the last release lost of what the first had."""
    links = [link("one", "a"), link("two", "a", "b"), link("three", "b")]
    assert [(c.name, c.introduced) for c in columns(links)] == [("a", 0), ("b", 1)]
    base = {"a": 0.0, "b": 0.0}
    results = [
        evaluation(base, {"a": a, "b": b}, 0.0) for a, b in ((0.5, 0.1), (0.6, 0.7), (0.4, 0.9))
    ]
    found = measures(links, results)
    assert found["backward_transfer"] == pytest.approx(((0.4 - 0.5) + (0.9 - 0.7)) / 2)
    assert found["forward_transfer"] == pytest.approx(0.1)
    alone = measures(links[:1], [evaluation(base, {"a": 0.5}, 0.0)])
    assert alone["overall"] == 0.5
    assert alone["backward_transfer"] is alone["forward_transfer"] is None


def test_what_moved_is_that_of_the_text_that_moved_most() -> None:
    found = evaluation({"a": 0.1}, {"a": 0.5}, 0.01)
    found["knowledge"] += [{"text": "u", "kl": 0.03}, {"text": "v", "kl": None}]
    assert measures([link("one", "a")], [found])["kl"] == 0.03


def test_one_name_for_two_tasks() -> None:
    links = [link("one", "a"), link("two", "a")]
    links[1].asked["evaluate"]["tasks"][0]["file"] = "other.jsonl"
    assert [(c.name, c.introduced) for c in columns(links)] == [("a of one", 0), ("a", 1)]
    links = [link("run", "a"), link("run", "a"), link("run", "b")]
    links[1].asked["evaluate"]["tasks"][0]["file"] = "other.jsonl"
    assert [c.name for c in columns(links)] == ["a", "a of run", "b"]
    links[2] = link("run", "a")
    links[2].asked["evaluate"]["tasks"][0]["match"] = "contains"
    assert [c.name for c in columns(links)] == ["a of run", "a of run (2)", "a"]


def test_one_task_said_in_two_ways() -> None:
    """With and without the defaults and a name, and the harness's with a limit."""
    links = [link("one"), link("two"), link("three")]
    links[0].asked["evaluate"]["tasks"] = ["t.jsonl", {"harness": "arc", "limit": 9}]
    links[1].asked["evaluate"]["tasks"] = [{"file": "t.jsonl", "match": "exact", "limit": None}]
    links[2].asked["evaluate"]["tasks"] = [{"file": "t.jsonl", "name": "mine"}, "harness:arc"]
    assert columns(links) == [
        ("mine", 0, {"file": "t.jsonl", "name": "mine"}), ("arc", 0, "harness:arc"),
    ]  # fmt: skip


def test_another_file_of_the_same_path_is_another_task() -> None:
    links = [link("one", "a"), link("two", "a")]
    for place, digest in enumerate(("1", "2")):
        links[place].record["data"] = {"sha256": {"a.jsonl": digest}}
    assert [(c.name, c.introduced) for c in columns(links)] == [("a of one", 0), ("a", 1)]
    assert [(c.name, c.introduced) for c in columns(as_now(links))] == [("a", 0)]
    links[1].record["data"]["sha256"]["a.jsonl"] = "1"
    assert [(c.name, c.introduced) for c in columns(links)] == [("a", 0)]


def test_the_history_parts_files_of_one_name() -> None:
    links = [link(name, "a") for name in ("one", "two", "three")]
    for place, (digest, score) in enumerate((("1", 0.25), ("2", 0.5), ("1", 0.75))):
        task = {"sha256": digest, "tuned": {"accuracy": score}}
        links[place] = links[place]._replace(evaluation={"tasks": {"a": task}})
    head, rows = history(links)
    assert head[6:8] == ["a", "a of two"]
    assert [row[6:8] for row in rows] == [["0.250", ""], ["", "0.500"], ["0.750", ""]]


def test_figures_that_a_chain_cannot_have() -> None:
    links = [link("one", "a"), link("two", "a", "b")]
    assert unmeasured(links, False) == {}
    assert set(unmeasured(links, True)) == {"kl"}
    assert set(unmeasured([link("one", "a"), link("two", "a")], False)) == {"forward_transfer"}
    assert set(unmeasured([link("one"), link("two", "a")], False)) == {"backward_transfer"}


# --- whole runs

SHORT = {"max_steps": 3, "eval_strategy": "no"}


def rows(path: Path, sign: str) -> str:
    lines = [
        {"prompt": f"{a} {sign} {b} =", "completion": str(a + b if sign == "+" else a - b)}
        for a in range(6)
        for b in range(4)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def task_of(folder: Path, name: str, sign: str) -> dict[str, Any]:
    file = rows(folder / f"{name}.jsonl", sign)
    return {
        "data": {"train": file, "eval": 0.25},
        "evaluate": {"tasks": [{"file": file, "name": name, "max_new_tokens": 2, "limit": 8}]},
        "training": SHORT,
        "output_dir": str(folder / "runs" / name),
    }


@pytest.fixture(scope="module")
def home(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of two runs of two tasks, the second with a part of the first's rows."""
    folder = tmp_path_factory.mktemp("home")
    run(settings(tiny("llama"), folder, **task_of(folder, "plus", "+")))
    about = task_of(folder, "minus", "-") | {
        "continue": {"run": str(folder / "runs" / "plus"), "replay": 0.5},
        "gates": ["continual.backward_transfer >= -1", "continual.cut <= 0"],
    }
    run(settings(tiny("llama"), folder, **about))
    return folder


@pytest.mark.slow
def test_a_gate_has_all_tasks_evaluated(home: Path) -> None:
    run_folder = home / "runs" / "minus"
    record = json.loads((run_folder / "run.json").read_text())
    assert [gate["holds"] for gate in record["gates"]] == [True, True]
    evaluation = json.loads((run_folder / "evaluation.json").read_text())
    assert set(evaluation["tasks"]) == {"plus", "minus"}
    found = evaluation["continual"]
    assert (found["runs"], found["tasks"], found["introduced"]) == (
        ["plus", "minus"], ["plus", "minus"], [0, 1],
    )  # fmt: skip
    own = json.loads((home / "runs" / "plus" / "evaluation.json").read_text())
    assert found["matrix"][0][0] == own["tasks"]["plus"]["tuned"]["accuracy"]
    assert found["knowledge"][0] == pytest.approx(own["knowledge"][0]["kl"], rel=1e-6)
    lines = [json.loads(line) for line in (run_folder / "samples.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines].count("plus") == 8


@pytest.mark.slow
def test_the_report_has_the_matrix(home: Path) -> None:
    for lang, words in (("en", "The updates so far"), ("ja", "これまでの更新")):
        page = report(home / "runs" / "minus", lang)
        assert words in page
        assert 'id="chain"' in page
    assert 'id="chain"' not in report(home / "runs" / "plus")


def test_replayed_rows_are_named_and_never_held_out(home: Path) -> None:
    record = json.loads((home / "runs" / "minus" / "run.json").read_text())
    # Of 24 rows 18 train; half of those 18 of the earlier run come back.
    assert record["data"]["replayed"] == {"plus": 9}
    assert record["data"]["train"]["kept"] == 18 + 9
    assert str(home / "plus.jsonl") in record["data"]["sha256"]


def test_replayed_rows_are_those_that_trained_whatever_the_seed(home: Path) -> None:
    earlier = Earlier(read_link(home / "runs" / "plus"), "fold", {})
    rows = read_rows(str(home / "plus.jsonl")).rows
    trained, _ = split_rows(rows, 0.25, earlier.link.asked["seed"])

    def places(share: float, seed: int) -> list[str]:
        return sorted(row.place for row in replayed(earlier, share, seed, False).rows)

    assert places(1.0, 5) == sorted(row.place for row in trained)
    assert places(0.5, 5) == places(0.5, 5) != places(0.5, 6)


def test_the_command(home: Path) -> None:
    before = (home / "runs" / "plus" / "evaluation.json").read_text()
    folder = home / "runs" / "minus"
    done = CliRunner().invoke(app, ["eval", str(folder), "--all-tasks"])
    assert done.exit_code == 0, done.exception
    found = json.loads((folder / "evaluation.json").read_text())["continual"]
    figure = f"{found['backward_transfer']:+.3f}"
    assert f"backward transfer, what later updates did to earlier tasks: {figure}" in done.stdout
    assert (home / "runs" / "plus" / "evaluation.json").read_text() == before
    trial = home / "trial.json"
    done = CliRunner().invoke(
        app, ["eval", str(folder), "--all-tasks", "--limit", "2", "--out", str(trial)]
    )
    assert done.exit_code == 0, done.exception
    assert json.loads(trial.read_text())["continual"]["limit"] == 2
    done = CliRunner().invoke(app, ["eval", str(folder), "--all-tasks", "--tasks", "x"])
    assert "leave out --tasks" in str(done.exception)
    done = CliRunner().invoke(app, ["gate", str(folder), "--gate", "continual.overall >= 2"])
    assert "continual.overall >= 2 (it is" in str(done.exception)


def test_whole_weights_are_compared_with_their_base(tiny: Tiny, tmp_path: Path) -> None:
    """There is no adapter to switch off: the base is another model."""
    values = settings(tiny("llama"), tmp_path, method="full", training=SHORT)
    run(values)
    folder = tmp_path / "run"
    before = json.loads((folder / "evaluation.json").read_text())
    done = CliRunner().invoke(app, ["eval", str(folder), "--all-tasks"])
    assert done.exit_code == 0, done.exception
    after = json.loads((folder / "evaluation.json").read_text())
    assert before["knowledge"][0]["kl"] > 0
    assert (after["tasks"], after["knowledge"]) == (before["tasks"], before["knowledge"])
    done = CliRunner().invoke(app, ["history", str(folder)])
    assert f"current release: {folder / 'model'}" in done.stdout


def test_each_release_gives_what_it_gives_alone(home: Path) -> None:
    """The column of the first task, asked of the first run by itself."""
    from milora.evaluate import evaluate_task, load_task

    found = json.loads((home / "runs" / "minus" / "evaluation.json").read_text())["continual"]
    first, last = chain(home / "runs" / "minus")
    for place, one in enumerate((first, last)):
        pair, reader, _ = open_run(one.run)
        for column, options in enumerate(
            (first.asked["evaluate"]["tasks"][0], last.asked["evaluate"]["tasks"][0])
        ):
            scores, _ = evaluate_task(pair, reader, load_task(options))
            assert scores["tuned"]["accuracy"] == found["matrix"][place][column]
            assert scores["base"]["accuracy"] == found["base"][column]


def test_what_is_refused(home: Path, tiny: Tiny, tmp_path: Path) -> None:
    about = task_of(tmp_path, "alone", "-")
    with pytest.raises(UserError, match=r"needs earlier tasks: name a run in continue\.run"):
        run(settings(tiny("llama"), tmp_path, **about, gates=["continual.overall >= 0"]))
    with pytest.raises(UserError, match="continual has overall, backward_transfer"):
        parse_gate("continual.forgetting <= 0")
    with pytest.raises(UserError, match="the base has no continual: give a number"):
        parse_gate("continual.overall >= base")
    same = task_of(tmp_path, "alone", "-") | {"continue": {"run": str(home / "runs" / "plus")}}
    same["evaluate"] = task_of(home, "plus", "+")["evaluate"]
    with pytest.raises(UserError, match=r"forward_transfer .* every task is the first run's"):
        run(settings(tiny("llama"), tmp_path, **same, gates=["continual.forward_transfer >= 0"]))
    (home / "plus.jsonl").rename(home / "away.jsonl")
    rows(home / "plus.jsonl", "-")
    done = CliRunner().invoke(app, ["eval", str(home / "runs" / "minus"), "--all-tasks"])
    assert "plus.jsonl has sha256" in str(done.exception)
    assert "put that file back and give the new one another name" in str(done.exception)
    (home / "plus.jsonl").unlink()
    try:
        done = CliRunner().invoke(app, ["eval", str(home / "runs" / "minus"), "--all-tasks"])
        assert isinstance(done.exception, UserError)
        assert f"the task plus of {home / 'runs' / 'plus'}: " in str(done.exception)
        about |= {"continue": {"run": str(home / "runs" / "plus"), "replay": 0.5}}
        gated = about | {"continue": {"run": str(home / "runs" / "plus")}}
        with pytest.raises(UserError, match=r"the task plus of .*plus.jsonl"):
            run(settings(tiny("llama"), tmp_path, **gated, gates=["continual.overall >= 0"]))
        assert not (tmp_path / "runs").exists()
        with pytest.raises(UserError, match=r"plus.jsonl is not the file that .* was trained on"):
            run(settings(tiny("llama"), tmp_path, **about))
    finally:
        (home / "away.jsonl").rename(home / "plus.jsonl")
