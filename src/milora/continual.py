"""A run that starts from the result of an earlier one, whose folder it only reads.

    same   its adapter is trained on: the pair (A, B) goes on from where it ended, with its anchor
    fold   a new adapter on top of it: the earlier update dW' stays as a frozen plain pair, and the
           components are those of W + dW'

Either way the base is the one that the first run had: with the adapter off the model is that base
to the last bit, and what leaves the run is one plain LoRA for it, dW' included.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from milora.adapter import Factors, take_off
from milora.approximation import best_of_rank, norm
from milora.errors import UserError
from milora.export import PlainLora, exact_rank, load_plain_lora
from milora.files import check_files, sha256, write_bytes
from milora.lineage import Link, chain, check_unchanged, continues, current, read_link
from milora.logits import logits_of, step0_bound
from milora.matrices import (
    ANCHOR,
    PREVIOUS,
    TRAINED,
    Matrix,
    Weights,
    adapted_matrices,
    matrix_in,
    skeleton_of,
)
from milora.recommended import stored_in
from milora.rows import Row, read_rows, split_rows
from milora.training_state import STATE
from milora.verify import find_adapter, why_whole

FORMAT = "milora previous update 1"
FILE = "previous.safetensors"

# What makes an adapter the same: with another of these the factors would mean something else.
SAME = ("method", "lora", "quantization")
SAME_MILORA = ("rank", "start", "protect", "protect_inputs", "factors_from")


class Earlier(NamedTuple):
    """The run that this one continues."""

    link: Link
    how: str  # same | fold
    record: dict[str, Any]  # for run.json

    @property
    def run(self) -> Path:
        return self.link.run

    @property
    def init(self) -> Path:
        return self.run / "init" / "factors.safetensors"


class Replayed(NamedTuple):
    """Rows of earlier runs that are trained on again."""

    rows: list[Row]
    counts: dict[str, int]  # by run
    files: dict[str, str]  # name -> sha256


def open_earlier(
    asked: Mapping[str, Any], run: Path, resumed: Mapping[str, Any], apart: bool
) -> Earlier | None:
    """The run that the configuration `asked` of the run in `run` continues, if it does.

    `resumed` is run.json of that run where it began already; `apart` is whether it keeps out of
    what earlier tasks use. Raises UserError for a run that cannot be continued so.
    """
    wanted = asked.get("continue") or {}
    if not wanted.get("run"):
        if apart:
            raise UserError(
                "milora.protect: {tasks: all} needs earlier tasks: name the run with continue.run"
            )
        return None
    folder, how = Path(wanted["run"]), wanted["how"]
    link = read_link(folder)
    if not link.done:
        raise UserError(
            f"continue.run: {folder} is not finished: finish it with `milora train ... --resume`"
        )
    if asked["method"] == "full" or link.record["method"] == "full":
        raise UserError(
            "continue.run: full fine-tuning has no adapter: use another method, or model: "
            f"{folder / 'model'} in its place"
        )
    if (folder / "model").is_dir():
        raise UserError(
            f"continue.run: {folder} has no adapter to continue: {why_whole(folder)}; go on from "
            f"its whole weights with model: {folder / 'model'}"
        )
    if link.failed:
        released = current(chain(folder))
        instead = f"continue {released.run}, which is the current release" if released else "train"
        raise UserError(
            f"continue.run: {folder} failed {len(link.failed)} of its gates "
            f"({link.failed[0]['gate']}: {link.failed[0]['said']}): {instead}, or train it again"
        )
    adapter = find_adapter(folder)
    if apart and how == "same":
        raise UserError(
            "milora.protect: {tasks: all} keeps a new adapter out of what the earlier one uses, "
            "and continue.how: same trains that one on: use how: fold"
        )
    if apart and asked["method"] in ("random", "pissa"):
        raise UserError(
            f"milora.protect: {{tasks: all}}: method {asked['method']} starts from components that "
            "earlier tasks use too: use milora, middle or lora"
        )
    if how == "same":
        _check_same(link, asked)
    elif link.record.get("labels"):
        raise UserError(
            f"continue.how: {how}: {folder} is a classifier, whose head is trained in full and "
            "belongs to its adapter: use how: same"
        )
    if stored := resumed.get("continues"):
        check_unchanged(folder, stored["adapter_sha256"], run)
    check_files(adapter)
    return Earlier(link, how, continues(link, run, how))


def _check_same(link: Link, asked: Mapping[str, Any]) -> None:
    there, here = stored_in(link.run), asked
    pairs = [(key, there.get(key), here.get(key)) for key in SAME]
    pairs += [
        (f"milora.{key}", there["milora"].get(key), here["milora"].get(key)) for key in SAME_MILORA
    ]
    inputs, keep = (here["milora"].get(key) for key in ("protect_inputs", "keep"))
    if inputs and not keep:  # it is read for their directions alone, which are there already
        pairs.append(("milora.text", *(one["milora"]["text"] for one in (there, here))))
    watched = [one["milora"]["interference"]["top"] for one in (there, here)]
    pairs.append(("milora.interference.top", *watched))
    for key, before, now in pairs:
        if before != now:
            raise UserError(
                f"continue.how: same trains the adapter of {link.run} on, whose {key} is "
                f"{before!r}, and here it is {now!r}: use the same, or how: fold"
            )
    init = link.run / "init"
    files = [link.run / "checkpoints" / STATE, init / "factors.safetensors"]
    if inputs:
        files.append(init / "top.safetensors")
    for file in files:
        if not file.exists():
            raise UserError(
                f"continue.how: same trains the adapter of {link.run} on, and {file} is gone: put "
                "it back, or use how: fold"
            )
    cut = link.record["adapter"].get("cut")
    if cut and cut["error"]:  # else the runs before it had cut, and this one nothing
        raise UserError(
            f"continue.how: same: the result of {link.run} was cut to rank {cut['rank']}, so that "
            "it is not what its factors give: use how: fold"
        )


def check_material(
    earlier: Earlier, base_sha256: str, model: str, labels: list[str], rows: Sequence[str]
) -> None:
    """Raise UserError for another base, other classes, or rows that train beside the factors."""
    recorded = earlier.link.record["base"]
    if recorded["sha256"] != base_sha256:
        raise UserError(
            f"wrong base: {model} has sha256 {base_sha256[:12]}, and {earlier.run}, which this run "
            f"continues, has {recorded['sha256'][:12]} ({recorded['name']}, {recorded['dtype']}): "
            "use that model and dtype"
        )
    if labels != earlier.link.record.get("labels", []):
        raise UserError(
            f"continue.run: the rows have the labels {', '.join(labels) or 'none'}, and "
            f"{earlier.run} has {', '.join(earlier.link.record.get('labels', [])) or 'none'}"
        )
    if rows:
        raise UserError(
            f"continue.run: rows of {', '.join(rows)} would train, whose result is merged weights "
            "and no adapter for the base of the chain: leave out new tokens and "
            "lora.modules_to_save"
        )


def previous_update(earlier: Earlier, base: PreTrainedModel, init: Path) -> dict[str, Factors]:
    """The update that this run's own comes on top of, by module; of a run that trains the same
    adapter on, the one that it came on top of already.

    From `init`, the folder of the run, where it is there.
    """
    if (init / FILE).exists():
        return load_previous(init / FILE)
    if earlier.how == "same":
        stored = earlier.init.with_name(FILE)
        return load_previous(stored) if stored.exists() else {}
    return _released(earlier, base)


def _released(earlier: Earlier, base: PreTrainedModel) -> dict[str, Factors]:
    """The update that the earlier run's adapter/ holds, by module."""
    return load_plain_lora(earlier.run / "adapter", skeleton_of(base)).factors


