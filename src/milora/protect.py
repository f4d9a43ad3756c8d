"""Hold the top of every weight's spectrum fixed: the update is kept out of it during training.

After each optimizer step

    B <- (I - U_k U_kᵀ) B        A <- A (I - V_k V_kᵀ)

with U_k, V_k the k largest singular vectors of W. A0 and B0 are orthogonal to them from the start,
so that U_kᵀ dW = 0 and dW V_k = 0 hold to rounding, and the top-k singular triplets of W + dW are
those of W (the projections are those of OPLoRA, arXiv 2510.13003, on the factors instead of on dW).
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from milora.adapter import COMPONENT, Factors, Start, module_seed, place
from milora.errors import UserError
from milora.files import write_bytes
from milora.fingerprints import check_base
from milora.matrices import PREVIOUS, TRAINED, Matrix
from milora.spectra import Interference, directions, interference, span
from milora.svd import Decompose, plain_arithmetic, positions
from milora.targeting import selects

FORMAT = "milora top singular vectors 2"
TINY = 1e-4  # of a factor: what is left of it is rounding
FIRST = 64  # triplets that are computed before it is known how many an energy takes
AT_ONCE = 2**24  # numbers, 64 MB of fp32, that are stacked for a product, whose result is as many

Energy = Mapping[str, float]  # {"energy": share of ||W||²}
Protect = int | Energy | Mapping[str, int | Energy]  # the last by pattern of module names
Tasks = Mapping[str, Any]  # {"tasks": "all", "weights": Protect}, what earlier tasks use too


class Top(NamedTuple):
    """The largest singular vectors of one weight."""

    U: Tensor  # (m, k) fp32, orthonormal columns
    Vh: Tensor  # (k, n) fp32, orthonormal rows
    energy: float  # share of ||W||² (Frobenius) of those protected, of all k where none is
    norm: float  # ||W||
    protected: int  # how many of the first are held, 0 to k
    limited: bool  # fewer than were asked for, since the initial factors lie there
    # U (m, r), Vh (r, n) fp32 of the minor subspace, from the factors before any is moved out of
    # what is held; None where these have no or not all of its directions, or it was not kept.
    minor: tuple[Tensor, Tensor] | None = None


def parts_of(protect: Protect | Tasks) -> tuple[Protect, bool]:
    """What is protected of the weights' own spectra, and whether what earlier tasks use is too."""
    if isinstance(protect, Mapping) and "tasks" in protect:
        return protect["weights"], True  # type: ignore[return-value]
    return protect, False


def check_protect(protect: Protect, method: str) -> None:
    """Raise UserError for a method whose update cannot be held."""
    if _nothing(protect):
        return
    if method == "full":
        raise UserError("milora.protect: full fine-tuning has no factors to hold: use an adapter")
    if method == "pissa":
        raise UserError(
            "milora.protect: pissa starts from the largest components, which protection leaves "
            "alone: use method milora or lora"
        )


def check_patterns(protect: Protect, names: Sequence[str]) -> None:
    """Raise UserError for a pattern that means none of `names`, the adapted weights."""
    for pattern in _patterns(protect):
        try:
            matched = any(selects(pattern, name) for name in names)
        except re.error as error:
            raise UserError(f"milora.protect: {pattern!r} is no pattern: {error}") from error
        if not matched:
            raise UserError(
                f"milora.protect: {pattern!r} matches none of the {len(names)} adapted weights, of "
                f"which one is {names[0]}"
            )


def _nothing(protect: Protect) -> bool:
    return protect == 0 or protect == {}


def _patterns(protect: Protect) -> list[str]:
    if isinstance(protect, int) or "energy" in protect:
        return []
    return list(protect)


def _asked(protect: Protect, name: str) -> int | Energy:
    if isinstance(protect, int) or "energy" in protect:
        return protect  # type: ignore[return-value]
    matching = (value for pattern, value in protect.items() if selects(pattern, name))
    return next(matching, 0)  # type: ignore[return-value]


