"""One task after another: what each way of updating keeps of the earlier ones.

    python benchmarks/sequence.py llama           on the model of small_llama.py: all arms, two
                                                  orders, three seeds; goes on where it stopped
    python benchmarks/sequence.py smollm2         SmolLM2-135M: one order, one seed, fewer rows
    python benchmarks/sequence.py llama --arms milora,lora --orders 0 --seeds 0
                                                  a part of it, as one of several processes
    python benchmarks/sequence.py try             16 rows a task, to see that it works
    python benchmarks/sequence.py docs            the tables and plots of docs/results.md

Every sequence is a chain of `milora train --continue-from` over TREC, subjectivity, polarity and
MAWPS, and what `milora eval --all-tasks` says of it. Its JSON lies in benchmarks/results/sequence
and is committed; run folders lie in build/ and go once it is there.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from small_llama import HELD_OUT, MODEL
from tables import fill
from tasks import BUILD, ROOT, graded, require_data, task_files, text_file

from milora.compare_page import COLOURS, Table, markdown
from milora.config import Config
from milora.files import read_json, write_json, write_text
from milora.lineage import chain
from milora.pages import inked, standalone, svg
from milora.progress import Progress
from milora.recommended import PUBLISHED
from milora.train import train
from milora.transfer import evaluate_chain
from milora.verify import open_run

RESULTS, RUNS = Path("benchmarks/results/sequence"), Path("build/sequence")
ORDERS = (
    ("trec", "subjectivity", "polarity", "mawps"),
    ("mawps", "polarity", "subjectivity", "trec"),
)
PROTECTED = 64  # directions of the spectrum, in "protect base"

# Each at the rate that milora compare chose for its method on one task of the four (results.md).
ARMS: dict[str, dict[str, Any]] = {
    "lora-same": {"method": "lora", "continue": {"how": "same"}},
    "lora": {"method": "lora"},
    "lora-tasks": {"method": "lora", "milora": {"protect": {"tasks": "all"}}},
    "milora": {"method": "milora"},
    "milora-base": {"method": "milora", "milora": {"protect": PROTECTED}},
    "milora-tasks": {"method": "milora", "milora": {"protect": {"tasks": "all"}}},
    "milora-replay": {"method": "milora", "continue": {"replay": 0.1}},
    "joint": {"method": "lora"},
}
SAID = {
    "zero-shot": "the base, untrained",
    "lora-same": "LoRA, one adapter trained on",
    "lora": "LoRA on the folded result",
    "lora-tasks": "LoRA, kept apart from earlier tasks",
    "milora": "MiLoRA on the folded result",
    "milora-base": f"MiLoRA, the {PROTECTED} largest directions protected",
    "milora-tasks": "MiLoRA, kept apart from earlier tasks",
    "milora-replay": "MiLoRA, a tenth of earlier rows again",
    "joint": "LoRA on all tasks at once",
}


class Setting(NamedTuple):
    """A model and how much it is given."""

    rows: int
    held_out: int
    test: int
    epochs: int
    batch: int
    rates: dict[str, float]  # by method
    orders: tuple[int, ...]
    seeds: tuple[int, ...]
    base: dict[str, Any]


def settings(name: str) -> Setting:
    if name == "llama":
        if not (MODEL / "model.safetensors").exists():
            sys.exit(f"{MODEL} is not there: python benchmarks/small_llama.py")
        knowledge = [str(HELD_OUT), text_file("wikitext2_test.txt")]
        base = {"model": str(MODEL), "evaluate": {"knowledge": knowledge, "chunks": 8}}
        rates = {"lora": 3e-3, "milora": 1e-3}
        return Setting(960, 80, 100, 2, 8, rates, (0, 1), (0, 1, 2), base)
    knowledge = [text_file("wikitext2_test.txt")]
    base = {
        "model": "smollm2-135m", "dtype": "bfloat16",
        "evaluate": {"knowledge": knowledge, "chunks": 4},
    }  # fmt: skip
    rates = {"lora": 3.3e-3, "milora": 1e-3}
    if name == "try":
        base["evaluate"]["chunks"] = 1
        return Setting(16, 8, 8, 3, 16, rates, (0,), (0,), base)
    return Setting(240, 40, 60, 1, 16, rates, (0,), (0,), base)


def values_of(
    setting: Setting, arm: str, rate: float, seed: int, folder: Path, task: str, train_file: str
) -> dict[str, Any]:
    files = files_of(setting, task)
    own = {key: value for key, value in ARMS[arm].items() if key != "continue"}
    return setting.base | {
        **own,
        "milora": {**PUBLISHED, **own.get("milora", {})},
        "output_dir": str(folder),
        "seed": seed,
        "data": {"train": train_file, "eval": files["held_out"], "max_length": 256},
        "lora": {"r": 16, "lora_alpha": 16},
        "training": {
            "learning_rate": rate, "num_train_epochs": setting.epochs,
            "per_device_train_batch_size": setting.batch,
            "save_strategy": "no", "eval_strategy": "no",
            "train_sampling_strategy": "group_by_length",
        },
        "evaluate": setting.base["evaluate"] | {"tasks": [graded(task, files["test"])]},
    }  # fmt: skip


def files_of(setting: Setting, task: str) -> dict[str, str]:
    return task_files(task, setting.rows, setting.held_out, setting.test)


def sequence(
    setting: Setting, arm: str, rate: float, order: int, seed: int, home: Path
) -> dict[str, Any]:
    """One chain of runs and what it came to."""
    began, done = time.monotonic(), []
    for place, task in enumerate(ORDERS[order]):
        folder, source = home / f"{place}-{task}", files_of(setting, task)["train"]
        values = values_of(setting, arm, rate, seed, folder, task, source)
        if done:
            values["continue"] = {"run": str(done[-1])} | ARMS[arm].get("continue", {})
        else:  # the first has no earlier tasks to keep apart from
            values["milora"] |= {"protect": 0} if "tasks" in arm else {}
        finish(values)
        done.append(folder)
    pair, reader, _ = open_run(done[-1])
    with Progress() as progress:
        result, _ = evaluate_chain(chain(done[-1]), pair, reader, progress)
    records = [read_json(folder / "run.json") for folder in done]
    return {
        "arm": arm, "rate": rate, "order": list(ORDERS[order]), "seed": seed,
        **{key: value for key, value in result["continual"].items() if key != "runs"},
        "ranks": [record["adapter"]["rank"] for record in records],
        "step0": [record["step0"]["difference"] for record in records],
        "seconds": time.monotonic() - began,
        "training_seconds": [record["seconds"].get("training") for record in records],
        "settings": {"rows": setting.rows, "epochs": setting.epochs, "batch": setting.batch,
                     "test": setting.test},
        "base_sha256": records[0]["base"]["sha256"], "versions": records[0]["versions"],
    }  # fmt: skip


def joint(setting: Setting, rate: float, seed: int, home: Path) -> dict[str, Any]:
    """All rows of all tasks in one run: what no order can better by much."""
    began, tasks = time.monotonic(), ORDERS[0]
    together = BUILD / f"joint-{setting.rows}.jsonl"
    lines = [Path(files_of(setting, task)["train"]).read_text(encoding="utf-8") for task in tasks]
    write_text(together, "".join(lines))
    values = values_of(setting, "joint", rate, seed, home, tasks[0], str(together))
    values["evaluate"] |= {
        "tasks": [graded(task, files_of(setting, task)["test"]) for task in tasks]
    }
    finish(values)
    record, found = read_json(home / "run.json"), read_json(home / "evaluation.json")
    scores = [found["tasks"][task]["tuned"]["accuracy"] for task in tasks]
    return {
        "arm": "joint", "rate": rate, "order": list(tasks), "seed": seed, "tasks": list(tasks),
        "base": [found["tasks"][task]["base"]["accuracy"] for task in tasks],
        "matrix": [scores], "overall": sum(scores) / len(scores), "backward_transfer": None,
        "forward_transfer": None, "kl": max(one["kl"] for one in found["knowledge"]),
        "ranks": [record["adapter"]["rank"]], "seconds": time.monotonic() - began,
        "training_seconds": [record["seconds"].get("training")],
        "settings": {"rows": setting.rows, "epochs": setting.epochs, "batch": setting.batch,
                     "test": setting.test},
        "base_sha256": record["base"]["sha256"], "versions": record["versions"],
    }  # fmt: skip


def finish(values: Mapping[str, Any]) -> None:
    """Begin the run or go on with it, unless it is done."""
    folder = Path(values["output_dir"])
    file = folder / "run.json"
    if file.exists() and read_json(file)["state"] == "done":
        return
    arguments = Config.model_validate(values).model_dump()
    with Progress() as progress:
        train(**arguments, resume=folder.exists(), progress=progress)


def everything(
    name: str, arms: Sequence[str], orders: Sequence[int], seeds: Sequence[int],
    rates: Sequence[float],
) -> None:  # fmt: skip
    setting = settings(name)
    for seed in seeds or setting.seeds:
        for order in orders or setting.orders:
            for arm in arms:
                if arm == "joint" and order != 0:
                    continue  # it has none
                for rate in rates or [setting.rates[ARMS[arm]["method"]]]:
                    one = f"{arm}-{rate:g}-{order}-{seed}"
                    file, home = RESULTS / name / f"{one}.json", RUNS / name / one
                    if file.exists():
                        continue
                    print(f"--- {name}: {one}", flush=True)
                    if arm == "joint":
                        found = joint(setting, rate, seed, home)
                    else:
                        found = sequence(setting, arm, rate, order, seed, home)
                    write_json(file, found)
                    shutil.rmtree(home, ignore_errors=True)


# --- the page


def outcomes(name: str) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """By arm and rate, every sequence that there is."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for path in sorted((RESULTS / name).glob("*.json")):
        one = read_json(path)
        found.setdefault((one["arm"], one["rate"]), []).append(one)
    return dict(sorted(found.items(), key=lambda item: (list(ARMS).index(item[0][0]), item[0][1])))


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    kept = [value for value in values if value is not None]
    if not kept:
        return ""
    mean = sum(kept) / len(kept)
    if len(kept) == 1:
        return f"{mean:.{digits}f}"
    deviation = (sum((value - mean) ** 2 for value in kept) / (len(kept) - 1)) ** 0.5
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def summary(name: str) -> Table:
    """Over orders and seeds: mean and standard deviation of each figure."""
    head = ["method", "rate", "sequences", "overall", "backward transfer", "forward transfer",
            "KL from the base", "rank"]  # fmt: skip
    found = outcomes(name)
    first = next(iter(found.values()))[0]
    base = sum(first["base"]) / len(first["base"])
    rows = [[SAID["zero-shot"], "", "", f"{base:.3f}", "", "", "0", ""]]
    for (arm, rate), every in found.items():
        columns = [
            spread([one[key] for one in every])
            for key in ("overall", "backward_transfer", "forward_transfer", "kl")
        ]
        rows.append([SAID[arm], f"{rate:g}", str(len(every)), *columns, str(every[0]["ranks"][-1])])
    return Table(head, rows)