def replayed(earlier: Earlier, share: float, seed: int, pictures: bool) -> Replayed:
    """A share of the training rows of every run of the chain, drawn by `seed`.

    Rows that a run held out stay out, and what it replayed itself does not count twice. Raises
    UserError for a file that is not the one that the run read.
    """
    rows, counts, files = list[Row](), dict[str, int](), dict[str, str]()
    for place, link in enumerate(chain(earlier.run)):
        data = link.asked["data"]
        source = data["train"]
        recorded = link.record["data"]["sha256"].get(source)
        if recorded and (not Path(source).is_file() or sha256(Path(source)) != recorded):
            raise UserError(
                f"continue.replay: {source} is not the file that {link.run} was trained on (sha256 "
                f"{recorded[:12]}): put that one back"
            )
        read = {key: data[key] for key in ("format", "columns", "on_bad_row")}
        own = read_rows(source, **read, pictures=pictures).rows
        if not isinstance(data["eval"], str):
            own, _ = split_rows(own, data["eval"], link.asked["seed"])
        count = max(1, round(share * len(own)))
        drawn = random.Random(f"{seed} {place}").sample(range(len(own)), count)
        rows += [own[number] for number in sorted(drawn)]
        counts[link.name] = counts.get(link.name, 0) + count
        files |= {source: recorded} if recorded else {}
    return Replayed(rows, counts, files)


def folded(base: nn.Module, weights: Weights | None, previous: Mapping[str, Factors]) -> Weights:
    """Reads W + dW of a base without adapters; `weights` reads W where it is packed."""

    def read(name: str) -> Tensor:
        weight = weights(name) if weights else matrix_in(base, name)
        if name not in previous:
            return weight
        A, B = (x.to(weight.device) for x in previous[name])
        return torch.addmm(weight.float(), B, A)

    return read


