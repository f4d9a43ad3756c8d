"""The model card that lies beside the adapter: base, data, recipe, scores, rank, licence."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from milora.recommended import decisive

SERVER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as --max-lora-rank

# The model types of which GGUF is written; of older records none is known.
GGUF_TYPES = (None, "llama", "mistral", "qwen2", "qwen3", "gemma3_text")

# By PEFT's task type: the library's class, and what the hub calls the use of such a model.
KINDS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
}
BASE_NOTE = {
    "smollm2-135m": (
        "The base is milora's bundled copy of SmolLM2-135M-Instruct, in milora's cache folder "
        "(`~/.cache/milora/smollm2-135m`). It was quantised to 4 bits before it was packaged, so "
        "its weights are not those of the hub's HuggingFaceTB/SmolLM2-135M-Instruct.",
        "",
    )
}


def _front(head: Mapping[str, Any], license: str) -> list[str]:
    """The YAML block that hubs read, with the licence where it is known."""
    known = {} if license == "unknown" else {"license": license}
    return ["---", yaml.safe_dump({**head, **known}, sort_keys=False).strip(), "---", ""]


def model_card(
    record: Mapping[str, Any], asked: Mapping[str, Any], evaluation: Mapping[str, Any] | None
) -> str:
    """README.md of adapter/, from run.json, the configuration and evaluation.json."""
    base, data = record["base"], record["data"]
    rank = record.get("adapter", {}).get("rank") or asked["lora"]["r"]
    merged = record.get("merged")
    license_named = harmless(base["license"])
    if base["license"] == "unknown":
        license_named = "see the card of the base"
    head: dict[str, Any] = {
        "base_model": base["name"],
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": pipeline(base),
        "tags": ["milora"] if merged else ["lora", "transformers", "milora"],
    }
    training, first = asked["training"], record["step0"]
    whose = "those of the run that it continues" if "from" in first else "the base's"
    kinds = record["coverage"]["adapted"].items()
    adapted = ", ".join(f"{kind} ({found['weights']})" for kind, found in kinds)
    recipe = [
        f"method {record['method']}, r {asked['lora']['r']}, alpha {asked['lora']['lora_alpha']}",
        *(f"{key} {value}" for key, value in decisive(asked.get("milora", {}))),
        *(f"{key} {value}" for key, value in training.items()),
        f"seed {asked['seed']}",
        f"adapted: {adapted}",
        *(f"trained in full: {name}" for name in record["coverage"].get("trained", ())),
    ]
    lines = [
        *_front(head, base["license"]),
        *(_whole_head(record) if merged else _adapter_head(record, asked, rank)),
    ]
    lines += [
        *_form(record),
        "## Base",
        "",
        f"- {harmless(base['name'])}, {base['dtype']}, sha256 `{base['sha256'][:16]}`; licence: "
        f"{license_named}. The "
        "licence of the base holds for what is made from it.",
        *_quantised(base),
        "",
        "## Data",
        "",
        f"- {data['train']['kept']} rows for training ({data['format']}), {data['eval']['kept']} "
        f"held out; {data['train']['shortened']} shortened, "
        f"{sum(data['train']['refused'].values())} refused",
        *(
            f"- of the questions of `{harmless(task)}` {counts['train']} also stand in the "
            f"training rows and {counts['eval']} in the held-out rows, so that its scores say less "
            "of new questions"
            for task, counts in data.get("test_overlap", {}).items()
            if any(counts.values())
        ),
        *(
            f"- `{harmless(file)}`, sha256 `{digest[:16]}`"
            for file, digest in data["sha256"].items()
        ),
        "",
        "## Recipe",
        "",
        *(f"- {harmless(line)}" for line in recipe),
        f"- {record['parameters']['trainable']:,} trained parameters of "
        f"{record['parameters']['all']:,}; "
        f"{record['seconds'].get('training', 0):.0f} s of training",
        f"- at step 0 the {first.get('of', 'logits')} differed from "
        f"{whose} by "
        f"{first['difference']:.1e} (relative to the largest)",
        *(f"- {line}" for line in _chain(record)),
        "",
    ]
    if evaluation:
        lines += ["## Learned and kept", "", *scores_table(evaluation), ""]
    if record.get("gates"):
        lines += ["## Gates", ""]
        for gate in record["gates"]:
            held = "holds" if gate["holds"] else "FAILS"
            lines.append(f"- {held}: {harmless(gate['gate'])} ({gate['said']})")
        lines.append("")
    return "\n".join(lines)


def _form(record: Mapping[str, Any], file: str | None = None) -> list[str]:
    """How to ask, where that was not the base's own way."""
    if "plain_form" not in record:
        return []
    where = f"the template in `{file}`" if file == "model.gguf" else "`chat_template.jinja`"
    written = "" if "reads" in record["base"] else f", which {where} writes"
    return [
        "## Ask it",
        "",
        f"No chat template came with the base, so that it was trained in a plain form{written}. A "
        "system message takes the place of the first paragraph, and further turns follow after "
        "an empty line:",
        "",
        "```",
        record["plain_form"],
        "```",
        "",
    ]