def plot(name: str) -> Any:
    """Score per task over the sequence, first order, mean over seeds: a panel for each arm."""
    import matplotlib.pyplot as plt

    found = [
        (arm, [one for one in every if one["order"] == list(ORDERS[0])])
        for (arm, _), every in outcomes(name).items()
        if arm != "joint"
    ]
    found = [(arm, every) for arm, every in found if every]
    columns = 3
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(9, 2.4 * rows), sharex=True, sharey=True, squeeze=False
    )
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, (arm, every) in zip(axes.flat, found, strict=False):
        for place, (task, colour) in enumerate(zip(every[0]["tasks"], COLOURS, strict=False)):
            stages = [
                sum(([one["base"], *one["matrix"]])[stage][place] for one in every) / len(every)
                for stage in range(len(every[0]["matrix"]) + 1)
            ]
            axis.plot(stages, color=colour, marker="o", markersize=3, label=task)
            axis.plot([place + 1], [stages[place + 1]], "o", color=colour, markersize=8, alpha=0.3)
        axis.set_title(SAID[arm], fontsize=8)
        axis.set_xticks(range(5), ["base", *every[0]["tasks"]], fontsize=7, rotation=20)
        axis.tick_params(labelbottom=True)
        axis.set_ylim(0, 1)
    axes[0][0].set_ylabel("accuracy")
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def docs() -> None:
    """Write the tables between the markers of docs/results.md, and the plots beside the JSON."""
    there = [name for name in ("llama", "smollm2") if (RESULTS / name).is_dir()]
    fill(Path("docs/results.md"), {f"sequence {n}": markdown(summary(n)) for n in there})
    for name in there:
        with inked():
            write_text(RESULTS / f"{name}.svg", standalone(svg(plot(name))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["llama", "smollm2", "try", "docs"])
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--orders", default="", help="0, 1 or both; default: of the model")
    parser.add_argument("--seeds", default="", help="default: of the model")
    parser.add_argument("--rates", default="", help="default: each method's own")
    given = parser.parse_args()
    os.chdir(ROOT)
    if given.name == "docs":
        docs()
        return
    require_data()
    numbers = [[int(x) for x in text.split(",") if x] for text in (given.orders, given.seeds)]
    rates = [float(x) for x in given.rates.split(",") if x]
    everything(given.name, given.arms.split(","), *numbers, rates)
    if given.name == "try":
        print("\n".join(markdown(summary("try"))))


if __name__ == "__main__":
    main()
