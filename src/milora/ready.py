"""A run that is known to be possible: everything that the user can get wrong, read and checked."""

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig
from transformers import TrainingArguments, set_seed

from milora import adapter, targeting
from milora.allocator import give_back_freed
from milora.arguments import check_here
from milora.checkpoint import Original, original_of
from milora.continual import Earlier, check_material, folded, open_earlier, previous_update
from milora.errors import UserError
from milora.evaluate import measured
from milora.files import read_record
from milora.gates import Gate, check_subjects, parse_gate
from milora.keep import SAMPLED, check_inputs
from milora.lineage import Link, chain
from milora.material import Material, read_material
from milora.matrices import Weights, adapted_matrices, is_suffix, matrix_in, skeleton_of
from milora.pretrained import Pretrained, dtype_of, labels_of, task_of
from milora.preview import size
from milora.processes import Processes
from milora.progress import Progress
from milora.protect import check_patterns, check_protect, check_room, parts_of
from milora.quantised import loaded_bytes
from milora.ranks import check_ranked, ranks, with_ranks
from milora.recommended import not_said, recommended, stored_in
from milora.store import Store
from milora.training_state import STATE, last_complete_checkpoint
from milora.transfer import check_tasks, unmeasured

# What of training: says how many rows a process takes at once, with the defaults.
PER_DEVICE = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}


class Ready(NamedTuple):
    """A run that is known to be possible; nothing is written yet."""

    asked: dict[str, Any]  # the configuration
    run: Path
    resumed: dict[str, Any]  # run.json of a run that began before, or {}
    arguments: TrainingArguments
    lora_config: LoraConfig | None
    material: Material
    gates: list[Gate]
    start: adapter.Start | None  # of a run that began before, or that this one trains on
    earlier: Earlier | None  # the run that this one continues
    previous: dict[str, adapter.Factors]  # the update that its own comes on top of
    weights: Weights | None  # reads the full-precision matrices of a quantised base
    packed: dict[str, Any]  # what run.json says of such a base
    parameters: int  # of the base

    @property
    def init(self) -> Path:
        return self.run / "init" / "factors.safetensors"

    @property
    def written(self) -> Path:
        """General text that the base has written."""
        return self.init.with_name("general.safetensors")

    @property
    def origin(self) -> Path:
        """Where the start is read from: of an adapter that is trained on, from that one's run."""
        return _origin(self.init, self.earlier)

    @property
    def apart(self) -> bool:
        return parts_of(self.asked["milora"]["protect"])[1]


