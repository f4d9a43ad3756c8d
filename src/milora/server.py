"""Ask a running server the probes of an adapter, and say what it serves.

The probes (verify.make_probes) are prompts as token ids with the log-probabilities of next tokens
under base and tuned, and with the update at wrong scales. An OpenAI-compatible server answers them
through /v1/completions, whether it is vLLM, llama.cpp or another that takes token ids.
"""

import json
import math
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from milora.errors import UserError
from milora.files import read_json
from milora.verify import LOOKED_AT, Check, find_adapter

LISTED = 20  # log-probabilities that are asked for, as many as vLLM gives
FLOOR = -10.0  # nats; below, rounding says more than the model
SECONDS = 120.0  # for one answer
Curve = Mapping[float, Sequence[float]]  # scale of the update -> log-probabilities


def verify_server(
    path: Path, url: str, model: str | None = None, tolerance: float = 0.1
) -> list[Check]:
    """Does the server at `url` answer as the adapter, merged model or GGUF at `path` should?

    `model` is its name there; by default the only one, or the only adapter. `tolerance` bounds the
    mean difference of log-probabilities (nats): servers compute in 16 bit or on quantised weights.
    Raises UserError when the server cannot be asked.
    """
    folder = find_adapter(path)
    record = read_json(folder / "milora.json")
    if record.get("labels"):
        raise UserError(f"{folder} is a classifier, of which servers of text give no classes")
    probes = record["probes"]
    probes = [probe for probe in probes if probe["text"] != LOOKED_AT]  # it gets tokens alone
    if not probes or not all("scaled" in probe for probe in probes):
        raise UserError(f"{folder} has no probes for servers: write it anew with `milora export`")
    address = url.rstrip("/").removesuffix("/v1")
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--server {url}: give an address such as http://localhost:8000")
    name = model or _name(address)
    curve: dict[float, list[float]] = {}
    found: list[float] = []
    listed = 0
    for probe in probes:
        answer = _next_tokens(address, name, probe)
        # One that is not listed has at most the least that is, so that nothing below tells.
        floor = max(min(answer.values()), FLOOR)
        expected = {0.0: probe["base"], 1.0: probe["tuned"]}
        expected |= {float(scale): values for scale, values in probe["scaled"].items()}
        for place, pair in enumerate(zip(probe["tokens"], probe["pieces"], strict=True)):
            seen = next((answer[key] for key in pair if key in answer), None)
            listed += seen is not None
            for scale, values in expected.items():
                curve.setdefault(scale, []).append(max(values[place], floor))
            found.append(floor if seen is None else max(seen, floor))
    said = f"{address}, model {name}: {listed} of {len(found)} log-probabilities listed"
    return [Check("server", listed > 0, said), judge(curve, found, tolerance)]


def judge(curve: Curve, found: Sequence[float], tolerance: float) -> Check:
    """Which scale of the update explains what was found? It must be 1, and near enough."""
    off = distance(curve[1.0], found)
    effect = distance(curve[1.0], curve[0.0])
    grid = [step / 100 for step in range(round(100 * max(curve)) + 1)]
    scale = min(grid, key=lambda s: distance(at_scale(curve, s), found))
    rest = distance(at_scale(curve, scale), found)
    measured = (
        f"log-probabilities off by {off:.3g} nats on average (bound {tolerance:g}; "
        f"the adapter moves them by {effect:.3g})"
    )
    right = off <= tolerance and off <= effect / 4
    if right:
        verdict = "the tuned model"
    elif rest > max(tolerance, effect / 5):
        verdict = (
            "another base, another adapter or other weights: no scale of the update explains the "
            f"answers (nearest {scale:.2g}, off by {rest:.3g})"
        )
    elif rest > effect / 5:
        verdict = "cannot be told from the base: serve it in a finer dtype, then ask again"
    elif scale < 0.15:
        verdict = "the base without the adapter"
    elif abs(scale - 1) > 0.1:
        verdict = f"the adapter at about {scale:.2g} times its scale"
    else:
        verdict = "the adapter, on weights that are not quite those of its base"
    return Check("served", right, f"{verdict}; {measured}")


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(x - y) for x, y in zip(one, other, strict=True)) / len(one)


def at_scale(curve: Curve, scale: float) -> list[float]:
    """Between the scales that are known, a straight line."""
    known = sorted(curve)
    upper = next(s for s in known if s >= scale)
    lower = max((s for s in known if s <= scale), default=upper)
    if lower == upper:
        return list(curve[upper])
    share = (scale - lower) / (upper - lower)
    return [x + share * (y - x) for x, y in zip(curve[lower], curve[upper], strict=True)]


def _name(address: str) -> str:
    listed = _ask(f"{address}/v1/models")
    try:
        models = {str(model["id"]): model for model in listed["data"]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{address}/v1/models lists no models: {str(listed)[:200]}") from error
    adapters = [name for name, model in models.items() if model.get("parent")]
    for names in (list(models), adapters):
        if len(names) == 1:
            return names[0]
    raise UserError(f"{address} serves {', '.join(models) or 'nothing'}: choose with --model")


def _next_tokens(address: str, model: str, probe: Mapping[str, Any]) -> dict[int | str, float]:
    """Log-probabilities of the likeliest next tokens, by id, or by text where no id is given."""
    answer = _ask(
        f"{address}/v1/completions",
        {
            "model": model, "prompt": probe["input_ids"], "max_tokens": 1, "temperature": 0,
            "logprobs": LISTED, "return_tokens_as_token_ids": True,
        },
    )  # fmt: skip
    try:
        given = answer["choices"][0]["logprobs"]
        found: dict[int | str, float] = {}
        if "content" in given:  # as llama.cpp gives them
            for one in given["content"][0]["top_logprobs"]:
                found[one["id"]] = float(one["logprob"])
        else:
            for token, value in given["top_logprobs"][0].items():
                number = token.removeprefix("token_id:")
                found[int(number) if number != token else token] = float(value)
        found = {token: value for token, value in found.items() if math.isfinite(value)}
        if found:
            return found
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        pass
    raise UserError(
        f"{address} gives no log-probabilities of completions, so that nothing can be compared: "
        f"{json.dumps(answer)[:200]}"
    )


def _ask(url: str, question: Mapping[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("MILORA_SERVER_KEY", "").strip():
        if not (key.isascii() and key.isprintable()):  # and http.client would quote it
            raise UserError(
                "MILORA_SERVER_KEY has a character that no HTTP header may have (a line end, or "
                "one beyond ASCII): set it to the key alone"
            )
        headers["Authorization"] = f"Bearer {key}"
    data = None if question is None else json.dumps(question).encode()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, headers), timeout=SECONDS
        ) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        said = error.read(300).decode(errors="replace")
        raise UserError(f"{url} answers {error.code}: {said}") from error
    except (OSError, ValueError, HTTPException) as error:  # not reached, not HTTP, or not JSON
        raise UserError(f"{url} cannot be asked ({error}): is the server up?") from error
