"""Models that read pictures: which pictures a row has, their tokens, their pixels.

A row keeps its text with MARK where a picture stands, and the pictures in that order. What stands
for them in the model's tokens, and the pixels, come from the model's own processor. Wherever rows
become tokens a Reader is taken: such a processor, or the tokenizer of a model without one.
"""

import functools
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from milora.errors import UserError
from milora.matrices import is_suffix

MODELS = ("llava", "idefics3")  # model_type of those that the tests take from end to end
MARK = "<image>"  # as in LLaVA's and ShareGPT's files
COLUMNS = ("image", "images")
TEXT_KEYS = {"messages": "content", "conversations": "value"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # none that starts another program

Reader = PreTrainedTokenizerBase | ProcessorMixin


class Picture(NamedTuple):
    path: str
    sha256: str  # of the file
    width: int
    height: int


def tokenizer_of(reader: Reader) -> PreTrainedTokenizerBase:
    """The tokenizer, of a processor its own."""
    if isinstance(reader, PreTrainedTokenizerBase):
        return reader
    found: PreTrainedTokenizerBase = reader.tokenizer
    return found


def image_tokens(reader: Reader) -> list[str]:
    """The token that stands for a picture, where the model reads any."""
    return [str(reader.image_token)] if hasattr(reader, "image_token") else []


def need_pillow(model: str) -> None:
    """Raise UserError when pictures cannot be opened here."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"model: {model} reads pictures, for which pillow is missing: "
            "pip install 'milora[vision]'"
        ) from error


# --- rows


def texts_of_parts(
    record: Mapping[str, Any], place: str
) -> tuple[dict[str, Any], list[str | None]]:
    """The record with marked text where messages have parts, and what the parts name.

    A part is {"type": "text", "text": ...} or {"type": "image"} with the file under "path" or
    "image"; one with neither (None) takes the next of the row's column.
    """
    record, named = dict(record), list[str | None]()
    for column, key in TEXT_KEYS.items():
        turns = record.get(column)
        if not isinstance(turns, list):
            continue
        record[column] = changed = list(turns)
        for number, turn in enumerate(turns):
            if not isinstance(turn, Mapping) or not isinstance(turn.get(key), list):
                continue
            pieces = []
            for part in turn[key]:
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind == "image":
                    named.append(part.get("path") or part.get("image"))
                    pieces.append(MARK)
                elif kind == "text" and isinstance(part.get("text"), str):
                    if MARK in part["text"]:
                        raise UserError(
                            f"{place}, message {number + 1}: a text part says {MARK}, which marks "
                            "a picture: remove it"
                        )
                    pieces.append(part["text"])
                else:
                    raise UserError(
                        f"{place}, message {number + 1}: {str(part)[:60]!r} is no part; use "
                        '{"type": "text", "text": ...} or {"type": "image", "path": ...}'
                    )
            changed[number] = {**turn, key: "".join(pieces)}
    return record, named


def pictures_of(
    record: Mapping[str, Any],
    named: Sequence[str | None],
    messages: list[dict[str, str]],
    folder: Path,
    place: str,
) -> list[Picture]:
    """The pictures of a row, in the order of the marks in its messages; each was opened.

    They are those that parts name and those of the column "image" or "images". Where no message
    has a mark they come before the first question, whose text is changed. Paths are relative to
    `folder`. Raises UserError with row and path for a picture that is not there, cannot be read,
    has no mark, or stands in an answer.
    """
    values: list[Any] = []
    for column in COLUMNS:
        value = record.get(column)
        if value is not None:
            values += value if isinstance(value, list) else [value]
    column_left = iter(values)
    wanted = [name if name is not None else next(column_left, None) for name in named]
    wanted += column_left
    marks = sum(message["content"].count(MARK) for message in messages)
    if wanted and not marks:
        asked = next((m for m in messages if m["role"] == "user"), None)
        if asked is None:
            raise UserError(f"{place}: a picture, and no message of the user that it belongs to")
        asked["content"] = MARK * len(wanted) + asked["content"]
        marks = len(wanted)
    if marks != len(wanted):
        raise UserError(
            f"{place}: {marks} times {MARK} in the messages and {len(wanted)} pictures; there must "
            "be as many (or no mark, and the pictures come first)"
        )
    for message in messages:
        if MARK in message["content"] and message["role"] == "assistant":
            raise UserError(f"{place}: a picture in an answer, which the model cannot give")
    return [_checked(value, folder, place) for value in wanted]


def _checked(value: Any, folder: Path, place: str) -> Picture:
    if not isinstance(value, str) or not value:
        raise UserError(
            f"{place}: a picture is {type(value).__name__}; the path of a file belongs there"
        )
    if "://" in value or value.startswith("data:"):
        raise UserError(f"{place}: {value[:60]} is no file: save the picture and give its path")
    path = folder / value
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{place}: the picture {path} cannot be read: {error.strerror}") from error
    try:
        opened = _open(io.BytesIO(data))
    except Exception as error:  # of many kinds, by the format of the file
        reason = str(error)
        if "cannot identify" in reason:  # and then the name of an object in memory
            reason = f"none of {', '.join(FORMATS)}"
        raise UserError(f"{place}: {path} is no whole picture ({reason}): replace it") from error
    return Picture(str(path), hashlib.sha256(data).hexdigest(), *opened.size)


def _open(source: Any) -> Any:
    """RGB, upright, and read to its last byte."""
    from PIL import Image, ImageOps

    with Image.open(source, formats=FORMATS) as found:
        return ImageOps.exif_transpose(found).convert("RGB")


def pictures_sha256(pictures: Iterable[Picture]) -> str:
    """One hash for many pictures."""
    return hashlib.sha256("".join(one.sha256 for one in pictures).encode()).hexdigest()


# --- tokens


def render(processor: Any, messages: Sequence[Mapping[str, str]], answer_next: bool) -> str:
    """The conversation by the processor's template, one image token where each picture stands."""
    conversation = [{**message, "content": _parts(message["content"])} for message in messages]
    return str(
        processor.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=answer_next
        )
    )


