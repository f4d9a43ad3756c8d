"""A smaller LoRA of a finished one, as a folder: how small, what it lost where, and its KL."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from peft import PeftModel

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
from milora.card import smaller_card
from milora.errors import UserError
from milora.export import (
    ADAPTER_FILE,
    PlainLora,
    Storage,
    check_loaded,
    copy_tokenizer,
    exact_rank,
    load_plain_lora,
    save_plain_lora,
)
from milora.files import files_sha256, new_folder, sha256, write_json, write_text
from milora.knowledge import DEFAULT_TEXT, general_texts, knowledge_kept
from milora.logits import Pair
from milora.matrices import base_modules, skeleton_of
from milora.pretrained import task_of
from milora.progress import Progress
from milora.verify import Opened, check_probed, make_probes, open_adapter


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


def check_smaller(smaller: Smaller, provenance: Mapping[str, Any]) -> None:
    """Raise UserError for what contradicts itself, or the adapter's milora.json `provenance`."""
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


def write_smaller(
    source: Path, out: Path, smaller: Smaller, base: str | None, trust_remote_code: bool,
    progress: Progress,
) -> Exported:  # fmt: skip
    """Write to `out` what `smaller` says of the adapter in `source`, on its base or on `base`.

    Raises UserError for a wrong base and for what cannot be kept or spread.
    """
    opened = open_adapter(source, base, trust_remote_code)
    check_probed(opened, source)
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
            "files_sha256": files_sha256(folder),
            "lineage": [*opened.provenance.get("lineage", ()), sha256(source / ADAPTER_FILE)],
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
        size = (folder / ADAPTER_FILE).stat().st_size
        whole = (source / ADAPTER_FILE).stat().st_size
        said = _sentence(plain, smaller, ranks, size / whole, kept)
        card = ""
        if (source / "README.md").is_file():
            card = (source / "README.md").read_text(encoding="utf-8")
        base_said = opened.provenance["base"]
        write_text(folder / "README.md", smaller_card(card, base_said, largest, written, said))
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
    parts = decomposed(exact)
    if smaller.bits == 8:
        plain, storage = _rounded(exact, parts, smaller)
    else:
        plain, storage = (
            at_ranks(exact, parts, _ranks(parts, smaller, smaller.max_error)),
            Storage(),
        )
    return plain, storage._replace(one_rank=not smaller.spread)


def _rounded(
    exact: PlainLora, parts: Mapping[str, Decomposed], smaller: Smaller
) -> tuple[PlainLora, Storage]:
    """In 8 bits, cut so far that an error that is asked for is kept by both together."""
    bound = smaller.max_error
    if bound is None:
        return in_8_bits(exact, parts, _ranks(parts, smaller, None))
    whole = in_8_bits(exact, parts, full_ranks(parts))
    alone = whole[0].error
    if alone >= bound:
        raise UserError(
            f"--max-error {bound} cannot be kept with --bits 8, whose rounding alone makes the "
            f"error {alone:.2e}: allow more than that, or leave --bits out"
        )
    # Cut and rounding are next to orthogonal; what the rounding of fewer ranks adds is not known.
    room = math.sqrt(bound**2 - alone**2)
    for share in (1.0, 0.9, 0.5):
        found = in_8_bits(exact, parts, _ranks(parts, smaller, share * room))
        if found[0].error <= bound:
            return found
    return whole


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
