"""The fused layer is two LoRA layers: same output, same gradients, and exact where they cancel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import KINDS, TARGETS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from milora import adapter, targeting
from milora.anchored import Stacked, anchored, product_dtype, stacked
from milora.anchored_layers import AHEAD
from milora.errors import UserError
from milora.matrices import TRAINED, adapted_matrices

Load = Callable[..., PreTrainedModel]


def drawn(seed: int, m: int, n: int, r: int, *lead: int) -> dict[str, Tensor]:
    """A layer's output, input and factors in fp64; A, B have moved away from A0, B0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A0, B0 = normal(r, n), normal(m, r)
    leaves = {
        "result": normal(*lead, m), "x": normal(*lead, n),
        "A": A0 + 0.1 * normal(r, n), "B": B0 + 0.1 * normal(m, r),
    }  # fmt: skip
    return {k: v.requires_grad_() for k, v in leaves.items()} | {"A0": A0, "minus_B0": -B0}


def apart(
    result: Tensor, x: Tensor, A: Tensor, B: Tensor, A0: Tensor, minus_B0: Tensor, s: float,
    dropped: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Two LoRAs, one after the other."""
    inner = x if dropped is None else dropped
    return result + s * (inner @ A.T @ B.T) + s * (x @ A0.T @ minus_B0.T)


def as_one(
    result: Tensor, x: Tensor, A: Tensor, B: Tensor, A0: Tensor, minus_B0: Tensor,
    scaling: float = 1.0, dropout: float = 0.0, by_hand: bool = False,
) -> Tensor:  # fmt: skip
    dtype = product_dtype(x.dtype, A.dtype, "cpu")
    by = stacked(A, B, A0, minus_B0, scaling, dropout > 0, dtype)
    if by_hand:
        by = Stacked(by.tall.detach(), by.wide.detach(), trained=(A, B, scaling))
    return anchored(result, x, by, dropout)


@pytest.fixture(params=["by hand", "by autograd"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of taking the gradients: that of a CPU, and that of a GPU."""
    if request.param == "by autograd":
        monkeypatch.setattr("milora.anchored.BY_HAND", ())


def gradients(out: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return list(torch.autograd.grad((out * weight).sum(), [given[k] for k in ("x", "A", "B")]))


@pytest.mark.parametrize("by_hand", [False, True])
def test_what_it_gives_may_be_written_into(by_hand: bool) -> None:
    """Falcon adds the attention's output to the MLP's in place."""
    given = drawn(0, 6, 5, 2, 2, 3)
    out = as_one(**given, scaling=1.0, by_hand=by_hand)
    out += 1
    theirs = apart(**given, s=1.0) + 1
    for a, b in zip(gradients(out, given), gradients(theirs, given), strict=True):
        torch.testing.assert_close(a, b)


shapes = st.tuples(*(st.integers(1, 9) for _ in range(2)), st.integers(1, 5))


@given(
    shapes, st.lists(st.integers(1, 4), max_size=3), st.floats(0.1, 4), st.integers(0, 99),
    st.booleans(),
)  # fmt: skip
def test_as_two_adapters(
    shape: tuple[int, int, int], lead: list[int], s: float, seed: int, by_hand: bool
) -> None:
    given = drawn(seed, *shape, *lead)
    ours, theirs = as_one(**given, scaling=s, by_hand=by_hand), apart(**given, s=s)
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)
    for a, b in zip(gradients(ours, given), gradients(theirs, given), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@given(shapes, st.floats(0.1, 0.9), st.integers(0, 99))
def test_as_two_adapters_with_dropout(shape: tuple[int, int, int], p: float, seed: int) -> None:
    given = drawn(seed, *shape, 3, 4)
    torch.manual_seed(seed)
    ours = as_one(**given, scaling=0.7, dropout=p)
    torch.manual_seed(seed)
    mask = F.dropout(torch.ones(12, shape[1], dtype=torch.float64), p)
    theirs = apart(**given, s=0.7, dropped=given["x"] * mask.view(3, 4, -1))
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)
    for a, b in zip(gradients(ours, given), gradients(theirs, given), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_at_all_at_step_0(
    base: torch.dtype, factors: torch.dtype, cast: torch.dtype | None
) -> None:
    given = {k: v.detach().to(factors) for k, v in drawn(0, 48, 80, 24, 33).items()}
    given |= {"A": given["A0"], "B": -given["minus_B0"]}
    given |= {k: given[k].to(base) for k in ("result", "x")}
    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None):
        out = as_one(**given, scaling=1.3)
    assert torch.equal(out, given["result"])
    assert out.dtype == base


@given(st.floats(1e-6, 0.5), st.sampled_from([0.0, 0.3, None]), st.integers(0, 99))
def test_on_16_bits_the_update_is_rounded_as_a_share_of_itself(
    moved: float, dropout: float | None, seed: int
) -> None:
    """However near A and B still are to A0 and B0."""
    given = drawn(seed, 32, 48, 4, 25)
    with torch.no_grad():
        given["result"].zero_()
        given["x"].copy_(given["x"].bfloat16())
        for name, start in (("A", given["A0"]), ("B", -given["minus_B0"])):
            given[name].copy_((start + 10 * moved * (given[name] - start)).float())
    single = {k: v.detach().float().requires_grad_(v.requires_grad) for k, v in given.items()}
    single["x"] = single["x"].detach().bfloat16().requires_grad_()
    exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in single.items()}
    cotangent = torch.randn(25, 32, generator=torch.Generator().manual_seed(seed))
    found = []
    for one in (single, exact):
        torch.manual_seed(seed)
        out = as_one(**one, scaling=0.7, dropout=dropout or 0.0, by_hand=dropout is None)
        loss = (out * cotangent.to(out)).sum()
        found.append([out, *torch.autograd.grad(loss, [one[k] for k in ("x", "A", "B")])])
    for ours, wanted in zip(*found, strict=True):
        assert (ours - wanted).norm() <= 2**-5 * wanted.norm()


