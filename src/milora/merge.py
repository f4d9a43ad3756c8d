"""W + dW into the files of a checkpoint, a block of rows at a time; the model is never held.

Each shard is written as a copy of the base's file in which the adapted weights have other values:
the same names, dtypes, shapes and places. What is merged is what is in the files, so that the
recorded hashes, of every adapted weight and of all weights, are compared with them first.
"""

import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any, BinaryIO, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from milora.adapter import Factors
from milora.checkpoint import INDEX, SINGLE, Shards, open_shards, stored_name
from milora.errors import UserError
from milora.fingerprints import AT_ONCE, blocks_sha256, composed_sha256
from milora.matrices import is_stack, matrix_in
from milora.progress import Progress

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16
}  # fmt: skip
BLOCK = 1 << 19  # numbers that are worked on at a time, few enough for a cache
FILES_AT_ONCE = 3
# Where the files of a mixture of experts keep one by one what the library stacks: the folder of
# the experts, then the matrices that lie one above the other in the stack.
EXPERTS = {
    "mixtral": ("block_sparse_moe", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}),
    "qwen2_moe": ("mlp", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
    "qwen3_moe": ("mlp", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}),
}
# Other names in the files, of weights that are adapted by none.
RENAMED = {"gpt_neox": ("lm_head.", "embed_out."), "mixtral": (".mlp.", ".block_sparse_moe.")}
# Not of the model that is written: weights in other formats, the base's own record and card.
LEFT_OUT = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth",
    "*.ckpt", "*.h5", "*.msgpack", "*.onnx*", "*.gguf", "*.ot", "*.tflite", "*.npz",
    "README.md", ".*", "milora.json", "adapter_config.json",
)  # fmt: skip


class Piece(NamedTuple):
    """What a tensor of the files holds of a matrix W (m, n) of the model."""

    tensor: str
    expert: int | None  # which of the tensor's, where the files have a stack too
    rows: slice  # of W
    transposed: bool  # the tensor holds them as columns


class Recorded(NamedTuple):
    """The weight that an adapter was trained on."""

    sha256: str
    dtype: torch.dtype | None  # that it was loaded in; None where it is as the files have it


class Whole(NamedTuple):
    """The base that an adapter was trained on, and where the files have what it is made of."""

    sha256: str  # of all weights
    dtype: torch.dtype  # that they were loaded in
    adapted: Mapping[str, str]  # their hashes by parameter, which check_weight compares
    parts: Mapping[str, list[list[str]]]  # of the others the tensors that make each
    skeleton: PreTrainedModel

    def starts(self) -> dict[str, list[str]]:
        """By tensor the parameters of `parts` that begin with it."""
        found: dict[str, list[str]] = {}
        for key, lists in self.parts.items():
            found.setdefault(lists[0][0], []).append(key)
        return found


class Rounding(NamedTuple):
    """||merged - (W + dW)|| / ||dW||, Frobenius: what of the update the dtype of the files lost."""

    all: float
    worst: tuple[str, float]
    dtype: str  # of the weights that were merged, the coarsest

    def sentence(self) -> str:
        return (
            f"{self.dtype}, of the update {self.all:.1e} was lost to rounding (at most "
            f"{self.worst[1]:.1e}, {self.worst[0]})"
        )


def rounding_of(
    lost: Mapping[str, float], norms: Mapping[str, float], dtypes: Iterable[torch.dtype]
) -> Rounding:
    """From the squared errors and the norms of the updates, by matrix."""
    shares = {name: math.sqrt(lost[name]) / (norms[name] or 1.0) for name in lost}
    norm = math.sqrt(sum(one**2 for one in norms.values()))
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    worst = max(shares.items(), key=lambda pair: pair[1], default=("", 0.0))
    name = str(coarsest).removeprefix("torch.")
    return Rounding(math.sqrt(sum(lost.values())) / (norm or 1.0), worst, name)


