"""Methods compared on real weights and real tasks: `milora compare`, with its settings written out.

    python benchmarks/comparison.py smollm2-trec     one comparison; goes on where it stopped
    python benchmarks/comparison.py llama-trec       on the model of small_llama.py
    python benchmarks/comparison.py minilm-trec      the same grid over sentence_classifier.py
    python benchmarks/comparison.py docs             the tables of docs/results.md
    python benchmarks/comparison.py smollm2-trec --arms milora,lora
                                                     a part of it, as one of several processes

What each run came to lies in benchmarks/results/comparison/NAME and is committed, so that a grid
goes on from there on any machine; run folders lie beside it and are not.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from small_llama import HELD_OUT, MODEL
from tables import fill, has_place
from tasks import ROOT, graded, kept_tasks, require_data, task_files, text_file
from variants import is_variant
from variants import run as variant

from milora.compare import (
    Arm,
    Outcome,
    compare,
    grid,
    measure_of,
    parse_arm,
    run_name,
    spread,
    summary,
    trained,
    write,
)
from milora.compare_page import Table, equal_score, markdown, plus_minus, scores, tables
from milora.config import Config
from milora.files import read_json, write_json, write_text
from milora.progress import Progress
from milora.recommended import PUBLISHED

RESULTS = Path("benchmarks/results/comparison")
SEEDS = (0, 1, 2)
ONE_SEED = ("smollm2held", "smollm2texts")  # a confirmation of what the smaller models show


def settings(model: str, output: str, files: dict[str, str], epochs: int) -> dict[str, Any]:
    """What the comparisons of causal models share."""
    return {
        "model": model,
        "output_dir": str(RESULTS / output),
        "data": {"train": files["train"], "eval": files["held_out"], "max_length": 256},
        "lora": {"r": 16, "lora_alpha": 16},
        "milora": dict(PUBLISHED),  # what an arm has beside it, it says
        "training": {
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 16,
            "save_strategy": "no",
            "train_sampling_strategy": "group_by_length",
        },
    }


def smollm2(task: str, name: str = "smollm2") -> dict[str, Any]:
    """640 rows, 40 steps of 16."""
    files = task_files(task, 640, 160, 200)
    return bfloat16(f"{name}-{task}", files, [graded(task, files["test"]), *kept_tasks(200)])


def bfloat16(
    output: str, files: dict[str, str], tasks: list[Any], **evaluate: Any
) -> dict[str, Any]:
    """SmolLM2 as it is, 16-bit weights, which the anchor leaves exact."""
    texts = [text_file("wikitext2_test.txt"), text_file("c4_demo.jsonl")]
    shared = settings("smollm2-135m", output, files, epochs=1)
    given = {"tasks": tasks, "knowledge": texts, "chunks": 8, **evaluate}
    return shared | {"dtype": "bfloat16", "evaluate": given}


def llama(task: str, name: str = "llama") -> dict[str, Any]:
    """1,500 rows three times, 282 steps of 16, fp32; kept is the loss of pretraining."""
    if not (MODEL / "model.safetensors").exists():
        sys.exit(f"{MODEL} is not there: python benchmarks/small_llama.py")
    files = task_files(task, 1500, 300, 500)
    evaluate = {
        "tasks": [graded(task, files["test"])],
        "knowledge": [str(HELD_OUT), text_file("wikitext2_test.txt")],
        "chunks": 16,
    }
    return settings(str(MODEL), f"{name}-{task}", files, epochs=3) | {"evaluate": evaluate}


# A decay that shrinks A and B by a tenth to a third over the run, at the rates that LoRA wants.
SMOLLM2 = ("lora", "milora", "pissa", "random", "middle", "lora:training.weight_decay=3")
SMALL = ("lora", "milora", "pissa", "random", "middle", "lora:training.weight_decay=1", "full")

# Protection: k of the 256 directions of the small Llama, of which r = 16 are the adapter's.
HELD = tuple(
    f"{method}:milora.protect={k}" for method in ("milora", "lora") for k in (0, 16, 64, 240)
)
HELD_256 = tuple(arm.replace("240", "256") for arm in HELD)
WATCHED = {"milora": {**PUBLISHED, "interference": {"top": 64}}}  # or in all that are protected


def held(task: str) -> dict[str, Any]:
    return llama(task, "held") | WATCHED


def llamafronts(task: str, name: str = "llamafronts") -> dict[str, Any]:
    return llama(task, name) | {"milora": {**PUBLISHED, "text": "sampled"}}


def llamakeep(task: str) -> dict[str, Any]:
    return llamafronts(task, "llamakeep")


def smollm2fronts(task: str) -> dict[str, Any]:
    """Without the likelihood tasks, which take longer than all the rest; more rows of the test."""
    whole = {"polarity": 1000, "trec": 500, "mawps": 234}[task]
    files = task_files(task, 640, 160, whole, f"{task}-640-{whole}")
    tasks = [graded(task, files["test"])]
    values = bfloat16(f"smollm2fronts-{task}", files, tasks, batch_size=128)
    return values | {"milora": {**PUBLISHED, "text": "sampled"}}


def smollm2float32(task: str) -> dict[str, Any]:
    """As `smollm2fronts`, computed in fp32, for machines without bfloat16 in hardware."""
    values = smollm2fronts(task)
    values["output_dir"] = str(RESULTS / f"smollm2float32-{task}")
    return values | {"dtype": "float32"}


def smollm2large(task: str) -> dict[str, Any]:
    """3,200 rows, 200 steps of 16."""
    files = task_files(task, 3200, 160, {"gsm8k": 256, "commonsense": 1000}[task])
    tasks = [graded(task, files["test"])]
    at_once = {"gsm8k": 128, "commonsense": 64}[task]  # passages are long
    values = bfloat16(f"smollm2large-{task}", files, tasks, chunks=16, batch_size=at_once)
    values["data"]["max_length"] = 384
    return values


def smollm2texts(task: str) -> dict[str, Any]:
    """On a third text too, which is neither the one that the runs know nor like it."""
    files = task_files(task, 640, 160, 200)
    values = bfloat16(f"smollm2texts-{task}", files, [graded(task, files["test"])])
    values["evaluate"]["knowledge"].append("default")
    return values | {"milora": {**PUBLISHED, "text": text_file("wikitext2_valid.txt")}}


def smollm2held(task: str) -> dict[str, Any]:
    return smollm2(task, "smollm2held") | WATCHED


# Who forgets less at equal score: each constraint, and all together; all seeds at every rate.
KEEP, INPUTS, BALANCED = "milora.keep.weight", "milora.protect_inputs=64", "milora.start=balanced"
RECOMMENDED = f"milora:{BALANCED}:{INPUTS}:milora.text=sampled"  # what `method: milora` does
DORA, MICA = "lora:lora.use_dora=true", "lora:lora.init_lora_weights=mica"  # PEFT's own
FRONTS = (
    "lora",
    "lora:training.weight_decay=3",
    DORA,
    MICA,
    f"lora:{INPUTS}",
    "milora",
    RECOMMENDED,
    f"milora:{BALANCED}:{KEEP}=1",
)
LLAMA_FRONTS = tuple(arm.replace("decay=3", "decay=1") for arm in FRONTS)
LARGE = ("lora", "lora:training.weight_decay=3", "milora", RECOMMENDED)
TEXTS = tuple(
    f"milora:{BALANCED}:{held}{text}"
    for held in (INPUTS, f"{KEEP}=1")
    for text in ("", ":milora.text=sampled")  # WikiText-2's validation set, else
)
# KL to the base in the loss: how often, and beside inputs that are held.
OFTEN = (
    RECOMMENDED,
    f"lora:{KEEP}=1",
    f"milora:{BALANCED}:{KEEP}=1",
    f"milora:{BALANCED}:{KEEP}=1:milora.keep.every=4",
    f"{RECOMMENDED}:{KEEP}=1",
    f"{RECOMMENDED}:{KEEP}=1:milora.keep.every=4",
)
MINILM_FRONTS = (
    "lora",
    "lora:training.weight_decay=1",
    DORA,
    MICA,
    f"lora:{INPUTS}",
    f"lora:{KEEP}=10",
    "lora:milora.protect=64",
    "milora",
    "milora:training.weight_decay=1",
    f"milora:{BALANCED}",
    "milora:milora.start=directions",
    f"milora:{BALANCED}:{INPUTS}",
    f"milora:{BALANCED}:{KEEP}=10",
    f"milora:milora.protect=64:{BALANCED}:{INPUTS}:{KEEP}=10",
)
FRONT_NAMES = {
    "lora": "lora",
    DORA: "DoRA",
    MICA: "MiCA",
    f"lora:{INPUTS}": "lora, inputs held",
    "milora": "milora, published",
    RECOMMENDED: "milora, the default",
    f"milora:{BALANCED}:{INPUTS}": "milora, the default",  # of MiniLM, which writes no text
    f"milora:{BALANCED}:{KEEP}=1": "milora, keep",
    f"milora:{BALANCED}:{KEEP}=10": "milora, keep",
}
# The published start, whose factors are large, wants a third of the rate that the others want.
SMALLER = {3e-3: 1e-3, 1e-3: 3e-4, 1e-2: 3e-3}
EVERY_RATE = ("smollm2fronts", "smollm2float32", "llamafronts", "minilmfronts")
NOT_WIDENED = (*EVERY_RATE, "smollm2large")  # minutes of a GPU a run

# By the first part of the name: arms, rates, tasks. The rates are widened where they must be.
COMPARISONS = {
    "smollm2fronts": (FRONTS, (1e-3, 3e-3, 1e-2), ("polarity", "trec", "mawps")),
    "smollm2float32": (FRONTS, (1e-3, 3e-3, 1e-2), ("trec",)),
    "llamafronts": (LLAMA_FRONTS, (1e-3, 3e-3, 1e-2), ("trec", "subjectivity", "polarity")),
    "minilmfronts": (MINILM_FRONTS, (1e-4, 3e-4, 1e-3, 3e-3), ("trec", "subjectivity", "polarity")),
    "smollm2large": (LARGE, (1e-3, 3e-3), ("gsm8k", "commonsense")),
    "smollm2texts": (TEXTS, (1e-3,), ("polarity",)),
    "llamakeep": (OFTEN, (3e-3,), ("trec",)),
    "smollm2": (SMOLLM2, (1e-4, 3e-4, 1e-3), ("trec", "mawps", "polarity")),
    "smollm2held": (HELD_256, (1e-4, 3e-4, 1e-3), ("trec", "polarity")),
    "llama": (SMALL, (3e-4, 1e-3, 3e-3), ("trec", "subjectivity")),
    "held": (HELD, (3e-4, 1e-3, 3e-3), ("trec", "polarity")),
    "minilm": (SMALL, (3e-4, 1e-3, 3e-3), ("trec", "subjectivity", "polarity")),
    "minilmheld": (HELD_256, (3e-4, 1e-3, 3e-3), ("trec", "polarity")),
}
NAMES = [f"{model}-{task}" for model, (_, _, tasks) in COMPARISONS.items() for task in tasks]


def causal(
    values: dict[str, Any], arms: Sequence[str], rates: Sequence[float], seeds: Sequence[int],
    every_rate: bool,
) -> dict[str, Any]:  # fmt: skip
    """A comparison by `milora compare` itself."""
    home = Path(values["output_dir"])
    widened = not _of_fronts(home.name)
    for folder in home.glob("*/"):  # a finished run is all in its file
        if folder.with_name(folder.name + ".json").exists():
            shutil.rmtree(folder, ignore_errors=True)  # another process may be at it
    config = Path("build") / f"{home.name}.yaml"
    write_text(config, yaml.safe_dump(values, sort_keys=False))
    with Progress() as progress:
        return compare(
            config, [], [armed(arm, rates, widened) for arm in arms], seeds, rates, progress,
            widen=widened and len(rates) > 1, every_rate=every_rate, make=made,
        )  # fmt: skip


def armed(arm: str, rates: Sequence[float], widened: bool) -> Arm:
    """With the rates of its own, where these would not be found by widening."""
    smaller = arm == "milora" and not widened
    return parse_arm(arm)._replace(rates=tuple(SMALLER[rate] for rate in rates) if smaller else ())


def made(settings: Config, progress: Progress) -> Outcome:
    return variant(settings, progress) if is_variant(settings) else trained(settings, progress)


def minilm(
    name: str, arms: Sequence[str], rates: Sequence[float], seeds: Sequence[int], every_rate: bool
) -> dict[str, Any]:
    """The same grid, summary and page, over runs of sentence_classifier.py.

    What stands for the base is a head trained on the untouched encoder.
    """
    from sentence_classifier import run

    home, task = RESULTS / name, name.split("-")[1]
    home.mkdir(parents=True, exist_ok=True)

    def one(arm: Arm, rate: float, seed: int) -> dict[str, Any]:
        file = home / f"{run_name(arm.name, rate, seed)}.json"
        if not file.exists():
            write_json(file, run(task, arm.overrides, rate, seed))
        return read_json(file)

    untouched = home / "head.json"
    if not untouched.exists():
        write_json(untouched, run(task, ["method=head"], 0.0, 0))
    with Progress() as progress:
        outcomes = grid(
            [parse_arm(arm) for arm in arms],
            seeds,
            rates,
            one,
            progress,
            not every_rate,
            every_rate,
        )
        head = read_json(untouched)["evaluation"]["tasks"][task]["tuned"]
        for outcome in outcomes.values():
            outcome["evaluation"]["tasks"][task]["base"] = head
        result = summary(outcomes, seeds)
        write(result, home, progress)
    return result


def docs() -> None:
    """Write what there is between the markers of docs/results.md and the README."""
    found = {
        name: read_json(RESULTS / name / "compare.json")
        for name in NAMES
        if (RESULTS / name / "compare.json").exists()
    }
    parts = {
        name: [*markdown(scores(result)), "", _notes(result)] for name, result in found.items()
    }
    for name, result in found.items():
        if equal := equal_score(result):
            parts[f"{name}, equal score"] = markdown(equal)
    fronts = {name: result for name, result in found.items() if _of_fronts(name)}
    others = {name: result for name, result in found.items() if name not in fronts}
    parts["comparison"] = markdown(against_lora(others))
    shown = ("lora", DORA, MICA, "milora", RECOMMENDED, f"milora:{BALANCED}:{KEEP}=1")
    parts["by rate"] = markdown(by_rate(("smollm2fronts", "smollm2float32"), shown))
    parts["larger"] = markdown(by_rate(("smollm2large",), LARGE))
    parts["fronts"] = markdown(at_own_rates(fronts))
    parts["equal rates"] = markdown(at_equal_rates())
    parts["short"] = markdown(briefly(others))
    parts["default"] = markdown(briefly(fronts))
    for page in (Path("docs/results.md"), Path("README.md")):
        text = page.read_text(encoding="utf-8")
        fill(page, {name: lines for name, lines in parts.items() if has_place(text, name)})


def _notes(result: dict[str, Any]) -> str:
    edges = [arm for arm, one in result["arms"].items() if one["at_the_edge"]]
    return f"At the edge of the rates tried: {', '.join(edges)}." if edges else ""


def against_lora(found: dict[str, dict[str, Any]]) -> Table:
    """For each comparison of methods: accuracy less LoRA's, and how far it moved beside LoRA."""
    head = ["comparison", "method", "accuracy", "less LoRA's (95 %)", "forgotten", "of LoRA's"]
    rows = []
    for name, result in found.items():
        if "lora" not in result["arms"]:
            continue  # of protection, which has a section of its own
        task = name.split("-")[1]
        own = {arm: one["knowledge"][0] for arm, one in result["arms"].items()}
        key = measure_of(own["lora"])
        for arm, one in result["arms"].items():
            row = [name, _named(arm, _of_fronts(name))]
            row.append(plus_minus(one["tasks"][task]["accuracy"], 3))
            pair = [p for p in result["pairs"] if p["task"] == task]
            pair = [p for p in pair if (p["first"], p["second"]) == ("lora", arm)]
            row.append(
                f"{-pair[0]['difference']:+.3f} ({-pair[0]['interval'][1]:+.3f} to "
                f"{-pair[0]['interval'][0]:+.3f})" if pair else ""
            )  # fmt: skip
            row.append(plus_minus(own[arm][key], 3))
            row.append(
                "" if arm == "lora" else f"{own[arm][key]['mean'] / own['lora'][key]['mean']:.2f}"
            )
            rows.append(row)
    return Table(head, rows)


