"""What a run needs, from shapes alone: memory and operations of a step, time to decompose, disk.

A training step of the model with its adapter is gone through with fake tensors, which have a
shape, a dtype and a device and no values. Each tensor that would be made counts from there to
where it would be freed, and the products are counted, so that architecture, adapter, batch and
gradient checkpointing need no formula of their own. Not counted is what a library takes beside
its tensors: some hundred MB for a GPU's context. On a CPU the allocator adds what it keeps of what
was freed, where allocator.py cannot tell it not to.
"""

import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from milora.errors import UserError
from milora.svd import Component

KINDS = (
    "weights", "adapter", "anchor", "directions", "gradients", "optimizer", "activations", "logits",
)  # fmt: skip

# Seconds of a decomposition beside its factorisation, as fp64 operations of a matrix product per
# entry of the weight: fitted to benchmarks/results/svd-*.json (docs/speed.md has how well).
PER_ENTRY, PER_ENTRY_AND_RANK = 2300, 37
EIGENVECTORS = 10  # per m n², where all of them are found: other components than the smallest


class Step(NamedTuple):
    """A training step of one device."""

    memory: dict[str, int]  # bytes by kind at the moment of the largest sum
    operations: int  # of products, twice the multiplications, gradient checkpointing included

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def step(
    model: nn.Module, rows: int, tokens: int, vocabulary: int, *,
    accumulated: bool = False, autocast: torch.dtype | None = None, unfused: bool = False,
) -> Step:  # fmt: skip
    """Forward, backward and AdamW's state of `model` on the meta device, at `rows` x `tokens`.

    `vocabulary` tells logits from other tensors; `accumulated`: gradients are there from the
    start; `unfused`: attention keeps its probabilities (see `attention_unfused`). The model's
    tensors are fake ones afterwards. Raises UserError where the shapes depend on values.
    """
    live = _Live()
    with FakeTensorMode():
        _fake(model)
        parameters = list(model.named_parameters())
        trained = [p for _, p in parameters if p.requires_grad]
        for name, tensor in (*parameters, *model.named_buffers()):
            live.see(tensor, _kind(name))
        # Adam's two moments; gradients, where they are those of earlier batches of the same step.
        state = [torch.empty_like(p) for p in trained for _ in range(2)]
        for tensor in state:
            live.see(tensor, "optimizer")
        for parameter in trained if accumulated else ():
            parameter.grad = torch.empty_like(parameter)
            live.see(parameter.grad, "gradients")
        ids = torch.zeros(rows, tokens, dtype=torch.long, device="cpu")
        kernels = sdpa_kernel(SDPBackend.MATH) if unfused else nullcontext()
        try:
            with live, kernels:
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                del loss
        except Exception as error:
            raise UserError(
                f"the shapes of this model's step cannot be followed without its values "
                f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): use "
                "`milora train CONFIG --dry-run`, which measures a step"
            ) from error
        made = {live.serial(p.grad) for p in trained if p.grad is not None}
    memory = dict.fromkeys(KINDS, 0)
    for serial, size, shape, kind in live.at_peak:
        if not kind:
            logits = shape[-1:] == (vocabulary,)
            kind = "gradients" if serial in made else "logits" if logits else "activations"
        memory[kind] += size
    return Step(memory, live.operations)


def attention_unfused(model: nn.Module, device: str, autocast: torch.dtype | None) -> bool:
    """Whether a GPU computes this model's attention without a fused kernel.

    None of them takes fp32 where several heads share a key, and then the probabilities are kept
    for the backward, heads x tokens² of each row.
    """
    config: Any = model.config
    text = config.get_text_config()
    shared = getattr(text, "num_key_value_heads", None) not in (None, text.num_attention_heads)
    single = next(model.parameters()).dtype == torch.float32 and autocast is None
    return device == "cuda" and shared and single