def pieces_of(
    skeleton: PreTrainedModel, names: Iterable[str], shards: Shards, source: str
) -> dict[str, list[Piece]]:
    """Where in the files each matrix of the model is.

    `skeleton` is the model without weights. Raises UserError for a matrix that the model has not,
    or that is not in the files under a name that is known.
    """
    found = {}
    for name in names:
        try:
            rows = len(matrix_in(skeleton, name))
        except KeyError:
            raise UserError(f"wrong base: {source} has no weight {name}") from None
        pieces = _pieces(skeleton, name, rows, shards)
        if not pieces:
            raise UserError(
                f"the files of {source} hold no weight for {name}: the library renames or fuses "
                "it when it loads the model, in a way that is not known here; serve the plain LoRA"
            )
        found[name] = pieces
    return found


def _pieces(skeleton: PreTrainedModel, name: str, rows: int, shards: Shards) -> list[Piece]:
    whole = slice(0, rows)
    if own := stored_name(skeleton, f"{name}.weight", shards.files):
        return [Piece(own, None, whole, _transposed(skeleton, name))]
    stack, _, expert = name.rpartition(".")
    if not expert.isdigit():
        return []
    owner, _, parameter = stack.rpartition(".")
    if own := stored_name(skeleton, stack, shards.files):
        return [Piece(own, int(expert), whole, _transposed(skeleton, owner))]
    kind: Any = getattr(skeleton.config, "model_type", "")
    if kind not in EXPERTS:
        return []
    folder, parts = EXPERTS[kind]
    layer = owner.removesuffix(".mlp.experts")
    files = [
        stored_name(skeleton, f"{layer}.{folder}.experts.{expert}.{part}.weight", shards.files)
        for part in parts.get(parameter, ())
    ]
    found = [file for file in files if file]
    if len(found) < len(files) or not files:
        return []
    size = rows // len(files)
    return [
        Piece(file, None, slice(i * size, (i + 1) * size), False) for i, file in enumerate(found)
    ]


def _transposed(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name)
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def merge_files(
    source: str,
    skeleton: PreTrainedModel,
    factors: Mapping[str, Factors],
    hashes: Mapping[str, Recorded],
    folder: Path,
    progress: Progress,
    whole: Whole | None = None,
) -> tuple[Rounding, bool]:
    """Write the files of `source`, a folder or hub id, into `folder` with the update in them.

    `factors` are of dW = B A by matrix; `hashes` are those that the adapter recorded. The sum is
    formed in fp32 (fp64 where the files are fp32) and rounded once. The peak is some blocks and,
    where a weight is stored transposed, that weight. Everything that is no weight is copied:
    configuration, tokenizer, licence. Returns too whether the files could be compared with the
    `whole` base. Raises UserError for another base, for files that are damaged, and for a dtype
    that is not floating point.
    """
    shards = open_shards(source)
    pieces = pieces_of(skeleton, factors, shards, source)
    changed: dict[str, list[tuple[str, Piece]]] = {}
    for name, found in pieces.items():
        for piece in found:
            changed.setdefault(piece.tensor, []).append((name, piece))
    files = sorted(set(shards.files.values()))
    threads, said, stopped = torch.get_num_threads(), list[str](), Event()
    one_at_a_time = Lock()

    def say(name: str) -> None:
        with one_at_a_time:
            progress("merging", len(said), len(factors), name)
            said.append(name)

    # Blocks and hashes take a thread each, since threads that share a product wait, spinning, for
    # one whose core has other work. What waits for the disk are the files, some at a time.
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            job = _Job(
                source, shards, factors, hashes, pieces, changed, folder, pool, threads, say,
                stopped, whole,
            )  # fmt: skip
            with ThreadPoolExecutor(FILES_AT_ONCE) as readers:
                begun = [readers.submit(_merge_file, job, file) for file in files]
                try:
                    shares = [one.result() for one in begun]
                except BaseException:
                    stopped.set()
                    raise
    finally:
        torch.set_num_threads(threads)
    progress("merging", len(factors), len(factors))
    if files != [SINGLE] and (index := shards.path_of(INDEX)):
        shutil.copyfile(index, folder / INDEX)
    copy_others(source, folder)
    lost = {name: sum(share.lost.get(name, 0.0) for share in shares) for name in factors}
    norms = {name: norm for share in shares for name, norm in share.norms.items()}
    others = {key: digest for share in shares for key, digest in share.others.items()}
    compared = whole is not None and _compared(source, whole, others)
    rounding = rounding_of(lost, norms, set[torch.dtype]().union(*(one.dtypes for one in shares)))
    return rounding, compared