def _of_fronts(name: str) -> bool:
    return name.split("-")[0] in NOT_WIDENED


def _named(arm: str, fronts: bool) -> str:
    plain = arm.partition(":")[0] + (" + decay" if ":" in arm else "")
    return FRONT_NAMES.get(arm, plain) if fronts else plain


def at_own_rates(fronts: dict[str, dict[str, Any]]) -> Table:
    """LoRA, the default and those that stand for the rest, each at its own rate."""
    own = {}
    for name, result in fronts.items():
        arms = {
            arm: one
            for arm, one in result["arms"].items()
            if arm in FRONT_NAMES or ("weight_decay" in arm and arm.startswith("lora"))
        }
        own[name] = {**result, "arms": arms}
    return against_lora(own)


def by_rate(models: Sequence[str], arms: Sequence[str]) -> Table:
    """What `arms` came to at every rate, with as many seeds as there are."""
    head, rows = ["comparison", "arm", "rate", "seeds", "held-out loss", "accuracy"], []
    head += ["loss", "KL, WikiText-2 test", "KL, C4"]
    names = [f"{model}-{task}" for model in models for task in COMPARISONS[model][2]]
    for name, arm in [(name, arm) for name in names for arm in arms]:
        task = name.split("-")[1]
        for rate, of in runs_by_rate(name, arm):
            tuned = [one["evaluation"]["tasks"][task]["tuned"] for one in of]
            figures = [
                [one["held_out_loss"] for one in of],
                [one["accuracy"] for one in tuned],
                [one["loss"] for one in tuned],
                *([one["evaluation"]["knowledge"][i]["kl"] for one in of] for i in range(2)),
            ]
            told = [plus_minus(spread(values), 4) for values in figures]
            rows.append([name, _named(arm, True), f"{rate:g}", str(len(of)), *told])
    return Table(head, rows)