def check(
    asked: dict[str, Any], arguments: TrainingArguments, resume: bool, processes: Processes,
    progress: Progress,
) -> Ready:  # fmt: skip
    """Read and check everything that the user can get wrong."""
    model, method, dtype, seed = (asked[key] for key in ("model", "method", "dtype", "seed"))
    lora, milora, quantization = (asked[key] for key in ("lora", "milora", "quantization"))
    run = Path(asked["output_dir"])
    resumed = check_folder(run, asked, resume, processes.number)
    if resume and not resumed:
        progress.say(f"--resume: {run} holds no run yet, so that it begins")
    check_here(arguments)
    lora_config = check_alone(asked, arguments)
    protect, apart = parts_of(milora["protect"])
    earlier = open_earlier(asked, run, resumed, apart)
    say_unused(milora, progress)
    if processes.sharded:
        _check_sharded(asked, arguments, processes.sharded)
    if (method == "full" or lora.get("modules_to_save")) and dtype == "auto":
        dtype = "float32"  # most steps of a small rate round to nothing in 16 bit
    if dtype == "auto" and resumed:
        dtype = resumed["base"]["dtype"]  # of where it began: another machine may mean another
    set_seed(seed)
    if not torch.cuda.is_available():
        give_back_freed()
    watched = protect or milora["interference"]["top"]
    original = original_of(
        model, quantization, milora["factors_from"], dtype=dtype,
        needed=bool(method in adapter.COMPONENT or watched or milora["rank"]),
        trust_remote_code=asked["trust_remote_code"],
    )  # fmt: skip
    weights = original.weights if original else None
    if original:
        progress.say(_memory(original, dtype))
    material = read_material(
        asked, dtype, bool(processes.sharded), processes.main, earlier, progress
    )
    number, batch = len(material.train.examples), arguments.train_batch_size * processes.number
    if arguments.dataloader_drop_last and number < batch:
        raise UserError(
            f"training.dataloader_drop_last: {asked['data']['train']} has {number} rows to train "
            f"on, fewer than one batch of {batch}, so that none is left: leave it out"
        )
    gates = [parse_gate(gate) for gate in asked["gates"]]
    there = measured(
        material.tasks,
        [source for _, source in material.texts],
        classifies=task_of(material.base.model) == "SEQ_CLS",
        interference=bool(watched) and method != "full",
    )
    check_subjects(gates, [task.name for task in material.tasks], there)
    over_all = [gate.text for gate in gates if gate.subject == "continual"]
    if over_all and not earlier:
        raise UserError(f"gates: {over_all[0]!r} needs earlier tasks: name a run in continue.run")
    base, base_sha = material.base, material.base_sha256
    if over_all and earlier:
        links = [*chain(earlier.run), Link(run, {}, asked, {})]
        check_tasks(links, base.reader, base.model)
        absent = unmeasured(links, task_of(base.model) == "SEQ_CLS")
        for gate in gates:
            if gate.subject == "continual" and gate.key in absent:
                raise UserError(
                    f"gates: {gate.text!r} would not be measured, since {absent[gate.key]}: leave "
                    "it out"
                )
    task = task_of(base.model)
    for key in ("keep", "protect_inputs"):
        if milora[key] and task != "CAUSAL_LM":
            raise UserError(
                f"milora.{key}: it has a causal model predict general text, which {model} is not"
            )
    if lora.get("modules_to_save") and task != "CAUSAL_LM":
        raise UserError("lora.modules_to_save is for causal models: leave it out")
    packed: dict[str, Any] = {}
    if original:
        packed = {
            "quantization": quantization, "label": original.label, "original": original.name,
            "bytes": loaded_bytes(base.model), "full_precision_bytes": original.full_bytes,
        }  # fmt: skip
    init = run / "init" / "factors.safetensors"
    states = run / "checkpoints"
    if method != "full" and not init.exists() and _has_begun(states):
        raise UserError(
            f"{init} is gone, and what {states} holds was trained from it: put it back, or begin a "
            "new run in another output_dir"
        )
    origin = _origin(init, earlier)
    start = adapter.load_start(origin) if method != "full" and origin.exists() else None
    previous: dict[str, adapter.Factors] = {}
    if earlier:
        labels = labels_of(base.model) if task == "SEQ_CLS" else []
        in_rows = [*material.named.ids, *(lora.get("modules_to_save") or ())]
        check_material(earlier, base_sha, model, labels, in_rows)
        previous = previous_update(earlier, base.model, init.parent)
    names: dict[str, targeting.Target] = {}
    open_yet = not_said(milora)
    if method != "full" and (milora["rank"] or isinstance(protect, dict) or open_yet):
        names = _targets(base, lora)
        check_patterns(protect, list(names))
    if open_yet:
        inputs = [target.shape[1] for target in names.values()]
        unfit = _unfit(lora, task, processes.sharded)
        asked = asked | {"milora": recommended(milora, inputs, unfit, progress)}
    if method != "full":
        options, ranked = lora, milora["rank"]
        if ranked:
            read = folded(base.model, weights, previous) if previous else weights
            options = with_ranks(lora, _ranks(base, names, ranked, start, read, progress))
        lora_config = targeting.lora_config(options, task, base.in_full)
        inputs = asked["milora"]["protect_inputs"]
        if inputs or apart:  # before any decomposition
            _check_room(base, lora_config, inputs, previous if apart else {})
    if lora_config is not None:
        whole = lora_config.modules_to_save or ()
        lora_config.trainable_token_indices = {
            layer: ids
            for layer, ids in material.named.rows.items()
            if not any(is_suffix(entry, layer) for entry in whole)
        } or None
        rows = [*(lora_config.trainable_token_indices or ()), *whole]
        if original and rows:
            raise UserError(
                f"rows of {', '.join(rows)} would train, whose result is merged weights, and into "
                f"packed numbers ({original.label}) nothing is merged: leave out quantization, or "
                "the new tokens and lora.modules_to_save"
            )
    stored_base = resumed.get("base", {}).get("sha256", base_sha)
    if processes.main and stored_base != base_sha:
        raise UserError(
            f"wrong base: {model} has sha256 {base_sha[:12]}, the run in {run} was made with "
            f"{stored_base[:12]}: use that base, or another output_dir"
        )
    for file, digest in resumed.get("data", {}).get("sha256", {}).items():
        if material.files.get(file) != digest:
            raise UserError(
                f"--resume: {file} has changed since the run in {run} began: put it back, or use "
                "another output_dir"
            )
    return Ready(
        asked, run, resumed, arguments, lora_config, material, gates, start, earlier, previous,
        weights, packed, base.model.num_parameters(),
    )  # fmt: skip


def _has_begun(states: Path) -> bool:
    return (states / STATE).exists() or last_complete_checkpoint(states) is not None


def _origin(init: Path, earlier: Earlier | None) -> Path:
    return earlier.init if earlier and earlier.how == "same" and not init.exists() else init


