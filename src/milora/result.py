"""What a run leaves: the adapter or merged weights, and what is said of the update."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from milora import adapter, export, fingerprints
from milora.card import model_card
from milora.data import plain_form, plain_template
from milora.files import files_sha256, new_folder, read_json, write_json, write_text
from milora.logits import Pair, logits_of
from milora.matrices import Matrix, adapted_matrices, kind_of
from milora.pretrained import Pretrained, load_pretrained
from milora.progress import Progress
from milora.protect import Top, measure, worst
from milora.spectra import thinned
from milora.tokens import load_with_tokens
from milora.verify import head_sha256, make_probes
from milora.vision import Reader

KEPT = ("rank", "exported_against_trained", "cut")  # of milora.json in run.json


def plainly_asked(reader: Reader, record: Mapping[str, Any]) -> str | None:
    """The form of a run's conversations where it is that of data.PLAIN_TEMPLATE."""
    if record["data"]["format"] == "text" or record["base"].get("task", "CAUSAL_LM") != "CAUSAL_LM":
        return None
    return plain_form(reader)


def save_reader(reader: Reader, folder: Path, record: Mapping[str, Any]) -> None:
    """With the template that the run was trained with, where that is ours.

    Not of a processor, whose template would get pictures as parts and drop the white space that
    they were trained with: its card alone says the form.
    """
    reader.save_pretrained(folder)
    if "plain_form" in record and isinstance(reader, PreTrainedTokenizerBase):
        write_text(folder / "chat_template.jinja", plain_template(reader))


def interference_by_layer(
    live: PeftModel, start: adapter.Start, tops: Mapping[str, Top]
) -> dict[str, Any]:
    """What run.json keeps: worst and mean, and left, right, minor, size and k of each module."""
    found = measure(adapted_matrices(live), start, tops)
    layers = {
        name: {**one._asdict(), "k": tops[name].U.shape[1], "protected": tops[name].protected}
        for name, one in found.items()
    }
    return {**worst(found), "layers": layers}