def _adapter_head(record: Mapping[str, Any], asked: Mapping[str, Any], rank: int) -> list[str]:
    base = record["base"]
    lines = [
        f"# LoRA adapter for {harmless(base['name'])}",
        "",
        f"A plain LoRA of rank {rank} for the untouched base `{harmless(base['name'])}`, trained "
        "with [milora](https://arxiv.org/abs/2406.09044) (Wang et al., NAACL 2025).",
        "",
        "## Load it",
        "",
        "```python",
        *load_code(record, '"path/of/the/base"', '"this/folder"'),
        "```",
        "",
        *BASE_NOTE.get(base["name"], ()),
        *_serving(record, rank),
    ]
    if "continues" in record:
        lines += [
            f"**Why rank {rank}:** the update of the run that this one continues is part of it, so "
            "that it goes on the base alone and on no other adapter.",
            "",
        ]
    elif record["method"] != "lora":
        lines += [
            f"**Why rank {rank}:** training started at the initial factors (A0, B0), not at zero, "
            "and the base was left as it is. The update is s(BA - B0A0), which as one ordinary "
            f"LoRA has twice the trained rank {asked['lora']['r']}. `milora export --rank K` gives "
            "the best approximation of a lower rank and states its error.",
            "",
        ]
    return lines


def _chain(record: Mapping[str, Any]) -> Iterator[str]:
    """Of a run that continues another: which, and what was cut."""
    if "continues" not in record:
        return
    earlier = record["continues"]
    how = "trains its adapter on" if earlier["how"] == "same" else "adds an adapter to its result"
    yield (
        f"continues `{harmless(Path(earlier['run']).name)}` ({how}), adapter sha256 "
        f"`{earlier['adapter_sha256'][:16]}`"
    )
    if cut := record["adapter"].get("cut"):
        yield (
            f"cut to rank {cut['rank']}: {cut['error']:.1e} of the update; " * bool(cut["error"])
            + f"all cuts of the chain add up to at most {cut['summed_error']:.1e}"
        )


def load_code(record: Mapping[str, Any], base: str, adapter: str) -> list[str]:
    """Lines of Python that load the adapter with PEFT; the two places as Python has them."""
    kind = auto_class(record["base"])
    labels, options = record.get("labels"), ""
    lines = ["from peft import PeftModel", f"from transformers import {kind}", ""]
    if labels:
        lines.append(f"labels = {dict(enumerate(labels))!r}")
        options = f", id2label=labels, pad_token_id={record['pad_token_id']}"
    return [
        *lines,
        f"base = {kind}.from_pretrained({base}{options})",
        f"model = PeftModel.from_pretrained(base, {adapter})",
    ]


def _serving(record: Mapping[str, Any], rank: int) -> list[str]:
    if record.get("labels"):
        return [
            "Beside the LoRA the folder holds a head, which the base has not and which was trained "
            f"in full ({', '.join(record['coverage']['trained'])}); PEFT puts it in its place. "
            "vLLM takes no such adapter: `milora export RUN --to merged` gives one model with both."
        ]
    return serving(rank, record["base"])


