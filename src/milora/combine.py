"""Two or more adapters of one base as one plain LoRA: their sum, TIES or DARE.

The sum of updates is exact, of the sum of their ranks. TIES (Yadav et al., 2023, arXiv 2306.01708)
and DARE (Yu et al., 2024, arXiv 2311.03099) work on the entries of dW and give matrices of full
rank, of which the best approximation within a rank is written and its error said; both are PEFT's
own functions, as its add_weighted_adapter applies them (`ties_svd`, `dare_linear_svd`), one weight
at a time. PEFT's `linear`, `ties` and `dare_linear` on A and B apart would not be those of B A.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.utils.merge_utils import dare_linear, ties
from torch import Tensor

from milora.adapter import Factors, module_seed, take_off
from milora.approximation import Decomposed, approximate, best_of_rank
from milora.card import combined_card, losses
from milora.errors import UserError
from milora.export import (
    ADAPTER_FILE,
    PlainLora,
    copy_tokenizer,
    exact_rank,
    load_plain_lora,
    save_plain_lora,
)
from milora.files import (
    check_files,
    files_sha256,
    new_folder,
    read_json,
    read_record,
    sha256,
    write_json,
    write_text,
)
from milora.matrices import skeleton_of
from milora.pretrained import opened
from milora.progress import Progress
from milora.spectra import interference, span
from milora.svd import components
from milora.verify import (
    ADAPTER,
    check_adapted,
    check_probed,
    find_adapter,
    make_probes,
    open_adapter,
)

HOW = ("sum", "ties", "dare")


class Shared(NamedTuple):
    """What two updates have in common, over all weights that both adapt."""

    cosine: float  # of the two as vectors: 1 the same, 0 nothing, -1 opposite
    inputs: float  # share of each one's ||dW||² in the inputs that the other reads, mean of both
    outputs: float  # and in the outputs that the other writes
    module: str  # where the larger share is the largest
    worst: float


def shared(one: Mapping[str, Factors], other: Mapping[str, Factors]) -> Shared:
    """From the factors alone, in fp64. 0 everywhere for updates with no weight in common."""
    dot, sizes, worst = 0.0, [0.0, 0.0], ("", 0.0)
    reads, writes = [0.0, 0.0], [0.0, 0.0]
    for name in sorted(set(one) & set(other)):
        pair = [Factors(*(x.double() for x in side[name])) for side in (one, other)]
        (A, B), (C, D) = pair
        dot += float(((B.T @ D) * (A @ C.T)).sum())
        spans = [span(*each) for each in pair]
        for i in (0, 1):
            P, Q = pair[i].B, pair[i].A
            size = float(((P.T @ P) * (Q @ Q.T)).sum())
            found = interference(P, Q, *spans[1 - i], 1.0, None)
            sizes[i] += size
            reads[i] += size * found.right
            writes[i] += size * found.left
            worst = max(worst, (name, max(found.left, found.right)), key=lambda each: each[1])
    if not all(sizes):
        return Shared(0.0, 0.0, 0.0, *worst)
    inputs, outputs = (
        sum(x / y for x, y in zip(v, sizes, strict=True)) / 2 for v in (reads, writes)
    )
    return Shared(dot / math.sqrt(sizes[0] * sizes[1]), inputs, outputs, *worst)


def combined(
    updates: Sequence[Mapping[str, Factors]], how: str, weights: Sequence[float],
    density: float, rank: int | None, seed: int,
) -> PlainLora:  # fmt: skip
    """One update of `rank`, or of the sum of the ranks; with the error of the approximation."""
    names = sorted({name for update in updates for name in update})
    if how == "sum":
        joined = {}
        for name in names:
            own = [(update[name], w) for update, w in zip(updates, weights, strict=True)
                   if name in update]  # fmt: skip
            joined[name] = Factors(
                torch.cat([factors.A for factors, _ in own]),
                torch.cat([w * factors.B for factors, w in own], 1),
            )
        plain = PlainLora(joined)
        return best_of_rank(plain, rank) if rank and rank < exact_rank(plain) else plain
    rank = rank or sum(max(len(A) for A, _ in update.values()) for update in updates)
    factors, lost = {}, {}
    for name in names:
        dense = [_dense(update[name]) for update in updates if name in update]
        own_weights = [w for update, w in zip(updates, weights, strict=True) if name in update]
        mixed = _mixed(dense, how, own_weights, density, module_seed(seed, name))
        total = float(mixed.double().square().sum())
        found = components(mixed, min(rank, *mixed.shape), "principal", seed)
        factors[name] = Decomposed(found.U, found.S, found.Vh).at(len(found.S))
        lost[name] = max(0.0, total - float(found.S.square().sum())), total
    return approximate(factors, lost)


def _dense(factors: Factors) -> Tensor:
    return factors.B @ factors.A


def _mixed(
    dense: Sequence[Tensor], how: str, weights: Sequence[float], density: float, seed: int
) -> Tensor:
    each = torch.tensor(weights, dtype=dense[0].dtype)
    if how == "ties":
        return ties(list(dense), each, density)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dare_linear(list(dense), each, density)


def combine(
    runs: Sequence[Path],
    out: Path,
    how: str = "sum",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> str:
    """Write the plain LoRA that the adapters of `runs` make together; returns what is to be said.

    Says first what each two of them have in common, and where their chat templates differ.
    `density` is the share of entries that TIES and DARE keep, half unless it is given; `seed`, 0
    unless given, says which DARE keeps. Raises UserError for adapters of different bases, with a
    head of their own, with other ends of an answer or with an update that another has too, for
    either of the two where it says nothing, and for an existing `out`.
    """
    progress = progress or Progress()
    weights = list(weights or [1.0] * len(runs))
    if density is not None and how == "sum":
        raise UserError("--density: a sum keeps all entries: leave it out, or add --how ties|dare")
    if seed is not None and how != "dare":
        raise UserError(f"--seed says which entries DARE keeps, and not --how {how}: leave it out")
    density, seed = 0.5 if density is None else density, seed or 0
    _check(runs, out, how, weights, density)
    folders = [find_adapter(run) for run in runs]
    stored = [read_json(folder / "milora.json") for folder in folders]
    digests = []
    for run, folder, one in zip(runs, folders, stored, strict=True):
        if one["format"] != ADAPTER:
            raise UserError(f"{run} holds {one['format']}, not an adapter: name its run")
        check_files(folder)
        with opened(folder / ADAPTER_FILE):
            digests.append(sha256(folder / ADAPTER_FILE))
    _check_alike(runs, stored, digests)
    first_one = open_adapter(folders[0], base, trust_remote_code)
    check_probed(first_one, folders[0])
    model = take_off(first_one.model)
    named = base or first_one.provenance["base"]["model"]
    for folder, one in zip(folders[1:], stored[1:], strict=True):
        check_adapted(model, one, folder, named, trust_remote_code)
    for run, folder in zip(runs[1:], folders[1:], strict=True):
        if _template(folder) != _template(folders[0]):
            progress.say(
                f"{run} has another chat template than {runs[0]}, whose own goes with {out}: the "
                "update of the other was trained on prompts that this one does not write"
            )
        end, first_end = _end(folder), _end(folders[0])
        if end and first_end and end != first_end:
            raise UserError(
                f"{run} ends its answers with {end!r}, and {runs[0]} with {first_end!r}: what they "
                "make together would end with either; train both with one tokenizer.eos_token"
            )
    updates = [load_plain_lora(folder, skeleton_of(model)).factors for folder in folders]
    names, common = [_name(run) for run in runs], []
    for i, one in enumerate(updates):
        for j in range(i + 1, len(updates)):
            found = shared(one, updates[j])
            common.append({"of": [names[i], names[j]], **found._asdict()})
            progress.say(
                f"{runs[i]} and {runs[j]}: cosine {found.cosine:+.3f}; {found.inputs:.1%} of each "
                f"is in inputs that the other reads, {found.outputs:.1%} in outputs that it writes"
                + f" (most in {found.module}, {found.worst:.1%})"
                * bool(found.module)
            )
    plain = combined(updates, how, weights, density, rank, seed)
    first = max((one["step0"] for one in stored), key=lambda each: each["difference"])
    record: dict[str, Any] = first_one.provenance | {
        "method": f"{how} of {len(runs)} adapters",
        "step0": first,
        "weights_sha256": _joined(stored, "weights_sha256"),
        "quantised_sha256": _joined(stored, "quantised_sha256"),
        "approximation_error": plain.error,
        "combined": {
            "how": how, "weights": weights, "seed": seed,
            **({} if how == "sum" else {"density": density}),
            "of": [
                {"name": name, "method": one["method"], "adapter_sha256": digest,
                 "approximation_error": one.get("approximation_error", 0.0),
                 **{key: one[key] for key in ("cut", "combined") if key in one}}
                for name, digest, one in zip(names, digests, stored, strict=True)
            ],
            "in_common": common,
        },
    }  # fmt: skip
    for key in ("cut", "approximation", "exported_against_trained"):  # of the first alone
        record.pop(key, None)
    earlier = [*(digest for one in stored for digest in _came_from(one)), *digests]
    record["lineage"] = list(dict.fromkeys(earlier))
    with new_folder(out) as folder:
        copy_tokenizer(folders[0], folder)
        record["rank"] = save_plain_lora(folder, plain, model, first_one.base.name)
        record["files_sha256"] = files_sha256(folder)
        loaded = PeftModel.from_pretrained(model, folder).eval()
        record["probes"] = make_probes(loaded, first_one.base.reader)
        write_json(folder / "milora.json", record)
        write_text(folder / "README.md", combined_card(record))
    said = f"{out}: plain LoRA of rank {record['rank']}, {how} of {len(runs)} adapters"
    parts = [f"{one['name']} ({lost})" for one in record["combined"]["of"] if (lost := losses(one))]
    if parts:
        said += f", of which no longer as trained: {', '.join(parts)}"
    if plain.error == 0:
        return said if parts else f"{said}, exact"
    return (
        f"{said}; relative error of the approximation {plain.error:.2e}, worst module "
        f"{plain.worst[0]} {plain.worst[1]:.2e}"
    )


def _check(
    runs: Sequence[Path], out: Path, how: str, weights: Sequence[float], density: float
) -> None:
    if len(runs) < 2:
        raise UserError("name two adapters or more: milora combine RUN RUN --out DIR")
    if how not in HOW:
        raise UserError(f"--how {how}: use {', '.join(HOW[:-1])} or {HOW[-1]}")
    if len(weights) != len(runs) or not all(math.isfinite(w) for w in weights):
        raise UserError(f"--weights: one number for each of the {len(runs)} adapters is needed")
    if not 0 < density < 1:
        raise UserError(f"--density {density}: a share between 0 and 1 is needed")
    if out.exists():
        raise UserError(f"--out {out} exists already: choose a new folder")


def _check_alike(
    runs: Sequence[Path], stored: Sequence[Mapping[str, Any]], digests: Sequence[str]
) -> None:
    for run, digest in zip(runs, digests, strict=True):
        if digests.count(digest) > 1:
            raise UserError(f"{run} is there twice: give it once, with --weights for its share")
    for run, one in zip(runs, stored, strict=True):
        made = "combined" in one or "approximation" in one
        for other, theirs, digest in zip(runs, stored, digests, strict=True):
            if digest in _came_from(one):
                raise UserError(
                    f"{run} {'was made from' if made else 'continues'} {other}, whose update is "
                    "part of its own: the two together would have it twice"
                    + f"; {run} is what they make"
                    * (not made)
                )
            both = sorted({*_came_from(one)} & {*_came_from(theirs)})
            if theirs is not one and both:
                raise UserError(
                    f"{run} and {other} both have the update of one adapter (sha256 "
                    f"{both[0][:12]}) in their own: the two together would have it twice; combine "
                    "adapters that were trained apart"
                )
        if one.get("labels"):
            raise UserError(f"{run} is a classifier, and of two heads nothing is made: train one")
        if one["base"]["sha256"] != stored[0]["base"]["sha256"]:
            raise UserError(
                f"wrong base: {run} is of {one['base']['name']} {one['base']['sha256'][:12]} "
                f"({one['base']['dtype']}), and {runs[0]} of {stored[0]['base']['name']} "
                f"{stored[0]['base']['sha256'][:12]} ({stored[0]['base']['dtype']})"
            )


def _came_from(one: Mapping[str, Any]) -> list[str]:
    """The hashes of all adapters whose update is part of one, by its milora.json."""
    parts = one.get("combined", {}).get("of", ())  # which older ones have in no lineage
    return [*one.get("lineage", ()), *(part["adapter_sha256"] for part in parts)]


def _name(run: Path) -> str:
    """What a run is called, of its adapter/ too."""
    own = run.resolve()
    return own.parent.name if (own.parent / "run.json").is_file() else own.name


def _end(folder: Path) -> Any:
    path = folder / "tokenizer_config.json"
    end = read_record(path).get("eos_token") if path.is_file() else None
    return end["content"] if isinstance(end, dict) else end


def _template(folder: Path) -> bytes | None:
    path = folder / "chat_template.jinja"
    return path.read_bytes() if path.is_file() else None


def _joined(stored: Sequence[Mapping[str, Any]], key: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in stored:
        found |= one.get(key, {})
    return found
