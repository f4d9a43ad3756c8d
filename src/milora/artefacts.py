"""`milora export`: from the files of a finished run to a folder for other tools."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from milora.adapter import TRAINED, Factors, Start, load_start
from milora.errors import UserError
from milora.export import merge, plain_lora, save_plain_lora
from milora.files import new_folder, read_json, write_json, write_text
from milora.matrices import adapted_matrices
from milora.verify import find_adapter, make_probes, open_adapter, why_whole


def export_run(
    run: Path,
    out: Path,
    to: str,
    rank: int | None,
    trust_remote_code: bool = False,
    base: str | None = None,
) -> str:
    """Write a plain LoRA ("lora", of rank 2r or the best of `rank`) or merged weights ("merged").

    `base` is where the base is now, if not where the run had it; merging into the original of a
    quantised base needs it. Returns a sentence that says what was written and the error it makes.

    Raises UserError for an unfinished run, an existing `out`, a rank that is no approximation, or
    merging into a quantised base.
    """
    if to not in ("lora", "merged"):
        raise UserError(f"--to {to}: use lora or merged")
    if out.exists():
        raise UserError(f"--out {out} exists already: choose a new folder")
    if to == "merged" and rank is not None:
        raise UserError("--rank goes with --to lora; merged weights hold the whole update")
    if (run / "model").is_dir():
        if to == "lora":
            raise UserError(
                f"--to lora: {why_whole(run)}: use {run / 'model'} as it is, or --to merged for a "
                "copy"
            )
        with new_folder(out) as folder:
            shutil.copytree(run / "model", folder, dirs_exist_ok=True)
        return f"{out}: whole weights, a copy of {run / 'model'}"
    source = find_adapter(run)
    start, tensors = _run_files(run)
    recorded = read_json(source / "milora.json")["base"]
    into_original = to == "merged" and "quantization" in recorded
    if into_original and base is None:
        original = recorded["original"] or "the checkpoint that it was made from"
        raise UserError(
            f"--to merged: the base of {run} is quantised ({recorded['label']}), and merging into "
            "packed numbers would round the update away: either merge into the full-precision base "
            f"(--base {original}), or serve {source}, a plain LoRA, on the quantised base"
        )
    opened = open_adapter(run, base, trust_remote_code, packed=not into_original)
    trained = _trained(tensors, opened.model)
    largest = opened.provenance["rank"]
    if rank is not None and rank > largest:
        raise UserError(f"--rank {rank}: the update has rank {largest}, choose at most that")
    plain = plain_lora(start, trained, rank)
    unloaded = opened.model.unload()
    if to == "merged":
        merge(unloaded, plain)
        with new_folder(out) as folder:
            unloaded.save_pretrained(folder)
            opened.base.tokenizer.save_pretrained(folder)
        said = f"{out}: merged weights, {opened.provenance['base']['dtype']} safetensors"
        if into_original:
            said += f", on the full-precision base; the update was trained on {recorded['label']}"
        return said
    with new_folder(out) as folder:
        for file in source.iterdir():  # tokenizer and chat template
            if file.name not in ("adapter_config.json", "adapter_model.safetensors", "milora.json"):
                shutil.copy(file, folder)
        written = save_plain_lora(folder, plain, unloaded, opened.base.name)
        loaded = PeftModel.from_pretrained(unloaded, folder)
        provenance: dict[str, Any] = opened.provenance | {
            "rank": written,
            "approximation_error": plain.error,
            "probes": make_probes(loaded, opened.base.tokenizer),
        }
        write_json(folder / "milora.json", provenance)
        if rank is not None:
            note = (
                f"\n\n## Approximation\n\nThis is the best rank-{rank} approximation of the "
                f"trained update (rank {largest}); relative error {plain.error:.2e} (Frobenius). "
                "The scores above are those of the full update.\n"
            )
            card = (folder / "README.md").read_text(encoding="utf-8").rstrip()
            write_text(folder / "README.md", card + note)
    if rank is None:
        return f"{out}: plain LoRA of rank {written}, exact"
    return (
        f"{out}: plain LoRA of rank {written}; relative error of the update {plain.error:.2e}, "
        f"worst module {plain.worst[0]} {plain.worst[1]:.2e}"
    )


def _run_files(run: Path) -> tuple[Start, dict[str, Tensor]]:
    init, final = run / "init" / "factors.safetensors", run / "checkpoints" / "trained.safetensors"
    if not (init.exists() and final.exists()):
        state = read_json(run / "run.json")["state"] if (run / "run.json").exists() else "no run"
        raise UserError(f"{run} is not a finished run with an adapter (state: {state})")
    return load_start(init), load_file(final)


def _trained(tensors: Mapping[str, Tensor], model: PeftModel) -> dict[str, Factors]:
    """The trained factors out of a checkpoint, by the names of the exported model's matrices."""
    found = {}
    for name, matrix in adapted_matrices(model).items():
        whole = (
            tensors[f"base_model.model.{matrix.path}.{which}.{TRAINED}.weight"]
            for which in ("lora_A", "lora_B")
        )
        found[name] = Factors(*matrix.part(*whole))
    return found
