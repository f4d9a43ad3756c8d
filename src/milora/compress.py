"""A smaller base, and what it costs: packed numbers to train on, or principal parts to judge.

pack              linear layers in 4 or 8 bits: a folder to load with transformers and to train on
principal_parts   what keeping the largest components would save and lose; nothing is written: no
                  library loads a weight as two factors, and multiplied out it is no smaller

The components are those of what a weight gives on a text, not of the weight alone: with C = XᵀX of
its inputs X, U_k are the eigenvectors of W C Wᵀ for the k largest eigenvalues, and the weight
becomes U_k (U_kᵀ W), the best of rank k for X (the optimum of SVD-LLM, arXiv 2403.07378). A weight
whose factors would have more numbers than itself stays whole.
"""

import copy
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from milora.card import figure, packed_card
from milora.checkpoint import open_shards
from milora.data import begins_with
from milora.errors import UserError
from milora.files import new_folder, write_json, write_text
from milora.keep import LENGTH, covariances, cut
from milora.knowledge import general_texts, knowledge_kept
from milora.logits import Pair
from milora.matrices import kind_of
from milora.merge import copy_others
from milora.pretrained import Pretrained, load_pretrained, positions, source_of, task_of
from milora.progress import Progress
from milora.quantised import is_packed, linear_shape, loaded_bytes, method_of, unlike
from milora.spectra import top_holding

BITS = {4: "nf4", 8: "int8"}
PIECES = 32  # of LENGTH tokens, that the inputs are taken from


