"""Open an adapter on its base, and check that it is what it was when it was made.

The provenance beside the weights (milora.json) holds a hash of every base weight that was
adapted, and probes: prompts with the log-probabilities that base and tuned gave them.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from milora.adapter import head_of
from milora.checkpoint import full_weights, open_checkpoint
from milora.data import prompt_ids, prompt_text
from milora.errors import UserError
from milora.export import ADAPTER_FILE, read_config, scale_of
from milora.files import changed_files, check_files, read_record, read_yaml
from milora.fingerprints import base_sha256, packed_hashes, tensor_sha256
from milora.forms import first_token
from milora.logits import Pair, base_only
from milora.matrices import matrix_in
from milora.pretrained import (
    Pretrained,
    complete,
    labels_of,
    load_pretrained,
    load_reader,
    opened,
    task_of,
)
from milora.tokens import load_with_tokens
from milora.vision import MARK, Reader, gradient, image_tokens, tokenizer_of

PROBES = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "Dear customer, thank you for your",
)
SCALES = (0.5, 2, 4)  # at which a server may have the update by mistake
LOOKED_AT = f"{MARK}What is in the picture?"  # the probe of a model that reads them
# Of a log-probability, in nats: in fp32 of the worst, in 16 bit of the mean, since another kernel
# or machine moves single ones by as much as a tenth.
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}


NOTHING: Mapping[str, Tensor] = MappingProxyType({})
ADAPTER, MERGED = "milora adapter 1", "milora merged weights 1"  # formats of milora.json
GGUF = "milora GGUF 1"


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
    reader: Reader
    configuration: dict[str, Any]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self.reader)


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
    is_adapter = read_record(folder / "milora.json").get("format") == ADAPTER
    if is_adapter and not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} has no adapter_config.json: put the file as written back")
    return folder


def why_whole(run: Path) -> str:
    """Why the result of a run is in model/ and not in adapter/."""
    layers = read_record(run / "run.json").get("merged", {}).get("rows_of")
    if not layers:
        return "it was trained in full"
    return f"rows of {' and '.join(layers)} were trained, which no plain LoRA can hold"


def open_run(path: Path, trust_remote_code: bool = False, base: str | None = None) -> OpenedRun:
    """Base and tuned of a run, or of an adapter folder made by milora.

    `base` is where the base is now, if not where it is recorded. Raises UserError for a wrong one,
    and for weights of an adapter that are not those that were written.
    """
    if not (path / "run.json").is_file() or not (path / "model").is_dir():
        check_files(find_adapter(path))
        opened = open_adapter(path, base, trust_remote_code)
        pair = Pair(opened.model, headless=opened.base.headless)
        return OpenedRun(pair, opened.base.reader, opened.provenance["configuration"])
    asked = read_yaml(path / "config.yaml")
    record = read_record(path / "run.json")
    recorded = record["base"]
    name = base or recorded["model"]
    # The template is that of model/, wherever its file is now.
    options = {k: v for k, v in asked.get("tokenizer", {}).items() if k != "chat_template"}
    loaded = load_with_tokens(
        name, recorded["dtype"], trust_remote_code, options,
        labels=record.get("labels", ()),
    )  # fmt: skip
    if loaded.sha256 != recorded["sha256"]:
        raise UserError(
            f"wrong base: {name} has sha256 {loaded.sha256[:12]}, but {path} was trained from "
            f"{recorded['sha256'][:12]}: put that model back, or name it with --base"
        )
    tuned = load_pretrained(str(path / "model"), recorded["dtype"], trust_remote_code)
    pair = Pair(tuned.model, loaded.base.model, loaded.base.headless)
    return OpenedRun(pair, tuned.reader, asked)


def open_adapter(
    path: Path, base: str | None = None, trust_remote_code: bool = False, packed: bool = True
) -> Opened:
    """The adapter of a run or folder on its base, by stock PEFT, after comparing the hashes.

    `base` replaces the base's name as recorded. A base that was quantised is quantised again; with
    `packed` False it is its full-precision original, by default the one that the run had.

    Raises UserError for a wrong base.
    """
    folder = find_adapter(path)
    provenance = read_record(folder / "milora.json")
    if provenance["format"] != ADAPTER:
        raise UserError(f"{folder} holds {provenance['format']}, not an adapter: name its run")
    read_config(folder)
    with opened(folder / ADAPTER_FILE):
        pass  # PEFT would take a damaged file for a fault of its own, a missing one for a hub id
    recorded = provenance["base"]
    model, quantization = base or recorded["model"], recorded.get("quantization")
    if not packed:
        model, quantization = base or recorded.get("original") or model, None
    loaded = load_pretrained(
        model, recorded["dtype"], trust_remote_code,
        provenance["configuration"].get("tokenizer", {}).get("eos_token"), quantization,
        provenance.get("labels", ()),
    )  # fmt: skip
    check_adapted(loaded.model, provenance, folder, model, trust_remote_code)
    # A base that is packed anew on another device has other numbers, and is known by its files.
    whole = _same_numbers(loaded.model, provenance) if "quantization" in recorded else True
    if whole and "sha256" in recorded:
        digest = base_sha256(loaded.model, loaded.fresh)
        if digest != recorded["sha256"]:
            raise UserError(
                f"wrong base: {model} has the weights that {folder} adapts, but others differ "
                f"(sha256 {digest[:12]}, and the adapter was trained on "
                f"{recorded['sha256'][:12]}): give that model ({recorded['name']})"
            )
    # The one it was trained with, chat template included, wherever the base came from.
    if (folder / "tokenizer_config.json").is_file():
        tokenizer, processor = own_reader(folder, loaded.model.config, trust_remote_code)
        embedding: Any = loaded.model.get_input_embeddings()
        writes = task_of(loaded.model) != "SEQ_CLS"
        complete(tokenizer, str(folder), None, len(embedding.weight), writes)
        loaded = loaded._replace(tokenizer=tokenizer, processor=processor)
    try:
        model = PeftModel.from_pretrained(loaded.model, folder)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder}: adapter_config.json does not fit {ADAPTER_FILE} or the base ({said}): put "
            "both files as written back"
        ) from error
    return Opened(model, loaded, provenance)


def own_reader(
    folder: Path, config: Any, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, ProcessorMixin | None]:
    """`load_reader` of an adapter's folder. Raises UserError for files that are damaged."""
    try:
        return load_reader(str(folder), config, trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises no type of its own
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({' '.join(str(error).split())[:300]}): put "
            "its files (tokenizer.json, tokenizer_config.json) as written back"
        ) from error