def _check_sharded(
    asked: Mapping[str, Any], arguments: TrainingArguments, how: Literal["fsdp", "zero3"]
) -> None:
    """Raise UserError for what cannot be trained where each process has a slice of the weights."""
    lora, named = asked["lora"], asked.get("tokenizer", {})
    there = {
        "method: full": asked["method"] == "full",
        "quantization": bool(asked["quantization"] or asked["milora"]["factors_from"]),
        "lora.target_parameters": bool(lora.get("target_parameters")),
        "lora.modules_to_save": bool(lora.get("modules_to_save")),
        "tokenizer.tokens": bool(named.get("tokens") or named.get("special_tokens")),
        "milora.rank": bool(asked["milora"]["rank"]),
        "continue.run": "continue" in asked,
    }
    for key, is_there in there.items():
        if is_there:
            raise UserError(
                f"{key} is not for weights that are shared out: leave it out, or have every "
                "process keep the whole model (examples/accelerate/ddp.yaml)"
            )
    if how == "fsdp":
        return
    milora, method = asked["milora"], asked["method"]
    watched = milora["interference"]
    there = {
        "milora.protect": bool(milora["protect"]),
        "milora.protect_inputs": bool(milora["protect_inputs"]),
        "milora.keep": bool(milora["keep"]),
        "milora.interference.limit": watched["limit"] is not None,
        "training.weight_decay": bool(arguments.weight_decay) and method != "lora",
        "load_best_model_at_end": bool(arguments.load_best_model_at_end),
        "16 bit": asked["dtype"] != "float32" or arguments.bf16 or arguments.fp16,
    }
    for key, is_there in there.items():
        if is_there:
            raise UserError(
                f"{key} is not for DeepSpeed, which keeps copies of its own of what trains, and in "
                "16 bit rounds the adapter and the anchor: use dtype: float32 and leave it out, "
                "or use FSDP 2 (examples/accelerate/fsdp2.yaml)"
            )


def check_folder(
    run: Path, asked: Mapping[str, Any], resume: bool, processes: int
) -> dict[str, Any]:
    """run.json of the run to resume, or {} for a new one.

    Raises UserError for a folder that cannot be written, or that holds another run.
    """
    if os.path.isfile(run):
        raise UserError(f"output_dir: {run} is a file")
    own = run.resolve()
    within = next(folder for folder in (own, *own.parents) if os.path.exists(folder))
    if not within.is_dir() or not os.access(within, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir: {run} cannot be written: {within} is no folder that takes files"
        )
    # Hidden files are what a killed process was about to write.
    there = run.exists() and any(not path.name.startswith(".") for path in run.iterdir())
    if not resume:
        if there:
            raise UserError(
                f"output_dir: {run} already holds another run: choose a new folder, or continue "
                "that run with --resume"
            )
        return {}
    if not (run / "run.json").exists():
        if there and not (run / "config.yaml").exists():
            raise UserError(f"output_dir: {run} holds no run to resume")
        return {}  # killed before its first step: begin it
    stored = stored_in(run)
    differ = [
        said
        for key in dict.fromkeys([*asked, *stored])  # one that is left out has changed too
        if key != "output_dir"
        for said in _differences(key, _of_any_number(stored, key), _of_any_number(asked, key))
    ]
    if differ:
        raise UserError(f"--resume: the configuration has changed: {'; '.join(differ)}")
    record = read_record(run / "run.json")
    rows = rows_per_step(asked["training"], processes)
    trained = (run / "checkpoints" / STATE).exists()
    latest = last_complete_checkpoint(run / "checkpoints")
    if not trained and latest and (latest / "latest").exists() and record["processes"] != processes:
        raise UserError(
            f"--resume: DeepSpeed's checkpoints are for {record['processes']} processes, and here "
            f"are {processes}: use as many, or a new output_dir"
        )
    if not trained and record.get("rows_per_step", rows) != rows:
        raise UserError(
            f"--resume: a step was over {record['rows_per_step']} rows and would be over {rows} "
            f"with {processes} processes: set training.per_device_train_batch_size or "
            "gradient_accumulation_steps so that it stays the same"
        )
    return record


def _differences(key: str, before: Any, now: Any) -> list[str]:
    """Which of the keys below `key` differ."""
    if before == now:
        return []
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return [f"{key} was {before!r} and is {now!r}"]
    keys = [*now, *(one for one in before if one not in now)]
    return [d for k in keys for d in _differences(f"{key}.{k}", before.get(k), now.get(k))]


def _of_any_number(asked: Mapping[str, Any], key: str) -> Any:
    """A key of the configuration without what may differ between numbers of processes."""
    value = asked.get(key)
    if key != "training" or value is None:
        return value
    return {k: v for k, v in value.items() if k not in PER_DEVICE}


def rows_per_step(training: Mapping[str, Any], processes: int) -> int:
    """How many rows the optimizer's step is over."""
    rows = 1
    for key, default in PER_DEVICE.items():
        rows *= int(training.get(key, default))
    return rows * processes