def runs_by_rate(name: str, arm: str, seed: int | str = "*") -> list[tuple[float, list[Outcome]]]:
    """The runs of an arm that there are, of all seeds or one, from the smallest rate on."""
    begin, found = run_name(arm, 0.5, 0).removesuffix("0.5-0"), dict[float, list[Outcome]]()
    for path in sorted((RESULTS / name).glob(f"{begin}[0-9]*-{seed}.json")):
        rate, _, _ = path.stem.removeprefix(begin).rpartition("-")
        found.setdefault(float(rate), []).append(read_json(path))
    return sorted(found.items())


def at_equal_rates() -> Table:
    """For every rate of the first seed: forgotten under protection, as a share of that without."""
    head = ["comparison", "method", "rate", "forgotten without"]
    head += [f"with k = {k}" for k in ("16", "64", "240 or 256")]
    rows = []
    for name in [name for name in NAMES if "held" in name]:
        task = name.split("-")[1]
        for method in ("lora", "milora"):
            at: dict[float, dict[int, Any]] = {}
            for k in (0, 16, 64, 240, 256):
                for rate, (one,) in runs_by_rate(name, f"{method}:milora.protect={k}", SEEDS[0]):
                    at.setdefault(rate, {})[k] = one["evaluation"]
            for rate, of in sorted(at.items()):
                if 0 in of and len(of) == 4:
                    (free, right), *rest = [_kept_and_right(of[k], task) for k in sorted(of)]
                    row = [name, method, f"{rate:g}", f"{free:.3f}"]
                    rows.append(row + [f"{f / free:.2f} ({r - right:+.3f})" for f, r in rest])
    return Table(head, rows)


