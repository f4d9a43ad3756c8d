"""`milora report`: one page about a run, for someone who did not train it.

Everything is read from the run folder's JSON; nothing is computed by the model again. The page
needs no network, and text from data or models stands in it as text.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from milora.card import BASE_NOTE, kept_scores, load_code, short, task_scores, vllm, writes_gguf
from milora.compare_page import COLOURS, Table
from milora.errors import UserError
from milora.files import read_lines, read_yaml
from milora.gates import read_finished
from milora.inspect_page import heat, spectra_panels
from milora.matrices import kind_of
from milora.pages import inked, inline, render, svg
from milora.progress import duration
from milora.recommended import decisive
from milora.transfer import table

LANGUAGES = ("en", "ja")
ANSWERS, LONGEST = 10, 600  # side by side; characters of each


def report(run: Path, lang: str = "en") -> str:
    """The page of a finished run, in one of LANGUAGES. Raises UserError where there is no run."""
    if lang not in LANGUAGES:
        raise UserError(f"--lang {lang}: use one of {', '.join(LANGUAGES)}")
    record, evaluation = read_finished(run, "config.yaml")
    asked = read_yaml(run / "config.yaml")
    config = (run / "config.yaml").read_text(encoding="utf-8")
    words = _words(lang)
    samples, metrics = (
        read_lines(run / name) if (run / name).exists() else []
        for name in ("samples.jsonl", "metrics.jsonl")
    )
    learned = task_scores(evaluation["tasks"], "{:.3f} ({:.3f}–{:.3f})", words)
    head = [words["measure"], words["base"], words["tuned"]]
    rank = record.get("adapter", {}).get("rank")
    base = record["base"]
    # Neither library nor server finds the bundled model, or a GGUF, by the name that milora does.
    named = base["name"] not in BASE_NOTE and not base["model"].endswith(".gguf")
    place = base["model"] if named else "path/of/the/base"
    return render(
        "report.html", lang=lang, t=words, record=record, config=config, rank=rank,
        name=Path(asked["output_dir"]).name,
        lead=_lead(record, rank, words),
        cards=_cards(record, evaluation, words),
        scores=Table(head, [list(row) for row in learned]),
        kept=Table(head, [list(row) for row in kept_scores(evaluation["knowledge"], words)]),
        chain=_chain(evaluation.get("continual"), words),
        asked=_asked(record, asked),
        data=_data(record["data"], words),
        loss=_drawn(_loss_plot, metrics, words["curves"]),
        spectra=_drawn(_spectra_plot, record.get("spectra"), words["spectra"]),
        interference=_interference(record.get("interference"), words),
        answers=_answers(samples, words),
        cost=_cost(record, words),
        load="\n".join(load_code(record, json.dumps(place), '"adapter"')),
        bundled=base["name"] in BASE_NOTE,
        vllm="\n".join(vllm(rank, place, "adapter")[0]) if rank else "",
        gguf=writes_gguf(base),
    )  # fmt: skip


def _words(lang: str) -> dict[str, str]:
    text = files("milora").joinpath("templates/report.yaml").read_text(encoding="utf-8")
    return {key: by_language[lang] for key, by_language in yaml.safe_load(text).items()}


def _lead(record: Mapping[str, Any], rank: int | None, words: Mapping[str, str]) -> list[str]:
    values = {
        "method": record["method"], "base": record["base"]["name"], "rank": rank,
        "rows": f"{record['data']['train']['kept']:,}",
    }  # fmt: skip
    key = "lead" if rank else "lead_full"
    if merged := record.get("merged"):
        key, values["layers"] = "lead_merged", ", ".join(merged["rows_of"])
    lead = [words[key].format(**values)]
    if error := record.get("adapter", {}).get("cut", {}).get("summed_error"):
        lead.append(words["lead_cut"].format(error=f"{error:.1e}"))
    if "stopped" in record:
        stopped = record["stopped"]
        lead.append(
            words["stopped"].format(step=stopped["step"], limit=stopped["interference_limit"])
        )
    return lead


def _chain(found: Mapping[str, Any] | None, words: Mapping[str, str]) -> dict[str, Any] | None:
    """Every release on every task, where they were evaluated."""
    if found is None:
        return None
    keys = ("overall", "backward_transfer", "forward_transfer")
    said = [f"{words[key]}: {found[key]:.3f}" for key in keys if found[key] is not None]
    return {"table": Table(*table(found)), "said": said}


def _cards(
    record: Mapping[str, Any], evaluation: Mapping[str, Any], words: Mapping[str, str]
) -> list[tuple[str, str]]:
    """The few figures that a reader in a hurry wants: (figure, what it is)."""
    cards = []
    for name, task in list(evaluation["tasks"].items())[:3]:
        if "accuracy" in task["tuned"]:
            pair = f"{task['base']['accuracy']:.3f} → {task['tuned']['accuracy']:.3f}"
            cards.append((pair, words["summary_accuracy"].format(name=name)))
    for kept in evaluation["knowledge"][:2]:
        far = "moved" if "moved" in kept else "kl"
        if kept[far] is not None:
            word = "summary_moved" if far == "moved" else "summary_kl"
            label = words[word].format(text=short(kept["text"]))
            cards.append((f"{kept[far]:.4f}", label))
    gates = record.get("gates", [])
    if gates:
        held = sum(gate["holds"] for gate in gates)
        cards.append((f"{held} / {len(gates)}", words["summary_gates"]))
    if "training" in record["seconds"]:
        cards.append((duration(record["seconds"]["training"]), words["summary_time"]))
    cards.append((f"{record['parameters']['trainable']:,}", words["summary_parameters"]))
    return cards


def _asked(record: Mapping[str, Any], asked: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings that decide the result: (key, value)."""
    base = record["base"]
    chosen: list[tuple[str, Any]] = [
        ("method", asked["method"]),
        ("model", f"{base['name']} ({base['dtype']}, {base['license']})"),
    ]
    if asked["method"] != "full":
        chosen += [(f"lora.{key}", value) for key, value in asked["lora"].items()]
        chosen += decisive(asked.get("milora", {}))
    chosen += [(f"continue.{key}", v) for key, v in asked.get("continue", {}).items() if v]
    chosen += [(f"tokenizer.{key}", v) for key, v in asked.get("tokenizer", {}).items() if v]
    chosen += [(f"training.{key}", value) for key, value in asked["training"].items()]
    chosen += [("seed", asked["seed"]), ("data.max_length", asked["data"]["max_length"])]
    return [(key, _plain(value)) for key, value in chosen]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _data(data: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    train = data["train"]
    refused = sum(train["refused"].values())
    reasons = "; ".join(f"{reason} ({count})" for reason, count in train["refused"].items())
    return {
        "lines": [
            words["data_rows"].format(
                train=train["kept"], eval=data["eval"]["kept"], format=data["format"]
            ),
            words["data_cut"].format(
                shortened=train["shortened"], skipped=data["skipped"],
                refused=f"{refused} ({reasons})" if reasons else refused,
            ),
            words["data_overlap"].format(overlap=data["overlap"]),
            *(
                words["data_test"].format(task=task, **counts)
                for task, counts in data.get("test_overlap", {}).items()
            ),
            words["data_tokens"].format(
                tokens=f"{train['tokens']:,}", trained=f"{train['trained_tokens']:,}"
            ),
        ],
        "files": Table(
            [words["file"], "sha256"], [[name, sha[:16]] for name, sha in data["sha256"].items()]
        ),
    }  # fmt: skip


def _interference(
    found: Mapping[str, Any] | None, words: Mapping[str, str]
) -> dict[str, Any] | None:
    if not found:
        return None
    rows = []
    for name, one in found["layers"].items():
        parts = [part for part in name.split(".") if part.isdigit()]
        rows.append(
            {"kind": kind_of(name), "layer": int(parts[0]) if parts else 0,
             "rho": max(one["left"], one["right"])}
        )  # fmt: skip
    counts = sorted({one["k"] for one in found["layers"].values()})
    protected = sum(one["protected"] > 0 for one in found["layers"].values())
    said = [
        words["interference_said"].format(
            k=str(counts[0]) if len(counts) == 1 else f"{counts[0]}–{counts[-1]}",
            max=f"{100 * found['max']:.3g} %", module=found["module"],
        ),
        words["size"].format(size=f"{100 * found['size']:.3g} %"),
    ]  # fmt: skip
    if protected:
        said.append(words["protected_said"].format(count=protected, all=len(found["layers"])))
    # On a scale that begins at a hundredth, so that what protection leaves is not coloured.
    return {"said": said, "heat": heat(rows, "rho", least=0.01)}


def _answers(
    samples: Sequence[Mapping[str, Any]], words: Mapping[str, str]
) -> list[dict[str, str]]:
    """What changed first: better, worse, then the rest, in turn."""
    usable = [sample for sample in samples if "prompt" in sample]
    groups: dict[int, list[Mapping[str, Any]]] = {1: [], -1: [], 0: []}
    for sample in usable:
        groups[_right(sample, "tuned") - _right(sample, "base")].append(sample)
    chosen: list[Mapping[str, Any]] = []
    while len(chosen) < ANSWERS and any(groups.values()):
        for group in groups.values():
            if group and len(chosen) < ANSWERS:
                chosen.append(group.pop(0))
    return [
        {
            "question": _cut(sample["prompt"]),
            "reference": _cut(
                sample["options"][sample["right"]] if "options" in sample else sample["reference"]
            ),
            **{state: _said(sample, state) for state in ("base", "tuned")},
            **{f"{state}_verdict": _verdict(sample, state, words) for state in ("base", "tuned")},
        }
        for sample in chosen
    ]


def _right(sample: Mapping[str, Any], state: str) -> int:
    if "options" in sample:
        return int(sample[state]["likeliest"] == sample["right"])
    return int(sample[state].get("verdict") == "right")


def _said(sample: Mapping[str, Any], state: str) -> str:
    if "options" in sample:
        place = sample[state]["likeliest"]
        return _cut("" if place is None else sample["options"][place])
    return _cut(sample[state]["answer"])


def _verdict(sample: Mapping[str, Any], state: str, words: Mapping[str, str]) -> str:
    if "options" in sample:
        return words["right" if _right(sample, state) else "wrong"]
    verdict = sample[state].get("verdict")
    return words[verdict] if verdict else ""


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def _cost(record: Mapping[str, Any], words: Mapping[str, str]) -> Table:
    rows = [
        [words["cost_time"].format(part=words[part]), duration(seconds)]
        for part, seconds in record["seconds"].items()
    ]
    if "peak_memory_bytes" in record:
        rows.append([words["cost_memory"], f"{record['peak_memory_bytes'] / 1e9:.2f} GB"])
    sizes = record["parameters"]
    rows.append([words["cost_parameters"], f"{sizes['trainable']:,} / {sizes['all']:,}"])
    rows.append([words["cost_energy"], words["not_measured"]])
    return Table([words["cost_item"], words["cost_value"]], rows)


def _drawn(draw: Any, figures: Any, label: str) -> str | None:
    """The plot for within the page; "" where there is nothing to draw, None without matplotlib."""
    if not figures:
        return ""
    try:
        with inked():
            return inline(draw(figures), label)
    except ImportError:
        return None


def _loss_plot(metrics: Sequence[Mapping[str, Any]]) -> str:
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(7.2, 2.9), layout="constrained")
    panel = sheet.subplots()
    for key, style in (("loss", {"lw": 1.4}), ("eval_loss", {"lw": 0, "marker": "o", "ms": 5})):
        lines = [line for line in metrics if key in line]
        panel.plot(
            [line["step"] for line in lines], [line[key] for line in lines],
            color=COLOURS[key == "eval_loss"], **style,
        )  # fmt: skip
    panel.set_ylim(bottom=0)
    return svg(sheet)


def _spectra_plot(spectra: Mapping[str, Any]) -> str:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for name, one in spectra.items():
        kinds.setdefault(kind_of(name), []).append(one)
    sheet, panels = spectra_panels(list(kinds))
    for kind, weights in kinds.items():
        for place, one in enumerate(weights):
            for key, style in (("before", ":"), ("after", "-")):
                places, values = zip(*one[key], strict=True)
                panels[kind].plot(
                    places, values, style, lw=1.1, color=COLOURS[place % len(COLOURS)]
                )
    return svg(sheet)
