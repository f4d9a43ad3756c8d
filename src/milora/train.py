"""One fine-tuning run, from data to a plain LoRA adapter: read top to bottom, it is `train`.

Everything the user can get wrong is checked before anything is written. Then each step leaves
one whole artefact in the run folder, and `resume` continues after the last one there is:

    config.yaml, run.json           what was asked; state, versions, hashes, checks, times
    init/factors.safetensors        initial factors, computed once; previous.safetensors, the
                                    update of the run that this one continues
    checkpoints/checkpoint-N/       the trainer's resumable states
    checkpoints/trained.safetensors the trained factors
    adapter/                        the result; model/ where no plain LoRA can hold it: full
                                    fine-tuning, and rows of embedding or head that were trained
    evaluation.json, samples.jsonl  base against tuned
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from milora import adapter, export, fingerprints
from milora.arguments import training_arguments
from milora.begin import Begun, StepZero, begin, probe_of, together
from milora.callbacks import Decay, Hold, Reporter, Watch, diverged
from milora.card import model_card
from milora.continual import within
from milora.errors import UserError
from milora.evaluate import evaluate_all, save_evaluation
from milora.files import locked, new_folder, read_json, write_json, write_text
from milora.forms import Collate, collator_for, mean_loss
from milora.gates import judge
from milora.keep import Keep
from milora.logits import Pair, logits_of
from milora.loop import MiloraTrainer
from milora.matrices import adapted_matrices
from milora.pretrained import task_of
from milora.preview import peak_memory, plan
from milora.processes import Processes, processes_of
from milora.progress import Progress
from milora.ready import Ready, check, check_folder
from milora.recommended import as_before
from milora.result import (
    export_merged,
    export_plain,
    interference_by_layer,
    plainly_asked,
    save_reader,
    spectra_before_and_after,
)
from milora.tokens import load_with_tokens
from milora.training_state import (
    STATE,
    best_or_last,
    has_ended,
    last_complete_checkpoint,
    load_state,
    not_finite,
    save_state,
    step_of,
)
from milora.transfer import extend_evaluation


def train(
    *,
    model: str,
    output_dir: str,
    data: Mapping[str, Any],
    method: str = "milora",
    seed: int = 0,
    dtype: str = "auto",
    quantization: str | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    early_stopping_patience: int = 0,
    tokenizer: Mapping[str, Any] = MappingProxyType({}),
    lora: Mapping[str, Any],
    milora: Mapping[str, Any],
    training: Mapping[str, Any],
    evaluate: Mapping[str, Any],
    gates: Sequence[str] = (),
    continue_: Mapping[str, Any] = MappingProxyType({}),
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress,
) -> dict[str, Any]:
    """Fine-tune, export and evaluate; returns the content of run.json (of the plan, if dry).

    The arguments are the keys of the configuration file (docs/configuration.md). Raises UserError
    for whatever the user must change; nothing is written in that case.

    In a process that `accelerate launch` has started this is one of several: they train together,
    and the first goes on; the others return {}. Where the weights are shared out too, the first
    returns as soon as the run is trained (its "state"), and what is left to do needs a process of
    its own (processes.alone).
    """
    asked: dict[str, Any] = {
        "model": model, "method": method, "output_dir": output_dir, "seed": seed, "dtype": dtype,
        "quantization": quantization,
        "trust_remote_code": trust_remote_code, "early_stopping_patience": early_stopping_patience,
        "data": dict(data), "lora": dict(lora), "milora": dict(milora), "training": dict(training),
        "evaluate": dict(evaluate), "gates": list(gates),
    }  # fmt: skip
    if any(tokenizer.values()):
        asked["tokenizer"] = dict(tokenizer)
    if continue_.get("run"):
        asked["continue"] = dict(continue_)
    asked, run = as_before(asked, resume), Path(output_dir)
    start = asked["milora"]["start"]
    arguments = training_arguments(method, training, run, seed, early_stopping_patience, start)
    processes = processes_of(arguments)
    with processes.agree():
        ready = check(asked, arguments, resume, processes, progress)
    if dry_run:
        base, rows = ready.material.base, ready.material.train
        if not processes.main:
            return {}
        return plan(
            base, rows, ready.lora_config, method, ready.asked["milora"], arguments, ready.weights
        )  # fmt: skip
    own = run.resolve()
    twice = UserError(
        f"output_dir: another process is at work on {run}: wait for it, or choose another"
    )
    with ExitStack() as stack:
        with processes.agree():
            if processes.main:
                stack.enter_context(locked(own.with_name(f".{own.name}.lock"), twice))
                if check_folder(run, asked, resume, processes.number) != ready.resumed:
                    raise twice  # it was, since the folder was checked
        return _run(ready, processes, progress)


def _run(ready: Ready, processes: Processes, progress: Progress) -> dict[str, Any]:
    """What `train` does once all is read and checked."""
    run, arguments = ready.run, ready.arguments
    there = torch.cuda.device_count()
    if arguments.n_gpu == 1 and processes.number == 1 and there > 1:
        progress.say(f"of {there} GPUs one is used: all of them with `accelerate launch`")
    with processes.agree():
        begun = begin(ready, processes, progress) if processes.main else None
    begun = together(ready, begun, processes)
    live, record = begun.live, begun.record
    collate = collator_for(ready.material.base.reader, ready.material.base.model)
    final = run / "checkpoints" / STATE
    if not final.exists():
        ended, seconds = _fit(ready, begun, collate, processes, progress)
        with processes.agree():
            _check_numbers(live, ended["result_step"], arguments)
        if processes.main:  # before the state, which says that training is over
            record |= {"peak_memory_bytes": peak_memory()} | ended
            record["seconds"]["training"] = seconds
            write_json(run / "run.json", record)
        save_state(final, live, write=processes.main)
        if processes.main:
            record["state"] = "trained"
            write_json(run / "run.json", record)
    else:
        load_state(final, live)
    processes.end()
    if not processes.main:
        return {}
    return record if processes.sharded else _finish(ready, begun, progress)


def _check_numbers(model: nn.Module, step: int, arguments: TrainingArguments) -> None:
    """Raise DivergedError where a tensor that trained holds no numbers. The log says that of losses
    alone, and there is none after the last step.
    """
    if name := not_finite(model):
        raise diverged(f"{name} holds NaN or infinite values at step {step}", arguments)


def _check_logits(model: nn.Module, probe: Mapping[str, Tensor], args: TrainingArguments) -> None:
    """The same of what comes of numbers that are too large."""
    model.eval()
    with torch.no_grad():
        largest = float(logits_of(model, probe).abs().max())
    if not 0 < largest < math.inf:  # a norm whose squares are too large gives zeros
        what = "no numbers" if largest else "all zero"
        raise diverged(f"the trained model gives logits that are {what}", args)


def _finish(ready: Ready, begun: Begun, progress: Progress) -> dict[str, Any]:
    """The result: export, evaluation, gates and the model card."""
    asked, run, material = ready.asked, ready.run, ready.material
    live, start, record, evaluate = begun.live, begun.start, begun.record, asked["evaluate"]
    base, probe = material.base, probe_of(ready)
    _check_logits(live, probe, ready.arguments)
    began = time.monotonic()
    if form := plainly_asked(base.reader, record):
        record["plain_form"] = form
    if begun.tops and isinstance(live, PeftModel) and start is not None:
        record["interference"] = interference_by_layer(live, start, begun.tops)
    if isinstance(live, PeftModel) and start is not None:
        head = adapter.head_of(live)
        trained = adapter.trained_factors(live)
        plain = export.plain_lora(start, trained, in_full=head, previous=ready.previous)
        if "spectra" not in record:
            matrices = adapted_matrices(live, ready.weights)
            record["spectra"] = spectra_before_and_after(matrices, plain)
        cut = None
        if ready.earlier:
            plain, cut = within(plain, asked["continue"]["rank"], ready.earlier)
        if adapter.trained_rows(live):
            pair = export_merged(live, plain, record, run, probe, asked, progress)
        else:
            live = export_plain(live, plain, start, record, base, run, probe, asked, cut, progress)
            pair = Pair(live, headless=base.headless)
        found = fingerprints.base_sha256(pair.other_base or pair.model, base.fresh)
        unchanged = found == begun.base_sha256
        record["base"]["unchanged"] = unchanged
        if not unchanged:
            raise RuntimeError("the base changed during the run, which must never be: report this")
    else:
        if not (run / "model").exists():
            with new_folder(run / "model") as folder:
                live.save_pretrained(folder)  # type: ignore[operator]
                save_reader(base.reader, folder, record)
                export.end_as_trained(folder, base.tokenizer, asked)
        other = load_with_tokens(
            asked["model"], record["base"]["dtype"], asked["trust_remote_code"],
            asked.get("tokenizer", {}), labels=record.get("labels", ()),
        ).base.model  # fmt: skip
        pair = Pair(live, other, base.headless)
    pair.model.eval()
    record["seconds"]["export"] = time.monotonic() - began
    if not (run / "evaluation.json").exists():
        began = time.monotonic()
        result, samples = evaluate_all(
            pair, base.reader, material.tasks, material.texts,
            int(evaluate["chunks"]), int(evaluate["batch_size"]), progress,
        )  # fmt: skip
        save_evaluation(run / "evaluation.json", run / "samples.jsonl", result, samples)
        record["seconds"]["evaluation"] = time.monotonic() - began
    evaluation = read_json(run / "evaluation.json")
    over_all = any(gate.subject == "continual" for gate in ready.gates)
    if over_all and "continual" not in evaluation:
        evaluation = extend_evaluation(run, pair, base.reader, progress)
    record["gates"] = [verdict._asdict() for verdict in judge(ready.gates, evaluation, record)]
    if asked["method"] != "full":
        kind = "adapter" if (run / "adapter").exists() else "model"
        write_text(run / kind / "README.md", model_card(record, asked, evaluation))
    record["state"] = "done"
    write_json(run / "run.json", record)
    return record


def _fit(
    ready: Ready, begun: Begun, collate: Collate, processes: Processes, progress: Progress
) -> tuple[dict[str, Any], float]:
    """Train, or go on from the last checkpoint; returns the step whose state is the result and
    where the interference stopped the run, for run.json, and the seconds that training took.
    """
    asked, run, arguments, live = ready.asked, ready.run, ready.arguments, begun.live
    checkpoint = last_complete_checkpoint(run / "checkpoints")
    reporter = Reporter(run / "metrics.jsonl", checkpoint, progress)
    if checkpoint and has_ended(checkpoint):  # the Trainer would do one step more
        good = best_or_last(checkpoint, arguments)
        load_state(good / STATE, live)
        return {"result_step": step_of(good)}, reporter.seconds
    matrices = adapted_matrices(live) if isinstance(live, PeftModel) else {}
    watch, keep = None, None
    callbacks: list[TrainerCallback] = [reporter]
    if asked["early_stopping_patience"]:
        callbacks.append(EarlyStoppingCallback(asked["early_stopping_patience"]))
    if arguments.weight_decay and matrices and asked["method"] != "lora":
        callbacks.append(Decay(matrices, arguments.weight_decay))
        arguments.weight_decay = 0.0
    if begun.tops and begun.start is not None and processes.sharded != "zero3":
        wanted = asked["milora"]["interference"]
        watch = Watch(
            matrices, begun.start, begun.tops, wanted["every"], wanted["limit"], wanted["stop"],
            path=run / "metrics.jsonl", progress=progress,
        )  # fmt: skip
        callbacks.append(watch)
    if begun.holds:
        callbacks.append(Hold(matrices, begun.holds))
    if asked["milora"]["keep"]:
        keep = Keep(begun.general, **asked["milora"]["keep"])
        length = len(keep.pieces[0])
        if keep.taken * length != keep.tokens:
            progress.say(
                f"milora.keep.tokens is {keep.tokens}, and {keep.taken * length} are taken: whole "
                f"pieces of {length}"
            )
    if processes.sharded and not ready.resumed.get("step0"):
        callbacks.append(StepZero(ready, begun.record, progress))
    config = ready.material.base.model.config
    cached = vars(config).get("use_cache")
    trainer = MiloraTrainer(
        model=live,
        args=arguments,
        train_dataset=ready.material.train.examples,  # type: ignore[arg-type]
        eval_dataset=ready.material.held_out.examples,  # type: ignore[arg-type]
        data_collator=collate,
        callbacks=callbacks,
        compute_loss_func=None if task_of(live) == "CAUSAL_LM" else mean_loss,
        keep=keep,
    )
    trainer.remove_callback(PrinterCallback)
    if watch:
        watch.trainer = trainer
    if checkpoint:
        progress.say(f"continuing from {checkpoint.name}")
        arguments.eval_on_start = False  # where it started, not where it goes on
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = reporter.seconds
    vars(config).pop("use_cache", None)  # the Trainer's, which turns it off and would be saved
    if cached is not None:
        config.use_cache = cached
    # Under bf16 or fp16 accelerate leaves autocast around forward; what follows is without.
    trainer.accelerator.unwrap_model(live, keep_fp32_wrapper=False)
    if not watch or not watch.passed:
        best = trainer.state.best_model_checkpoint if arguments.load_best_model_at_end else None
        return {"result_step": step_of(Path(best)) if best else trainer.state.global_step}, seconds
    reached = last_complete_checkpoint(run / "checkpoints")
    if reached is None:
        raise UserError(
            f"the interference passed milora.interference.limit ({watch.limit:g}) at step "
            f"{watch.passed}, before there was a checkpoint to go back to: use a lower "
            "training.learning_rate, milora.protect, or a higher limit, and a new output_dir"
        )
    progress.say(f"stopped at step {watch.passed}; the result is that of {reached.name}")
    load_state(reached / STATE, live)
    stopped = {"step": watch.passed, "interference_limit": watch.limit}
    return {"stopped": stopped, "result_step": step_of(reached)}, seconds