def _parts(content: str) -> list[dict[str, str]]:
    """As templates want it. They write what separates text from pictures, so that ours goes."""
    if MARK not in content:
        return [{"type": "text", "text": content}]
    parts = []
    for number, piece in enumerate(content.split(MARK)):
        parts += [{"type": "image"}] * bool(number)
        parts += [{"type": "text", "text": piece.strip()}] * bool(piece.strip())
    return parts


def expand(
    processor: Any, text: str, pictures: Sequence[Picture], places: Sequence[tuple[int, int]] = ()
) -> tuple[str, list[tuple[int, int]], int]:
    """`text` with all the tokens of each picture for its one, `places` where they are then, and
    where the last picture ends.

    Raises ValueError when the text has not as many image tokens as there are pictures.
    """
    found = [match.span() for match in re.finditer(re.escape(processor.image_token), text)]
    if len(found) != len(pictures):
        raise ValueError(f"the chat template has {len(found)} places for {len(pictures)} pictures")
    if not found:
        return text, list(places), 0
    tokens = [_tokens(processor, one.width, one.height) for one in pictures]
    pieces, last = list[str](), 0
    for (start, end), instead in zip(found, tokens, strict=True):
        pieces += [text[last:start], instead]
        last = end
    finish = sum(map(len, pieces))

    def moved(position: int) -> int:
        longer = (
            len(instead) - (end - start)
            for (start, end), instead in zip(found, tokens, strict=True)
            if end <= position
        )
        return position + sum(longer)

    whole = "".join([*pieces, text[last:]])
    return whole, [(moved(first), moved(until)) for first, until in places], finish


@functools.lru_cache(maxsize=4096)
def _tokens(processor: Any, width: int, height: int) -> str:
    """What the processor writes for one picture, which depends on its size alone."""
    from PIL import Image

    blank = Image.new("RGB", (width, height))
    found = processor(
        text=[processor.image_token], images=[[blank]], return_text_replacement_offsets=True
    )
    return str(found["text_replacement_offsets"][0][0]["replacement"])