class _Job(NamedTuple):
    """What is the same for all files; see `merge_files`."""

    source: str
    shards: Shards
    factors: Mapping[str, Factors]
    hashes: Mapping[str, Recorded]
    pieces: Mapping[str, Sequence[Piece]]  # by matrix
    changed: Mapping[str, Sequence[tuple[str, Piece]]]  # by tensor of the files
    folder: Path
    pool: ThreadPoolExecutor
    threads: int  # of it
    say: Callable[[str], None]
    stopped: Event  # another file failed
    whole: Whole | None


class _Share(NamedTuple):
    """Of one file: squared errors and norms by matrix, the dtypes that were merged into, and the
    hashes of what is not adapted."""

    lost: dict[str, float]
    norms: dict[str, float]
    dtypes: set[torch.dtype]
    others: dict[str, str | None]


def _merge_file(job: _Job, file: str) -> _Share:
    share, checks, path = _Share({}, {}, set(), {}), dict[str, Future[float]](), job.folder / file
    starts = job.whole.starts() if job.whole else {}
    others = dict[str, Future[str | None]]()
    with TensorFile(job.source, file, job.shards) as old, path.open("wb") as new:
        at = 0  # so much of the file is written
        waiting = deque(tensor for tensor in old.order if tensor in starts)

        def hash_until(end: int) -> None:
            """What was just copied is hashed while the disk's cache has it."""
            while waiting and old.begin + old.header[waiting[0]]["data_offsets"][0] < end:
                for key in starts[waiting.popleft()]:
                    assert job.whole
                    others[key] = job.pool.submit(_hashed, job.source, job.shards, job.whole, key)

        for tensor in (one for one in old.order if one in job.changed):
            for name, piece in sorted(job.changed[tensor], key=lambda p: p[1].expert or 0):
                if piece == job.pieces[name][0]:
                    job.say(name)
                    checks[name] = job.pool.submit(_checked, job, name)
                L, R = job.factors[name].B[piece.rows], job.factors[name].A
                if piece.transposed:
                    L, R = R.T, L.T
                start, end, kind, width = old.place(piece)
                share.dtypes.add(DTYPES[kind])
                _copy(old.handle, new, at, start)
                hash_until(start)
                blocks = old.blocks(start, end, DTYPES[kind], width)
                for merged, off in _in_order(job, ((name, W, L[rows], R) for rows, W in blocks)):
                    new.write(merged.view(torch.uint8).numpy().data)
                    share.lost[name] = share.lost.get(name, 0.0) + off
                    if job.stopped.is_set():
                        return share
                at = end
        _copy(old.handle, new, at, old.size)
        hash_until(old.size)
        share.norms.update({name: check.result() for name, check in checks.items()})
        share.others.update({key: hashed.result() for key, hashed in others.items()})
        new.flush()
        os.fsync(new.fileno())
    return share


def _in_order(
    job: _Job, asked: Iterable[tuple[str, Tensor, Tensor, Tensor]]
) -> Iterator[tuple[Tensor, float]]:
    """`summed` of each, some of them at a time."""
    begun = deque[Future[tuple[Tensor, float]]]()
    for one in asked:
        begun.append(job.pool.submit(summed, *one))
        if len(begun) > 2 * job.threads:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _checked(job: _Job, name: str) -> float:
    """The norm of the update, once the weight that it is for is known to be the right one."""
    check_weight(name, job.pieces[name], job.shards, job.source, job.hashes[name])
    return norm_of(job.factors[name])


