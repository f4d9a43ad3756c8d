"""How far a model moved on general text."""

import math
import pydoc_data.topics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from milora.classification import embeddings, moved
from milora.data import begins_with
from milora.errors import UserError
from milora.files import sha256, why_no_file
from milora.forms import predictions
from milora.keep import in_pieces, kl
from milora.logits import Pair
from milora.pretrained import positions, task_of
from milora.rows import read_rows

DEFAULT_TEXT = "default"
AT_ONCE = 64  # tokens of a general text that are compared together
EMBEDDED = 64  # tokens of a piece of general text of which a classifier's embedding is compared


def knowledge_kept(
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    chunks: int = 16,
    length: int = 512,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """How far the tuned model moved on general text: KL(base || tuned) per token, perplexities.

    The first `chunks` pieces of `length` tokens each, which begin as the tokenizer begins a text (a
    Gemma without <bos> predicts next to nothing); within a piece every token but the first is
    predicted from those before it. KL in nats, exact over the whole vocabulary, in fp32.
    Tokens at which it is not finite are counted in `not_finite` and left out of the rest, which is
    None where no token is left or a figure itself is not finite. An encoder-decoder reads the
    first half of a piece and predicts the second. A classifier predicts no tokens: of it the same
    text in pieces of EMBEDDED tokens says how far their embeddings moved (classification.moved).
    """
    classifies = task_of(pair.model) == "SEQ_CLS"
    if classifies:
        chunks, length = chunks * length // EMBEDDED, EMBEDDED
    length = min(length, positions(pair.model))
    begin = [] if classifies else begins_with(tokenizer)
    pieces = in_pieces(tokenizer, text[: chunks * length * 12], length, begin)[:chunks]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise UserError("evaluate.knowledge: the text has fewer than 2 tokens")
    if classifies:
        places = dict[str, Tensor]()
        for state, entered in (("base", pair.base), ("tuned", pair.tuned)):
            progress("knowledge kept", len(places), 2)
            with entered() as model:
                places[state] = embeddings(model, pieces)
        return {"pieces": len(pieces), **moved(places["base"], places["tuned"])}
    divergence, agree, losses, total = [], [], {"base": 0.0, "tuned": 0.0}, 0
    for done, piece in enumerate(pieces):
        progress("knowledge kept", done, len(pieces))
        logits = {}
        for state, entered in (("base", pair.base), ("tuned", pair.tuned)):
            with entered() as model, torch.no_grad():
                logits[state], following = predictions(model, piece)
        total += len(following)
        # By few tokens at a time: with a vocabulary of 262,144 each table of a piece is 0.5 GB.
        for first in range(0, len(following), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            log_p = {state: logits[state][part].float().log_softmax(-1) for state in logits}
            each = kl(log_p["base"], log_p["tuned"])
            finite = each.isfinite()
            for state in losses:
                picked = log_p[state].gather(1, following[part, None].to(each.device))[finite]
                losses[state] -= float(picked.double().sum())
            divergence.append(each[finite])
            agree.append((log_p["base"].argmax(-1) == log_p["tuned"].argmax(-1))[finite])
    each = torch.cat(divergence).cpu()
    count = len(each)
    found = dict.fromkeys(
        ("kl", "kl_p99", "top_token_agreement", "base_perplexity", "tuned_perplexity")
    )
    if count:
        found |= {
            "kl": float(each.mean()),
            "kl_p99": float(each.quantile(0.99)),
            "top_token_agreement": float(torch.cat(agree).double().mean()),
            **{f"{state}_perplexity": _exp(losses[state] / count) for state in losses},
        }
    return {"tokens": total, "not_finite": total - count, **found}


def _exp(value: float) -> float | None:
    try:
        found = math.exp(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def general_texts(
    sources: str | Sequence[str], key: str = "evaluate.knowledge"
) -> list[tuple[str, str]]:
    """(text, where it comes from) of each. "default" is the prose of Python's own help topics.

    Raises UserError for a file that is not there, is no text, or is given twice.
    """
    given = [sources] if isinstance(sources, str) else list(sources)
    if not given or len(set(given)) < len(given):
        raise UserError(f"{key}: each text must be given once, and one at least")
    found = [_general_text(source, key) for source in given]
    for text, source in found:
        if not text.strip():
            raise UserError(f"{key}: {source} holds no text: name another file")
    return found


def check_unseen(
    texts: Sequence[tuple[str, str]], files: Mapping[str, str], train: str, general: Sequence[str]
) -> None:
    """Raise UserError for a text that the run trains on (`train`) or keeps (`general`): by its
    name, or as a copy of the file, of which `files` are the hashes.
    """
    parts = [("data.train", train), *(("milora.text", name) for name in general)]
    seen = {files[name]: (key, name) for key, name in parts if name in files}
    for _, name in texts:
        digest = sha256(Path(name)) if Path(name).is_file() else ""
        key, other = seen.get(digest, ("milora.text" if name in general else "", name))
        if key:
            both = name if name == other else f"{name} (a copy of {other})"
            raise UserError(
                f"{key} and evaluate.knowledge both have {both}: what is kept must be measured on "
                "text that took no part in the run"
            )


def _general_text(source: str, key: str) -> tuple[str, str]:
    if source == DEFAULT_TEXT:
        topics = pydoc_data.topics.topics
        release = f"{sys.version_info.major}.{sys.version_info.minor}"
        name = f"the help topics of Python {release} (PSF licence)"
        return "\n\n".join(topics[name] for name in sorted(topics)), name
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{key}: {source} {why_no_file(path)}")
    if path.suffix == ".txt":
        try:
            return path.read_text(encoding="utf-8"), source
        except UnicodeDecodeError as error:
            raise UserError(f"{source} is not UTF-8 (byte {error.start})") from error
    rows = read_rows(source, format="text").rows
    return "\n\n".join(row.messages[0]["content"] for row in rows), source