class _Live(TorchDispatchMode):
    """Sums up the storages that exist, and remembers which did when the sum was largest.

    And the operations of products. (PyTorch's FlopCounterMode hangs hooks on every module, which
    keep alive what gradient checkpointing computes again.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[int, int, tuple[int, ...], str]] = {}
        self.count = self.now = self.peak = self.operations = 0
        self.at_peak: list[tuple[int, int, tuple[int, ...], str]] = []

    def see(self, tensor: Tensor, kind: str = "") -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.storages:
            return
        self.count += 1
        size = storage.nbytes()
        self.storages[storage._cdata] = (self.count, size, tuple(tensor.shape), kind)
        weakref.finalize(storage, self.forget, storage._cdata)
        self.now += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, list(self.storages.values())

    def forget(self, storage: int) -> None:
        self.now -= self.storages.pop(storage)[1]

    def serial(self, tensor: Tensor) -> int:
        return self.storages[tensor.untyped_storage()._cdata][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            formula = flop_registry[func._overloadpacket]
            self.operations += int(formula(*args, **(kwargs or {}), out_val=made))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return made


def _kind(name: str) -> str:
    if ".anchor." in name:
        return "anchor"
    beside = (".lora_", ".modules_to_save.", ".token_adapter.")  # PEFT's names
    return "adapter" if any(part in name for part in beside) else "weights"


def _fake(model: nn.Module) -> None:
    """Fake tensors in place of those of `model`; what was shared stays shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        tensors = (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        )
        for name, old in tensors:
            if id(old) not in made:
                new: Tensor = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                is_parameter = isinstance(old, nn.Parameter)
                made[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
            setattr(module, name, made[id(old)])


def gathered(model: nn.Module, classes: Sequence[str]) -> int:
    """Bytes of weights that each device of a sharded run has whole at a time.

    Two of the largest module of `classes`, the one that computes and the one that is fetched
    meanwhile, and from first to last what is in none of them: embedding, head, the last norm.
    """
    blocks = [module for module in model.modules() if type(module).__name__ in classes]
    inside = {id(t) for block in blocks for t in block.parameters()}
    largest = max((sum(t.nbytes for t in block.parameters()) for block in blocks), default=0)
    return 2 * largest + sum(t.nbytes for t in model.parameters() if id(t) not in inside)


def per_device(step: Step, trained: int, processes: int, sharded: bool, whole: int) -> Step:
    """`step` on each of `processes`, of which each has its own rows.

    Without `sharded` each has everything, and a second copy of the gradients to exchange. With it
    (FSDP, ZeRO-3) weights, adapter, gradients and optimizer state are shared out, and `whole` bytes
    of weights are whole at a time (see `gathered`); the anchor and the directions that are held,
    which are no parameters, are on each.
    """
    if processes == 1:
        return step
    memory = dict(step.memory)
    if not sharded:
        memory["gradients"] += trained
        return step._replace(memory=memory)
    for kind in ("weights", "adapter", "gradients", "optimizer"):
        memory[kind] = -(-memory[kind] // processes)
    memory["weights"] += whole
    return step._replace(memory=memory)


def product_rate(dtype: torch.dtype, device: str, shape: tuple[int, int, int]) -> float:
    """Operations per second of a matrix product (a, b) x (b, c) here: the best of some."""
    a, b, c = shape
    left = torch.randn(a, b, device=device).to(dtype)
    right = torch.randn(b, c, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * a * b * c / best


def decomposition_seconds(
    shape: tuple[int, ...], rank: int, component: Component, rates: Mapping[torch.dtype, float]
) -> float:
    """About how long `rank` components of a weight of `shape` take, at product rates by dtype.

    The smallest: the factorisation at the rate of a product, LU of a square weight in fp64 and
    half of AᵀA with Cholesky of a rectangular one in fp32, and the Krylov steps by entry and rank.
    """
    m, n = max(shape), min(shape)
    if component != "minor":
        return EIGENVECTORS * m * n**2 / rates[torch.float64]
    if m == n:
        factorised = 2 / 3 * n**3 / rates[torch.float64]
    else:
        factorised = (m * n**2 + n**3 / 3) / rates[torch.float32]
    return factorised + m * n * (PER_ENTRY + PER_ENTRY_AND_RANK * rank) / rates[torch.float64]


def disk(
    shapes: Mapping[str, tuple[tuple[int, ...], int]], trained: int, checkpoints: int, top: int,
    minor: bool,
) -> dict[str, int]:  # fmt: skip
    """Bytes by place of a run with an adapter: weights by name as (shape, rank), all factors fp32.

    `trained` is the number of trained parameters, `top` how many of the largest singular vectors
    are kept of each weight, and `minor` whether the directions of its initial factors are too.
    """
    ends = sum(sum(shape) for shape, _ in shapes.values())
    factors = sum(sum(shape) * rank for shape, rank in shapes.values())
    return {
        "decomposition store (kept for other runs)": 8 * (factors + ends * top),
        "init/": 4 * (factors * (2 if minor else 1) + ends * top),
        f"checkpoints/ ({checkpoints} at once)": checkpoints * 12 * trained + 4 * trained,
        "adapter/": 8 * factors,
    }
