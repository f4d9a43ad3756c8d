"""Invariants 1, 2 and 4 on tiny models, and that the anchor is the paper's method."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, TARGETS
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from milora import adapter, costs, fingerprints, targeting
from milora.adapter import ANCHOR, TRAINED, initial_factors
from milora.errors import UserError
from milora.logits import base_only, step0_bound, step0_difference
from milora.matrices import adapted_matrices
from milora.svd import minor_components

METHODS = ("milora", "pissa", "middle", "random", "lora")
Load = Callable[..., PreTrainedModel]


def config(kind: str, **options: Any) -> LoraConfig:
    return targeting.lora_config(
        {"r": 4, "lora_alpha": 4, "target_modules": TARGETS[kind]} | options
    )


def perturb(model: nn.Module, seed: int = 0) -> None:
    """Move the trainable tensors, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_step_0_is_the_base(
    kind: str, dtype: torch.dtype, method: str, load: Load, batch: dict[str, torch.Tensor]
) -> None:
    model, _ = adapter.add_adapter(load(kind, dtype), config(kind), method)
    difference = step0_difference(model, batch)
    assert difference <= step0_bound(dtype)
    perturb(model)
    assert step0_difference(model, batch) > 1e-4  # the figure can fail


def test_step_0_is_checked_in_the_memory_of_one_row(load: Load) -> None:
    """And a NaN in any row is found."""
    model, _ = adapter.add_adapter(load("llama"), config("llama"), "milora")
    peaks = []
    for rows in (1, 8):
        ids = torch.randint(0, 250, (rows, 32))
        live = costs._Live()
        with live:
            step0_difference(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        peaks.append(live.peak)
    assert peaks[1] < 1.2 * peaks[0]
    ids = torch.tensor([[1, 2], [3, 4], [1, 2]])
    with torch.no_grad():
        model.get_input_embeddings().weight[4] = torch.nan
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert math.isnan(step0_difference(model, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_untouched_and_comes_back_bitwise(
    kind: str, dtype: torch.dtype, load: Load, batch: dict[str, torch.Tensor]
) -> None:
    plain = load(kind, dtype)
    with torch.no_grad():
        logits = plain(**batch).logits
    before = fingerprints.base_sha256(plain)
    model, _ = adapter.add_adapter(plain, config(kind), "milora")
    perturb(model)
    assert fingerprints.base_sha256(model) == before
    with base_only(model), torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)
    assert fingerprints.base_sha256(model.unload()) == before


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_starts_exactly_at_the_base(
    kind: str, method: str, load: Load, batch: dict[str, torch.Tensor]
) -> None:
    model, _ = adapter.add_adapter(load(kind), config(kind), method)
    with torch.autocast("cpu", torch.bfloat16):
        assert step0_difference(model, batch) == 0


def test_a_copy_of_the_model_is_a_model_of_its_own(
    load: Load, batch: dict[str, torch.Tensor]
) -> None:
    model, _ = adapter.add_adapter(load("llama"), config("llama"), "milora")
    other = copy.deepcopy(model)
    perturb(other)
    assert step0_difference(other, batch) > 1e-4
    assert step0_difference(model, batch) <= 1e-5


def test_the_bare_pair_cannot_be_saved_by_mistake(load: Load, tmp_path: Path) -> None:
    model, _ = adapter.add_adapter(load("llama"), config("llama"), "milora")
    with pytest.raises(UserError, match="without the anchor"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_sees_one_changed_bit(load: Load) -> None:
    model = load("llama")
    before = fingerprints.base_sha256(model)
    with torch.no_grad():
        model.model.norm.weight.view(torch.int32)[3] ^= 1
    assert fingerprints.base_sha256(model) != before


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_and_b_train_also_after_switching_the_adapter_off(kind: str, load: Load) -> None:
    model, _ = adapter.add_adapter(load(kind), config(kind), "milora")

    def trainable() -> set[str]:
        return {n for n, p in model.named_parameters() if p.requires_grad}

    first = trainable()
    assert first
    assert all(f".{TRAINED}." in name for name in first)
    with base_only(model):
        pass
    assert trainable() == first
    with pytest.raises(KeyError), base_only(model):
        raise KeyError
    assert trainable() == first
    with model.disable_adapter(), base_only(model):
        pass
    assert trainable() == first
    model.base_model.disable_adapter_layers()
    with base_only(model):
        pass
    assert model.get_model_status().enabled is False


@pytest.mark.parametrize("alpha", [4, 8, 3])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_initial_factors_are_the_minor_component(
    alpha: int, use_rslora: bool, load: Load
) -> None:
    options = {"lora_alpha": alpha, "use_rslora": use_rslora}
    model, start = adapter.add_adapter(load("qwen2"), config("qwen2", **options), "milora")
    for name, layer in adapted_matrices(model).items():
        W = layer.weight.double()
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        minor = (U[:, -4:] * S[-4:]) @ Vh[-4:]
        A, B = start.factors[name]
        s = start.scaling[name]
        assert s == pytest.approx(alpha / (2 if use_rslora else 4))
        torch.testing.assert_close(s * B.double() @ A.double(), minor, atol=1e-6, rtol=0)
        # Orthogonal to the principal part of W at step 0 (paper, section 3).
        assert (U[:, :4].T @ B.double()).abs().max() < 1e-6
        assert (A.double() @ Vh[:4].T).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["milora", "pissa"])
def test_decay_is_towards_the_start(method: str, load: Load) -> None:
    model, start = adapter.add_adapter(load("llama"), config("llama"), method)
    matrices = adapted_matrices(model)
    adapter.decay(matrices, 0.3)
    for name, factors in adapter.trained_factors(model).items():
        assert all(torch.equal(*pair) for pair in zip(factors, start.factors[name], strict=True))
    perturb(model)
    before = adapter.trained_factors(model)
    adapter.decay(matrices, 0.25)
    for name, factors in adapter.trained_factors(model).items():
        for now, then, begun in zip(factors, before[name], start.factors[name], strict=True):
            torch.testing.assert_close(now - begun, 0.75 * (then - begun), atol=1e-7, rtol=0)


def test_ranks_and_alphas_by_pattern(load: Load, batch: dict[str, torch.Tensor]) -> None:
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 9}}
    model, start = adapter.add_adapter(load("llama"), config("llama", **patterns), "milora")
    assert start.factors["model.layers.0.self_attn.q_proj"].A.shape == (2, 32)
    assert start.scaling["model.layers.1.mlp.up_proj"] == 9 / 4
    assert step0_difference(model, batch) <= 1e-5


