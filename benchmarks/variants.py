"""DoRA and MiCA, PEFT's own, on causal models: the data, trainer and evaluation of `milora train`.

`milora train` refuses both, since what they come to is no plain LoRA of two factors that train.
comparison.py does its runs of them here.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, set_seed

from milora.arguments import training_arguments
from milora.begin import versions
from milora.callbacks import Reporter
from milora.compare import Outcome, held_out_loss, rows_right
from milora.config import Config
from milora.evaluate import evaluate_all, save_evaluation
from milora.files import read_json
from milora.forms import collator_for
from milora.logits import Pair
from milora.loop import MiloraTrainer
from milora.processes import processes_of
from milora.progress import Progress
from milora.ready import check

VARIANTS = ("use_dora", "init_lora_weights")


def is_variant(settings: Config) -> bool:
    return any(key in (settings.lora.model_extra or {}) for key in VARIANTS)


def run(settings: Config, progress: Progress) -> Outcome:
    """One run, as milora.compare keeps it; raises DivergedError."""
    asked = settings.model_dump()
    variant = {key: asked["lora"].pop(key) for key in VARIANTS if key in asked["lora"]}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        asked["output_dir"] = str(folder / "run")
        arguments = training_arguments("lora", asked["training"], folder, settings.seed, 0)
        ready = check(asked, arguments, False, processes_of(arguments), progress)
        material = ready.material
        base = material.base
        set_seed(settings.seed)
        config = LoraConfig(**asked["lora"], **variant, task_type="CAUSAL_LM")
        live = get_peft_model(base.model, config)
        trainer = MiloraTrainer(
            model=live,
            args=arguments,
            train_dataset=material.train.examples,  # type: ignore[arg-type]
            eval_dataset=material.held_out.examples,  # type: ignore[arg-type]
            data_collator=collator_for(base.reader, base.model),
            callbacks=[Reporter(folder / "metrics.jsonl", None, progress)],
        )
        trainer.remove_callback(PrinterCallback)
        seconds: dict[str, float] = {}
        began = time.monotonic()
        trainer.train()
        seconds["training"] = time.monotonic() - began
        live.eval()
        began = time.monotonic()
        evaluate: dict[str, Any] = asked["evaluate"]
        result, samples = evaluate_all(
            Pair(live), base.reader, material.tasks, material.texts,
            int(evaluate["chunks"]), int(evaluate["batch_size"]), progress,
        )  # fmt: skip
        seconds["evaluation"] = time.monotonic() - began
        files = folder / "evaluation.json", folder / "samples.jsonl"
        save_evaluation(*files, result, samples)
        return {
            "held_out_loss": held_out_loss(folder),
            "trained_parameters": sum(p.numel() for p in live.parameters() if p.requires_grad),
            "seconds": seconds,
            "versions": versions(),
            "base_sha256": material.base_sha256,
            "data_sha256": material.files,
            "interference": None,
            "evaluation": read_json(files[0]),
            "right": rows_right(files[1]),
        }