def shown(reader: Reader, text: str) -> str:
    """`text` for people: a picture's many tokens as one with their number."""
    for token in image_tokens(reader):
        for run in set(re.findall(f"(?:{re.escape(token)}){{2,}}", text)):
            text = text.replace(run, f"{token}×{len(run) // len(token)}")
    return text


def pixels(reader: Reader, paths: Iterable[Sequence[str]]) -> dict[str, Tensor]:
    """What the model takes for the pictures of each row of a batch; {} where there are none."""
    opened = [[_open(path) for path in row] for row in paths if row]
    if not opened:
        return {}
    processor: Any = reader
    return dict(processor.image_processor(opened, return_tensors="pt"))


def gradient(processor: Any) -> tuple[Picture, dict[str, Tensor]]:
    """A picture drawn here, from black above to white below, and what the model takes for it."""
    from PIL import Image

    drawn = Image.linear_gradient("L").convert("RGB")
    found = dict(processor.image_processor([[drawn]], return_tensors="pt"))
    return Picture("", hashlib.sha256(drawn.tobytes()).hexdigest(), *drawn.size), found


# --- modules


def outside_language_model(model: nn.Module) -> list[str]:
    """Names of the vision tower and the projector; none where the model reads text alone.

    Some that are not among MODELS have them too: Gemma 3 from 4B on, which here learns from text.
    """
    any_model: Any = model
    if not hasattr(any_model.config, "vision_config"):
        return []
    language = any_model.get_decoder()
    children = dict(any_model.base_model.named_children())
    if not any(child is language for child in children.values()):
        return []
    prefix = any_model.base_model_prefix
    return [f"{prefix}.{name}" for name, child in children.items() if child is not language]


def stored_names(model: nn.Module, parameter: str) -> list[str]:
    """What a parameter is called in LLaVA's files, as published and as transformers writes them,
    and in Gemma 3's."""
    config: Any = model.config
    if not hasattr(config, "vision_config"):
        return []
    return [
        re.sub(old, new, parameter)
        for old, new in (
            (r"^model\.language_model\.", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        )
        if re.match(old, parameter)
    ]


def leave_tower_alone(model: nn.Module, config: LoraConfig) -> None:
    """Exclude all that is outside the language model from the targets in `config`.

    Entries like q_proj mean layers of both. An empty list under exclude_modules asks for all.
    """
    outside = outside_language_model(model)
    given = config.exclude_modules
    if not outside or (given is not None and not given):
        return
    names = [name for name, _ in model.named_modules()]
    entries = config.target_modules or ()
    for entry in () if isinstance(entries, str) else sorted(entries):
        found = [name for name in names if is_suffix(entry, name)]
        if found and all(part_of(name, outside) for name in found):
            raise UserError(
                f"lora.target_modules: {entry!r} is in the vision tower or projector alone, which "
                "are left as they are; set lora.exclude_modules: [] to adapt those too"
            )
    patterns = [rf"(?:{'|'.join(map(re.escape, outside))})\..*"]
    if isinstance(given, str):
        patterns.append(f"(?:{given})")
    elif given:
        patterns.append(rf"(?:.*\.)?(?:{'|'.join(map(re.escape, sorted(given)))})")
    config.exclude_modules = "|".join(patterns)


def projectors(model: nn.Module) -> list[str]:
    """Of what is outside the language model that which is not the vision tower."""
    return [name for name in outside_language_model(model) if "vision" not in name]


def train_in_full(model: nn.Module) -> None:
    """All parameters train, but for a vision tower's."""
    model.requires_grad_(True)
    for name in set(outside_language_model(model)) - set(projectors(model)):
        model.get_submodule(name).requires_grad_(False)


def part_of(name: str, outside: Sequence[str]) -> str:
    """`vision_tower.` and the like before what is said of a module outside the language model."""
    found = next((one for one in outside if name.startswith(f"{one}.")), None)
    return f"{found.rpartition('.')[2]}." if found else ""