def test_pissa_takes_out_what_peft_takes_out(load: Load) -> None:
    ours, start = adapter.add_adapter(load("llama"), config("llama", lora_alpha=8), "pissa")
    theirs = get_peft_model(
        load("llama"),
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["llama"], init_lora_weights="pissa"),
    )
    residual = {n: x.weight for n, x in adapted_matrices(theirs).items()}
    for name, layer in adapted_matrices(ours).items():
        A, B = start.factors[name]
        taken = layer.weight - residual[name]
        torch.testing.assert_close(start.scaling[name] * B @ A, taken, atol=1e-6, rtol=1e-5)


class Rewritten(nn.Module):
    """The paper's construction: W - s B0 A0 in place of W, and a LoRA that starts at A0, B0."""

    def __init__(self, base: nn.Module, A: torch.Tensor, B: torch.Tensor, s: float) -> None:
        super().__init__()
        self.base, self.s = base, s
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        delta = s * B @ A
        with torch.no_grad():
            base.weight -= delta.T if isinstance(base, Conv1D) else delta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.s * (x @ self.A.T @ self.B.T)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_equal_the_rewritten_base(
    kind: str, load: Load, batch: dict[str, torch.Tensor]
) -> None:
    options = {"lora_alpha": 6}
    anchored, start = adapter.add_adapter(load(kind), config(kind, **options), "milora")
    rewritten = load(kind)
    pairs = {}
    for name, (A, B) in start.factors.items():
        module = rewritten.get_submodule(name)
        pairs[name] = Rewritten(module, A, B, start.scaling[name])
        rewritten.set_submodule(name, pairs[name])
    for model in (anchored, rewritten):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
        model.eval()  # GPT-2 has dropout, which would draw differently
        for _ in range(20):
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = 0.0
    for name, (A, B) in adapter.trained_factors(anchored).items():
        A0, B0 = start.factors[name]
        s = start.scaling[name]
        ours = s * (B @ A - B0 @ A0)
        paper = s * (pairs[name].B @ pairs[name].A - B0 @ A0).detach()
        torch.testing.assert_close(ours, paper, atol=1e-5, rtol=1e-4)
        moved = max(moved, float(ours.abs().max()))
    assert moved > 1e-3


