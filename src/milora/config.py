"""The configuration file: pydantic models and `key=value` overrides; stops at the command line."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from milora.errors import UserError
from milora.files import why_not_yaml
from milora.gates import parse_gate
from milora.grade import Match
from milora.recommended import PUBLISHED

DEFAULT = """\
# milora train this-file.yaml [key=value ...]
# model, output_dir and data.train must be given; every other key is shown with its default.
model: smollm2-135m            # hub id, local folder, GGUF file, or the bundled model's name
method: milora                 # milora | pissa | middle | random | lora | full
output_dir: runs/first         # the run folder; it must not hold another run
seed: 0
dtype: auto                    # auto | float32 | bfloat16 | float16: of the base; adapters are fp32
quantization: null             # nf4 | int8, or {load_in_4bit: true, ...}: the base packed in memory
trust_remote_code: false       # true runs code that comes with the model
early_stopping_patience: 0     # evaluations without a better loss before the run stops; 0 never
data:
  train: data/train.jsonl      # jsonl, json, csv, parquet, or a hub id
  eval: 0.05                   # a file, or a share held out
  format: auto                 # auto | messages | sharegpt | alpaca | prompt-completion |
                               # classification (text and label) | text
  columns: {}                  # our column: the one in the file, for example {prompt: question}
  max_length: 512              # tokens; longer rows are cut at the end and counted
  on_bad_row: fail             # fail | skip
tokenizer:
  tokens: []                   # texts that become one token each, with a row that trains; the
                               # result is then merged weights, in model/
  special_tokens: []           # the same, left out of decoded answers
  chat_template: null          # a Jinja file, or its text, in place of the model's own
  eos_token: null              # the token that ends an answer, in place of the tokenizer's own
lora:                          # handed to peft.LoraConfig as it stands
  r: 32
  # lora_alpha: 32             # as r by default, so that the scale is 1
  target_modules: [q_proj, k_proj, v_proj, up_proj, down_proj]
milora:                        # or `milora: published`, the method as in the paper
  factors_from: null           # the full-precision checkpoint behind a model that comes quantised
  rank: null                   # by layer: {energy: 0.001}, {parameters: 2000000}; else lora.r
  protect: 0                   # top-k singular directions held fixed; {energy: 0.5}; or by pattern;
                               # {tasks: all, weights: 0}: what earlier tasks use, and the same
  interference:                # how much of the update acts in the top directions, as it trains
    top: 16                    # k, or protect where that is more; 0 measures what is protected
    every: 50                  # steps
    limit: null                # a share in (0, 1) above which a warning is given
    stop: false                # true: and the run ends with its last checkpoint below the limit
  start: null                  # published | directions (A = V, B = 0) | balanced (LoRA's size);
                               # null: balanced for milora, published for other methods
  protect_inputs: null         # top-k directions in which general text enters each weight, held
                               # too; null: 64 for milora (a quarter of them at most), else 0
  text: sampled                # that text: what the base itself writes, or file(s) that
                               # evaluate.knowledge does not have
  keep: null                   # {weight: 1.0, every: 1, tokens: 512}: KL to the base on that text
                               # joins the loss
training:                      # handed to transformers.TrainingArguments as it stands
  # learning_rate: 1.0e-3      # default by method: milora 1e-3 (1e-4 as published); lora 3e-4;
                               # middle, random 1e-4; pissa 3e-5; full 2e-5 (docs/method.md)
  num_train_epochs: 3
  per_device_train_batch_size: 16
evaluate:
  tasks: []                    # files like data.train, or {file, name, match: exact | json |
                               # contains | regex | number | math | choice | none, pattern,
                               # protocol: generate | likelihood, prompt, max_new_tokens, limit},
                               # or {harness: NAME, include: FOLDER, limit}
  knowledge: default           # text file(s), .txt or .jsonl; default: Python's help topics
  chunks: 16                   # pieces of 512 tokens of it
  batch_size: 16
continue:
  run: null                    # the finished run whose result this one starts from; null: the base
  how: fold                    # fold: a new adapter on top of it | same: its adapter trained on
  replay: 0                    # a share of every earlier run's training rows, trained on again
  rank: null                   # the most that the exported adapter may have; null: all, 2r more
gates: []                      # conditions on what was measured, checked at the end, exit code 3;
                               # for example [mail.accuracy >= base + 0.05, knowledge.kl <= 0.05]
