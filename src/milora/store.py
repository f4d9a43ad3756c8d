"""The decomposition store: components computed once, found again by the weight they are of.

    STORE/v1/<sha256 of the weight>-minor.safetensors      U (m, R), S (R,), Vh (R, n) in fp64

A result is named by the values of the weight, the component and the version of the solver, so
that it cannot be taken for another's; it carries a hash of its own bytes, so that damage shows.
It is written whole or not at all. Any smaller rank is a slice of it.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from milora.adapter import COMPONENT, module_seed
from milora.checkpoint import full_weights, open_checkpoint
from milora.errors import UserError
from milora.files import NO_ROOM, cache_folder, folder_of, locked, write_bytes
from milora.fingerprints import tensor_sha256
from milora.matrices import components_of_parts
from milora.pretrained import dtype_of, task_of
from milora.progress import Progress
from milora.protect import Protect, check_patterns, check_protect, top_of
from milora.ranks import check_ranked, ranks
from milora.svd import SOLVER, Component, Components, components, positions
from milora.targeting import lora_config, targets

FORMAT = "milora decomposition 1"


class BusyError(Exception):
    """Another process is computing this very result."""


class Store:
    """Decompositions on disk, for any number of processes.

    `say` gets a sentence when something in the store cannot be used. `found`, `made` and
    `residual` count what this object did. With `optional`, a store that cannot be written is said
    and done without; otherwise it raises UserError.
    """

    def __init__(
        self,
        folder: Path | None = None,
        say: Callable[[str], None] = print,
        optional: bool = False,
    ) -> None:
        self.root = folder or store_folder()
        self.folder = self.root / f"v{SOLVER}"
        self.say, self.optional, self.writable = say, optional, True
        self.found = self.made = 0
        self.residual = 0.0
        with self._writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            _sweep(self.folder)
        others = sorted(p.name for p in self.root.glob("v*") if p.name != self.folder.name)
        if others:
            say(
                f"{self.root} also holds decompositions of another version of the solver "
                f"({', '.join(others)}): they are not used and can be deleted"
            )

    def components(
        self, weight: Tensor, rank: int, component: Component, seed: int = 0, wait: bool = True
    ) -> Components:
        """As svd.components; computed only when the store has it in no such rank or larger.

        Raises BusyError when another process is at it and `wait` is False.
        """
        # 16-bit values are exact in fp32: a weight loaded as either is the same weight.
        whole = weight.float() if weight.element_size() < 4 else weight
        name = f"{tensor_sha256(whole)}-{component}" + f"-{seed}" * (component == "random")
        where = positions(component, min(weight.shape), rank, seed)
        path = self.folder / f"{name}.safetensors"
        result = self._read(path, weight, where, component, seed)
        if result is not None:
            self.found += 1
        else:
            with self._only_here(path, wait):
                # Another process may have done it meanwhile.
                result = self._read(path, weight, where, component, seed)
                if result is not None:
                    self.found += 1
                else:
                    result = components(weight, rank, component, seed)
                    self._write(path, result)
                    self.made += 1
        self.residual = max(self.residual, result.residual)
        return result

    def spectrum(self, weight: Tensor) -> Tensor:
        """All singular values of `weight`, descending, fp64: kept like components.

        Computed in fp64 up to 1024 columns or rows, in fp32 above, where those below 1e-7 of the
        largest are rounding.
        """
        whole = weight.float() if weight.element_size() < 4 else weight

        def make() -> Tensor:
            exact = torch.float64 if min(weight.shape) <= 1024 else torch.float32
            S: Tensor = torch.linalg.svdvals(weight.to(exact)).double().cpu()
            return S

        return self.tensor(f"{tensor_sha256(whole)}-spectrum", make)

    def tensor(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, on the CPU, made once: `name` must say all that it depends on."""
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as handle:
                about = json.loads((handle.metadata() or {})["milora"])
                kept: Tensor = handle.get_tensor("S")
            if about != {"format": FORMAT, "of": name, "digest": tensor_sha256(kept)}:
                raise ValueError("its content is not what was written")
            self.found += 1
            return kept
        except FileNotFoundError:
            pass
        except Exception as error:  # of many kinds: whatever the damage, it is computed anew
            self.say(f"{path} cannot be used ({error}): it is computed again")
        made = make()
        about = {"format": FORMAT, "of": name, "digest": tensor_sha256(made)}
        with self._writing(path):
            write_bytes(path, save({"S": made}, {"milora": json.dumps(about)}))
        self.made += 1
        return made

    def _read(
        self, path: Path, weight: Tensor, wanted: Tensor, component: Component, seed: int
    ) -> Components | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as handle:
                about = json.loads((handle.metadata() or {})["milora"])
                U, S, Vh = (handle.get_tensor(name) for name in ("U", "S", "Vh"))
            digest = about.pop("digest")
            if about["format"] != FORMAT or about["of"] != path.stem:
                raise ValueError(f"it says that it is {about['format']} of {about['of']}")
            if digest != _digest(about, U, S, Vh):
                raise ValueError("its content is not what was written")
        except Exception as error:  # of many kinds: whatever the damage, it is computed anew
            self.say(f"{path} cannot be used ({error}): it is computed again")
            with suppress(OSError):
                path.unlink()
            return None
        here = positions(component, min(weight.shape), len(S), seed)
        picked = torch.isin(here, wanted)
        if int(picked.sum()) < len(wanted):
            return None  # of a smaller rank
        U, S, Vh = (x.to(weight.device) for x in (U[:, picked], S[picked], Vh[picked]))
        return Components(U, S, Vh, about["norm"], about["residual"], about["solver"])

    def _write(self, path: Path, found: Components) -> None:
        tensors = {"U": found.U, "S": found.S, "Vh": found.Vh}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        about: dict[str, Any] = {
            "format": FORMAT, "of": path.stem, "solver_version": SOLVER, "norm": found.norm,
            "residual": found.residual, "solver": found.solver,
        }  # fmt: skip
        about["digest"] = _digest(about, *tensors.values())
        with self._writing(path):
            write_bytes(path, save(tensors, {"milora": json.dumps(about)}))

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            advice = "set MILORA_STORE to a folder that can be written"
            if error.errno in NO_ROOM:
                advice = (
                    "free some space, or set MILORA_STORE to a folder with room; what is done stays"
                )
            sentence = f"the decomposition store cannot write {path} ({error.strerror}): {advice}"
            if not self.optional:
                raise UserError(sentence) from error
            if self.writable:
                self.say(f"{sentence} (going on without it)")
            self.writable = False

    @contextmanager
    def _only_here(self, path: Path, wait: bool) -> Iterator[None]:
        """Without locks work may be done twice, but never wrong, since results appear whole."""
        with locked(path.with_suffix(".lock"), None if wait else BusyError()):
            yield

    def size(self) -> int:
        """Bytes of all results of this version."""
        total = 0
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total