def test_a_zero_singular_value_gives_no_dead_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(12, 8, generator=generator)
    W[:, 5] = W[:, 2]  # two equal columns: rank 7
    found = minor_components(W, 3)
    assert found.zero.tolist() == [False, False, True]
    A, B = initial_factors(found, 2.0)
    torch.testing.assert_close(
        2 * B @ A, ((found.U * found.S) @ found.Vh).float(), atol=1e-6, rtol=0
    )
    assert B[:, 2].abs().max() == 0
    assert A[2].norm() > 0.1 * A[1].norm()  # B gets a gradient through it


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_zero_weight_can_be_adapted(scale: float) -> None:
    A, B = initial_factors(minor_components(torch.zeros(6, 5) * scale, 2), 1.0)
    assert torch.isfinite(A).all()
    assert A.norm() > 0
    assert B.abs().max() == 0


def refused(model: PreTrainedModel, options: dict[str, Any], method: str = "milora") -> str:
    with pytest.raises(UserError) as caught:
        adapter.add_adapter(model, targeting.lora_config(options), method)
    return str(caught.value)


def test_targets_that_match_nothing_or_only_part(load: Load) -> None:
    said = refused(load("llama"), {"r": 2, "target_modules": ["q_proj", "k_prj"]})
    assert "'k_prj' matches no module" in said
    assert "did you mean k_proj?" in said
    assert "up_proj" in said
    said = refused(load("gpt2"), {"r": 2, "target_modules": ["query"]})
    assert "c_attn" in said
    said = refused(load("llama"), {"r": 2, "target_modules": ".*nothing"})
    assert "lora.target_modules" in said


def test_patterns_and_layers_that_select_nothing(load: Load) -> None:
    def said(**options: Any) -> str:
        return refused(load("llama"), {"r": 2, "target_modules": ["q_proj"]} | options)

    assert "lora.rank_pattern: 'k_proj' matches none" in said(rank_pattern={"k_proj": 2})
    assert "lora.alpha_pattern: 'proj' matches none" in said(alpha_pattern={"proj": 2})
    assert "no adapted weight is in layer 2" in said(layers_to_transform=[1, 2])


def test_an_embedding_or_a_tied_head_is_refused(load: Load) -> None:
    said = refused(load("llama"), {"r": 2, "target_modules": ["embed_tokens"]})
    assert "model.embed_tokens, of class Embedding; only linear layers" in said
    said = refused(load("tied"), {"r": 2, "target_modules": ["q_proj", "lm_head"]})
    assert "lm_head shares its weight with the input embedding" in said
    adapter.add_adapter(load("llama"), config("llama", target_modules=["lm_head"]), "milora")


def test_all_linear_leaves_the_head_alone(load: Load, batch: dict[str, torch.Tensor]) -> None:
    for kind in KINDS:
        all_linear = config(kind, target_modules="all-linear")
        model, _ = adapter.add_adapter(load(kind), all_linear, "milora")
        names = adapted_matrices(model)
        assert not any("lm_head" in name for name in names)
        assert len(names) == (8 if kind == "gpt2" else 14)
        assert step0_difference(model, batch) <= 1e-5


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [
        ("lora_dropout", "a", "a number of at least 0 and below 1"),
        ("lora_dropout", -0.1, "a number of at least 0 and below 1"),
        ("lora_alpha", True, "a number above 0"),
        ("use_rslora", "false", "true or false"),
        ("target_modules", 5, "a list of names, or a pattern,"),
        ("exclude_modules", 3, "a list of names, or a pattern,"),
        ("layers_to_transform", "0", "the number of a layer, or a list of them,"),
        ("layers_to_transform", [0, "1"], "the number of a layer, or a list of them,"),
        ("rank_pattern", ["q_proj"], "a number by pattern, {q_proj: 8},"),
        ("modules_to_save", "lm_head", "a list of names"),
    ],
)
def test_options_of_a_wrong_type_are_named(key: str, value: Any, needed: str) -> None:
    options = {"r": 2, "target_modules": ["q_proj"]} | {key: value}
    with pytest.raises(UserError) as caught:
        targeting.lora_config(options)
    assert f"lora.{key} is {value!r}: {needed} is needed" in str(caught.value)