def _kept_and_right(evaluation: dict[str, Any], task: str) -> tuple[float, float]:
    kept = evaluation["knowledge"][0]
    return kept["kl" if "kl" in kept else "moved"], evaluation["tasks"][task]["tuned"]["accuracy"]


def briefly(found: dict[str, dict[str, Any]]) -> Table:
    """LoRA and another alone, MiLoRA as published or, of the fronts, the default."""
    head = ["comparison", "LoRA: accuracy, forgotten", "MiLoRA: accuracy, forgotten"]
    rows = []
    for name, result in found.items():
        task, arms = name.split("-")[1], result["arms"]
        other = RECOMMENDED if _of_fronts(name) else "milora"
        if "lora" in arms and other in arms:
            row = [name]
            for arm in ("lora", other):
                kept = arms[arm]["knowledge"][0]
                score = plus_minus(arms[arm]["tasks"][task]["accuracy"], 3)
                row.append(f"{score}, {plus_minus(kept[measure_of(kept)], 3)}")
            rows.append(row)
    return Table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=[*NAMES, "docs"])
    parser.add_argument("--arms", help="comma-separated, some of those of the comparison")
    parser.add_argument("--rates", help="comma-separated, some of those of the comparison")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="the first are enough")
    given = parser.parse_args()
    name = given.name
    os.chdir(ROOT)
    if name == "docs":
        docs()
        return
    require_data()
    model, task = name.split("-")
    arms, rates, _ = COMPARISONS[model]
    if given.arms:
        arms = tuple(arm for arm in arms if arm in given.arms.split(","))
    if given.rates:
        rates = tuple(rate for rate in rates if rate in map(float, given.rates.split(",")))
    seeds = [int(seed) for seed in given.seeds.split(",")]
    seeds = seeds[:1] if model in ONE_SEED else seeds
    if model.startswith("minilm"):
        result = minilm(name, arms, rates, seeds, model in EVERY_RATE)
    else:
        of = {
            "smollm2": smollm2, "smollm2held": smollm2held, "smollm2fronts": smollm2fronts,
            "smollm2float32": smollm2float32, "smollm2large": smollm2large,
            "smollm2texts": smollm2texts,
            "llama": llama, "llamafronts": llamafronts, "llamakeep": llamakeep, "held": held,
        }  # fmt: skip
        every = model in EVERY_RATE or len(rates) == 1
        result = causal(of[model](task), arms, rates, seeds, every)
    print(tables(result))


if __name__ == "__main__":
    main()