def check_adapted(
    model: nn.Module, provenance: dict[str, Any], folder: Path, name: str, trust_remote_code: bool
) -> None:
    """Raise UserError unless all weights that the adapter in `folder` adapts are the recorded ones.

    `name` is that of the base, `model`, which has no adapters.
    """
    wrong = _wrong_weights(model, provenance, name, trust_remote_code)
    if wrong:
        raise UserError(
            f"wrong base: {name} differs from the base of {folder} in "
            f"{len(wrong)} weights, the first is {wrong[0]}: give the model that the adapter was "
            f"trained on ({provenance['base']['name']})"
        )


def _wrong_weights(
    model: nn.Module, provenance: dict[str, Any], name: str, trust_remote_code: bool
) -> list[str]:
    """Those of the adapted weights that are not the recorded ones.

    Of a base that was quantised either the packed numbers must be those recorded, or, where they
    were packed elsewhere or are not packed now, the full-precision weights in the files.
    """
    stored, packed = provenance["weights_sha256"], provenance.get("quantised_sha256", {})
    if _same_numbers(model, provenance):
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


def _same_numbers(model: nn.Module, provenance: Mapping[str, Any]) -> bool:
    """Whether adapted weights of the base are packed, and in the very numbers of the run."""
    packed = provenance.get("quantised_sha256", {})
    return bool(packed) and packed_hashes(model, packed) == packed


def check_probed(opened: Opened, folder: Path) -> None:
    """Raise UserError unless the base answers the recorded probes as it did in the run.

    To be called before probes of the base in hand are recorded: no hash is of its config.json, nor
    of what else there is in a base that was packed elsewhere. Of a classifier's base nothing is
    recorded, so that it is asked itself.
    """
    stored, state = opened.provenance, "tuned" if opened.provenance.get("labels") else "base"
    dtype = stored["base"]["dtype"]
    if "quantization" in stored["base"] and not _same_numbers(opened.model, stored):
        dtype = "bfloat16"  # another rounding of the packed numbers moves them as 16 bit do
    with base_only(opened.model) if state == "base" else nullcontext():
        found = _probes(opened.model, opened.base.reader, stored["probes"], state, dtype)
    if not found.holds:
        raise UserError(
            f"wrong base: {opened.base.name} answers the probes of {folder} otherwise than the "
            f"base that the adapter was trained on ({stored['base']['name']}), {found.detail}: its "
            "config.json, or a weight that is not adapted, is not as it was; give that model"
        )


