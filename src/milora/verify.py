"""Open an adapter on its base, and check that it is what it was when it was made.

The provenance beside the weights (milora.json) holds a hash of every base weight that was
adapted, and probes: prompts with the log-probabilities that base and tuned gave them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from milora.adapter import base_only, tensor_sha256
from milora.errors import UserError
from milora.files import read_json
from milora.matrices import matrix_in
from milora.pretrained import Pretrained, load_pretrained

PROBES = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "Dear customer, thank you for your",
)
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}  # of a log-probability, in nats


class Check(NamedTuple):
    name: str
    holds: bool
    detail: str


class Opened(NamedTuple):
    model: PeftModel
    base: Pretrained
    provenance: dict[str, Any]


def find_adapter(path: Path) -> Path:
    """The adapter folder of a run folder, or the folder itself."""
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if not (folder / "milora.json").is_file():
        what = "a finished run" if path.is_dir() else "there"
        raise UserError(f"{path} is not {what}: it has no adapter/ made by milora")
    return folder


def open_adapter(path: Path, base: str | None = None, trust_remote_code: bool = False) -> Opened:
    """The adapter of a run or folder on its base, by stock PEFT, after comparing the hashes.

    `base` replaces the base's name as recorded. Raises UserError for a wrong base.
    """
    folder = find_adapter(path)
    provenance = read_json(folder / "milora.json")
    recorded = provenance["base"]
    loaded = load_pretrained(base or recorded["model"], recorded["dtype"], trust_remote_code)
    wrong = _wrong_weights(loaded.model, provenance["weights_sha256"])
    if wrong:
        raise UserError(
            f"wrong base: {base or recorded['model']} differs from the base of {folder} in "
            f"{len(wrong)} weights, the first is {wrong[0]}: give the model that the adapter was "
            f"trained on ({recorded['name']})"
        )
    return Opened(PeftModel.from_pretrained(loaded.model, folder), loaded, provenance)


def _wrong_weights(model: nn.Module, stored: dict[str, str]) -> list[str]:
    wrong = []
    for name, digest in stored.items():
        try:
            if tensor_sha256(matrix_in(model, name)) != digest:
                wrong.append(name)
        except KeyError:
            wrong.append(f"{name} (not there)")
    return wrong


def make_probes(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """For each prompt the five likeliest next tokens of the tuned model, with their
    log-probabilities (nats) under tuned and base."""
    probes = []
    for text in PROBES:
        ids = tokenizer(text)["input_ids"]
        tuned, base = _next_token(model, ids)
        top = tuned.topk(min(5, len(tuned))).indices
        probes.append(
            {
                "text": text,
                "input_ids": list(ids),
                "tokens": top.tolist(),
                "tuned": [round(x, 5) for x in tuned[top].tolist()],
                "base": [round(x, 5) for x in base[top].tolist()],
            }
        )
    return probes


def _next_token(model: PeftModel, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    with torch.no_grad():
        tuned = model(input_ids=tokens).logits[0, -1].float().log_softmax(-1).cpu()
        with base_only(model):
            base = model(input_ids=tokens).logits[0, -1].float().log_softmax(-1).cpu()
    return tuned, base


def verify(path: Path, base: str | None = None, trust_remote_code: bool = False) -> list[Check]:
    """Fingerprint, step-0 identity as recorded, file format, and the probes, base and tuned.

    Raises UserError for a wrong base, since nothing else can be checked then.
    """
    opened = open_adapter(path, base, trust_remote_code)
    stored = opened.provenance
    config: Any = opened.model.peft_config["default"]
    first = stored["step0"]
    bound = TOLERANCE[stored["base"]["dtype"]]
    count = len(stored["weights_sha256"])
    plain = config.lora_alpha == config.r == stored["rank"] and not (
        config.use_rslora or config.rank_pattern or config.alpha_pattern
    )
    checks = [
        Check("base", True, f"all {count} adapted weights have the recorded sha256"),
        Check(
            "step 0",
            first["difference"] <= first["bound"],
            f"at the start of training the logits differed by {first['difference']:.1e}, "
            f"bound {first['bound']}",
        ),
        Check("format", plain, f"plain LoRA, r = lora_alpha = {config.r}"),
    ]
    for state in ("base", "tuned"):
        worst = 0.0
        for probe in stored["probes"]:
            tuned, plain_base = _next_token(opened.model, probe["input_ids"])
            found = (tuned if state == "tuned" else plain_base)[probe["tokens"]]
            worst = max(worst, float((found - torch.tensor(probe[state])).abs().max()))
        checks.append(
            Check(
                f"probes, {state}",
                worst <= bound,
                f"log-probabilities off by at most {worst:.1e}, bound {bound}",
            )
        )
    return checks