def summed(name: str, W: Tensor, L: Tensor, R: Tensor) -> tuple[Tensor, float]:
    """W + L R in the dtype of W, and the squared error of its rounding."""
    exact = torch.float32 if W.element_size() < 4 else torch.float64
    wanted = W.to(exact, copy=True).addmm_(L.to(exact), R.to(exact))
    rounded = wanted.to(W.dtype)
    off = float(torch.linalg.vector_norm(wanted.sub_(rounded)))
    if not math.isfinite(off):
        raise UserError(
            f"{name}: base or adapter holds NaN or infinite values, or their sum does not fit "
            f"{W.dtype}: it cannot be merged"
        )
    return rounded, off**2


def norm_of(factors: Factors) -> float:
    """||B A||, from the factors alone."""
    A, B = factors.A.double(), factors.B.double()
    return math.sqrt(max(float(((A @ A.T) * (B.T @ B)).sum()), 0.0))


def check_weight(
    name: str, pieces: Sequence[Piece], shards: Shards, source: str, recorded: Recorded
) -> None:
    """Raise UserError unless the files hold the weight that the adapter was trained on."""
    with TensorFile(source, shards.files[pieces[0].tensor], shards) as first:
        stored = first.header[pieces[0].tensor]["shape"]
        dtype = recorded.dtype or DTYPES[first.place(pieces[0])[2]]

    def blocks(dtype: torch.dtype) -> Iterator[Tensor]:
        for piece in pieces:
            with TensorFile(source, shards.files[piece.tensor], shards) as opened:
                if piece.transposed:
                    yield opened.matrix(piece).to(dtype)
                    continue
                start, end, kind, width = opened.place(piece)
                for _, block in opened.blocks(start, end, DTYPES[kind], width):
                    yield block.to(dtype)

    rows = sum(piece.rows.stop - piece.rows.start for piece in pieces)
    shape = rows, stored[-2 if pieces[0].transposed else -1]
    # transformers keeps some modules, T5's wo among them, in fp32 where the rest is in 16 bit.
    kinds = (dtype,) if recorded.dtype is None else dict.fromkeys((dtype, torch.float32))
    if all(blocks_sha256(one, shape, blocks(one)) != recorded.sha256 for one in kinds):
        raise UserError(
            f"wrong base: {name} in the files of {source} is not the weight that the adapter was "
            "trained on: give the model (and revision) that it was trained on"
        )


def whole_of(
    source: str, skeleton: PreTrainedModel, hashes: Mapping[str, Recorded], sha256: str,
    dtype: torch.dtype,
) -> Whole:  # fmt: skip
    """Of a base in full precision; `hashes` are of the weights that are adapted."""
    parts, adapted = _parts(skeleton, open_shards(source)), dict[str, str]()
    for name in hashes.keys() & {key.removesuffix(".weight") for key in parts}:
        if not _transposed(skeleton, name):  # else the hash is of the other order
            adapted[f"{name}.weight"] = hashes[name].sha256
    rest = {key: lists for key, lists in parts.items() if key not in adapted}
    return Whole(sha256, dtype, adapted, rest, skeleton)


def check_all(source: str, whole: Whole, progress: Progress) -> bool:
    """As `_compared`, after hashing what is not adapted: some blocks of it are in memory."""
    shards, found = open_shards(source), dict[str, str | None]()
    with ThreadPoolExecutor(min(torch.get_num_threads(), AT_ONCE)) as pool:  # hashing holds no lock
        hashes = pool.map(partial(_hashed, source, shards, whole), whole.parts)
        for key, digest in zip(whole.parts, hashes, strict=True):
            progress("comparing", len(found), len(whole.parts), key)
            found[key] = digest
    progress("comparing", len(found), len(found))
    return _compared(source, whole, found)