def pack(
    model: str, out: Path, bits: int, text: str, chunks: int, dtype: str = "auto",
    trust_remote_code: bool = False, progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `model` with its linear layers in `bits` to `out`, by bitsandbytes (nf4 or LLM.int8).

    Returns, and leaves in compression.json: bytes before (of the files, or in `dtype`) and after,
    ||Q - W|| / ||W|| by kind, and perplexities and KL on the first `chunks` pieces of `text` (see
    knowledge_kept). Raises UserError for bits other than 4 and 8, an existing `out`, a model that
    is packed already or does not write text, or without bitsandbytes.
    """
    progress = progress or Progress()
    if bits not in BITS:
        raise UserError(f"--bits {bits}: 4 and 8 are known")
    if out.exists():
        raise UserError(f"--out {out} exists already: choose a new folder")
    if model.endswith(".gguf"):
        raise UserError(f"{model} is a GGUF file: give the folder that it was made from")
    (said, name), *_ = general_texts(text, "--text")
    whole = _loaded(model, dtype, trust_remote_code)
    cut(whole.tokenizer, [said], 2, "--text")
    packed = load_pretrained(
        model, str(whole.model.dtype).removeprefix("torch."), trust_remote_code, None, BITS[bits]
    )
    taken = [name for name, layer in packed.model.named_modules()
             if linear_shape(layer) and is_packed(layer)]  # fmt: skip
    kinds: dict[str, list[float]] = {}
    for module in taken:
        weight = _matrix(whole.model.get_submodule(module))
        lost = unlike(packed.model.get_submodule(module), weight)
        kinds.setdefault(kind_of(module), []).append(lost)
    if not kinds:
        raise UserError(f"{model} has no linear layer that bitsandbytes packs: it stays as it is")
    # On a CPU 16-bit files are computed with in fp32, which is no saving of the packing.
    before = _file_bytes(source_of(model)) if dtype == "auto" else loaded_bytes(whole.model)
    result = {
        "model": model, "how": BITS[bits], "text": name,
        "bytes": {"before": before, "after": loaded_bytes(packed.model)},
        "whole": _whole(packed.model, taken),
        "kinds": {
            kind: {"weights": len(lost), "error": sum(lost) / len(lost)}
            for kind, lost in kinds.items()
        },
        "knowledge": knowledge_kept(
            Pair(packed.model, whole.model), packed.tokenizer, said, chunks, progress=progress
        ),
    }  # fmt: skip
    with new_folder(out) as folder:
        copy_others(source_of(model), folder)
        packed.model.save_pretrained(folder)
        whole.reader.save_pretrained(folder)
        _check_saved(packed.model, str(folder), trust_remote_code)
        write_json(folder / "compression.json", result)
        write_text(folder / "README.md", packed_card(result, whole.name, whole.license))
    return result


def _file_bytes(source: str) -> int:
    shards = open_shards(source)
    paths = (shards.path_of(file) for file in set(shards.files.values()))
    return sum(path.stat().st_size for path in paths if path)


def _whole(model: nn.Module, taken: Container[str]) -> dict[str, int]:
    """Bytes of the matrices that stay as they are, by kind: embedding, head, stacks of experts."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module, _, own = name.rpartition(".")
        if parameter.ndim > 1 and module not in taken:
            kind = kind_of(module if own == "weight" else name)
            found[kind] = found.get(kind, 0) + parameter.nbytes
    return found


def _matrix(layer: nn.Module) -> Tensor:
    """Its weight (m, n), a view where it lies transposed."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if isinstance(layer, Conv1D) else weight


def _loaded(model: str, dtype: str, trust_remote_code: bool) -> Pretrained:
    loaded = load_pretrained(model, dtype, trust_remote_code)
    if method := method_of(loaded.model.config):
        raise UserError(f"{model} is quantised already ({method}): give the original")
    if task_of(loaded.model) != "CAUSAL_LM":
        raise UserError(f"{model} is no causal language model, whose perplexity says what is lost")
    return loaded


@torch.no_grad()
def _check_saved(packed: nn.Module, folder: str, trust_remote_code: bool) -> None:
    """Raise RuntimeError unless the folder gives the model that was measured."""
    ids = torch.arange(8, device=next(packed.parameters()).device)[None]
    again = load_pretrained(folder, "auto", trust_remote_code).model
    if not torch.equal(packed(input_ids=ids).logits, again(input_ids=ids).logits):
        raise RuntimeError("the packed model, loaded again, is another one: please report this")


@torch.no_grad()
def principal_parts(
    model: str, energy: float, text: str, chunks: int, dtype: str = "auto",
    trust_remote_code: bool = False, progress: Progress | None = None, aware: bool = True,
) -> tuple[dict[str, Any], Pretrained]:  # fmt: skip
    """What is left of `model` when every linear layer keeps `energy` of what it gives on `text`.

    The measure is on the first `chunks` pieces of the text, the inputs are those of the PIECES
    after them; with `aware` False the energy is that of the weights. Returns bytes, ranks by kind,
    perplexities and KL, and the model, its weights multiplied out. Raises UserError for an energy
    outside of (0, 1) and a text that is too short.
    """
    progress = progress or Progress()
    if not 0 < energy < 1:
        raise UserError(f"--energy {energy}: a share between 0 and 1 is needed")
    (said, name), *_ = general_texts(text, "--text")
    loaded = _loaded(model, dtype, trust_remote_code)
    whole = copy.deepcopy(loaded.model)
    layers = {
        name: layer
        for name, layer in loaded.model.named_modules()
        if linear_shape(layer) and layer is not loaded.model.get_output_embeddings()
    }
    measured = 2 * chunks + len(begins_with(loaded.tokenizer))
    pieces = cut(loaded.tokenizer, [said], positions(loaded.model), "--text")[measured:][:PIECES]
    if aware and len(pieces) < PIECES / 4:
        raise UserError(
            f"--text: {name} is too short: beside the {chunks} pieces of 512 tokens that are "
            f"measured, {PIECES * LENGTH} tokens show the inputs of the layers"
        )
    found: Iterable[tuple[str, Tensor | None]] = ((name, None) for name in layers)
    if aware:
        inputs = {
            name: (whole.get_submodule(name), _matrix(layer).shape[1])
            for name, layer in layers.items()
        }
        found = covariances(whole, inputs, pieces)
    kinds: dict[str, list[tuple[int, int, int]]] = {}
    saved, unseen = 0, list[str]()
    for done, (module, C) in enumerate(found):
        progress("principal parts", done, len(layers), module)
        if C is not None and not C.trace() > 0:
            unseen.append(module)  # such as those of a vision tower
            continue
        weight = _matrix(layers[module])
        U, V = parts(weight, C, energy)
        kept, full = U.numel() + V.numel(), weight.numel()
        kinds.setdefault(kind_of(module), []).append((U.shape[1], min(weight.shape), kept < full))
        if kept < full:
            weight.copy_(U @ V)
            saved += (full - kept) * weight.element_size()
    before = loaded_bytes(whole)
    result = {
        "model": model, "how": "principal", "energy": energy, "text": name,
        "of": "outputs" if aware else "weights", "unseen": unseen,
        "whole": _whole(loaded.model, layers),
        "bytes": {"before": before, "after": before - saved},
        "kinds": {
            kind: {
                "weights": len(own),
                "factored": sum(smaller for _, _, smaller in own),
                "rank": sorted(rank for rank, _, _ in own)[len(own) // 2],
                "of": own[0][1],
            }
            for kind, own in kinds.items()
        },
        "knowledge": knowledge_kept(
            Pair(loaded.model, whole), loaded.tokenizer, said, chunks, progress=progress
        ),
    }  # fmt: skip
    return result, loaded


def parts(weight: Tensor, C: Tensor | None, energy: float) -> tuple[Tensor, Tensor]:
    """U (m, k) and Uᵀ W (k, n), in the dtype of W: the least k whose part of W C Wᵀ, of its trace,
    is `energy`; C (n, n) symmetric, or None for the identity.
    """
    W = weight.double()
    Q, R = torch.linalg.qr(W)  # (m, q), (q, n): what W C Wᵀ has beside zeros is R C Rᵀ
    values, vectors = torch.linalg.eigh(R @ R.T if C is None else R @ C.double() @ R.T)
    k = top_holding(values.flip(0).clamp_min(0).sqrt(), energy)
    U = Q @ vectors[:, -k:]
    return U.to(weight.dtype), (U.T @ W).to(weight.dtype)


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: what each kind of layer lost, or the rank that it keeps."""
    kinds = result["kinds"]
    if result["how"] != "principal":
        rows = [[kind, str(k["weights"]), f"{k['error']:.3f}"] for kind, k in kinds.items()]
        return ["kind", "weights", "‖Q − W‖/‖W‖"], rows
    rows = [
        [kind, str(k["weights"]), f"{k['rank']} of {k['of']}", str(k["factored"])]
        for kind, k in kinds.items()
    ]
    return ["kind", "weights", "median rank", "smaller as factors"], rows


def sentence(result: Mapping[str, Any]) -> str:
    """Size and loss in a few words, and whether it pays."""
    size, kept = result["bytes"], result["knowledge"]
    before, after = (figure(kept[f"{state}_perplexity"], 2) for state in ("base", "tuned"))
    said = (
        f"{size['before'] / 1e6:,.0f} MB to {size['after'] / 1e6:,.0f} MB "
        f"({size['after'] / size['before']:.0%}); perplexity {before} to {after}, KL "
        f"{figure(kept['kl'], 4)} on {result['text']}"
    )
    if whole := result.get("whole"):
        parts = (f"{kind} ({count / 1e6:,.1f} MB)" for kind, count in whole.items())
        said += f"; as they were: {', '.join(parts)}"
    if result["how"] == "principal" and size["after"] == size["before"]:
        said += "; no layer is smaller as two factors at that energy"
    if unseen := result.get("unseen"):
        said += f"; the text does not run through {unseen[0]} ({len(unseen)} in all), kept whole"
    return said