"""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class Data(Strict):
    train: str
    eval: float | str = 0.05
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt-completion", "classification", "text"
    ] = "auto"
    columns: dict[str, str] = {}
    max_length: int = Field(default=512, ge=2)
    on_bad_row: Literal["fail", "skip"] = "fail"


class Tokenizer(Strict):
    tokens: list[str] = []
    special_tokens: list[str] = []
    chat_template: str | None = None
    eos_token: str | None = None


class Lora(BaseModel):
    """Checked where it is used, against peft.LoraConfig; only the defaults are ours."""

    model_config = ConfigDict(extra="allow")

    r: Any = 32
    lora_alpha: Any = None
    target_modules: Any = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


class Energy(Strict):
    energy: float = Field(gt=0, lt=1)


Number = Annotated[int, Field(ge=0, strict=True)]  # true is no number
Text = Annotated[str, Field(min_length=1)]


class Interference(Strict):
    top: int = Field(default=16, ge=0)
    every: int = Field(default=50, ge=1)
    limit: float | None = Field(default=None, gt=0, lt=1)
    stop: bool = False


class Parameters(Strict):
    parameters: int = Field(ge=1)


class KeepText(Strict):
    weight: float = Field(default=1.0, gt=0)
    every: int = Field(default=1, ge=1)
    tokens: int = Field(default=512, ge=2)


def _form(value: Any) -> Any:
    """A block with `energy` or `tasks` is that one, and not one of patterns that are so called."""
    for key, block in (("energy", Energy), ("tasks", Tasks)):
        if isinstance(value, Mapping) and key in value:
            return block.model_validate(value)
    return value


class Tasks(Strict):
    tasks: Literal["all"]
    weights: Annotated[Number | Energy | dict[str, Number | Energy], BeforeValidator(_form)] = 0


class Milora(Strict):
    factors_from: str | None = None
    rank: Energy | Parameters | None = None
    protect: Annotated[
        Number | Energy | Tasks | dict[str, Number | Energy], BeforeValidator(_form)
    ] = 0
    interference: Interference = Interference()
    start: Literal["published", "directions", "balanced"] | None = None
    text: Text | Annotated[list[Text], Field(min_length=1)] = "sampled"
    protect_inputs: int | None = Field(default=None, ge=0)
    keep: KeepText | None = None


class TaskFile(Strict):
    file: str | None = None
    harness: str | None = None
    include: str | None = None
    name: str | None = None
    match: Match = "exact"
    pattern: str | None = None
    protocol: Literal["generate", "likelihood"] = "generate"
    prompt: str | None = None
    max_new_tokens: int = Field(64, ge=1)
    limit: int | None = Field(None, ge=1)


class Evaluate(Strict):
    tasks: list[str | TaskFile] = []
    knowledge: str | list[str] = "default"
    chunks: int = Field(default=16, ge=1)
    batch_size: int = Field(default=16, ge=1)


class Continue(Strict):
    run: str | None = None
    how: Literal["same", "fold"] = "fold"
    rank: int | None = Field(default=None, ge=1)
    replay: float = Field(default=0.0, ge=0, le=1)


class Config(Strict):
    model_config = ConfigDict(populate_by_name=True)

    model: str
    method: Literal["milora", "pissa", "middle", "random", "lora", "full"] = "milora"
    output_dir: str
    seed: int = Field(0, ge=0, le=2**32 - 1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["nf4", "int8"] | dict[str, Any] | None = None
    trust_remote_code: bool = False
    early_stopping_patience: int = Field(0, ge=0)
    data: Data
    tokenizer: Tokenizer = Tokenizer()
    lora: Lora = Lora()
    milora: Milora = Milora()
    training: dict[str, Any] = {}
    evaluate: Evaluate = Evaluate()
    continue_: Continue = Field(default=Continue(), alias="continue")  # a keyword of Python
    gates: list[str] = []

    @field_validator("milora", mode="before")
    @classmethod
    def _published(cls, given: Any) -> Any:
        return PUBLISHED if given == "published" else given

    @model_validator(mode="after")
    def _at_home(self) -> "Config":
        """A leading ~ of a path is the home folder here already: TrainingArguments expand it."""
        places: tuple[tuple[BaseModel, tuple[str, ...]], ...] = (
            (self, ("model", "output_dir")), (self.data, ("train", "eval")),
            (self.tokenizer, ("chat_template",)), (self.milora, ("factors_from", "text")),
            (self.evaluate, ("knowledge", "tasks")), (self.continue_, ("run",)),
            *((task, ("file", "include")) for task in self.evaluate.tasks
              if isinstance(task, TaskFile)),
        )  # fmt: skip
        for block, keys in places:
            for key in keys:
                if (found := _expanded(given := getattr(block, key))) != given:
                    setattr(block, key, found)
        return self


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two repairs: 1e-4 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # refused below
            if key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise UserError(f"line {line}: the key {key_node.value!r} is given twice")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# An impossible date, a number of 5000 digits and bytes that are no UTF-8 are ValueErrors.
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in `path` with `key.sub=value` overrides applied, checked.

    Raises UserError, one sentence for all that is wrong, unknown keys with the nearest known.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a configuration file")
    if not path.is_file():
        raise UserError(f"{path} does not exist; `milora train --print-default` prints one")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except NOT_YAML as error:
        raise UserError(f"{path} is not valid YAML: {why_not_yaml(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values; see `milora train --print-default`")
    for block in ("data", "tokenizer", "lora", "milora", "training", "evaluate", "continue"):
        if block in values and values[block] is None:  # all its keys are commented out
            values[block] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"{override!r}: write key=value, for example training.learning_rate=1e-4"
            )
        try:
            value = yaml.load(text, Loader=_Loader)
        except NOT_YAML as error:
            said = override if len(override) < 60 else f"{override[:57]}..."
            raise UserError(
                f"{said!r}: the value is not valid YAML: {why_not_yaml(error)}"
            ) from error
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise UserError(f"{override!r}: {parent} holds a value, not keys")
        inner[last] = value
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {_sentence(error, values)}") from error
    if isinstance(config.data.eval, float) and not 0 < config.data.eval < 1:
        raise UserError(
            f"{path}: data.eval is {config.data.eval}: a share between 0 and 1, or a file"
        )
    for place, task in enumerate(config.evaluate.tasks):
        if isinstance(task, TaskFile) and (task.file is None) == (task.harness is None):
            raise UserError(f"{path}: evaluate.tasks.{place} needs either file or harness")
    for gate in config.gates:
        try:
            parse_gate(gate)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    watch = config.milora.interference
    if watch.stop and watch.limit is None:
        raise UserError(f"{path}: milora.interference.stop needs milora.interference.limit")
    protect = config.milora.protect
    held = protect.weights if isinstance(protect, Tasks) else protect
    if isinstance(held, dict) and not any(held.values()):
        raise UserError(f"{path}: milora.protect is {held}, which holds nothing: write 0")
    if watch.limit is not None and not watch.top and held == 0:
        raise UserError(f"{path}: milora.interference.limit needs top above 0 to measure by")
    if config.continue_.run is None and config.continue_ != Continue():
        raise UserError(
            f"{path}: continue.run is missing: name the run to continue, or leave the block out"
        )
    if config.lora.lora_alpha is None:
        config.lora.lora_alpha = config.lora.r  # the paper's setting: s = 1
    return config


# Keys that take several forms, of which pydantic would name each with what is wrong about it.
FORMS = {
    "milora.protect": "a whole number of at least 0, {energy: 0.5}, one of these by pattern of "
    "names, or {tasks: all}",
    "milora.text": "sampled, or text files that evaluate.knowledge does not have",
    "milora.rank": "{energy: 0.001} or {parameters: 2000000}; one rank for all is lora.r",
    "quantization": "nf4, int8, or keys of BitsAndBytesConfig such as {load_in_4bit: true}",
}


def _sentence(error: ValidationError, values: Mapping[str, Any]) -> str:
    found = []
    for problem in error.errors():
        place = problem["loc"]
        form = next((f for f in FORMS if [*place[: f.count(".") + 1]] == f.split(".")), None)
        if form:
            value: Any = values
            for part in form.split("."):
                value = value[part]
            found.append(f"{form} is {value!r}: it is {FORMS[form]}")
            continue
        if problem["type"] == "model_type":
            block = ".".join(map(str, place))
            whole = ", or published" if block == "milora" else ""
            found.append(f"{block} is {problem['input']!r}: it is a block of keys{whole}")
            continue
        where = [str(part) for part in place if str(part) not in ("str", "TaskFile", "float")]
        key = ".".join(where)
        if problem["type"] == "string_type" and isinstance(problem["input"], dict):
            continue  # a task given with options; what is wrong with them is said too
        if problem["type"] == "extra_forbidden":
            near = _nearest(where)
            found.append(f"unknown key {key}" + (f", did you mean {near}?" if near else ""))
        elif problem["type"] == "missing":
            found.append(f"{key} is missing")
        else:
            found.append(
                f"{key} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
            )
    return "; ".join(dict.fromkeys(found))


def _nearest(where: Sequence[str]) -> str | None:
    """The known key that `where` may have meant: in its own block, else in another."""
    blocks: dict[str, list[str]] = {
        "data": list(Data.model_fields),
        "tokenizer": list(Tokenizer.model_fields),
        "lora": ["r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora"],
        "milora": [*Milora.model_fields, *Interference.model_fields, *KeepText.model_fields],
        "evaluate": list(Evaluate.model_fields),
        "continue": list(Continue.model_fields),
        "training": ["learning_rate", "num_train_epochs", "max_steps", "report_to"],
    }
    *block, key = where
    if "tasks" in block:
        known = list(TaskFile.model_fields)
    else:
        top = [field.alias or name for name, field in Config.model_fields.items()]
        known = blocks.get(block[0], []) if block else top
    near = difflib.get_close_matches(key, known, 1, 0.7)
    if near or block:
        return near[0] if near else None
    homes = {inner: f"{name}.{inner}" for name, keys in blocks.items() for inner in keys}
    near = difflib.get_close_matches(key, homes, 1, 0.7)
    return homes[near[0]] if near else None