def test_a_rank_that_does_not_fit_names_the_weight_and_the_bound(load: Load) -> None:
    said = refused(load("llama"), {"r": 17, "target_modules": ["q_proj", "k_proj"]})
    assert "lora.r is 17" in said
    assert "model.layers.0.self_attn.k_proj is 16 x 32: at most 16 fits" in said


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named(bad: float, load: Load) -> None:
    model = load("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    said = refused(model, {"r": 2, "target_modules": ["up_proj"]})
    assert said.startswith("model.layers.1.mlp.up_proj.weight holds NaN or infinite")


def test_a_second_adapter_is_refused(load: Load) -> None:
    model = load("llama")
    adapter.add_adapter(model, config("llama"), "milora")
    assert "has an adapter already" in refused(model, {"r": 2, "target_modules": ["q_proj"]})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 4}, "lora.rank is not an option of peft.LoraConfig"),
        ({"lora_alpah": 4}, "did you mean lora_alpha?"),
        ({"use_dora": True}, "lora.use_dora is not supported"),
        ({"bias": "all"}, "lora.bias is not supported"),
        ({"init_lora_weights": "pissa"}, "use `method`"),
        ({"r": 0}, "lora.r is 0"),
        ({"r": 2.5}, "lora.r is 2.5"),
        ({"r": True}, "lora.r is True"),
        ({"lora_alpha": -1}, "lora.lora_alpha is -1"),
        ({"lora_alpha": float("nan")}, "lora.lora_alpha is nan"),
        ({"rank_pattern": {"q_proj": 0}}, "lora.rank_pattern[q_proj] is 0"),
        ({"target_modules": None}, "lora.target_modules is missing"),
    ],
)
def test_options_that_no_plain_lora_can_hold(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        targeting.lora_config({"r": 4, "target_modules": ["q_proj"]} | options)
    assert said in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_loading_a_start_never_decomposes(
    method: str,
    load: Load,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: dict[str, torch.Tensor],
) -> None:
    model, start = adapter.add_adapter(load("llama"), config("llama"), method, seed=3)
    adapter.save_start(tmp_path / "factors.safetensors", start)
    perturb(model)

    def no_svd(*args: object, **kwargs: object) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr(torch.linalg, "svd", no_svd)
    stored = adapter.load_start(tmp_path / "factors.safetensors")
    again, _ = adapter.add_adapter(load("llama"), config("llama"), method, start=stored)
    assert step0_difference(again, batch) <= 1e-5
    for name, (A, B) in adapter.trained_factors(again).items():
        assert torch.equal(A, start.factors[name].A)
        assert torch.equal(B, start.factors[name].B)
        assert again.peft_config[TRAINED].lora_dropout == 0
        assert (ANCHOR in again.peft_config) == (method != "lora")


def test_a_start_of_another_base_is_refused_naming_both(load: Load, tmp_path: Path) -> None:
    _, start = adapter.add_adapter(load("llama"), config("llama"), "milora")
    other = load("llama")
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3
    with pytest.raises(UserError) as caught:
        adapter.add_adapter(other, config("llama"), "milora", start=start)
    said = str(caught.value)
    name = "model.layers.0.self_attn.q_proj"
    assert said.startswith(f"wrong base: {name}.weight has sha256 ")
    assert start.sha256[name][:12] in said
    fewer = config("llama", target_modules=["q_proj"])
    with pytest.raises(UserError, match="for other modules"):
        adapter.add_adapter(load("llama"), fewer, "milora", start=start)


def test_a_file_that_is_no_start_is_refused(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "factors.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read"):
        adapter.load_start(path)
    _, start = adapter.add_adapter(load("llama"), config("llama"), "milora")
    adapter.save_start(path, start)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        adapter.load_start(path)


def test_random_draws_other_places_in_every_module(load: Load) -> None:
    _, start = adapter.add_adapter(load("llama"), config("llama"), "random")
    values = [tuple(found["singular_values"]) for found in start.spectra.values()]
    assert len(set(values)) == len(values)
    _, same = adapter.add_adapter(load("llama"), config("llama"), "random")
    _, other = adapter.add_adapter(load("llama"), config("llama"), "random", seed=1)
    assert same.spectra == start.spectra
    assert other.spectra != start.spectra


def test_every_method_has_a_start_of_its_own(load: Load) -> None:
    name = "model.layers.0.mlp.up_proj"
    found = {}
    for method in METHODS:
        model, _ = adapter.add_adapter(load("llama"), config("llama"), method)
        found[method] = adapter.trained_factors(model)[name].A
    for a in METHODS:
        for b in METHODS:
            assert (a == b) == torch.equal(found[a], found[b])


def test_dropout_is_on_the_trained_adapter_only(load: Load) -> None:
    model, _ = adapter.add_adapter(load("llama"), config("llama", lora_dropout=0.5), "milora")
    layer = adapted_matrices(model)["model.layers.0.self_attn.q_proj"].layer
    assert layer.lora_dropout[TRAINED].p == 0.5
    assert isinstance(layer.lora_dropout[ANCHOR], nn.Identity)
    assert copy.deepcopy(model.peft_config[TRAINED]).lora_dropout == 0.5
