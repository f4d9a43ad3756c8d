"""`milora export`: from the adapter of a finished run to a folder for other tools."""

import math
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from milora.adapter import take_off
from milora.approximation import (
    Decomposed,
    at_ranks,
    decomposed,
    full_ranks,
    in_8_bits,
    rank_within,
    spread,
)
from milora.card import artefact_card, server_rank
from milora.checkpoint import open_checkpoint
from milora.errors import UserError
from milora.evaluate import DEFAULT_TEXT, Pair, general_texts, knowledge_kept
from milora.export import (
    PlainLora,
    Storage,
    check_loaded,
    exact_rank,
    load_plain_lora,
    merge,
    save_plain_lora,
)
from milora.files import new_folder, read_json, write_json, write_text
from milora.ggufs import check_gguf, write_lora, write_model
from milora.matrices import base_modules, skeleton_of
from milora.merge import Recorded, merge_files
from milora.pretrained import source_of, task_of
from milora.progress import Progress
from milora.verify import (
    ADAPTER,
    GGUF,
    MERGED,
    Opened,
    find_adapter,
    make_probes,
    open_adapter,
    why_whole,
)

KINDS = ("lora", "merged", "gguf", "gguf-merged")
LORA, MODEL = "adapter.gguf", "model.gguf"
OWN = ("adapter_config.json", "adapter_model.safetensors", "milora.json", "README.md")


class Smaller(NamedTuple):
    """What of the update a LoRA is to keep: at most one of the first two is given."""

    rank: int | None = None  # the best of this rank
    max_error: float | None = None  # the smallest within this relative error (Frobenius)
    spread: bool = False  # ranks by weight, the same number of parameters in all
    bits: int = 32  # of a number in the file


EXACT = Smaller()


class Exported(NamedTuple):
    """What was written, in a sentence, and of an approximation each weight's rank and error."""

    said: str
    ranks: Mapping[str, int] = MappingProxyType({})
    errors: Mapping[str, float] = MappingProxyType({})


