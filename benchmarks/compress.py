"""Does a smaller base pay? Size, perplexity and tasks: original, compressed, and trained again.

    python benchmarks/compress.py                 SmolLM2-135M in all ways; goes on where it stopped
    python benchmarks/compress.py nf4 outputs-0.95 some of them
    python benchmarks/compress.py adapter         one run's adapter by rank, by budget, in 8 bits
    python benchmarks/compress.py docs            the tables of docs/compression.md

Each way has its JSON in benchmarks/results/compress. Trained again is MiLoRA on 128 pieces of
Wikipedia; the original is trained just so, since what it gains by that is no recovery. Measured on
WikiText-2 test, C4 and the likelihood of the right options of ARC-Easy and PIQA.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tables import fill
from tasks import BUILD, DATA, ROOT, kept_tasks, require_data, task_files, text_file

from milora.artefacts import export_run
from milora.compress import pack, principal_parts
from milora.config import Config
from milora.files import read_json, write_json, write_text
from milora.progress import Progress
from milora.recommended import PUBLISHED
from milora.smaller import EXACT, Smaller
from milora.train import train

RESULTS, RUNS = Path("benchmarks/results/compress"), Path("build/compress")
PAGE = Path("docs/compression.md")
MODEL, DTYPE = "smollm2-135m", "bfloat16"
PIECES, LONG = 128, 900  # rows to train on, and characters of each
WAYS = {
    "original": "the original",
    "int8": "`--bits 8`",
    "nf4": "`--bits 4`",
    "outputs-0.99": "`--energy 0.99`",
    "outputs-0.95": "`--energy 0.95`",
    "weights-0.9": "energy 0.9 of the weights",
}


def pieces() -> str:
    """Wikipedia as rows of plain text."""
    path = BUILD / "wiki-pieces.jsonl"
    text = (DATA / "general_text" / "wiki_demo.txt").read_text(encoding="utf-8")
    rows = [text[i : i + LONG] for i in range(0, len(text), LONG)]
    step = len(rows) // PIECES
    lines = [json.dumps({"text": row}) for row in rows[::step][:PIECES]]
    write_text(path, "\n".join(lines) + "\n")
    return str(path)


def compressed(way: str, folder: Path, progress: Progress) -> dict[str, Any]:
    """The model in `folder`, and what compress says of it."""
    kind, _, energy = way.partition("-")
    text = text_file("wikitext2_test.txt")
    if kind == "original":
        return {}
    if not energy:
        bits = {"int8": 8, "nf4": 4}[kind]
        return pack(MODEL, folder, bits, text, 8, DTYPE, progress=progress)
    found, loaded = principal_parts(
        MODEL, float(energy), text, 8, DTYPE, progress=progress, aware=kind == "outputs"
    )
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return found


def trained(
    home: Path, model: str, data: dict[str, str], r: int, rate: float, batch: int,
    evaluate: dict[str, Any], progress: Progress, **milora: Any,
) -> None:  # fmt: skip
    """One epoch of MiLoRA on `model`, in home/run."""
    values = {
        "model": model, "dtype": DTYPE, "output_dir": str(home / "run"),
        "data": {**data, "max_length": 256}, "lora": {"r": r, "lora_alpha": r},
        "training": {
            "learning_rate": rate, "num_train_epochs": 1, "per_device_train_batch_size": batch,
            "save_strategy": "no", "eval_strategy": "no",
        },
        "evaluate": evaluate, "milora": {**PUBLISHED, **milora},
    }  # fmt: skip
    train(**Config.model_validate(values).model_dump(), progress=progress)


def measured(way: str) -> dict[str, Any]:
    home = RUNS / way
    shutil.rmtree(home, ignore_errors=True)
    texts = [text_file("wikitext2_test.txt"), text_file("c4_demo.jsonl")]
    packed = {"factors_from": MODEL} if way in ("int8", "nf4") else {}
    with Progress() as progress:
        about = compressed(way, home / "model", progress)
        trained(
            home, str(home / "model") if about else MODEL, {"train": pieces()}, 32, 3e-4, 4,
            {"tasks": list(kept_tasks(100)), "chunks": 8, "knowledge": texts}, progress, **packed,
        )  # fmt: skip
    record, scores = read_json(home / "run/run.json"), read_json(home / "run/evaluation.json")
    return {
        "way": way, "compression": about, "base": record["base"], "seconds": record["seconds"],
        "tasks": {
            name: {state: one[state]["accuracy"] for state in ("base", "tuned")}
            for name, one in scores["tasks"].items()
        },
        "knowledge": [
            {key: one[key] for key in ("text", "base_perplexity", "tuned_perplexity")}
            for one in scores["knowledge"]
        ],
        "versions": record["versions"],
    }  # fmt: skip


SMALLER = {
    "as it was trained": EXACT,
    "`--max-error 0.01`": Smaller(max_error=0.01),
    "`--max-error 0.01 --spread`": Smaller(max_error=0.01, spread=True),
    "`--max-error 0.1`": Smaller(max_error=0.1),
    "`--max-error 0.1 --spread`": Smaller(max_error=0.1, spread=True),
    "`--rank 8`": Smaller(8),
    "`--rank 8 --spread`": Smaller(8, spread=True),
    "`--bits 8`": Smaller(bits=8),
    "`--rank 8 --spread --bits 8`": Smaller(8, spread=True, bits=8),
}


def adapter() -> list[dict[str, Any]]:
    """A run on TREC, its adapter made smaller in every way of SMALLER."""
    home, files = RUNS / "adapter", task_files("trec", 480, 80, 100)
    shutil.rmtree(home, ignore_errors=True)
    data = {"train": files["train"], "eval": files["held_out"]}
    evaluate = {"tasks": [], "knowledge": [text_file("wikitext2_test.txt")], "chunks": 4}
    found = []
    with Progress() as progress:
        trained(home, MODEL, data, 16, 1e-3, 8, evaluate, progress)
        for place, (said, smaller) in enumerate(SMALLER.items()):
            out = home / str(place)
            export_run(home / "run", out, "lora", smaller, progress=progress)
            about = read_json(out / "milora.json")
            own = about.get("approximation", {})
            found.append({
                "how": said, "rank": about["rank"],
                "ranks": sorted(set(own.get("ranks", {"": about["rank"]}).values())),
                "bytes": (out / "adapter_model.safetensors").stat().st_size,
                "error": about.get("approximation_error", 0.0),
                "kl": own.get("knowledge", {}).get("default"),
                "exact_kl": own.get("knowledge", {}).get("exact"),
            })  # fmt: skip
    found[0]["kl"] = found[1]["exact_kl"]
    return found


def adapter_rows() -> list[str]:
    every = read_json(RESULTS / "adapter.json")
    lines = ["| `milora export` | rank | file | of the exact | error of ΔW | KL from the base |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for one in every:
        ranks = one["ranks"]
        rank = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        lines.append(
            f"| {one['how']} | {rank} | {one['bytes'] / 1e6:.1f} MB | "
            f"{one['bytes'] / every[0]['bytes']:.0%} | {one['error']:.1%} | {one['kl']:.5f} |"
        )
    return lines


def rows() -> list[str]:
    whole = read_json(RESULTS / "nf4.json")["compression"]["bytes"]["before"]
    head = ["", "size", "of the original", "WikiText-2", "trained again", "C4", "trained again",
            "ARC-Easy", "trained again", "PIQA", "trained again"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for way, said in WAYS.items():
        path = RESULTS / f"{way}.json"
        if not path.exists():
            continue
        found = read_json(path)
        size = found["compression"].get("bytes", {}).get("after", whole)
        cells = [said, f"{size / 1e6:.0f} MB", f"{size / whole:.0%}"]
        for text in found["knowledge"]:
            cells += [f"{text[f'{state}_perplexity']:.1f}" for state in ("base", "tuned")]
        for task in found["tasks"].values():
            cells += [f"{task[state]:.3f}" for state in ("base", "tuned")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", help=f"of {', '.join(WAYS)}, adapter, or docs")
    given = parser.parse_args()
    os.chdir(ROOT)
    if given.ways == ["docs"]:
        fill(PAGE, {"adapter": adapter_rows(), "base": rows()})
        return
    require_data()
    if given.ways == ["adapter"]:
        write_json(RESULTS / "adapter.json", adapter())
        return
    if unknown := set(given.ways) - set(WAYS):
        sys.exit(f"{min(unknown)} is none of {', '.join(WAYS)}")
    for way in given.ways or WAYS:
        if not (RESULTS / f"{way}.json").exists():
            write_json(RESULTS / f"{way}.json", measured(way))
            print(f"{way}: written", flush=True)


if __name__ == "__main__":
    main()