def spectra_before_and_after(
    matrices: Mapping[str, Matrix], plain: export.PlainLora
) -> dict[str, Any]:
    """Singular values before and after, of the first, middle and last weight of every kind.

    Weights with more than 2048 rows and columns are left out, since theirs would take minutes.
    """
    kinds: dict[str, list[str]] = {}
    for name, matrix in matrices.items():
        if matrix.packed and matrix.source is None:
            continue  # nothing to compare with
        kinds.setdefault(kind_of(name), []).append(name)
    found = {}
    for names in kinds.values():
        for name in dict.fromkeys((names[0], names[len(names) // 2], names[-1])):
            weight = matrices[name].weight.double()
            if min(weight.shape) > 2048:
                continue
            A, B = (x.double().to(weight.device) for x in plain.factors[name])
            found[name] = {
                "before": thinned(torch.linalg.svdvals(weight)),
                "after": thinned(torch.linalg.svdvals(weight + B @ A)),
            }
    return found


def export_plain(
    live: PeftModel,
    plain: export.PlainLora,
    start: adapter.Start,
    record: dict[str, Any],
    pretrained: Pretrained,
    run: Path,
    probe: Mapping[str, Tensor],
    asked: Mapping[str, Any],
    cut: Mapping[str, Any] | None,
    progress: Progress,
) -> PeftModel:
    """Write adapter/ and return the base with that very adapter, loaded by PEFT.

    `cut` says what `plain` is short of what was trained.
    """
    live.eval()
    with torch.no_grad():
        trained_logits = logits_of(live, probe)
    base = adapter.take_off(live)
    record["base"]["type"] = base.config.model_type
    if not (run / "adapter").exists():
        with new_folder(run / "adapter") as folder:
            rank = export.save_plain_lora(folder, plain, base, pretrained.name)
            save_reader(pretrained.reader, folder, record)
            loaded = PeftModel.from_pretrained(base, folder)
            export.check_loaded(loaded, plain)
            with torch.no_grad():
                logits = logits_of(loaded, probe)
            difference = float((logits - trained_logits).abs().max() / trained_logits.abs().max())
            probes = make_probes(loaded, pretrained.reader)
            head = head_sha256(loaded)
            base = adapter.take_off(loaded)
            provenance = {
                "format": "milora adapter 1",
                "base": record["base"],
                "weights_sha256": start.sha256,
                "quantised_sha256": fingerprints.packed_hashes(base, start.sha256),
                "method": record["method"],
                "rank": rank,
                "files_sha256": files_sha256(folder),
                "step0": record["step0"],
                "exported_against_trained": difference,
                "versions": record["versions"],
                "configuration": asked,
                "probes": probes,
            }
            if head:
                provenance |= {"labels": record["labels"], "head_sha256": head}
            if "plain_form" in record:
                provenance["plain_form"] = record["plain_form"]
            if cut:
                provenance["cut"] = dict(cut)
            if "continues" in record:
                provenance["lineage"] = record["continues"]["lineage"]
            record["adapter"] = {k: provenance[k] for k in KEPT if k in provenance}
            write_json(folder / "milora.json", provenance)
            write_text(folder / "README.md", model_card(record, asked, None))
        twice = "" if start.method == "lora" else " (2r: B, A and the initial factors)"
        if "continues" in record:
            twice = " (with the update of the runs that it continues)"
        progress.say(
            f"{run / 'adapter'}: plain LoRA of rank {rank}{twice}, logits as trained to "
            f"{difference:.1e}"
        )
        if cut and cut["error"]:
            progress.say(
                f"cut to rank {cut['rank']}: {cut['error']:.1e} of the update (Frobenius, worst "
                f"{cut['worst'][0]} {cut['worst'][1]:.1e}); all cuts of the chain add up to at "
                f"most {cut['summed_error']:.1e}"
            )
        elif not difference <= (1e-5 if base.dtype == torch.float32 else 0.05):
            progress.say(
                "its factors are those that were trained, to the last bit; the update is so large "
                f"that the order of the sums shows in {record['base']['dtype']}"
            )
    written = read_json(run / "adapter" / "milora.json")
    record["adapter"] = {k: written[k] for k in KEPT if k in written}
    record["state"] = "exported"
    write_json(run / "run.json", record)
    return PeftModel.from_pretrained(base, run / "adapter")


def export_merged(
    live: PeftModel,
    plain: export.PlainLora,
    record: dict[str, Any],
    run: Path,
    probe: Mapping[str, Tensor],
    asked: Mapping[str, Any],
    progress: Progress,
) -> Pair:
    """Write model/, whole weights, since no plain LoRA holds rows of embedding or head.

    Returns what the folder gives and, with its adapter off, the base.
    """
    live.eval()
    keep, dtype = probe["attention_mask"].bool(), record["base"]["dtype"]
    with torch.no_grad():
        trained_logits = live(**probe).logits[keep].float()
    rows = adapter.trained_rows(live)
    layers = sorted({name.rpartition(".")[0] for name in rows})
    record["merged"] = {"rows_of": layers}
    if not (run / "model").exists():
        fresh = load_with_tokens(
            asked["model"], dtype, asked["trust_remote_code"], asked.get("tokenizer", {})
        ).base
        export.merge(fresh.model, plain, rows)
        with new_folder(run / "model") as folder:
            fresh.model.save_pretrained(folder)
            save_reader(fresh.reader, folder, record)
            export.end_as_trained(folder, fresh.tokenizer, asked)
            write_text(folder / "README.md", model_card(record, asked, None))
        del fresh
    tuned = load_pretrained(str(run / "model"), dtype, asked["trust_remote_code"]).model
    with torch.no_grad():
        logits = tuned(**probe).logits[keep].float()
    difference = float((logits - trained_logits).abs().max() / trained_logits.abs().max())
    record["merged"]["exported_against_trained"] = difference
    record["state"] = "exported"
    write_json(run / "run.json", record)
    progress.say(
        f"{run / 'model'}: merged weights, since {' and '.join(layers)} had rows to train, which "
        f"no plain LoRA holds; logits as trained to {difference:.1e}"
    )
    if dtype == "float32" and not difference <= 1e-3:
        raise RuntimeError("the merged weights are not what was trained: please report this")
    live.base_model.disable_adapter_layers()  # type: ignore[operator]
    return Pair(tuned, live)