def top_vectors(
    matrices: Mapping[str, Matrix],
    start: Start,
    protect: Protect,
    watched: int,
    seed: int,
    decompose: Decompose,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Top]:
    """The top singular vectors of every adapted weight, to protect and to watch.

    `matrices` as adapted_matrices gives them; `start` as it was made, nothing moved. At
    least `watched` vectors are taken, or all that the weight has. Raises UserError as
    check_patterns does.
    """
    check_patterns(protect, list(matrices))
    found = {}
    for done, (name, matrix) in enumerate(matrices.items()):
        progress(name, done, len(matrices))
        rank = matrix.rank(TRAINED)
        top = top_of(
            name, matrix.effective, matrix.parts, rank, start.method, protect, watched, seed,
            decompose,
        )  # fmt: skip
        if top is not None:
            found[name] = top._replace(minor=_minor(start, name))
    return found


def _minor(start: Start, name: str) -> tuple[Tensor, Tensor] | None:
    A0, B0 = start.factors[name]
    if start.method != "milora" or not B0.any(0).all():  # a column of zeros spans nothing
        return None
    U, Vh = directions(A0, B0)
    return U.float().contiguous(), Vh.float().contiguous()


def top_of(
    name: str,
    weight: Tensor,
    parts: Sequence[Tensor],
    rank: int,
    method: str,
    protect: Protect,
    watched: int,
    seed: int,
    decompose: Decompose,
) -> Top | None:
    """Of one weight; None where there is nothing to protect or to watch."""
    drawn = module_seed(seed, name)
    # Of a weight of several parts the initial factors lie anywhere: they are moved out of the way.
    room = _room("lora" if parts else method, min(weight.shape), rank, drawn)
    asked = _asked(protect, name)
    norm = float(torch.linalg.norm(weight.double()))
    if isinstance(asked, int):
        held, limited = min(asked, room), asked > room
    else:
        held, limited = _for_energy(weight, asked["energy"], norm, room, drawn, decompose)
    count = max(held, min(watched, min(weight.shape)))
    if count == 0:
        return None
    top = decompose(weight, count, "principal", drawn)
    energy = float(top.S[: held or count].square().sum()) / norm**2 if norm else 0.0
    U, Vh = top.U.float().contiguous(), top.Vh.float().contiguous()
    return Top(U, Vh, energy, norm, held, limited)


def _room(method: str, count: int, rank: int, seed: int) -> int:
    """How many of the largest of `count` triplets the initial factors leave alone."""
    if method == "lora":  # starts anywhere; r directions must be left for it
        return count - rank
    return int(positions(COMPONENT[method], count, rank, seed)[0])


def _for_energy(
    weight: Tensor, share: float, norm: float, room: int, seed: int, decompose: Decompose
) -> tuple[int, bool]:
    """The least k whose triplets hold `share` of ||W||², and whether there is no room for it."""
    count = min(FIRST, room)
    while count:
        S = decompose(weight, count, "principal", seed).S
        reached = (S.square().cumsum(0) >= share * norm**2).nonzero()
        if len(reached):
            return int(reached[0]) + 1, False
        if count == room:
            break
        count = min(2 * count, room)
    return room, True


class Held(NamedTuple):
    """What one update is kept out of."""

    U: Tensor  # (m, k) fp32, orthonormal columns: out of B
    Vh: Tensor  # (k', n) fp32, orthonormal rows: out of A


def held(
    matrices: Mapping[str, Matrix],
    tops: Mapping[str, Top],
    inputs: Mapping[str, Tensor],
    used: Mapping[str, Held] = MappingProxyType({}),
) -> dict[str, Held]:
    """By module: the protected singular vectors, the directions (k, n) of its inputs, if any, and
    what earlier tasks use of it.

    Raises UserError where fewer inputs or outputs are left than the adapter's rank.
    """
    found = {}
    for name, matrix in matrices.items():
        A, B = matrix.factors(TRAINED)
        U, Vh = B.new_zeros(len(B), 0), A.new_zeros(0, A.shape[1])
        if name in tops:
            top = tops[name]
            U, Vh = top.U[:, : top.protected], top.Vh[: top.protected]
        if name in inputs:
            Vh = _joint(Vh, inputs[name])
        if name in used:
            U, Vh = _joint(U.T, used[name].U.T).T, _joint(Vh, used[name].Vh)
        if name in inputs or name in used:
            _check_left(name, len(A), Held(U, Vh), tasks=name in used)
        if len(Vh):
            found[name] = Held(U, Vh)
    return found