def make_probes(model: PeftModel, reader: Reader) -> list[dict[str, Any]]:
    """For each prompt, as it is and as a question in the model's template, the five likeliest next
    tokens of the tuned model, with their log-probabilities (nats) under tuned and base, and with
    the update at the wrong scales of SCALES, by which a server's fault is known. A model that reads
    pictures is asked about one too, by none but `verify`.

    Of a classifier the classes in place of tokens, and nothing of the base, whose head may be new;
    of an encoder-decoder how its answer begins, to each prompt as it is."""
    tokenizer, kind = tokenizer_of(reader), task_of(model)
    probes = []
    for text, ids in _prompts(reader, kind):
        seen = _seen(text, reader)
        tuned = first_token(model, ids, seen)
        top = tuned.topk(min(5, len(tuned))).indices
        probe: dict[str, Any] = {
            "text": text, "input_ids": list(ids), "tokens": top.tolist(),
            "tuned": _rounded(tuned[top]),
        }  # fmt: skip
        if kind == "SEQ_CLS":
            names = labels_of(model)
            probes.append(probe | {"pieces": [names[place] for place in top.tolist()]})
            continue
        with base_only(model):
            base = first_token(model, ids, seen)
        scaled = {}
        for scale in SCALES:
            with rescale_adapter_scale(model, scale):
                scaled[str(scale)] = _rounded(first_token(model, ids, seen)[top])
        probes.append(
            {
                **probe,
                "pieces": [tokenizer.decode([token]) for token in top.tolist()],
                "base": _rounded(base[top]),
                "scaled": scaled,
            }
        )
    return probes


def _prompts(reader: Reader, kind: str | None) -> list[tuple[str, list[int]]]:
    """Text and tokens of each probe; see `make_probes`."""
    tokenizer = tokenizer_of(reader)
    prompts = [(text, list(tokenizer(text)["input_ids"])) for text in PROBES]
    templated = (*PROBES, *([LOOKED_AT] if image_tokens(reader) else []))
    for text in templated if kind == "CAUSAL_LM" else ():
        asked = [{"role": "user", "content": text}]
        shown = [gradient(reader)[0]] if text == LOOKED_AT else []
        with suppress(UserError):  # a template may want more than one question
            ids = prompt_ids(reader, asked, shown)
            prompts.append((text if shown else prompt_text(reader, asked), list(ids)))
    return prompts


def _rounded(values: Tensor) -> list[float]:
    return [round(x, 5) for x in values.tolist()]


def _seen(text: str, reader: Reader) -> dict[str, Tensor]:
    """What goes to the model with the tokens of a probe."""
    return gradient(reader)[1] if text == LOOKED_AT else {}


def head_sha256(model: PeftModel) -> dict[str, str]:
    """Of what the adapter holds beside its LoRA, a classifier's head: the hash of each tensor."""
    return {
        f"{module}.{name}": tensor_sha256(tensor)
        for module, tensors in head_of(model).items()
        for name, tensor in tensors.items()
    }


