"""The decomposition store: components computed once, found again by the weight they are of.

    STORE/v1/<sha256 of the weight>-minor.safetensors      U (m, R), S (R,), Vh (R, n) in fp64

A result is named by the values of the weight, the component and the version of the solver, so
that it cannot be taken for another's; it carries a hash of its own bytes, so that damage shows.
It is written whole or not at all. Any smaller rank is a slice of it.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from milora.adapter import COMPONENT, lora_config, module_seed, targets, tensor_sha256
from milora.checkpoint import open_checkpoint
from milora.errors import UserError
from milora.files import NO_ROOM, cache_folder, write_bytes
from milora.pretrained import dtype_of
from milora.progress import Progress
from milora.svd import SOLVER, Component, Components, components, positions

FORMAT = "milora decomposition 1"


class BusyError(Exception):
    """Another process is computing this very result."""


class Store:
    """Decompositions on disk, for any number of processes.

    `say` gets a sentence when something in the store cannot be used. `found`, `made` and
    `residual` count what this object did.
    """

    def __init__(self, folder: Path | None = None, say: Callable[[str], None] = print) -> None:
        self.root = folder or store_folder()
        self.folder = self.root / f"v{SOLVER}"
        self.say = say
        self.found = self.made = 0
        self.residual = 0.0
        with _written(self.folder):
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
        name = f"{tensor_sha256(whole)}-{component}"
        path = self.folder / (f"{name}-{seed}" if component == "random" else name)
        path = path.with_suffix(".safetensors")
        wanted = positions(component, min(weight.shape), rank, seed)
        result = self._read(path, weight, wanted, component, seed)
        if result is None:
            with self._only_here(path, wait):
                result = self._read(path, weight, wanted, component, seed)
                if result is None:
                    result = components(weight, rank, component, seed)
                    self._write(path, result, component, seed)
                    self.made += 1
                    self.found -= 1
        self.found += 1
        self.residual = max(self.residual, result.residual)
        return result

    def _read(
        self, path: Path, weight: Tensor, wanted: Tensor, component: Component, seed: int
    ) -> Components | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as handle:
                about = json.loads((handle.metadata() or {})["milora"])
                U, S, Vh = (handle.get_tensor(name) for name in ("U", "S", "Vh"))
            if about["format"] != FORMAT or about["digest"] != _digest(U, S, Vh):
                raise ValueError("its content is not what was written")
        except Exception as error:  # of many kinds: whatever the damage, it is computed anew
            self.say(f"{path} is damaged ({error}): it is computed again")
            return None
        here = positions(component, min(weight.shape), len(S), seed)
        picked = torch.isin(here, wanted)
        if int(picked.sum()) < len(wanted):
            return None  # of a smaller rank
        U, S, Vh = (x.to(weight.device) for x in (U[:, picked], S[picked], Vh[picked]))
        return Components(U, S, Vh, about["norm"], about["residual"], about["solver"])

    def _write(self, path: Path, found: Components, component: Component, seed: int) -> None:
        tensors = {"U": found.U, "S": found.S, "Vh": found.Vh}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        about = {
            "format": FORMAT, "component": component, "seed": seed, "norm": found.norm,
            "residual": found.residual, "solver": found.solver,
            "digest": _digest(*tensors.values()),
        }  # fmt: skip
        with _written(path):
            write_bytes(path, save(tensors, {"milora": json.dumps(about)}))

    @contextmanager
    def _only_here(self, path: Path, wait: bool) -> Iterator[None]:
        lock = FileLock(path.with_suffix(".lock"), blocking=wait)
        try:
            lock.acquire()
        except Timeout as error:
            raise BusyError from error
        except (NotImplementedError, OSError):  # a file system without locks: work may be done
            yield  # twice, but never wrong, since results appear whole
            return
        try:
            yield
        finally:
            # Whoever waits for it finds the result; whoever comes later needs no lock.
            with suppress(OSError):
                Path(lock.lock_file).unlink()
            lock.release()

    def size(self) -> int:
        """Bytes of all results of this version."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


def store_folder() -> Path:
    """$MILORA_STORE, else decompositions/ in milora's cache."""
    own = os.environ.get("MILORA_STORE")
    return Path(own) if own else cache_folder() / "decompositions"


def decompose_checkpoint(
    *,
    model: str,
    method: str,
    lora: Mapping[str, Any],
    seed: int = 0,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    store: Store,
    progress: Progress,
) -> dict[str, Any]:
    """Put the components that a run would start from into `store`, one weight at a time.

    The arguments are those of `train`. The model is never held: the peak is some times its
    largest weight. What the store has is not computed again, so that a killed call goes on where
    it was. Weights that another process is at are left to it and looked for at the end.

    Returns counts, seconds and the worst residual. Raises UserError for whatever the user must
    change, before the first decomposition where it can be known.
    """
    if method not in COMPONENT:
        raise UserError(f"method {method} starts from no components: there is nothing to decompose")
    config: LoraConfig = lora_config(lora)
    checkpoint = open_checkpoint(model, trust_remote_code)
    wanted = targets(checkpoint.skeleton, config)
    began = time.monotonic()
    queue, busy = list(wanted), list[str]()
    done = 0
    while queue:
        name = queue.pop(0)
        target = wanted[name]
        stored = checkpoint.read(name)
        weight = stored.to(dtype_of(dtype))
        if target.transposed and not checkpoint.gguf:
            weight = weight.T
        if tuple(weight.shape) != target.shape:
            raise UserError(
                f"{name}.weight is {tuple(weight.shape)} in the files of {model}, but its "
                f"configuration says {target.shape}: they do not belong together"
            )
        if not torch.isfinite(weight).all():
            raise UserError(f"{name}.weight holds NaN or infinite values: the base is damaged")
        before = store.made
        try:
            # After one round those that were busy are waited for.
            store.components(
                weight, target.rank, COMPONENT[method], module_seed(seed, name),
                wait=name in busy,
            )  # fmt: skip
        except BusyError:
            busy.append(name)
            queue.append(name)
            continue
        done += 1
        # What was there takes no time, and would make the rest look quick.
        what = "decomposing" if store.made > before else "in the store"
        progress(what, done, len(wanted), name)
    return {
        "weights": len(wanted), "made": store.made, "found": store.found,
        "residual": store.residual, "seconds": time.monotonic() - began,
        "folder": str(store.folder), "bytes": store.size(),
    }  # fmt: skip


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor_sha256(tensor).encode())
    return digest.hexdigest()


def _sweep(folder: Path) -> None:
    """Remove what killed processes, here or on another machine, had half written an hour ago."""
    for path in folder.glob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()
        except FileNotFoundError:  # another process was faster
            continue


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "set MILORA_STORE to a folder that can be written"
        if error.errno in NO_ROOM:
            advice = (
                "free some space, or set MILORA_STORE to a folder with room; what is done stays"
            )
        raise UserError(
            f"the decomposition store cannot write {path} ({error.strerror}): {advice}"
        ) from error
