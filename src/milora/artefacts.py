"""`milora export`: from the adapter of a finished run to a folder for other tools."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from milora.adapter import take_off
from milora.card import artefact_card, losses
from milora.checkpoint import open_checkpoint, open_shards
from milora.errors import UserError
from milora.export import copy_tokenizer, end_as_trained, load_plain_lora, merge
from milora.files import check_files, files_sha256, new_folder, read_json, write_json, write_text
from milora.ggufs import check_gguf, write_lora, write_model
from milora.matrices import matrix_in, skeleton_of
from milora.merge import (
    Recorded,
    Whole,
    check_all,
    check_weight,
    merge_files,
    norm_of,
    pieces_of,
    rounding_of,
    summed,
    whole_of,
)
from milora.pretrained import source_of
from milora.progress import Progress
from milora.quantised import quantization_config
from milora.smaller import EXACT, Exported, Smaller, check_smaller, write_smaller
from milora.verify import (
    ADAPTER,
    GGUF,
    MERGED,
    check_probed,
    find_adapter,
    make_probes,
    open_adapter,
    own_reader,
    why_whole,
)

KINDS = ("lora", "merged", "gguf", "gguf-merged")
# Of an adapter's milora.json in that of what is made of it.
CARRIED = ("base", "method", "versions", "probes", "approximation_error", "cut", "combined",
           "plain_form", "labels")  # fmt: skip
LORA, MODEL, TEMPLATE = "adapter.gguf", "model.gguf", "chat_template.jinja"


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
    if (run / "run.json").is_file() and (run / "model").is_dir():
        if to != "merged":
            raise UserError(
                f"--to {to}: {why_whole(run)}: use {run / 'model'} as it is, or --to merged for a "
                "copy"
            )
        if base:
            raise UserError("--base: a copy of whole weights needs no base: leave it out")
        with new_folder(out) as folder:
            shutil.copytree(run / "model", folder, dirs_exist_ok=True)
        return Exported(f"{out}: whole weights, a copy of {run / 'model'}")
    source = find_adapter(run)
    provenance = read_json(source / "milora.json")
    if provenance["format"] != ADAPTER:
        raise UserError(f"{source} holds {provenance['format']}, not an adapter: name its run")
    check_files(source)
    lost, error = losses(provenance), provenance.get("approximation_error", 0.0)
    if smaller != EXACT and error:
        raise UserError(
            f"{source} is an approximation already, of relative error {error:.2e}: make the "
            "smaller one of what that was made from, so that all that is lost is said"
        )
    check_smaller(smaller, provenance)
    if to == "lora" and smaller == EXACT:
        if base:
            raise UserError("--base: a copy of the adapter needs no base: leave it out")
        with new_folder(out) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
        return Exported(f"{out}: plain LoRA of rank {provenance['rank']}, {_exactly(lost)}")
    if to != "lora" and provenance.get("labels"):
        return _classifier(source, out, to, base, trust_remote_code)
    recorded, progress = provenance["base"], progress or Progress()
    into_original = "merged" in to and "quantization" in recorded
    packed = provenance.get("quantised_sha256", {})
    # Of a base that came packed, trained without its original, there are no other hashes.
    unknown = {name for name in packed if packed[name] == provenance["weights_sha256"][name]}
    if into_original and unknown:
        raise UserError(
            f"--to {to}: the base of {run} came packed ({recorded['label']}), and the run had no "
            "milora.factors_from, so that no hash of the full-precision weights was kept: it "
            f"cannot be merged; serve {source}, a plain LoRA, on the packed base"
        )
    if into_original and base is None:
        original = recorded["original"] or "the checkpoint that it was made from"
        raise UserError(
            f"--to {to}: the base of {run} is quantised ({recorded['label']}), and merging into "
            "packed numbers would round the update with them: either merge into the full-precision "
            f"base (--base {original}), or serve {source}, a plain LoRA, on the quantised base"
        )
    if to == "lora":
        done = write_smaller(source, out, smaller, base, trust_remote_code, progress)
        before = f" What it was made of was no longer as trained: {lost}." if lost else ""
        return done._replace(said=done.said + before)
    model = base or recorded["model"]
    if "quantization" in recorded and base is None:
        model = recorded["original"]
        if model is None:
            raise UserError(
                f"--to {to}: the base of {run} came packed ({recorded['label']}): name the "
                "checkpoint that it was made from with --base"
            )
    files = source_of(model)
    skeleton = open_checkpoint(files, trust_remote_code).skeleton
    if "gguf" in to:
        check_gguf(skeleton.config)
    plain = load_plain_lora(source, skeleton)
    skeleton = open_checkpoint(files, trust_remote_code).skeleton  # PEFT is in the other now
    dtype = getattr(torch, recorded["dtype"])
    hashes = {
        name: Recorded(digest, None if name in packed else dtype)
        for name, digest in provenance["weights_sha256"].items()
    }
    record: dict[str, Any] = {key: provenance[key] for key in CARRIED if key in provenance}
    not_compared = ""
    if into_original:  # the probes were measured on the quantised base
        not_compared = _check_original(source, recorded, base, trust_remote_code)
        opened = open_adapter(source, base, trust_remote_code, packed=False)
        record["probes"] = make_probes(opened.model, opened.base.reader)
        del opened
    whole: Whole | None = None
    if "quantization" not in recorded and "sha256" in recorded:
        whole = whole_of(files, skeleton, hashes, recorded["sha256"], dtype)
    if to == "gguf":
        shards = open_shards(files)
        for name, found in pieces_of(skeleton, plain.factors, shards, files).items():
            if name not in unknown:
                check_weight(name, found, shards, files, hashes[name])
        if unknown:
            progress.say(
                f"no hash of the full-precision weights was kept: that {model} is the original of "
                f"{recorded['name']} is known by its shapes alone"
            )
    own: Any = None
    if to == "gguf-merged" or (to == "merged" and (source / "tokenizer_config.json").is_file()):
        own, _ = own_reader(source, skeleton.config, trust_remote_code)
    with new_folder(out) as folder:
        if to == "gguf":
            write_lora(folder / LORA, skeleton.config, plain.factors, recorded)
            if "plain_form" in record and (source / TEMPLATE).is_file():
                shutil.copyfile(source / TEMPLATE, folder / TEMPLATE)
            record |= {"format": GGUF, "file": LORA, "rank": provenance["rank"]}
            said = f"{out / LORA}: GGUF LoRA of rank {provenance['rank']}, {_exactly(lost)}"
        elif to == "merged":
            rounding, compared = merge_files(
                files, skeleton, plain.factors, hashes, folder, progress, whole
            )
            _replace_tokenizer(source, folder, provenance["configuration"], own)
            record |= {"format": MERGED, "rounding": rounding._asdict()}
            record["files_sha256"] = files_sha256(folder)
            said = f"{out}: merged weights, {rounding.sentence()}"
        else:
            compared = whole is not None and check_all(files, whole, progress)
            rounding = write_model(
                folder / MODEL, files, skeleton, plain.factors, hashes, own,
                str(recorded["name"]), Path(model) if model.endswith(".gguf") else None, progress,
            )  # fmt: skip
            record |= {"format": GGUF, "file": MODEL, "rounding": rounding._asdict()}
            said = f"{out / MODEL}: merged GGUF, {rounding.sentence()}"
        if into_original:
            said += f", on the full-precision base; the update was trained on {recorded['label']}"
        if to != "gguf" and not compared and not into_original:
            not_compared = _only_adapted("what the library makes of the others is not known here")
        if to != "gguf":
            said += not_compared + _also(lost)
        write_json(folder / "milora.json", record)
        write_text(folder / "README.md", artefact_card(record))
    return Exported(said)


def _check_original(
    source: Path, recorded: Mapping[str, Any], base: str | None, trust_remote_code: bool
) -> str:
    """Raise UserError where `base`, quantised as the run had it, is not the base of the run.

    Merging compares the adapted weights alone. Returns what is to be said where that is all.
    """
    why = "it came packed, without hashes of the others"
    if recorded["quantization"] is not None:
        try:
            quantization_config(recorded["quantization"], getattr(torch, recorded["dtype"]))
        except UserError as error:  # the library that packs is not installed here
            why = str(error)
        else:
            check_probed(open_adapter(source, base, trust_remote_code), source)
            return ""
    return _only_adapted(why)


def _only_adapted(why: str) -> str:
    return f"; of the base only the adapted weights were compared ({why})"


def _exactly(lost: str) -> str:
    return f"as it is, {lost}" if lost else "exact"


def _also(lost: str) -> str:
    return f"; the update is no longer as trained: {lost}" if lost else ""


def _replace_tokenizer(
    source: Path, folder: Path, configuration: Mapping[str, Any], tokenizer: Any
) -> None:
    """The adapter's in place of the base's, and answers end where they did in training."""
    if tokenizer:
        older = ["special_tokens_map.json", "added_tokens.json"]  # they would be read first
        older += ["chat_template.json"] * (source / TEMPLATE).is_file()
        for name in older:
            (folder / name).unlink(missing_ok=True)
    copy_tokenizer(source, folder)
    if tokenizer:
        end_as_trained(folder, tokenizer, configuration)


def _classifier(
    source: Path, out: Path, to: str, base: str | None, trust_remote_code: bool
) -> Exported:
    """Merged weights with the head, which is in no file of the base, so that they are loaded."""
    if to != "merged":
        raise UserError(
            f"--to {to}: llama.cpp reads no head of a classifier: use --to merged, or --to lora"
        )
    opened = open_adapter(source, base, trust_remote_code)
    check_probed(opened, source)
    provenance, model = opened.provenance, take_off(opened.model)
    plain = load_plain_lora(source, skeleton_of(model))
    lost, norms, dtypes = dict[str, float](), dict[str, float](), set[torch.dtype]()
    for name, factors in plain.factors.items():
        weight = matrix_in(model, name)
        A, B = (one.to(weight.device) for one in factors)
        merged, lost[name] = summed(name, weight, B, A)
        with torch.no_grad():
            weight.copy_(merged)
        norms[name] = norm_of(factors)
        dtypes.add(weight.dtype)
    merge(model, plain._replace(factors={}))  # the head alone
    rounding = rounding_of(lost, norms, dtypes)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        copy_tokenizer(source, folder)
        record = {key: provenance[key] for key in CARRIED if key in provenance}
        record |= {"format": MERGED, "rounding": rounding._asdict()}
        record["files_sha256"] = files_sha256(folder)
        write_json(folder / "milora.json", record)
        write_text(folder / "README.md", artefact_card(record))
    said = f"{out}: merged weights with the head, {rounding.sentence()}"
    return Exported(said + _also(losses(provenance)))
