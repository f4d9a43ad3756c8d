"""A run at step 0: initial factors, what is held, the check that step 0 is the base, the folder."""

import math
import platform
import tempfile
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from milora import adapter, export, fingerprints
from milora.continual import FILE, logits_before, save_previous, step0
from milora.errors import UserError
from milora.files import read_json, write_json, write_text
from milora.forms import collator_for, read_only
from milora.keep import (
    CALIBRATION,
    KEPT,
    SAMPLED,
    Pieces,
    input_directions,
    left_out,
    load_pieces,
    sampled,
    sampled_name,
    save_pieces,
)
from milora.logits import step0_bound, step0_difference
from milora.material import data_record
from milora.matrices import Weights, adapted_matrices
from milora.pretrained import labels_of, positions, task_of
from milora.preview import coverage
from milora.processes import Processes
from milora.progress import Progress
from milora.protect import (
    Held,
    Top,
    begin_outside,
    held,
    load_tops,
    parts_of,
    project,
    save_tops,
    top_vectors,
    used_by_tasks,
)
from milora.ready import Ready, rows_per_step
from milora.store import Store
from milora.svd import Decompose, components
from milora.training_state import STATE, load_state
from milora.vision import train_in_full


class Begun(NamedTuple):
    """A run at step 0, or where it was interrupted."""

    live: nn.Module
    start: adapter.Start | None
    tops: dict[str, Top]
    holds: dict[str, Held]
    general: Pieces  # of milora.text
    record: dict[str, Any]  # run.json
    base_sha256: str  # of the base that trains: with rows for new tokens not the one that came


def begin(ready: Ready, processes: Processes, progress: Progress) -> Begun:
    """Initial factors, the anchor, the check that step 0 is the base, and the run folder."""
    asked, run, material, resumed = ready.asked, ready.run, ready.material, ready.resumed
    method, milora, seed = asked["method"], asked["milora"], asked["seed"]
    base, start, init, origin = material.base, ready.start, ready.init, ready.origin
    earlier, previous = ready.earlier, ready.previous
    probe, before = probe_of(ready), None
    if earlier and "step0" not in resumed:
        before = logits_before(earlier, base.model, probe)
    live: nn.Module = base.model
    live_sha = fingerprints.base_sha256(live) if material.named.ids else material.base_sha256
    general = _general(ready, live_sha, progress)
    if ready.lora_config is not None:
        store = None
        if start is None and method in adapter.COMPONENT and not previous:
            store = Store(say=progress.say, optional=True)
        live, start = adapter.add_adapter(
            base.model, ready.lora_config, method, seed=seed, start=start, begin=milora["start"],
            decompose=store.components if store else components, weights=ready.weights,
            previous=previous, keep_apart=ready.apart,
            progress=lambda name, done, total: progress("decomposing", done, total, name),
        )  # fmt: skip
        if store and store.found:
            progress.say(
                f"initial factors: {store.found} of {store.found + store.made} weights were in "
                f"the store ({store.folder})"
            )
    else:
        train_in_full(base.model)
    zero = sum(found["zero"] for found in start.spectra.values()) if start else 0
    if zero:
        progress.say(
            f"{zero} singular values are zero (init/spectra.json)"
            + ": those pairs start with B = 0 and an A of ordinary size, so that they can learn"
            * (milora["start"] == "published")
        )
    tops: dict[str, Top] = {}
    inputs: dict[str, Tensor] = {}
    holds: dict[str, Held] = {}
    if isinstance(live, PeftModel) and start is not None:
        take = components if previous else Store(say=progress.say, optional=True).components
        tops, inputs = _tops(
            live, ready.weights, start, milora, general, origin, seed, take, progress
        )
        if inputs and earlier and earlier.how == "same":
            progress.say(f"inputs: the directions that are held are those of {earlier.run.name}")
        holds = _hold(live, start, tops, inputs, ready.apart, origin, progress)
    if earlier and earlier.how == "same":
        load_state(earlier.run / "checkpoints" / STATE, live)
    task = task_of(base.model)
    record = resumed or {
        "state": "started",
        "method": method,
        "base": {
            "model": asked["model"], "name": base.name, "license": base.license,
            "sha256": material.base_sha256,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            **ready.packed,
            **({"reads": "pictures"} if base.processor else {}),
        },
        "versions": versions(),
        "seed": seed,
        "data": data_record(material),
        "parameters": {
            "trainable": sum(p.numel() for p in live.parameters() if p.requires_grad),
            "all": ready.parameters,
        },
        "coverage": coverage(live) if isinstance(live, PeftModel) else {},
        "seconds": {},
    }  # fmt: skip
    if not resumed:
        record["rows_per_step"] = rows_per_step(asked["training"], processes.number)
        record["processes"] = processes.number
    if earlier and not resumed:
        record["continues"] = earlier.record
    if material.named.ids:
        record["tokens"] = {"ids": material.named.ids, "added": material.named.added}
    if task != "CAUSAL_LM":
        record["base"]["task"] = task
    if task == "SEQ_CLS":
        record["labels"] = labels_of(base.model)
        record["pad_token_id"] = base.tokenizer.pad_token_id
    if "step0" not in record and isinstance(live, PeftModel) and not processes.sharded:
        first = None
        if earlier and before is not None and start is not None:
            now = export.plain_lora(start, adapter.trained_factors(live), previous=previous)
            first = step0(earlier, live, before, probe, now, base.model)
        record["step0"] = step_zero(live, probe, asked["model"], progress, first)
    run.mkdir(parents=True, exist_ok=True)
    if not resumed:
        write_text(run / "config.yaml", yaml.safe_dump(asked, sort_keys=False, allow_unicode=True))
        write_json(run / "run.json", record)
    if start is not None and not init.exists():
        init.parent.mkdir(exist_ok=True)
        if earlier and previous:
            save_previous(init.with_name(FILE), previous, earlier.record["adapter_sha256"])
        if origin != init:
            start = start._replace(spectra=read_json(origin.with_name("spectra.json")))
        write_json(run / "init" / "spectra.json", start.spectra)
    if (tops or inputs) and start and not (init.parent / "top.safetensors").exists():
        save_tops(init.parent / "top.safetensors", tops, inputs, start.sha256)
    if general and milora["text"] == SAMPLED and not ready.written.exists():
        save_pieces(ready.written, general)
    if start is not None and not init.exists():
        adapter.save_start(init, start)  # the last: where it is, all that goes with it is too
    return Begun(live, start, tops, holds, general, record, live_sha)


