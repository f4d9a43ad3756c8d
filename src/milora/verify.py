"""Open an adapter on its base, and check that it is what it was when it was made.

The provenance beside the weights (milora.json) holds a hash of every base weight that was
adapted, and probes: prompts with the log-probabilities that base and tuned gave them.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from milora.adapter import base_only, packed_hashes, tensor_sha256
from milora.checkpoint import full_weights, open_checkpoint
from milora.errors import UserError
from milora.evaluate import Pair
from milora.files import read_json
from milora.matrices import matrix_in
from milora.pretrained import Pretrained, complete, load_pretrained
from milora.tokens import load_with_tokens

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


class OpenedRun(NamedTuple):
    """Base and tuned of whatever a run has as its result."""

    pair: Pair
    tokenizer: PreTrainedTokenizerBase
    configuration: dict[str, Any]


def find_adapter(path: Path) -> Path:
    """The adapter folder of a run folder, or the folder itself."""
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if (path / "run.json").is_file() and (path / "model").is_dir():
        raise UserError(
            f"{path} has no adapter: {why_whole(path)}, so that its result is {path}/model"
        )
    if not (folder / "milora.json").is_file():
        what = "a finished run" if path.is_dir() else "there"
        raise UserError(f"{path} is not {what}: it has no adapter/ made by milora")
    return folder


def why_whole(run: Path) -> str:
    """Why the result of a run is in model/ and not in adapter/."""
    layers = read_json(run / "run.json").get("merged", {}).get("rows_of")
    if not layers:
        return "it was trained in full"
    return f"rows of {' and '.join(layers)} were trained, which no plain LoRA can hold"


def open_run(path: Path, trust_remote_code: bool = False) -> OpenedRun:
    """Base and tuned of a run, or of an adapter folder made by milora."""
    if not (path / "run.json").is_file() or not (path / "model").is_dir():
        opened = open_adapter(path, trust_remote_code=trust_remote_code)
        return OpenedRun(
            Pair(opened.model), opened.base.tokenizer, opened.provenance["configuration"]
        )
    asked = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    recorded = read_json(path / "run.json")["base"]
    loaded = load_with_tokens(
        recorded["model"], recorded["dtype"], trust_remote_code, asked.get("tokenizer", {})
    )
    if loaded.sha256 != recorded["sha256"]:
        raise UserError(
            f"wrong base: {recorded['model']} has sha256 {loaded.sha256[:12]}, but {path} was "
            f"trained from {recorded['sha256'][:12]}: put that model back"
        )
    tuned = load_pretrained(str(path / "model"), recorded["dtype"], trust_remote_code)
    return OpenedRun(Pair(tuned.model, loaded.base.model), tuned.tokenizer, asked)


def open_adapter(
    path: Path, base: str | None = None, trust_remote_code: bool = False, packed: bool = True
) -> Opened:
    """The adapter of a run or folder on its base, by stock PEFT, after comparing the hashes.

    `base` replaces the base's name as recorded. A base that was quantised is quantised again; with
    `packed` False it is its full-precision original, by default the one that the run had.

    Raises UserError for a wrong base.
    """
    folder = find_adapter(path)
    provenance = read_json(folder / "milora.json")
    recorded = provenance["base"]
    model, quantization = base or recorded["model"], recorded.get("quantization")
    if not packed:
        model, quantization = base or recorded.get("original") or model, None
    loaded = load_pretrained(
        model, recorded["dtype"], trust_remote_code,
        provenance["configuration"].get("tokenizer", {}).get("eos_token"), quantization,
    )  # fmt: skip
    wrong = _wrong_weights(loaded.model, provenance, model, trust_remote_code)
    if wrong:
        raise UserError(
            f"wrong base: {model} differs from the base of {folder} in "
            f"{len(wrong)} weights, the first is {wrong[0]}: give the model that the adapter was "
            f"trained on ({recorded['name']})"
        )
    # The one it was trained with, chat template included, wherever the base came from.
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        embedding: Any = loaded.model.get_input_embeddings()
        complete(tokenizer, str(folder), None, len(embedding.weight))
        loaded = loaded._replace(tokenizer=tokenizer)
    return Opened(PeftModel.from_pretrained(loaded.model, folder), loaded, provenance)


def _wrong_weights(
    model: nn.Module, provenance: dict[str, Any], name: str, trust_remote_code: bool
) -> list[str]:
    """Those of the adapted weights that are not the recorded ones.

    Of a base that was quantised either the packed numbers must be those recorded, or, where they
    were packed elsewhere or are not packed now, the full-precision weights in the files.
    """
    stored, packed = provenance["weights_sha256"], provenance.get("quantised_sha256", {})
    if packed and packed_hashes(model, packed) == packed:
        stored = {name: digest for name, digest in stored.items() if name not in packed}
    read = None
    if packed and stored.keys() & packed:
        try:
            read = full_weights(open_checkpoint(name, trust_remote_code), name)
        except UserError:  # a checkpoint that comes packed, in other numbers
            return [f"{one} (quantised)" for one in packed]
    wrong = []
    for module, digest in stored.items():
        try:
            weight = read(module) if read and module in packed else matrix_in(model, module)
            if tensor_sha256(weight) != digest:
                wrong.append(module)
        except (KeyError, UserError):
            wrong.append(f"{module} (not there)")
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