def _check_left(name: str, rank: int, own: Held, tasks: bool) -> None:
    for what, vectors in (("inputs", own.Vh), ("outputs", own.U.mT)):
        count, size = vectors.shape
        if size - count < rank:
            further = ", or continue.rank of the run that this one continues" * tasks
            raise UserError(
                f"milora.protect and protect_inputs hold {count} of the {size} {what} of {name}, "
                f"whose adapter has rank {rank}: lower one of them{further}"
            )


def check_room(matrices: Mapping[str, Matrix], previous: Mapping[str, Factors]) -> None:
    """Raise UserError where `previous`, which `{tasks: all}` holds, leaves less of a weight than
    the rank of its adapter. `matrices` may be on the meta device.
    """
    for name, matrix in matrices.items():
        if name in previous:
            _check_left(name, matrix.rank(TRAINED), Held(*span(*previous[name])), tasks=True)


def _joint(one: Tensor, other: Tensor) -> Tensor:
    """Orthonormal rows (k, n), fp32, of all that both have; what both have counts once."""
    both = torch.cat([one, other.to(one)]).double()
    _, S, basis = torch.linalg.svd(both, full_matrices=False)
    kept: Tensor = basis[S > 1e-6].float()
    return kept


def used_by_tasks(matrices: Mapping[str, Matrix]) -> dict[str, Held]:
    """By module all that the update of the earlier runs reads and writes."""
    found = {}
    for name, matrix in matrices.items():
        if PREVIOUS in matrix.layer.lora_A:
            U, Vh = span(*matrix.factors(PREVIOUS))
            if len(Vh):
                found[name] = Held(U.float(), Vh.float())
    return found


@torch.no_grad()
def moved(
    start: Start,
    matrices: Mapping[str, Matrix],
    holds: Mapping[str, Held],
    tops: Mapping[str, Top],
) -> dict[str, Factors]:
    """The initial factors that do not lie outside of what is held, put there, by module.

    Those of a weight that is several matrices (`Matrix.parts`), whose own largest singular vectors
    are not orthogonal to the smallest of its parts, and where more is held than those of `tops`.
    A pair of which nothing is left outside could not learn: it gets B = 0 and for A a direction
    drawn outside of what is held, of the length that it had.
    """
    found = {}
    for name, hold in holds.items():
        own = tops[name].protected if name in tops else 0
        if start.method != "lora" and (matrices[name].parts or len(hold.Vh) > own):
            A0, B0 = (x.double() for x in start.factors[name])
            U, Vh = (x.cpu().double() for x in hold)
            A, B = A0 - A0 @ Vh.T @ Vh, B0 - U @ (U.T @ B0)
            length = A0.norm(dim=1)
            dead = (A.norm(dim=1) <= TINY * length) & (B.norm(dim=0) <= TINY * B0.norm(dim=0))
            if dead.any():
                generator = torch.Generator().manual_seed(module_seed(0, name))
                drawn = torch.randn(int(dead.sum()), A.shape[1], generator=generator).to(A)
                drawn = drawn - drawn @ Vh.T @ Vh
                A[dead] = drawn * (length[dead] / drawn.norm(dim=1))[:, None]
                B[:, dead] = 0.0
            found[name] = Factors(A.float(), B.float())
    return found


def begin_outside(
    start: Start,
    matrices: Mapping[str, Matrix],
    holds: Mapping[str, Held],
    tops: Mapping[str, Top] = MappingProxyType({}),
) -> None:
    """Before the first step: what trains, and the anchor with it, moved out of what is held."""
    if start.method == "lora":  # its A starts anywhere, and B at 0: step 0 stays the base
        project(matrices, holds)
    elif outside := moved(start, matrices, holds, tops):
        start.factors.update(outside)
        place(matrices, start)