def _general(ready: Ready, base_sha256: str, progress: Progress) -> Pieces:
    """Pieces of milora.text: of files, or what the base writes, once for a run and once here."""
    base, milora = ready.material.base, ready.asked["milora"]
    known = ready.origin.with_name("top.safetensors").exists()  # and the inputs in it
    wanted = milora["keep"] or (milora["protect_inputs"] and not known)
    if milora["text"] != SAMPLED or not wanted:
        return ready.material.general
    if ready.written.exists():
        return load_pieces(ready.written)
    count = KEPT if milora["keep"] else CALIBRATION
    longest, what = positions(base.model), "general text, which the base writes"

    def write() -> Tensor:
        told = partial(progress, what)
        return torch.tensor(sampled(base.model, base.tokenizer, count, longest, told))

    store = Store(say=progress.say, optional=True)
    name = sampled_name(base_sha256, base.tokenizer, count, longest)
    pieces: Pieces = store.tensor(name, write).tolist()
    return pieces


def together(ready: Ready, begun: Begun | None, processes: Processes) -> Begun:
    """The same state in every process: what the main one has begun, sent to the others.

    Raises UserError where they do not see one folder, which checkpoints are read from.
    """
    if processes.number == 1 and begun:
        return begun
    with processes.agree():
        if not (ready.run / "run.json").exists():
            raise UserError(
                f"output_dir: {ready.run} is not there, so the machines do not share it: use a "
                "folder that all of them see"
            )
    files = [ready.init, ready.init.with_name("top.safetensors"), ready.written]
    sent = [processes.share(lambda f=file: f.read_bytes() if f.exists() else b"") for file in files]  # type: ignore[misc]
    if begun is None:
        live: nn.Module = ready.material.base.model
        if ready.lora_config is None:
            train_in_full(ready.material.base.model)
            return Begun(live, None, {}, {}, [], {}, "")
        with tempfile.TemporaryDirectory() as folder:
            places = [Path(folder) / file.name for file in files]
            for place, content in zip(places, sent, strict=True):
                place.write_bytes(content)
            start = adapter.load_start(places[0])
            tops, inputs = load_tops(places[1], start.sha256) if sent[1] else ({}, {})
            general = load_pieces(places[2]) if sent[2] else ready.material.general
        live, _ = adapter.add_adapter(
            ready.material.base.model, ready.lora_config, ready.asked["method"],
            seed=ready.asked["seed"], start=start, checked=True, previous=ready.previous,
        )  # fmt: skip
        matrices = adapted_matrices(live)
        holds = held(matrices, tops, inputs, used_by_tasks(matrices) if ready.apart else {})
        if start.method == "lora":
            project(matrices, holds)
        if ready.earlier and ready.earlier.how == "same":
            load_state(ready.earlier.run / "checkpoints" / STATE, live)
        begun = Begun(live, start, tops, holds, general, {}, "")
    if processes.sharded and isinstance(begun.live, PeftModel) and begun.start:
        adapter.anchor_aside(begun.live, begun.start)
        if processes.sharded == "zero3":
            adapter.unfused(begun.live)
    return begun


class StepZero(TrainerCallback):
    """The check of step 0 where it takes all processes to run the model: once it is shared out."""

    def __init__(self, ready: Ready, record: dict[str, Any], progress: Progress) -> None:
        self.ready, self.record, self.progress = ready, record, progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:
            return
        probe = {name: tensor.to(args.device) for name, tensor in probe_of(self.ready).items()}
        self.record["step0"] = step_zero(
            kwargs["model"], probe, self.ready.asked["model"], self.progress
        )
        if state.is_world_process_zero:
            write_json(self.ready.run / "run.json", self.record)