@pytest.mark.parametrize(("dropout", "by_hand"), [(0.0, False), (0.0, True), (0.5, False)])
def test_what_is_kept_for_the_backward(dropout: float, by_hand: bool) -> None:
    """[A; A - A0] x and the stacks, beside x, which is there anyway; or D x and D as well.

    A, which is there anyway too, is no stack then, and -A0 is. On a GPU D takes a byte each.
    """
    given = drawn(0, 40, 30, 2, 50)
    kept: dict[int, int] = {}
    known = {t.untyped_storage().data_ptr() for t in given.values()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = as_one(**given, dropout=dropout, by_hand=by_hand)
    assert out.requires_grad
    stacked = (50 + 40 + 30) * 2 * 2 * 8
    dropped = 50 * 30 * 2 * 8 - 30 * 2 * 8
    assert sum(kept.values()) == stacked + (dropped if dropout else 0)


def losses(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return loss.detach(), found


def moved(load: Load, kind: str, **further: Any) -> Any:
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[kind], **further}
    model, _ = adapter.add_adapter(
        load(kind, torch.float64), targeting.lora_config(options), "milora"
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def test_the_gradients_are_those_of_autograd_too(
    load: Load, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moved(load, "llama").train()
    by_hand = losses(model, batch)
    monkeypatch.setattr("milora.anchored.BY_HAND", ())
    torch.testing.assert_close(losses(model, batch), by_hand, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "options"),
    # k_proj and v_proj are of one shape, and stacked together where they have one scale.
    [*((kind, {}) for kind in KINDS), ("llama", {"alpha_pattern": {"v_proj": 9}})],
)
def test_a_model_trains_as_with_two_adapters_of_peft(
    kind: str, options: dict[str, Any], load: Load, batch: dict[str, Tensor]
) -> None:
    model = moved(load, kind, **options)
    ours = losses(model, batch)
    for matrix in adapted_matrices(model).values():
        del matrix.layer.forward
    torch.testing.assert_close(ours, losses(model, batch), atol=1e-10, rtol=1e-9)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_stacks_made_ahead_are_those_that_each_layer_makes(
    dropout: float, load: Load, batch: dict[str, Tensor]
) -> None:
    """Anew in every forward; a call of the model within, past the tuner, has each make its own."""
    model = moved(load, "llama", lora_dropout=dropout).train()
    layers = [matrix.layer for matrix in adapted_matrices(model).values()]
    seen: list[bool] = []
    for layer in layers:
        layer.base_layer.register_forward_hook(lambda *_, of=layer: seen.append(AHEAD in vars(of)))
    for _ in range(2):
        found = []
        for ahead, run in ((True, model), (False, model.base_model.model)):
            torch.manual_seed(0)
            seen.clear()
            loss, gradients = losses(run, batch)
            found.append((loss, list(gradients.values())))
            assert seen == [ahead] * len(layers)
            assert not any(AHEAD in vars(layer) for layer in layers)
        torch.testing.assert_close(*found, rtol=0, atol=0)
        with torch.no_grad():
            for layer in layers:
                layer.lora_A[TRAINED].weight.data.mul_(1.5)  # which bumps no version


def test_a_forward_that_fails_leaves_no_stacks_behind(load: Load, batch: dict[str, Tensor]) -> None:
    """They would be taken for the factors of the next one."""
    model = moved(load, "llama").train()
    layers = [matrix.layer for matrix in adapted_matrices(model).values()]
    layers[-1].base_layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    assert not any(AHEAD in vars(layer) for layer in layers)


def test_merged_by_peft_the_anchor_is_not_added_twice(load: Load, batch: dict[str, Tensor]) -> None:
    model = moved(load, "llama").eval()
    with torch.no_grad():
        wanted = model(**batch).logits
        model.merge_adapter([TRAINED, adapter.ANCHOR])
        torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-10, rtol=1e-9)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(reentrant: bool, load: Load, batch: dict[str, Tensor]) -> None:
    model = moved(load, "llama").train()
    plain = losses(model, batch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(losses(model, batch), plain, atol=1e-12, rtol=1e-12)


@pytest.mark.slow
def test_compiled(load: Load, batch: dict[str, Tensor]) -> None:
    model = moved(load, "llama")
    plain = losses(model, batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss, found = losses(compiled, batch)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    torch.testing.assert_close((loss, found), plain, atol=1e-10, rtol=1e-9)


def test_two_trained_adapters_at_once_are_refused(load: Load, batch: dict[str, Tensor]) -> None:
    model = moved(load, "llama")
    model.add_adapter("other", targeting.lora_config({"r": 4, "target_modules": TARGETS["llama"]}))
    model.base_model.set_adapter([adapter.TRAINED, "other", adapter.ANCHOR])
    with pytest.raises(UserError, match="default, other are active at once"):
        model(**batch)