def _hashed(source: str, shards: Shards, whole: Whole, key: str) -> str | None:
    """As tensor_sha256 of the parameter when it is loaded; None where that is not known."""
    kept = _kept_in_fp32(whole.skeleton, whole.dtype) & set(key.split("."))
    dtype = torch.float32 if kept else whole.dtype
    shape = whole.skeleton.get_parameter(key).shape
    found = {_stored_sha256(source, shards, one, dtype, shape) for one in whole.parts[key]}
    return found.pop() if len(found) == 1 else None  # of tied weights any is the model's


def _compared(source: str, whole: Whole, found: Mapping[str, str | None]) -> bool:
    """Whether the hash of all weights could be made of those that were `found` in the files.

    Not where the library makes something of the files that is not known here. Raises UserError for
    another base.
    """
    every = {**whole.adapted, **{key: digest for key, digest in found.items() if digest}}
    if set(every) != set(whole.skeleton.state_dict()):
        return False
    if (digest := composed_sha256(every)) != whole.sha256:
        raise UserError(
            f"wrong base: in the files of {source} weights that are not adapted are not those that "
            f"the adapter was trained on (all together have sha256 {digest[:12]}, and had "
            f"{whole.sha256[:12]}): give the model (and revision) that it was trained on"
        )
    return True


def _parts(skeleton: PreTrainedModel, shards: Shards) -> dict[str, list[list[str]]]:
    """By parameter the tensors that make it, one behind the other; several such lists where it is
    one with others that the files have too. Those that the files have otherwise are left out.
    """
    kind: Any = getattr(skeleton.config, "model_type", "")
    old, new = RENAMED.get(kind, ("", ""))
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    found: dict[int, list[list[str]]] = {}
    for key, parameter in parameters.items():
        other = key.replace(old, new) if old else key
        own = stored_name(skeleton, key, shards.files) or stored_name(skeleton, other, shards.files)
        tensors = [own] if own else []
        if not own and is_stack(parameter):
            experts, rows, _ = parameter.shape
            pieces = [_pieces(skeleton, f"{key}.{e}", rows, shards) for e in range(experts)]
            tensors = [piece.tensor for each in pieces for piece in each] if all(pieces) else []
        if tensors:
            found.setdefault(id(parameter), []).append(tensors)
    return {key: found[id(own)] for key, own in parameters.items() if id(own) in found}


