"""Tokens and a chat template of the user's own, and the rows that new tokens need.

A token that the tokenizer does not know yet gets the next id, and the model a row for it in the
embedding, and in the head where that is a weight of its own. The row starts as the mean of the rows
of the pieces that the text was read as before. No row of another token changes, so that on text
without new tokens the model is the base, and its logits of the old tokens too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from milora.data import prompt_text
from milora.errors import UserError
from milora.fingerprints import base_sha256, tensor_sha256
from milora.pretrained import Pretrained, load_pretrained, task_of
from milora.vision import Reader, render


class Named(NamedTuple):
    """What became of the tokens that the configuration names."""

    ids: dict[str, int]
    added: list[str]  # those that the tokenizer did not know
    rows: dict[str, list[int]]  # by module of the model: the rows that train


class Loaded(NamedTuple):
    """A base with the user's tokens and template."""

    base: Pretrained
    sha256: str  # of the base as it came, before it had rows for them
    named: Named
    template: str | None  # the file of the chat template


def load_with_tokens(
    model: str,
    dtype: str,
    trust_remote_code: bool,
    options: Mapping[str, Any],
    quantization: str | Mapping[str, Any] | None = None,
    labels: Sequence[str] = (),
    *,
    device: str | None = None,
    hashed: bool = True,
) -> Loaded:
    """`load_pretrained`, and what the block `tokenizer` of the configuration asks for.

    Equal arguments give equal rows. Not `hashed`, its sha256 is left out. Raises UserError as its
    parts do, and for what a classifier or an encoder-decoder cannot have.
    """
    eos_token = options.get("eos_token")
    base = load_pretrained(model, dtype, trust_remote_code, eos_token, quantization, labels, device)
    kinds = {"SEQ_CLS": "a classifier", "SEQ_2_SEQ_LM": "an encoder-decoder"}
    kind = kinds.get(task_of(base.model) or "")
    for key in ("tokens", "special_tokens", "chat_template"):
        if kind and options.get(key) and (key != "chat_template" or labels):
            raise UserError(f"tokenizer.{key} is not for {kind}, which {model} is: leave it out")
    sha256 = base_sha256(base.model, base.fresh) if hashed else ""
    template = options.get("chat_template")
    named = add_tokens(
        base.model, base.tokenizer, options.get("tokens", ()), options.get("special_tokens", ())
    )
    file = use_template(base.reader, template) if template else None
    return Loaded(base, sha256, named, file)


def use_template(tokenizer: Reader, template: str) -> str | None:
    """Give the tokenizer a chat template: its text, or the path of a file, which is returned.

    Of a model that reads pictures it is the processor's, whose messages have parts.

    Raises UserError for one that is no template or that leaves out what was said.
    """
    path = None if "{{" in template or "{%" in template else Path(template)
    if path:
        try:
            there = path.is_file()
        except OSError:  # too long for a name
            there = False
        if not there:
            raise UserError(
                f"tokenizer.chat_template: {template[:80]} is no file, nor a template (which has "
                "{{ ... }} in it)"
            )
        try:
            template = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"tokenizer.chat_template: {path} is not UTF-8") from error
    tokenizer.chat_template = template
    said = "the question", "the answer"
    asked = [{"role": "user", "content": said[0]}]
    answered = [*asked, {"role": "assistant", "content": said[1]}]
    try:
        prompt = prompt_text(tokenizer, asked)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
        else:
            whole = render(tokenizer, answered, answer_next=False)
    except (jinja2.TemplateError, UserError, TypeError, ValueError) as error:
        raise UserError(f"tokenizer.chat_template: {error}") from error
    for text in said:
        if text not in whole:
            role = "user" if text == said[0] else "assistant"
            raise UserError(f"tokenizer.chat_template leaves out what the {role} said")
    if not whole.startswith(prompt):
        raise UserError(
            "tokenizer.chat_template: with add_generation_prompt the question must end where the "
            f"answer begins; it gives {prompt!r}, and with an answer {whole!r}"
        )
    return str(path) if path else None


@torch.no_grad()
def add_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[str],
    special: Sequence[str] = (),
) -> Named:
    """Make each of the texts one token, with a row in `model`; both are changed in place.

    One that the tokenizer has already keeps its id and its row. `special` ones are left out of what
    is decoded. Raises UserError for a text that cannot be one token.
    """
    every = [*tokens, *special]
    if not every:
        return Named({}, [], {})
    for text in every:
        if not text.strip():
            raise UserError(f"tokenizer.tokens: {text!r} is empty")
        if every.count(text) > 1:
            raise UserError(f"tokenizer.tokens: {text!r} is named twice")
    known = tokenizer.get_vocab()
    added = [text for text in every if text not in known]
    pieces = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in added}
    tokenizer.add_tokens([text for text in tokens if text in added])
    tokenizer.add_tokens([text for text in special if text in added], special_tokens=True)
    ids = {}
    for text in every:
        read = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(read) != 1:
            raise UserError(
                f"tokenizer.tokens: {text!r} stands in the vocabulary, but is read as "
                f"{len(read)} tokens: give it as it stands in text"
            )
        ids[text] = int(read[0])
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(
            "tokenizer.tokens: the output head of this model has a bias, which PEFT's trained rows "
            "leave out: write these marks as ordinary text, or use another base"
        )
    _grow(model, max(ids.values()) + 1)
    for layer in _layers(model):
        for text in added:
            if ids[text] not in pieces[text] and pieces[text]:
                layer.weight[ids[text]] = (
                    layer.weight[pieces[text]].float().mean(0).to(layer.weight)
                )
    modules = {id(module): name for name, module in model.named_modules()}
    rows = sorted(ids.values())
    return Named(ids, added, {modules[id(layer)]: rows for layer in _layers(model)})


def _layers(model: PreTrainedModel) -> list[Any]:
    """The layers that hold a row for every token: the embedding, and the head unless tied to it."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    return [embedding] if head is None or head.weight is embedding.weight else [embedding, head]


def _grow(model: PreTrainedModel, count: int) -> None:
    """Rows for `count` tokens; each new one is the mean of all that were there."""
    old = len(_layers(model)[0].weight)
    if count <= old:
        return
    before = [tensor_sha256(layer.weight[:old]) for layer in _layers(model)]
    model.resize_token_embeddings(count, mean_resizing=False)
    model.requires_grad_(False)
    for layer, digest in zip(_layers(model), before, strict=True):
        if tensor_sha256(layer.weight[:old]) != digest:
            raise RuntimeError("the rows of old tokens changed as new ones came: report this")
        layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight)