def _whole_head(record: Mapping[str, Any]) -> list[str]:
    base, layers = record["base"], " and ".join(map(harmless, record["merged"]["rows_of"]))
    tokens = [harmless(token) for token in record.get("tokens", {}).get("added", ())]
    return [
        f"# {harmless(base['name'])}, fine-tuned",
        "",
        "Whole weights: an adapter trained with [milora](https://arxiv.org/abs/2406.09044) (Wang "
        f"et al., NAACL 2025) merged into the base `{harmless(base['name'])}`. Rows of {layers} "
        "were trained too, which no plain LoRA can hold, so that there is no adapter."
        + f" Tokens added to the base's: {', '.join(tokens)}."
        * bool(tokens),
        "",
        "## Load it",
        "",
        "```python",
        f"from transformers import {auto_class(base)}",
        "",
        f'model = {auto_class(base)}.from_pretrained("this/folder")',
        "```",
        "",
        "Use the tokenizer and the chat template that lie beside the weights.",
        "",
    ]


def _quantised(base: Mapping[str, Any]) -> Iterator[str]:
    if "quantization" in base:
        keys = base["quantization"] if isinstance(base["quantization"], dict) else {}
        how = ", ".join([base["label"], *(f"{key} {value}" for key, value in keys.items())])
        yield (
            f"- It was quantised ({harmless(how)}) while the adapter was trained. The adapter fits "
            "the base so quantised, and the full-precision one with the difference that quantising "
            "makes. Merge it into the full-precision base only."
        )


def vllm(rank: int, base: str, adapter: str) -> tuple[list[str], str]:
    """The commands that serve an adapter of `rank`, and the folder that is served."""
    most, served, cut = SERVER_RANKS[-1], adapter, []
    if rank > most:
        served = "small"
        cut = [f"milora export {adapter} --rank {most} --out small  # vLLM takes no more"]
    command = (
        f"vllm serve {base} --enable-lora --max-lora-rank {server_rank(rank)} "
        f"--lora-modules tuned={served}"
    )
    return [*cut, command], served


def writes_gguf(base: Mapping[str, Any]) -> bool:
    """Whether `milora export --to gguf` knows such a base, by what its record says of it."""
    return _task(base) == "CAUSAL_LM" and base.get("type") in GGUF_TYPES


def serving(rank: int, base: Mapping[str, Any]) -> list[str]:
    """How to serve an adapter of `rank`, and to see that it is served; nothing where no server
    takes it."""
    if _task(base) != "CAUSAL_LM":
        return []
    commands, served = vllm(rank, "path/of/the/base", "this/folder")
    llama = [
        "llama.cpp, on a GGUF of the base (`--to gguf-merged` gives one file that needs no base):",
        "",
        "```",
        "milora export this/folder --to gguf --out gguf",
        "llama-server --model base.gguf --lora gguf/adapter.gguf",
        "milora verify gguf --server http://localhost:8080",
        "```",
        "",
    ]
    return [
        "## Serve it",
        "",
        "vLLM; the adapter is a model of its own there, called `tuned`:",
        "",
        "```",
        *commands,
        f"milora verify {served} --server http://localhost:8000 --model tuned",
        "```",
        "",
        *(llama if writes_gguf(base) else []),
        "`milora verify` asks the server a few prompts and compares its log-probabilities with "
        "those that were measured here: an adapter that is ignored, scaled wrongly or put on "
        "another base is found. Use the chat template that lies beside the weights, if there is "
        "one: the model was trained with it.",
        "",
    ]