def by_layer(exported: Exported) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: what each weight lost, by layer and kind; with ranks of their own
    behind the rank.

    Of several weights of one kind in a layer, such as experts, the largest loss.
    """
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for name, error in exported.errors.items():
        layer = re.match(r"(.*?\.\d+)\.(.+)", name)
        cells = found.setdefault(layer[1] if layer else "", {})
        kind = re.sub(r"\d+\.", "", layer[2] if layer else name)
        cells[kind] = max(cells.get(kind, (0.0, 0)), (error, exported.ranks[name]))
    kinds = list(dict.fromkeys(kind for cells in found.values() for kind in cells))
    short = [kind.rpartition(".")[2] for kind in kinds]
    if len(set(short)) < len(short):
        short = kinds
    same = len(set(exported.ranks.values())) == 1
    stacks = {layer.rpartition(".")[0] for layer in found}

    def shown(error: float, rank: int) -> str:
        return f"{error:.1e}" if same else f"{rank}: {error:.0e}"

    rows = [
        [
            layer.rpartition(".")[2] if len(stacks) == 1 else layer,
            *(shown(*cells[kind]) if kind in cells else "" for kind in kinds),
        ]
        for layer, cells in sorted(found.items(), key=lambda item: _in_order(item[0]))
    ]
    return ["layer", *short], rows


def _in_order(layer: str) -> tuple[str, int]:
    stack, _, number = layer.rpartition(".")
    return stack, int(number) if number.isdigit() else -1


def export_run(
    run: Path,
    out: Path,
    to: str,
    smaller: Smaller = EXACT,
    trust_remote_code: bool = False,
    base: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write one of KINDS from a run folder or the adapter in it: a plain LoRA (of rank 2r or what
    `smaller` says), merged weights, a GGUF LoRA for the GGUF of the base, or a merged GGUF.

    Only an approximation loads the base, for its probes and its KL, and what is merged into the
    original of a quantised base, for its probes; the others read its files weight by weight.
    `base` is where the base is now, if not where the run had it; merging needs it for a quantised
    base, as its original. Returns what was written and the error it makes. Raises UserError for an
    unfinished run, an existing `out`, a wrong base, a rank that is no approximation, an error that
    cannot be kept, or merging into packed numbers.
    """
    if to not in KINDS:
        raise UserError(f"--to {to}: use {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if out.exists():
        raise UserError(f"--out {out} exists already: choose a new folder")
    if smaller != EXACT and to != "lora":
        raise UserError(
            "--rank, --max-error, --spread and --bits go with --to lora: write that one first, "
            f"then its folder --to {to}"
        )
    if (run / "model").is_dir():
        if to != "merged":
            raise UserError(
                f"--to {to}: {why_whole(run)}: use {run / 'model'} as it is, or --to merged for a "
                "copy"
            )
        with new_folder(out) as folder:
            shutil.copytree(run / "model", folder, dirs_exist_ok=True)
        return Exported(f"{out}: whole weights, a copy of {run / 'model'}")
    source = find_adapter(run)
    provenance = read_json(source / "milora.json")
    if provenance["format"] != ADAPTER:
        raise UserError(f"{source} holds {provenance['format']}, not an adapter: name its run")
    lost = provenance.get("approximation_error", 0.0)
    if smaller != EXACT and lost:
        raise UserError(
            f"{source} is an approximation already, of relative error {lost:.2e}: make the smaller "
            "one of what that was made from, so that all that is lost is said"
        )
    _check(smaller, provenance)
    if to == "lora" and smaller == EXACT:
        with new_folder(out) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        return Exported(f"{out}: plain LoRA of rank {provenance['rank']}, {_exactly(lost)}")
    if to != "lora" and provenance.get("labels"):
        return _classifier(source, out, to, base, trust_remote_code)
    recorded, progress = provenance["base"], progress or Progress()
    into_original = "merged" in to and "quantization" in recorded
    if into_original and base is None:
        original = recorded["original"] or "the checkpoint that it was made from"
        raise UserError(
            f"--to {to}: the base of {run} is quantised ({recorded['label']}), and merging into "
            "packed numbers would round the update with them: either merge into the full-precision "
            f"base (--base {original}), or serve {source}, a plain LoRA, on the quantised base"
        )
    if to == "lora":
        return _smaller(source, out, smaller, base, trust_remote_code, progress)
    model = base or recorded["model"]
    files = source_of(model)
    skeleton = open_checkpoint(files, trust_remote_code).skeleton
    if "gguf" in to:
        check_gguf(skeleton.config)
    plain = load_plain_lora(source, skeleton)
    skeleton = open_checkpoint(files, trust_remote_code).skeleton  # PEFT is in the other now
    dtype, packed = getattr(torch, recorded["dtype"]), provenance.get("quantised_sha256", {})
    hashes = {
        name: Recorded(digest, None if name in packed else dtype)
        for name, digest in provenance["weights_sha256"].items()
    }
    record: dict[str, Any] = {
        key: provenance[key]
        for key in ("base", "method", "versions", "probes", "approximation_error")
        if key in provenance
    }
    if into_original:  # the probes were measured on the quantised base
        opened = open_adapter(source, base, trust_remote_code, packed=False)
        record["probes"] = make_probes(opened.model, opened.base.reader)
        del opened
    with new_folder(out) as folder:
        if to == "gguf":
            write_lora(folder / LORA, skeleton.config, plain.factors, recorded)
            record |= {"format": GGUF, "file": LORA, "rank": provenance["rank"]}
            said = f"{out / LORA}: GGUF LoRA of rank {provenance['rank']}, {_exactly(lost)}"
        elif to == "merged":
            rounding = merge_files(files, skeleton, plain.factors, hashes, folder, progress)
            copy_tokenizer(source, folder)
            record |= {"format": MERGED, "rounding": rounding._asdict()}
            said = f"{out}: merged weights, {rounding.sentence()}"
        else:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
            rounding = write_model(
                folder / MODEL, files, skeleton, plain.factors, hashes, tokenizer,
                str(recorded["name"]), Path(model) if model.endswith(".gguf") else None, progress,
            )  # fmt: skip
            record |= {"format": GGUF, "file": MODEL, "rounding": rounding._asdict()}
            said = f"{out / MODEL}: merged GGUF, {rounding.sentence()}"
        if into_original:
            said += f", on the full-precision base; the update was trained on {recorded['label']}"
        write_json(folder / "milora.json", record)
        write_text(folder / "README.md", artefact_card(record))
    return Exported(said)


def _exactly(lost: float) -> str:
    return f"as it is, an approximation of relative error {lost:.2e}" if lost else "exact"


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Of an adapter what is no weight and no record: tokenizer and chat template."""
    for file in source.iterdir():
        if file.name not in OWN:
            shutil.copyfile(file, folder / file.name)


def _classifier(
    source: Path, out: Path, to: str, base: str | None, trust_remote_code: bool
) -> Exported:
    """Merged weights with the head, which is in no file of the base, so that they are loaded."""
    if to != "merged":
        raise UserError(
            f"--to {to}: llama.cpp reads no head of a classifier: use --to merged, or --to lora"
        )
    opened = open_adapter(source, base, trust_remote_code)
    model = take_off(opened.model)
    merge(model, load_plain_lora(source, skeleton_of(model)))
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        copy_tokenizer(source, folder)
    return Exported(f"{out}: merged weights with the head, {opened.provenance['base']['dtype']}")


def _check(smaller: Smaller, provenance: Mapping[str, Any]) -> None:
    rank, error = smaller.rank, smaller.max_error
    if rank is not None and error is not None:
        raise UserError("--rank and --max-error both say how small: give one of them")
    if rank is not None and rank > provenance["rank"]:
        raise UserError(
            f"--rank {rank}: the update has rank {provenance['rank']}, choose at most that"
        )
    if error is not None and not 0 < error < 1:
        raise UserError(f"--max-error {error}: a share of the update between 0 and 1 is needed")
    if smaller.bits not in (8, 32):
        raise UserError(f"--bits {smaller.bits}: 8 and 32 are known")
    if smaller.spread and rank is None and error is None:
        raise UserError("--spread needs --rank or --max-error, which say how much there is")


def _smaller(
    source: Path, out: Path, smaller: Smaller, base: str | None, trust_remote_code: bool,
    progress: Progress,
) -> Exported:  # fmt: skip
    opened = open_adapter(source, base, trust_remote_code)
    largest, model = opened.provenance["rank"], take_off(opened.model)
    exact = load_plain_lora(source, skeleton_of(model))
    plain, storage = _approximation(exact, smaller, set(base_modules(model)))
    ranks = {name: len(A) for name, (A, _) in plain.factors.items()}
    with new_folder(out) as folder:
        copy_tokenizer(source, folder)
        written = save_plain_lora(folder, plain, model, opened.base.name, storage=storage)
        loaded = PeftModel.from_pretrained(model, folder)
        check_loaded(loaded, plain, storage)
        provenance: dict[str, Any] = opened.provenance | {
            "rank": written,
            "approximation_error": plain.error,
            "approximation": {
                "bits": smaller.bits,
                "scale": storage.scale,
                "ranks": ranks,
                "errors": dict(plain.errors),
            },
            "probes": make_probes(loaded, opened.base.reader),
        }
        kept = _divergences(loaded, source, opened, progress)
        provenance["approximation"]["knowledge"] = kept
        write_json(folder / "milora.json", provenance)
        size = (folder / "adapter_model.safetensors").stat().st_size
        whole = (source / "adapter_model.safetensors").stat().st_size
        said = _sentence(plain, smaller, ranks, size / whole, kept)
        note = (
            f"\n\n## Approximation\n\nOf the trained update (rank {largest}): {said} "
            "The scores above are those of the full update. For llama.cpp use `milora export "
            "this/folder --to gguf`: its own converter knows one rank and scale for all weights. "
            f"vLLM needs `--max-lora-rank {server_rank(written)}`.\n"
        )
        card = (source / "README.md").read_text(encoding="utf-8").rstrip()
        write_text(folder / "README.md", card + note)
    return Exported(f"{out}: {said}", ranks, plain.errors)


def _approximation(
    exact: PlainLora, smaller: Smaller, modules: Collection[str]
) -> tuple[PlainLora, Storage]:
    """`modules` are those of the base, among which expert stacks are not."""
    stacked = sorted(set(exact.factors) - set(modules))
    if smaller.spread and stacked:
        raise UserError(
            f"--spread: {stacked[0]} is one of a stack of experts, which have one rank: leave "
            "--spread out"
        )
    parts, bound = decomposed(exact), smaller.max_error
    if smaller.bits == 32:
        plain, storage = at_ranks(exact, parts, _ranks(parts, smaller, bound)), Storage()
        return plain, storage._replace(one_rank=not smaller.spread)
    if bound is None:
        plain, storage = in_8_bits(exact, parts, _ranks(parts, smaller, None))
        return plain, storage._replace(one_rank=not smaller.spread)
    plain, storage = in_8_bits(exact, parts, full_ranks(parts))
    if plain.error >= bound:
        raise UserError(
            f"--max-error {bound} cannot be kept with --bits 8, whose rounding alone makes the "
            f"error {plain.error:.2e}: allow more than that, or leave --bits out"
        )
    # Cut and rounding are next to orthogonal; what the rounding of fewer ranks adds is not known.
    room = math.sqrt(bound**2 - plain.error**2)
    for share in (1.0, 0.9, 0.5):
        found = in_8_bits(exact, parts, _ranks(parts, smaller, share * room))
        if found[0].error <= bound:
            plain, storage = found
            break
    return plain, storage._replace(one_rank=not smaller.spread)


def _ranks(
    parts: Mapping[str, Decomposed], smaller: Smaller, error: float | None
) -> dict[str, int]:
    if smaller.spread:
        return spread(parts, smaller.rank, error)
    full = full_ranks(parts)
    rank = smaller.rank
    if error is not None:
        rank = rank_within(parts, error)
    return full if rank is None else {name: min(rank, most) for name, most in full.items()}


def _divergences(
    smaller: PeftModel, source: Path, opened: Opened, progress: Progress
) -> dict[str, Any]:
    """KL (nats per token) from the base of the exact update and of its approximation, on the first
    general text of the run, or the default one where its file is gone; of a classifier how far the
    embeddings moved.
    """
    asked = opened.provenance["configuration"].get("evaluate", {})
    try:
        text, name = general_texts(asked.get("knowledge", DEFAULT_TEXT))[0]
    except UserError:
        text, name = general_texts(DEFAULT_TEXT)[0]
    pieces: dict[str, Any] = {"chunks": asked.get("chunks", 16), "progress": progress}
    tokenizer = opened.base.tokenizer
    classifies = task_of(smaller) == "SEQ_CLS"
    key = "moved" if classifies else "kl"
    measure = "Embeddings moved by" if classifies else "KL from the base"
    found: dict[str, Any] = {"text": name, "measure": measure}
    smaller.load_adapter(str(source), adapter_name="exact")
    for adapter in ("default", "exact"):
        smaller.set_adapter(adapter)
        found[adapter] = knowledge_kept(Pair(smaller), tokenizer, text, **pieces)[key]
    return found


def _sentence(
    plain: PlainLora, smaller: Smaller, ranks: Mapping[str, int], size: float,
    kept: Mapping[str, Any],
) -> str:  # fmt: skip
    rank = f"rank {exact_rank(plain)}"
    if smaller.spread:
        rank = f"ranks {min(ranks.values())} to {max(ranks.values())}"
        if smaller.rank:
            rank += f", in all at most as many parameters as rank {smaller.rank}"
    said = f"plain LoRA of {rank}" + ", in floats of 8 bits" * (smaller.bits == 8)
    module, worst = plain.worst
    said += (
        f"; relative error of the update {plain.error:.2e}, worst module {module} {worst:.2e}; "
        f"{size:.0%} of the exact file."
    )
    if kept["default"] is not None and kept["exact"] is not None:
        said += (
            f" {kept['measure']} {kept['default']:.4g}, of the exact update {kept['exact']:.4g}, "
            f"on {kept['text']}."
        )
    return said
