"""`milora export`: from the adapter of a finished run to a folder for other tools."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from milora.adapter import take_off
from milora.card import artefact_card
from milora.checkpoint import open_checkpoint
from milora.errors import UserError
from milora.export import best_of_rank, load_plain_lora, merge, save_plain_lora
from milora.files import new_folder, read_json, write_json, write_text
from milora.ggufs import check_gguf, write_lora, write_model
from milora.matrices import skeleton_of
from milora.merge import Recorded, merge_files
from milora.pretrained import source_of
from milora.progress import Progress
from milora.verify import ADAPTER, GGUF, MERGED, find_adapter, make_probes, open_adapter, why_whole

KINDS = ("lora", "merged", "gguf", "gguf-merged")
LORA, MODEL = "adapter.gguf", "model.gguf"
OWN = ("adapter_config.json", "adapter_model.safetensors", "milora.json", "README.md")


def export_run(
    run: Path,
    out: Path,
    to: str,
    rank: int | None,
    trust_remote_code: bool = False,
    base: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Write one of KINDS from a run folder or the adapter in it: a plain LoRA (of rank 2r or the
    best of `rank`), merged weights, a GGUF LoRA for the GGUF of the base, or a merged GGUF.

    Only an approximation loads the base, for its probes; the others read its files weight by
    weight. `base` is where the base is now, if not where the run had it; merging needs it for a
    quantised base, as its original. Returns a sentence that says what was written and the error it
    makes. Raises UserError for an unfinished run, an existing `out`, a wrong base, a rank that is
    no approximation, or merging into packed numbers.
    """
    if to not in KINDS:
        raise UserError(f"--to {to}: use {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if out.exists():
        raise UserError(f"--out {out} exists already: choose a new folder")
    if rank is not None and to != "lora":
        raise UserError(
            f"--rank goes with --to lora: write that one first, then its folder --to {to}"
        )
    if (run / "model").is_dir():
        if to != "merged":
            raise UserError(
                f"--to {to}: {why_whole(run)}: use {run / 'model'} as it is, or --to merged for a "
                "copy"
            )
        with new_folder(out) as folder:
            shutil.copytree(run / "model", folder, dirs_exist_ok=True)
        return f"{out}: whole weights, a copy of {run / 'model'}"
    source = find_adapter(run)
    provenance = read_json(source / "milora.json")
    if provenance["format"] != ADAPTER:
        raise UserError(f"{source} holds {provenance['format']}, not an adapter: name its run")
    if rank is not None and rank > provenance["rank"]:
        raise UserError(
            f"--rank {rank}: the update has rank {provenance['rank']}, choose at most that"
        )
    if to == "lora" and rank is None:
        with new_folder(out) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        return f"{out}: plain LoRA of rank {provenance['rank']}, exact"
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
        return _smaller(source, out, rank or 0, base, trust_remote_code)
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
        key: provenance[key] for key in ("base", "method", "versions", "probes")
    }
    with new_folder(out) as folder:
        if to == "gguf":
            write_lora(folder / LORA, skeleton.config, plain.factors, recorded)
            record |= {"format": GGUF, "file": LORA, "rank": provenance["rank"]}
            said = f"{out / LORA}: GGUF LoRA of rank {provenance['rank']}, exact"
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
    return said


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Of an adapter what is no weight and no record: tokenizer and chat template."""
    for file in source.iterdir():
        if file.name not in OWN:
            shutil.copyfile(file, folder / file.name)


def _classifier(source: Path, out: Path, to: str, base: str | None, trust_remote_code: bool) -> str:
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
    return f"{out}: merged weights with the head, {opened.provenance['base']['dtype']}"


def _smaller(source: Path, out: Path, rank: int, base: str | None, trust_remote_code: bool) -> str:
    opened = open_adapter(source, base, trust_remote_code)
    largest, model = opened.provenance["rank"], take_off(opened.model)
    plain = best_of_rank(load_plain_lora(source, skeleton_of(model)), rank)
    with new_folder(out) as folder:
        copy_tokenizer(source, folder)
        written = save_plain_lora(folder, plain, model, opened.base.name)
        loaded = PeftModel.from_pretrained(model, folder)
        provenance: dict[str, Any] = opened.provenance | {
            "rank": written,
            "approximation_error": plain.error,
            "probes": make_probes(loaded, opened.base.reader),
        }
        write_json(folder / "milora.json", provenance)
        note = (
            f"\n\n## Approximation\n\nThis is the best rank-{rank} approximation of the "
            f"trained update (rank {largest}); relative error {plain.error:.2e} (Frobenius). "
            "The scores above are those of the full update.\n"
        )
        card = (source / "README.md").read_text(encoding="utf-8").rstrip()
        write_text(folder / "README.md", card + note)
    return (
        f"{out}: plain LoRA of rank {written}; relative error of the update {plain.error:.2e}, "
        f"worst module {plain.worst[0]} {plain.worst[1]:.2e}"
    )