@torch.no_grad()
def project(matrices: Mapping[str, Matrix], holds: Mapping[str, Held]) -> dict[str, Held]:
    """B <- B - U Uᵀ B and A <- A - A V Vᵀ, in place, on the adapter of every weight held.

    Returns `holds` where the factors are now, so that the next step need not fetch them. Factors of
    one shape are in one product: one by one they are so small that a GPU mostly waits.
    """
    here = {}
    alike: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for name, hold in holds.items():
        A, B = matrices[name].factors(TRAINED)
        U, Vh = here[name] = Held(hold.U.to(B), hold.Vh.to(A))
        for rows, out in (A, Vh), (B.T, U.T):
            if len(out):
                key = rows.shape, out.shape, rows.dtype, rows.device
                alike.setdefault(key, []).append((rows, out))
    for pairs in alike.values():
        count = max(1, AT_ONCE // sum(one.numel() for one in pairs[0]))
        with plain_arithmetic(pairs[0][0].device):
            for some in (pairs[i : i + count] for i in range(0, len(pairs), count)):
                X, V = map(torch.stack, zip(*some, strict=True))
                left = torch.baddbmm(X, X @ V.mT, V, alpha=-1)
                for (rows, _), new in zip(some, left, strict=True):
                    rows.copy_(new)
    return here


@torch.no_grad()
def measure(
    matrices: Mapping[str, Matrix], start: Start, tops: Mapping[str, Top]
) -> dict[str, Interference]:
    """The interference of the adapter as it is now, by module."""
    found = {}
    for name, top in tops.items():
        A, B = matrices[name].factors(TRAINED)
        s = start.scaling[name]
        P, Q = s * B.double(), A.double()
        if start.method != "lora":
            A0, B0 = (x.to(A.device) for x in start.factors[name])
            P, Q = torch.cat([P, -s * B0.double()], 1), torch.cat([Q, A0.double()])
        minor = None
        if top.minor is not None:
            minor = top.minor[0].to(A.device), top.minor[1].to(A.device)
        found[name] = interference(P, Q, top.U.to(A.device), top.Vh.to(A.device), top.norm, minor)
    return found


def worst(found: Mapping[str, Interference]) -> dict[str, Any]:
    """Over all modules: the largest and the mean of the larger side, where, and the mean size."""
    sides = {name: max(one.left, one.right) for name, one in found.items()}
    module = max(sides, key=lambda name: (math.isnan(sides[name]), sides[name]))
    return {
        "max": sides[module],
        "module": module,
        "mean": sum(sides.values()) / len(sides),
        "size": sum(one.size for one in found.values()) / len(found),
    }


def save_tops(
    path: Path, tops: Mapping[str, Top], inputs: Mapping[str, Tensor], sha256: Mapping[str, str]
) -> None:
    """One safetensors file, bound to the base by the hashes of its weights."""
    tensors = {f"{name}.inputs": Vh.cpu() for name, Vh in inputs.items()}
    for name, top in tops.items():
        tensors[f"{name}.top_U"], tensors[f"{name}.top_Vh"] = top.U.cpu(), top.Vh.cpu()
        if top.minor is not None:
            tensors[f"{name}.minor_U"], tensors[f"{name}.minor_Vh"] = (x.cpu() for x in top.minor)
    numbers = {n: [t.energy, t.norm, t.protected, t.limited] for n, t in tops.items()}
    about = {"format": FORMAT, "numbers": numbers, "sha256": {n: sha256[n] for n in tops}}
    write_bytes(path, save(tensors, {"milora": json.dumps(about)}))


def load_tops(path: Path, sha256: Mapping[str, str]) -> tuple[dict[str, Top], dict[str, Tensor]]:
    """What `save_tops` wrote. Raises UserError when it is of another base or damaged."""
    try:
        with safe_open(path, framework="pt") as handle:
            about = json.loads((handle.metadata() or {}).get("milora", "{}"))
            if about.get("format") != FORMAT:
                raise ValueError(f"it is not {FORMAT}")
            stored, get = dict.fromkeys(handle.keys()), handle.get_tensor
            tops = {
                name: Top(get(f"{name}.top_U"), get(f"{name}.top_Vh"), *numbers)
                for name, numbers in about["numbers"].items()
            }
            for name in [name for name in tops if f"{name}.minor_U" in stored]:
                minor = get(f"{name}.minor_U"), get(f"{name}.minor_Vh")
                tops[name] = tops[name]._replace(minor=minor)
            inputs = {
                key.removesuffix(".inputs"): get(key) for key in stored if key.endswith(".inputs")
            }
    except Exception as error:  # safetensors raises its own types, not exported under one base
        raise UserError(f"{path} cannot be read ({error}): start the run anew") from error
    check_base(about["sha256"], {name: sha256[name] for name in tops if name in sha256})
    return tops, inputs
