"""What models have answered, kept, so that no question is put to the same model twice.

A second evaluation computes only what is new; the base's answers serve every run on that base. An
answer is found by a hash of the model's weights and configuration, its tokenizer and template, the
versions that compute, and the question; verdicts are not kept, since graders may change.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from milora.data import plain_template
from milora.files import cache_folder, folder_of, read_json, write_json
from milora.fingerprints import base_sha256, tensor_sha256
from milora.matrices import SAVED
from milora.vision import Reader, tokenizer_of

PIECE = 128  # questions that are kept together

Result = TypeVar("Result")
Item = TypeVar("Item")
Recall = Callable[[Any, Callable[[], Any]], Any]  # (question, how to compute) -> answer, as JSON


def compute_always(asked: Any, compute: Callable[[], Result]) -> Result:
    """A Recall that keeps nothing."""
    return compute()


def recall_of(who: str, folder: Path | None = None) -> Recall:
    """A Recall for the model that `who` names (see `who_answers`)."""
    home = folder or answers_folder()

    def recall(asked: Any, compute: Callable[[], Any]) -> Any:
        text = json.dumps([who, asked], sort_keys=True)
        path = home / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        with suppress(OSError, ValueError):  # not there, or damaged: it is asked again
            return read_json(path)
        # Through JSON, so that it is the same whether it was kept or not.
        found = json.loads(json.dumps(compute()))
        with suppress(OSError):  # no room: it costs time when asked again, and nothing else
            home.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
        return found

    return recall


def in_pieces(
    recall: Recall,
    asked: Any,
    items: Sequence[Item],
    length: Callable[[Item], int],
    compute: Callable[[Sequence[Item], int], Any],
) -> list[Any]:
    """`compute(items, how many came before)` for PIECE of them at a time, each kept at once.

    The longest go first; the answers are in the order of `items`. So an evaluation that was
    stopped within a task goes on near where it was.
    """
    order = sorted(range(len(items)), key=lambda i: -length(items[i]))
    found: dict[int, Any] = {}
    for first in range(0, len(order), PIECE):
        places = order[first : first + PIECE]
        piece = [items[i] for i in places]
        answers = recall([asked, piece], partial(compute, piece, first))
        found |= dict(zip(places, answers, strict=True))
    return [found[i] for i in range(len(items))]


def who_answers(model: nn.Module, reader: Reader) -> str:
    """A hash of all that decides what the model answers with its adapter off."""
    parameter, tokenizer = next(model.parameters()), tokenizer_of(reader)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    ends = getattr(getattr(inner, "generation_config", None), "eos_token_id", None)
    template = getattr(reader, "chat_template", None)
    if not template and not inner.config.is_encoder_decoder:
        template = plain_template(tokenizer)  # the same with a run that has it beside its weights
    parts = [
        base_sha256(model), str(parameter.dtype), parameter.device.type,
        _said(inner.config.to_dict()), str(ends), _spelling(tokenizer),
        str(template), len(tokenizer), type(tokenizer).__name__,
        str(tokenizer.eos_token), str(getattr(reader, "image_processor", None)),
        *(version(package) for package in ("milora", "torch", "transformers", "peft")),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# Where a model lies, what has written it, and what training switches: it answers the same.
BESIDE = ("_name_or_path", "base_model_name_or_path", "revision", "transformers_version",
          "peft_version", "use_cache", "inference_mode")  # fmt: skip


def _said(settings: Mapping[str, Any]) -> str:
    """In one order in every process: PEFT has sets among them."""
    kept = {key: value for key, value in settings.items() if key not in BESIDE}
    ordered = {key: sorted(v) if isinstance(v, set) else v for key, v in kept.items()}
    return json.dumps(ordered, sort_keys=True, default=str)


def _spelling(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of how the tokenizer turns text into tokens, whatever it was last asked to pad."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    whole = json.loads(fast.to_str()) if fast else {"vocab": tokenizer.get_vocab()}
    lasting = {key: whole[key] for key in whole if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


def with_adapter(who: str, model: nn.Module) -> str:
    """The same for the model whose base is `who`, with its adapter on, if it has one."""
    if not isinstance(model, PeftModel):
        return who
    inner: Any = model.base_model
    parts = [who]
    parts += sorted(
        f"{name} {tensor_sha256(tensor)}"
        for name, tensor in inner.state_dict().items()
        if ".lora_" in name or f".{SAVED}." in name
    )
    parts += sorted(_said(config.to_dict()) for config in model.peft_config.values())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def answers_folder() -> Path:
    """$MILORA_ANSWERS, else answers/ in milora's cache."""
    return folder_of("MILORA_ANSWERS", cache_folder() / "answers")