def store_folder() -> Path:
    """$MILORA_STORE, else decompositions/ in milora's cache."""
    return folder_of("MILORA_STORE", cache_folder() / "decompositions")


def decompose_checkpoint(
    *,
    model: str,
    method: str,
    lora: Mapping[str, Any],
    ranked: Mapping[str, float] | None = None,
    protect: Protect = 0,
    watched: int = 0,
    seed: int = 0,
    dtype: str = "auto",
    quantised: bool = False,
    trust_remote_code: bool = False,
    store: Store,
    progress: Progress,
) -> dict[str, Any]:
    """Put the components that a run would start from into `store`, one weight at a time.

    The arguments are those of `train`: `ranked` is milora.rank, `protect` and `watched` are
    milora.protect and milora.interference.top; `quantised` says that the run packs the weights, so
    that they are taken as the files have them, whatever the dtype. The model is never held: the
    peak is some times its largest weight. What the store has is not computed again, so that a
    killed call goes on where it was. Weights that another process is at are left to it and looked
    for at the end.

    Returns counts, seconds and the worst residual. Raises UserError for whatever the user must
    change, before the first decomposition where it can be known.
    """
    if method not in COMPONENT:
        raise UserError(f"method {method} starts from no components: there is nothing to decompose")
    if ranked:
        check_ranked(lora)
    config: LoraConfig = lora_config(lora)
    checkpoint = open_checkpoint(model, trust_remote_code)
    read = full_weights(checkpoint, model)
    config.task_type = task_of(checkpoint.skeleton)
    wanted = targets(checkpoint.skeleton, config)
    began = time.monotonic()
    missing = [name for name in wanted if not checkpoint.has(name)]
    if missing:
        raise UserError(
            f"the files of {model} hold no weight for {missing[0]} ({len(missing)} in all): either "
            "they are damaged, or the library fuses or renames it when it loads the model; then "
            "leave it to `milora train`, which decomposes the loaded weights"
        )

    def weight_of(name: str) -> Tensor:
        target, weight = wanted[name], read(name)
        if not quantised:
            weight = weight.to(dtype_of(dtype))
        if tuple(weight.shape) != target.shape:
            raise UserError(
                f"{name}.weight is {tuple(weight.shape)} in the files of {model}, but its "
                f"configuration says {target.shape}: they do not belong together"
            )
        if not torch.isfinite(weight).all():
            raise UserError(f"{name}.weight holds NaN or infinite values: the base is damaged")
        return weight

    check_protect(protect, method)
    check_patterns(protect, list(wanted))
    beside = Store(store.root, store.say, store.optional)  # of what is not counted
    if ranked:
        spectra = {}
        for done, name in enumerate(wanted):
            progress("spectra", done, len(wanted), name)
            spectra[name] = beside.spectrum(weight_of(name))
        shapes = {name: target.shape for name, target in wanted.items()}
        for name, rank in ranks(spectra, shapes, ranked).items():
            wanted[name] = wanted[name]._replace(rank=rank)
    total = sum(len(target.parts) or 1 for target in wanted.values())
    queue, busy = list(wanted), set[str]()
    while queue:
        name = queue.pop(0)
        target, done = wanted[name], store.made + store.found
        if name in busy:
            store.say(f"waiting for another process, which is at {name}")
        progress("decomposing", done, total, name, free=store.found)
        weight, drawn = weight_of(name), module_seed(seed, name)
        try:
            components_of_parts(
                weight, target.parts, target.rank, COMPONENT[method], drawn,
                partial(store.components, wait=name in busy),
            )  # fmt: skip
            top_of(
                name, weight, target.parts, target.rank, method, protect, watched, seed,
                beside.components,
            )  # fmt: skip
        except BusyError:  # left to that process, and looked for at the end
            busy.add(name)
            queue.append(name)
    progress("decomposing", total, total)
    return {
        "weights": total, "made": store.made, "found": store.found,
        "residual": store.residual, "seconds": time.monotonic() - began,
        "folder": str(store.folder), "bytes": store.size(),
    }  # fmt: skip


def _digest(about: Mapping[str, Any], *tensors: Tensor) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(tensor_sha256(tensor).encode())
    return digest.hexdigest()


def _sweep(folder: Path) -> None:
    """Remove what killed processes, here or on another machine, had half written an hour ago."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):  # another process was faster, or it is another user's
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()