def check_alone(asked: Mapping[str, Any], arguments: TrainingArguments) -> LoraConfig | None:
    """What can be known of the configuration by itself; the adapter's, None of full fine-tuning.

    Raises UserError for keys that have no meaning, or none with each other.
    """
    method, lora, milora = (asked[key] for key in ("method", "lora", "milora"))
    watch = milora["interference"]
    if arguments.save_strategy == "best" and watch["limit"] is not None:
        raise UserError(
            "training.save_strategy: best writes states that milora.interference.limit has not "
            "seen: use steps or epoch"
        )
    if watch["stop"] and arguments.save_strategy == "no":
        raise UserError(
            "milora.interference.stop goes back to the last checkpoint, and training.save_strategy "
            "is no: leave one out"
        )
    lora_config: LoraConfig | None = targeting.lora_config(lora)
    if method == "full":
        lora_config = None
        for key, there in (("rank", milora["rank"]), ("interference.limit", watch["limit"])):
            if there is not None:
                raise UserError(f"milora.{key}: full fine-tuning has no factors: use an adapter")
    if milora["rank"]:
        check_ranked(lora)
    check_protect(parts_of(milora["protect"])[0], method)
    check_general(milora, method)
    if method == "full" and (asked["quantization"] or milora["factors_from"]):
        raise UserError(
            "quantization: full fine-tuning cannot train packed numbers: use an adapter, or leave "
            "quantization and milora.factors_from out"
        )
    return lora_config


def say_unused(milora: Mapping[str, Any], progress: Progress) -> None:
    if milora["text"] != SAMPLED and not milora["keep"] and milora["protect_inputs"] == 0:
        progress.say("milora.text is not used: set milora.keep or milora.protect_inputs")


def check_general(milora: Mapping[str, Any], method: str) -> None:
    """What needs milora.text, and what does nothing with this method."""
    asked = [key for key in ("keep", "protect_inputs") if milora[key]]
    if method == "full" and asked:
        raise UserError(f"milora.{asked[0]}: full fine-tuning has no adapter to hold: use one")
    if milora["start"] != "published" and method not in adapter.COMPONENT:
        raise UserError(
            f"milora.start is {milora['start']}, which method {method} does not have: leave it out"
        )


def _unfit(lora: Mapping[str, Any], task: str | None, sharded: str | None) -> str | None:
    """Why inputs cannot be held here, where they cannot."""
    if task != "CAUSAL_LM":
        return "a model that writes no text"
    if lora.get("target_parameters"):
        return "experts, which see some tokens only"
    return "DeepSpeed" if sharded == "zero3" else None


def _targets(base: Pretrained, lora: Mapping[str, Any]) -> dict[str, targeting.Target]:
    """What the run adapts, before the model has an adapter."""
    config = targeting.lora_config({**lora, "r": 1}, task_of(base.model), base.in_full)
    return targeting.targets(skeleton_of(base.model), config)


def _check_room(
    base: Pretrained, config: LoraConfig, inputs: int, previous: Mapping[str, adapter.Factors]
) -> None:
    """Raise UserError where what is to be held leaves less of a weight than the adapter's rank."""
    own = deepcopy(config)  # PEFT writes into it
    matrices = adapted_matrices(adapter.without_values(skeleton_of(base.model), own, "lora"))
    if inputs:
        check_inputs(matrices, inputs)
    check_room(matrices, previous)


def _ranks(
    base: Pretrained, names: Mapping[str, targeting.Target], wanted: Mapping[str, float],
    start: adapter.Start | None, weights: Weights | None, progress: Progress,
) -> dict[str, int]:  # fmt: skip
    """The rank of every weight: of the stored factors, else from the spectra."""
    if start is not None:
        return {name: len(factors.A) for name, factors in start.factors.items()}
    store = Store(say=progress.say, optional=True)
    spectra = {}
    for done, name in enumerate(names):
        progress("spectra", done, len(names), name)
        weight = weights(name) if weights else matrix_in(base.model, name)
        spectra[name] = store.spectrum(weight)
    found = ranks(spectra, {name: target.shape for name, target in names.items()}, wanted)
    sizes = sorted(found.values())
    progress.say(
        f"ranks by layer: {sizes[0]} to {sizes[-1]}, median {sizes[len(sizes) // 2]}, "
        f"{sum(r * sum(names[name].shape) for name, r in found.items()):,} parameters"
    )
    return found


def _memory(original: Original, dtype: str) -> str:
    """How much the base takes, said before it is loaded."""
    full = f"{size(original.full_bytes)} in {str(dtype_of(dtype)).removeprefix('torch.')}"
    if original.packed_bytes is None:
        return f"the base, quantised ({original.label}), would take {full}"
    packed = f"{size(original.packed_bytes)} quantised ({original.label})"
    return f"the base takes {packed}, and would take {full}"