def artefact_card(record: Mapping[str, Any]) -> str:
    """README.md of merged weights or a GGUF, from what their milora.json says."""
    base, file = record["base"], record.get("file")
    name = harmless(base["name"])
    head: dict[str, Any] = {
        "base_model": base["name"],
        "pipeline_tag": pipeline(base),
        "tags": ["milora", *(["gguf"] if file else ["transformers"])],
    }
    if file == "adapter.gguf":
        command = "llama-server --model base.gguf --lora adapter.gguf"
        what = (
            f"A LoRA of rank {record['rank']} for a GGUF of the untouched base `{name}`, whose "
            "scale is 1. On a base that was quantised after training it is as good as that base."
        )
    else:
        command = f"llama-server --model {file}" if file else "vllm serve this/folder"
        rounding = record["rounding"]
        what = (
            f"`{name}` with what was learned added to its weights, in {rounding['dtype']}: of the "
            f"update {rounding['all']:.1e} was lost to rounding, at most "
            f"{rounding['worst'][1]:.1e} ({harmless(rounding['worst'][0])})."
        )
    if file and "plain_form" in record:
        own = " --chat-template-file chat_template.jinja"
        command += f" --jinja{own * (file == 'adapter.gguf')}"
    commands = [
        command,
        f"milora verify this/folder --server http://localhost:{8080 if file else 8000}",
    ]
    if labels := record.get("labels"):
        what += f" Its head, trained in full, names {', '.join(map(harmless, labels))}."
    if _task(base) != "CAUSAL_LM":  # of which no server gives log-probabilities of tokens
        commands = ["milora verify this/folder"]
    if lost := losses(record):
        what += f" The update is no longer as trained: {harmless(lost)}."
    return "\n".join(
        [
            *_front(head, base["license"]),
            f"# {name}, tuned",
            "",
            f"{what} Trained with [milora](https://arxiv.org/abs/2406.09044), method "
            f"{record['method']}; the adapter's own card has data, recipe and scores. The licence "
            "of the base holds for it.",
            "",
            "```",
            *commands,
            "```",
            "",
            *_form(record, file),
        ]
    )


def packed_card(record: Mapping[str, Any], name: str, license: str) -> str:
    """README.md of a base of packed numbers, from its compression.json."""
    kept, size = record["knowledge"], record["bytes"]
    before, after = (figure(kept[f"{state}_perplexity"], 2) for state in ("base", "tuned"))
    head: dict[str, Any] = {"base_model": name, "base_model_relation": "quantized"}
    return "\n".join(
        [
            *_front(head, license),
            f"# {harmless(name)}, {record['how']}",
            "",
            f"The linear layers of `{harmless(name)}` packed by bitsandbytes ({record['how']}): "
            f"{size['after'] / 1e6:,.0f} MB in place of {size['before'] / 1e6:,.0f} MB. On "
            f"{harmless(record['text'])} the perplexity went from {before} to {after}, KL "
            f"{figure(kept['kl'], 4)} nats per token. "
            "The licence of the original holds for it.",
            "",
            "To train on it, with factors of the original:",
            "",
            "```yaml",
            "model: this/folder",
            "milora:",
            f"  factors_from: {harmless(record['model'])}",
            "```",
            "",
        ]
    )


def smaller_card(card: str, base: Mapping[str, Any], exact: int, rank: int, about: str) -> str:
    """The card of a LoRA of rank `exact` as that of its approximation, with `about` it.

    What it said of its own rank, and how to serve that, is of the smaller one.
    """
    card = re.sub(rf"\*\*Why rank {exact}:\*\*[^\n]*\n\n", "", card)
    card = card.replace(f"plain LoRA of rank {exact} for", f"plain LoRA of rank {rank} for")
    card = card.replace("\n".join(serving(exact, base)), "\n".join(serving(rank, base)))
    note = f"Of the update that is described above (rank {exact}): {about}"
    if "## Learned and kept" in card:
        note += " The scores above are of that update, not of this one."
    if writes_gguf(base):
        note += (
            " For llama.cpp use `milora export this/folder --to gguf`: its own converter knows one "
            "rank and scale for all weights."
        )
    if _task(base) == "CAUSAL_LM":
        note += f" vLLM needs `--max-lora-rank {server_rank(rank)}`."
    return f"{card.rstrip()}\n\n## Approximation\n\n{note}\n"