def logits_before(earlier: Earlier, base: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """What the earlier result gives, as stock PEFT loads it, as logits_of gives them."""
    loaded = PeftModel.from_pretrained(base, earlier.run / "adapter").eval()
    with torch.no_grad():
        logits = logits_of(loaded, batch)
    take_off(loaded)
    return logits


def step0(
    earlier: Earlier, live: PeftModel, before: Tensor, batch: Mapping[str, Tensor],
    plain: PlainLora, base: PreTrainedModel,
) -> dict[str, Any]:  # fmt: skip
    """How far the run starts from the earlier result, and the bound on it.

    Of a new adapter in the logits, which are summed in the same order; on experts in 16 bit, where
    PEFT rounds one adapter otherwise than several, in the factors. Of the same one in the factors
    that it would export now (`plain`), since the logits of that export are summed otherwise than
    those of the pair that trains.
    """
    if earlier.how == "same":
        stored = _released(earlier, base)
        off = (
            x - y[tuple(map(slice, x.shape))]
            for name, own in plain.factors.items()
            for x, y in zip(own, stored[name], strict=True)
        )
        return _of_factors(off, earlier)
    bound, matrices = step0_bound(base.dtype), adapted_matrices(live)
    if bound == 0 and any(matrix.expert is not None for matrix in matrices.values()):
        return _of_factors(_at_start(matrices, _released(earlier, base)), earlier)
    training = live.training
    live.eval()
    with torch.no_grad():
        after = logits_of(live, batch)
    live.train(training)
    difference = float((after - before).abs().max() / before.abs().max())
    return {"difference": difference, "bound": bound, "from": earlier.run.name}


def _of_factors(off: Iterable[Tensor], earlier: Earlier) -> dict[str, Any]:
    difference = max(float(one.detach().abs().max()) for one in off)
    return {"difference": difference, "bound": 0.0, "of": "factors", "from": earlier.run.name}


def _at_start(matrices: Mapping[str, Matrix], stored: Mapping[str, Factors]) -> Iterator[Tensor]:
    """How far the earlier update in the model is from the `stored` one, the new from nothing."""
    for name, matrix in matrices.items():
        A, B = (factor.cpu() for factor in matrix.factors(PREVIOUS))
        earlier = stored.get(name, Factors(A[:0], B[:, :0]))
        more = len(A) - len(earlier.A)
        yield A - pad(earlier.A, (0, 0, 0, more))
        yield B - pad(earlier.B, (0, more))
        A, B = matrix.factors(TRAINED)
        if ANCHOR in matrix.layer.lora_A:
            A0, minus_B0 = matrix.factors(ANCHOR)
            yield A - A0
            yield B + minus_B0
        else:  # PEFT's own start
            yield B


def within(plain: PlainLora, rank: int | None, earlier: Earlier) -> tuple[PlainLora, Any]:
    """The update within `rank`, and what was cut from it: relative to it, and as a norm.

    `summed` adds what the earlier runs of the chain had cut. By the triangle inequality the result
    is at most so far (Frobenius, over all weights) from the sum of all updates as they were
    trained.
    """
    before = earlier.link.record["adapter"].get("cut", {}).get("summed", 0.0)
    whole = norm(plain)
    if rank is not None and exact_rank(plain) > rank:
        plain = best_of_rank(plain, rank)
    elif not before:
        return plain, None
    summed = before + plain.error * whole
    return plain, {
        "rank": exact_rank(plain),
        "error": plain.error,
        "norm": plain.error * whole,
        "summed": summed,
        "summed_error": summed / whole if whole else 0.0,
        "worst": list(plain.worst),
    }


def save_previous(path: Path, previous: Mapping[str, Factors], digest: str) -> None:
    """One safetensors file, by names that no loader of adapters knows."""
    tensors = {}
    for name, (A, B) in previous.items():
        # Of stacked experts they are parts of one tensor, which safetensors does not write.
        tensors[f"{name}.previous_A"] = A.clone(memory_format=torch.contiguous_format)
        tensors[f"{name}.previous_B"] = B.clone(memory_format=torch.contiguous_format)
    about = {"format": FORMAT, "adapter_sha256": digest, "modules": list(previous)}
    write_bytes(path, save(tensors, {"milora": json.dumps(about)}))


def load_previous(path: Path) -> dict[str, Factors]:
    """What `save_previous` wrote. Raises UserError when the file is not of that format."""
    try:
        with safe_open(path, framework="pt") as handle:
            about = json.loads((handle.metadata() or {}).get("milora", "{}"))
            if about.get("format") != FORMAT:
                raise ValueError(f"it is not {FORMAT}")
            return {
                name: Factors(
                    handle.get_tensor(f"{name}.previous_A"), handle.get_tensor(f"{name}.previous_B")
                )
                for name in about["modules"]
            }
    except Exception as error:  # safetensors raises its own types, not exported under one base
        raise UserError(f"{path} cannot be read ({error}): start the run anew") from error