def probe_of(ready: Ready) -> dict[str, Tensor]:
    """The first rows, on which step 0 and the export are checked."""
    base = ready.material.base
    probe = read_only(collator_for(base.reader, base.model)(ready.material.train.examples[:4]))
    return {name: tensor.to(base.model.device) for name, tensor in probe.items()}


def step_zero(
    live: PeftModel, probe: Mapping[str, Tensor], model: str, progress: Progress,
    first: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """How far the adapted logits are from the base's, and the bound, for run.json; `first` is what
    continual.step0 says in its place of a run that continues another.

    Raises UserError where the base is damaged, RuntimeError where the bound is passed.
    """
    base: Any = live.get_base_model()
    if first is None:
        first = {
            "difference": step0_difference(live, probe),
            "bound": step0_bound(base.dtype),
        }
    difference, bound, what = first["difference"], first["bound"], first.get("of", "logits")
    if not math.isfinite(difference):
        raise UserError(f"model: {model} gives logits that are no numbers{_damaged(live)}")
    whose = (
        f"the {what} and those of {first['from']}" if "from" in first else "adapted and base logits"
    )
    progress.say(f"step 0: {whose} differ by {difference:.1e} (bound {bound})")
    if not difference <= bound:
        raise RuntimeError(
            f"step 0 is not {first.get('from', 'the base')}: the {what} differ by {difference:.1e} "
            f"of the largest, bound {bound}; nothing was trained, please report this"
        )
    return first


def _damaged(model: nn.Module) -> str:
    """The first weight with a NaN or an infinity, which explains what the model gives."""
    for name, weight in fingerprints.base_weights(model).items():
        if not torch.isfinite(weight).all():
            return f": {name} holds NaN or infinite values, so that the base is damaged"
    return " on your rows, though all its weights are: use dtype: float32"


def _tops(
    live: PeftModel, weights: Weights | None, start: adapter.Start, milora: Mapping[str, Any],
    general: Pieces, init: Path, seed: int, decompose: Decompose, progress: Progress,
) -> tuple[dict[str, Top], dict[str, Tensor]]:  # fmt: skip
    """The singular vectors to hold and to watch, from the run folder or the store, and the
    directions of inputs to hold, from the run folder or the text.
    """
    matrices, stored = adapted_matrices(live, weights), init.with_name("top.safetensors")
    if stored.exists():
        device = next(live.parameters()).device
        tops, inputs = load_tops(stored, start.sha256)
        return {
            name: top._replace(U=top.U.to(device), Vh=top.Vh.to(device))
            for name, top in tops.items()
        }, inputs
    tops, inputs = {}, {}
    protect, _ = parts_of(milora["protect"])
    if protect or milora["interference"]["top"]:
        tops = top_vectors(
            matrices, start, protect, milora["interference"]["top"], seed,
            decompose,
            lambda name, done, total: progress("the largest components", done, total, name),
        )  # fmt: skip
        if init.exists():  # an earlier run's, which may have been moved: it is not minor any more
            tops = {name: top._replace(minor=None) for name, top in tops.items()}
    if milora["protect_inputs"]:
        pieces = general[:CALIBRATION]
        progress.say(f"inputs: {sum(map(len, pieces))} tokens of milora.text run through the base")
        inputs = input_directions(live, matrices, pieces, milora["protect_inputs"])
        if said := left_out(matrices, inputs):
            progress.say(f"inputs: {said}")
    return tops, inputs


def _hold(
    live: PeftModel, start: adapter.Start, tops: Mapping[str, Top], inputs: Mapping[str, Tensor],
    apart: bool, init: Path, progress: Progress,
) -> dict[str, Held]:  # fmt: skip
    """What the update is kept out of. What the run starts from is moved out of it, unless it was
    when `init` was written.
    """
    matrices = adapted_matrices(live)
    used = used_by_tasks(matrices) if apart else {}
    holds = held(matrices, tops, inputs, used)
    protected = [top for top in tops.values() if top.protected]
    if protected:
        counts = sorted(top.protected for top in protected)
        energies = [top.energy for top in protected]
        progress.say(
            f"protected: the top {counts[0]} to {counts[-1]} directions of {len(protected)} "
            f"weights, {min(energies):.0%} to {max(energies):.0%} of their energy"
        )
    limited = [top for top in tops.values() if top.limited]
    if limited:
        none = sum(not top.protected for top in limited)
        progress.say(
            f"milora.protect: in {len(limited)} weights fewer than asked for"
            + f", in {none} of them none" * bool(none)
            + ", since the initial factors begin there"
        )
    if used:
        counts = sorted(len(one.Vh) for one in used.values())
        progress.say(
            f"kept apart: {counts[0]} to {counts[-1]} directions that earlier tasks use, in "
            f"{len(used)} weights"
        )
    if start.method == "lora" or not init.exists():
        begin_outside(start, matrices, holds, tops)
    return holds


def versions() -> dict[str, str]:
    packages = ("milora", "torch", "transformers", "peft", "accelerate", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