def losses(record: Mapping[str, Any]) -> str:
    """What an update lost since it was trained, by the milora.json of its adapter or of what was
    made of that; nothing where it is exact."""
    found = []
    if error := record.get("approximation_error"):
        found.append(f"an approximation of relative error {error:.2e}")
    if error := record.get("cut", {}).get("summed_error"):
        found.append(f"cut by continue.rank, by at most {error:.2e} of it in all")
    for part in record.get("combined", {}).get("of", ()):
        if lost := losses(part):
            found.append(f"with {part['name']} in it: {lost}")
    return "; ".join(found)


def combined_card(record: Mapping[str, Any]) -> str:
    """README.md of a combination of adapters, from its milora.json."""
    base, about = record["base"], record["combined"]
    name = harmless(base["name"])
    head: dict[str, Any] = {
        "base_model": base["name"],
        "library_name": "peft",
        "pipeline_tag": pipeline(base),
        "tags": ["lora", "transformers", "milora"],
    }
    how = {"sum": "the sum", "ties": "TIES", "dare": "DARE"}[about["how"]]
    kept = f", a share of {about['density']:g} of the entries kept" if "density" in about else ""
    error = record["approximation_error"]
    lines = [
        *_front(head, base["license"]),
        f"# LoRA adapters for {name}, combined", "",
        f"A plain LoRA of rank {record['rank']} for the untouched base `{name}`: {how} of the "
        f"adapters below{kept}"
        + (f", approximated with a relative error of {error:.2e}" if error else "")
        + ". It was not trained as such: evaluate it on the tasks of each.",
        "",
        *(
            f"- {weight:g} × `{harmless(one['name'])}` ({harmless(one['method'])}), adapter sha256 "
            f"`{one['adapter_sha256'][:16]}`"
            + (f"; no longer as trained: {harmless(lost)}" if (lost := losses(one)) else "")
            for one, weight in zip(about["of"], about["weights"], strict=True)
        ),
        "",
        "| | cosine | in inputs that the other reads | in outputs that it writes |",
        "|---|---|---|---|",
        *(
            f"| {' and '.join(map(harmless, one['of']))} | {one['cosine']:+.3f} | "
            f"{one['inputs']:.1%} | {one['outputs']:.1%} |"
            for one in about["in_common"]
        ),
        "",
        "## Load it", "", "```python",
        *load_code(record, '"path/of/the/base"', '"this/folder"'),
        "```", "",
        *serving(record["rank"], base),
        *_form(record),
        "The licence of the base holds for it.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def auto_class(base: Mapping[str, Any]) -> str:
    """The library's class that loads the base of a run, by what its record says of it."""
    return "AutoModelForImageTextToText" if "reads" in base else KINDS[_task(base)][0]


def pipeline(base: Mapping[str, Any]) -> str:
    """What the hub calls the use of such a model."""
    return "image-text-to-text" if "reads" in base else KINDS[_task(base)][1]


def _task(base: Mapping[str, Any]) -> str:
    return str(base.get("task", "CAUSAL_LM"))


# What is shown of a task beside its accuracy; the last two only where there are any.
SCORES = ("format_failures", "loss", "accuracy_normalised", "unended", "not_finite")
FAULTS = ("unended", "not_finite")
WORDS = {
    "accuracy": "{name}: accuracy of {about}",
    "metric": "{name}: {key}",
    "format_failures": "{name}: format failures",
    "f1": "{name}: F1 of {label}",
    "f1_mean": "{name}: F1, mean over the classes",
    "loss": "{name}: loss per answer token",
    "loss_class": "{name}: loss per row",
    "accuracy_normalised": "{name}: accuracy, per byte of the option",
    "unended": "{name}: answers that did not end",
    "not_finite": "{name}: with logits not finite",
    "perplexity": "perplexity of {name} ({tokens} tokens{missing})",
    "missing": ", {count} left out",
    "kl": "KL(base‖tuned) per token there, mean and 99th percentile",
    "agreement": "same likeliest token as the base",
    "moved": "embeddings of {name} ({pieces} pieces): 1 − cosine with the base's, mean",
    "similarities": "correlation of their similarities with the base's",
    "headless": "; the base has no such head: it says the commonest label",
    "rows": "{rows} (95 %)",
    "twice": "; {count} rows stand twice",
    "commonest": "; always the commonest answer: {share}",
}
Scores = Iterator[tuple[str, str, str]]  # label, base, tuned


def all_scores(evaluation: Mapping[str, Any], interval: str) -> Scores:
    """All that is shown of an evaluation. `interval` formats an accuracy and its two ends."""
    yield from task_scores(evaluation["tasks"], interval)
    yield from kept_scores(evaluation["knowledge"])


def task_scores(
    tasks: Mapping[str, Any], interval: str, words: Mapping[str, str] = WORDS
) -> Scores:
    for name, task in tasks.items():
        base, tuned = task["base"], task["tuned"]
        for metric in base.get("metrics", {}):
            if "stderr" not in metric:
                before, after = (figure(one["metrics"][metric], 4) for one in (base, tuned))
                yield words["metric"].format(name=name, key=metric), before, after
        if "accuracy" in base:
            before, after = (
                interval.format(one["accuracy"], *one["interval"]) for one in (base, tuned)
            )
            label = words["accuracy"].format(name=name, about=about(task, words))
            yield label, before, after
        if "f1" in base:
            before, after = (
                interval.format(one["f1"], *one["f1_interval"]) for one in (base, tuned)
            )
            of = task["f1_of"]
            label = words["f1" if of else "f1_mean"].format(name=name, label=of)
            yield label, before, after
        for key in SCORES:
            if key in tuned and (key not in FAULTS or base.get(key) or tuned[key]):
                before = figure(base[key], 3) if key in base else ""
                word = "loss_class" if key == "loss" and "f1" in base else key
                yield words[word].format(name=name), before, figure(tuned[key], 3)


def kept_scores(knowledge: Sequence[Mapping[str, Any]], words: Mapping[str, str] = WORDS) -> Scores:
    for kept in knowledge:
        if "moved" in kept:
            label = words["moved"].format(name=short(kept["text"]), pieces=kept["pieces"])
            yield label, "0", figure(kept["moved"], 4)
            yield words["similarities"], "1", figure(kept["similarities"], 3)
            continue
        left_out = kept.get("not_finite")
        missing = words["missing"].format(count=left_out) if left_out else ""
        name = short(kept["text"])
        label = words["perplexity"].format(name=name, tokens=kept["tokens"], missing=missing)
        yield label, figure(kept["base_perplexity"], 2), figure(kept["tuned_perplexity"], 2)
        yield words["kl"], "0", f"{figure(kept['kl'], 4)}, {figure(kept['kl_p99'], 4)}"
        yield words["agreement"], "1", figure(kept["top_token_agreement"], 3)


def about(task: Mapping[str, Any], words: Mapping[str, str] = WORDS) -> str:
    """How many rows a task has, how many stand twice, what the commonest answer alone scores."""
    said = words["rows"].format(rows=task["rows"])
    if task.get("duplicates"):
        said += words["twice"].format(count=task["duplicates"])
    if task.get("headless"):
        said += words["headless"]
    elif task.get("majority", 0) >= 0.05:
        said += words["commonest"].format(share=f"{task['majority']:.3f}")
    return said


def short(text: str) -> str:
    """The name of a general text: of a file, its stem."""
    return Path(text).stem if text.endswith((".txt", ".jsonl")) else text


def figure(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"


def scores_table(evaluation: Mapping[str, Any]) -> list[str]:
    """Base against tuned, as lines of a Markdown table."""
    lines = ["| | base | tuned |", "|---|---|---|"]
    for label, base, tuned in all_scores(evaluation, "{:.3f} ({:.3f} to {:.3f})"):
        lines.append(f"| {harmless(label)} | {base} | {tuned} |")
    return lines


def server_rank(rank: int) -> int:
    """The least --max-lora-rank of a server that takes an adapter of `rank`, or the largest."""
    return next((r for r in SERVER_RANKS if r >= rank), SERVER_RANKS[-1])


def harmless(text: Any) -> str:
    """Text from files and configurations, harmless in Markdown and HTML."""
    plain = " ".join(str(text).split())
    for character in "\\`*[]|":
        plain = plain.replace(character, "\\" + character)
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