def verify(path: Path, base: str | None = None, trust_remote_code: bool = False) -> list[Check]:
    """Fingerprint, step-0 identity as recorded, file format, and the probes, base and tuned.

    Of merged weights the files, the tokens and the probes. Raises UserError for a wrong base,
    since nothing else can be checked then, and for GGUF, which only a server can run (see
    server.verify_server).
    """
    folder = find_adapter(path)
    stored = read_record(folder / "milora.json")
    if stored["format"] == GGUF:
        raise UserError(f"{folder} is GGUF: serve it, and use `milora verify {path} --server URL`")
    if stored["format"] == MERGED:
        if base:
            raise UserError(f"{folder} holds merged weights, which need no --base: leave it out")
        written = stored["rounding"]["dtype"].replace("float64", "float32")
        merged = load_pretrained(str(folder), written, trust_remote_code)
        dtype = max(written, stored["base"]["dtype"], key=lambda one: TOLERANCE[one])
        found = _probes(merged.model, merged.reader, stored["probes"], "tuned", dtype)
        return [
            *_files(folder, stored),
            *_rendered(merged.model, merged.reader, stored["probes"]),
            found,
        ]
    opened = open_adapter(path, base, trust_remote_code)
    config: Any = opened.model.peft_config["default"]
    first = stored["step0"]
    dtype = stored["base"]["dtype"]
    count = len(stored["weights_sha256"])
    scale = stored.get("approximation", {}).get("scale", 1.0)
    plain = config.r == stored["rank"] and scale_of(config) == scale
    checks = [
        Check("base", True, f"all {count} adapted weights have the recorded sha256"),
        Check(
            "step 0",
            first["difference"] <= first["bound"],
            f"at the start of training the logits differed by {first['difference']:.1e}, "
            f"bound {first['bound']}",
        ),
        *_files(folder, stored),
        Check("format", plain, f"plain LoRA, r = {config.r}, scale {scale:g}"),
    ]
    head = head_sha256(opened.model)
    if head or stored.get("head_sha256"):
        detail = f"{', '.join(sorted(head)) or 'none'}, by the recorded sha256"
        checks.append(Check("head", head == stored.get("head_sha256"), detail))
    if not head:
        with base_only(opened.model):
            found = _probes(opened.model, opened.base.reader, stored["probes"], "base", dtype)
        if not found.holds:
            changed = ", with the adapter off: the base, or its config.json, is not as it was"
            found = found._replace(detail=found.detail + changed)
        checks.append(found)
    checks += _rendered(opened.model, opened.base.reader, stored["probes"])
    checks.append(_probes(opened.model, opened.base.reader, stored["probes"], "tuned", dtype))
    return checks


def _files(folder: Path, stored: Mapping[str, Any]) -> Iterator[Check]:
    """Whether the weights are those that were written: a gentle update moves the probes by less
    than their bound in 16 bit. Older artefacts have no such record."""
    if "files_sha256" not in stored:
        return
    wanted, off = stored["files_sha256"], changed_files(folder, stored)
    every = f"all {len(wanted)} files of weights have" if len(wanted) > 1 else f"{min(wanted)} has"
    said = f"{every} the recorded sha256"
    if off:
        said = f"{off[0]} is not as it was written ({len(off)} of {len(wanted)} differ)"
    yield Check("file", not off, said)


def _rendered(model: nn.Module, reader: Reader, probes: list[dict[str, Any]]) -> Iterator[Check]:
    """Whether tokenizer and chat template make of the probes what they did.

    A template that writes the date says something else every day, so that nothing is compared."""
    if "strftime_now" in str(getattr(reader, "chat_template", "")):
        return
    wanted = [probe["input_ids"] for probe in probes]
    found = [ids for _, ids in _prompts(reader, task_of(model))]
    if found == wanted:
        yield Check(
            "tokens",
            True,
            f"tokenizer and chat template write all {len(wanted)} probes as recorded",
        )
        return
    pairs = zip_longest(probes, found)
    first = next(probe for probe, ids in pairs if not probe or probe["input_ids"] != ids)
    said = repr(first["text"]) if first else "a probe that was not there"
    yield Check("tokens", False, f"tokenizer or chat template have changed: {said} reads otherwise")


def _probes(
    model: nn.Module, reader: Reader, probes: list[dict[str, Any]], state: str, dtype: str
) -> Check:
    off = []
    for probe in probes:
        seen = _seen(probe["text"], reader)
        found = first_token(model, probe["input_ids"], seen)[probe["tokens"]]
        off.append((found - torch.tensor(probe[state])).abs())
    every = torch.cat(off)
    worst, mean, bound = float(every.max()), float(every.mean()), TOLERANCE[dtype]  # or NaN
    if dtype == "float32":
        off_by, said = worst, f"at most {worst:.1e}, bound {bound}"
    else:
        off_by, said = mean, f"{mean:.1e} on average, bound {bound} (at most {worst:.1e})"
    return Check(f"probes, {state}", off_by <= bound, f"log-probabilities off by {said}")