def _kept_in_fp32(skeleton: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """The modules that transformers loads in fp32 where the rest is in `dtype`."""
    lists = {
        "_keep_in_fp32_modules": (torch.float16,),
        "_keep_in_fp32_modules_strict": (torch.float16, torch.bfloat16),
    }
    kept = [getattr(skeleton, key, None) for key, dtypes in lists.items() if dtype in dtypes]
    return {name for names in kept for name in names or ()}


def _stored_sha256(
    source: str, shards: Shards, tensors: Sequence[str], dtype: torch.dtype, shape: Sequence[int]
) -> str | None:
    """As tensor_sha256 of what `tensors` make, one behind the other; None of other numbers than
    floating point."""

    def blocks() -> Iterator[Tensor]:
        for tensor in tensors:
            with TensorFile(source, shards.files[tensor], shards) as opened:
                about = opened.header[tensor]
                start, end = (opened.begin + offset for offset in about["data_offsets"])
                for _, block in opened.blocks(start, end, DTYPES[about["dtype"]], 1):
                    yield block.to(dtype)

    try:
        return blocks_sha256(dtype, shape, blocks())
    except KeyError:
        return None


class TensorFile:
    """One safetensors file, read by offsets, so that nothing of it stays mapped."""

    def __init__(self, source: str, file: str, shards: Shards) -> None:
        path = shards.path_of(file)
        if not path:
            raise UserError(f"{source} has no {file}, which its {INDEX} names: fetch it again")
        self.file, self.path, self.size = file, path, path.stat().st_size
        self.handle = path.open("rb")
        try:
            length = int.from_bytes(self.handle.read(8), "little")
            self.begin = 8 + length
            if not length or self.begin > self.size:
                raise ValueError("its header is not whole")
            self.header: dict[str, Any] = json.loads(self.handle.read(length))
            if not isinstance(self.header, dict):
                raise ValueError("its header is no table")
            self.header.pop("__metadata__", None)
            self.order = sorted(self.header, key=lambda name: self.header[name]["data_offsets"])
            if self.begin + self.header[self.order[-1]]["data_offsets"][1] != self.size:
                raise ValueError("its size is not what its header says")
        except (ValueError, KeyError, IndexError, TypeError) as error:
            self.handle.close()
            raise UserError(
                f"{path} cannot be read ({error}): it is truncated or damaged, fetch it again"
            ) from error
        own = (tensor for tensor, of in shards.files.items() if of == file)
        if missing := [tensor for tensor in own if tensor not in self.header]:
            self.handle.close()
            raise UserError(f"{path} has no {missing[0]}, though {INDEX} says so: fetch both again")

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()

    def place(self, piece: Piece) -> tuple[int, int, str, int]:
        """Of a piece the first byte and the last in the file, the dtype and the width of its rows.

        Raises UserError when they are not floating point, or not as many as the shape says.
        """
        about = self.header[piece.tensor]
        if about["dtype"] not in DTYPES:
            raise UserError(
                f"{piece.tensor} of {self.path} is {about['dtype']}: an update can be merged only "
                f"into {', '.join(DTYPES)}; serve the plain LoRA instead"
            )
        start, end = (self.begin + offset for offset in about["data_offsets"])
        if end - start != math.prod(about["shape"]) * DTYPES[about["dtype"]].itemsize:
            raise UserError(f"{self.path}: {piece.tensor} is not as long as its shape says")
        if piece.expert is not None:
            size = (end - start) // about["shape"][0]
            start, end = start + piece.expert * size, start + (piece.expert + 1) * size
        return start, end, about["dtype"], about["shape"][-1]

    def blocks(
        self, start: int, end: int, dtype: torch.dtype, width: int, size: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The rows of a matrix `width` wide, some at a time: which, and their values."""
        row, first = width * dtype.itemsize, 0
        rows, step = (end - start) // row, max(1, (size or BLOCK) // width)
        while first < rows:
            last = min(first + step, rows)
            data = bytearray((last - first) * row)
            self.handle.seek(start + first * row)
            _fill(data, self.handle)
            yield slice(first, last), torch.frombuffer(data, dtype=dtype).view(-1, width)
            first = last

    def matrix(self, piece: Piece) -> Tensor:
        """The rows of W (out, in) that `piece` means, on the CPU."""
        start, end, kind, width = self.place(piece)
        ((_, weight),) = self.blocks(start, end, DTYPES[kind], width, end - start)
        return weight.T if piece.transposed else weight


def _fill(data: bytearray | memoryview, handle: BinaryIO) -> None:
    if handle.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise UserError(f"{handle.name} was cut short while it was read: merge again")


def _copy(old: BinaryIO, new: BinaryIO, first: int, last: int) -> None:
    old.seek(first)
    buffer = memoryview(bytearray(1 << 20))  # a fresh one each time costs more than the copy
    while first < last:
        part = buffer[: last - first]
        _fill(part, old)
        new.write(part)
        first += len(part)


def copy_others(source: str, folder: Path) -> None:
    """What of the base is no weight: configuration, tokenizer, licence, code that it came with."""
    base = Path(source)
    if not base.is_dir():
        try:
            base = Path(snapshot_download(source, ignore_patterns=[*LEFT_OUT, "*/*"]))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            raise UserError(f"the files of {source} cannot be fetched: {error}") from error
    for path in sorted(base.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in LEFT_OUT):
            shutil.copyfile(path, folder / path.name)
