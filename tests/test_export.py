"""Invariant 3: one artefact, one base. What is exported loads with stock PEFT and is right."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, TARGETS
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from test_adapter import METHODS, config, perturb
from transformers import PreTrainedModel

from milora import adapter
from milora.adapter import Factors, Start
from milora.approximation import best_of_rank
from milora.export import check_loaded, plain_lora, save_plain_lora, scale_of, target_names
from milora.matrices import adapted_matrices

Load = Callable[..., PreTrainedModel]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"lora_alpha": 9},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "patterns": {"rank_pattern": {"0.*(v_proj|c_fc)": 2}, "alpha_pattern": {"q_proj|c_attn": 7}},
    "layers": {"layers_to_transform": [1]},
}


def trained(kind: str, load: Load, method: str = "milora", **options: Any) -> tuple[Any, Start]:
    model, start = adapter.add_adapter(load(kind), config(kind, **options), method)
    perturb(model)
    return model, start


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = model(**batch).logits[batch["attention_mask"].bool()]
    assert isinstance(found, torch.Tensor)
    return found.float()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_gives_the_trained_logits(
    kind: str, options: str, load: Load, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    model, start = trained(kind, load, **OPTIONS[options])
    plain = plain_lora(start, adapter.trained_factors(model))
    assert save_plain_lora(tmp_path, plain, load(kind), "tiny") == 8
    loaded = PeftModel.from_pretrained(load(kind), tmp_path)
    base = logits(load(kind), batch)
    assert relative(logits(loaded, batch), logits(model, batch)) <= 1e-5
    assert relative(logits(loaded, batch), base) > 1e-3  # it does something
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, batch), base)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_exports(
    method: str, load: Load, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    model, start = trained("llama", load, method)
    plain = plain_lora(start, adapter.trained_factors(model))
    rank = save_plain_lora(tmp_path, plain, load("llama"), "tiny")
    assert rank == (4 if method == "lora" else 8)
    loaded = PeftModel.from_pretrained(load("llama"), tmp_path)
    assert relative(logits(loaded, batch), logits(model, batch)) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_base(kind: str, load: Load, tmp_path: Path, batch: dict[str, torch.Tensor]) -> None:
    model, start = adapter.add_adapter(load(kind, torch.bfloat16), config(kind), "milora")
    perturb(model)
    save_plain_lora(tmp_path, plain_lora(start, adapter.trained_factors(model)), load(kind), "tiny")
    loaded = PeftModel.from_pretrained(load(kind, torch.bfloat16), tmp_path)
    # Both round to bf16 (2^-8) after each layer, from values that differ in fp32 rounding.
    assert relative(logits(loaded, batch), logits(model, batch)) <= 0.03


def test_what_has_no_single_scale() -> None:
    plain = {"r": 4, "lora_alpha": 8, "target_modules": ["q"]}
    both = {"rank_pattern": {"q": 2}, "alpha_pattern": {"q": 4}}
    for options, scale in (
        ({}, 2), (both, 2), ({"use_rslora": True}, None), ({"rank_pattern": {"q": 2}}, None),
        (both | {"alpha_pattern": {"q": 2}}, None),
    ):  # fmt: skip
        assert scale_of(LoraConfig(**plain | options)) == scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_loaded_is_compared_with_what_was_trained(
    dtype: torch.dtype, load: Load, tmp_path: Path
) -> None:
    model, start = trained("llama", load, **OPTIONS["patterns"])
    plain = plain_lora(start, adapter.trained_factors(model))
    save_plain_lora(tmp_path, plain, load("llama"), "tiny")
    loaded = PeftModel.from_pretrained(load("llama", dtype), tmp_path)
    check_loaded(loaded, plain)
    layers = adapted_matrices(loaded)
    name = list(layers)[3]
    for spoil in (
        lambda layer: layer.lora_B["default"].weight.data[0, 0].add_(1e-6),
        lambda layer: layer.lora_A["default"].weight.data.mul_(2),
        lambda layer: layer.scaling.update(default=2.0),
    ):
        loaded = PeftModel.from_pretrained(load("llama", dtype), tmp_path)
        spoil(adapted_matrices(loaded)[name].layer)
        with pytest.raises(RuntimeError, match=f"in 1 of {len(layers)} weights.*{name}"):
            check_loaded(loaded, plain)
    fewer = plain._replace(factors={n: f for n, f in plain.factors.items() if n != name})
    with pytest.raises(RuntimeError, match=name):
        check_loaded(PeftModel.from_pretrained(load("llama", dtype), tmp_path), fewer)


def test_the_files_are_what_servers_read(load: Load, tmp_path: Path) -> None:
    options = OPTIONS["patterns"] | {"lora_alpha": 3, "use_rslora": True, "lora_dropout": 0.1}
    model, start = trained("llama", load, **options)
    plain = plain_lora(start, adapter.trained_factors(model))
    save_plain_lora(tmp_path, plain, load("llama"), "tiny", "main")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["lora_alpha"] == written["r"] == 8
    assert written["use_rslora"] is False
    assert written["rank_pattern"] == written["alpha_pattern"] == {}
    assert written["init_lora_weights"] is True
    assert written["bias"] == "none"
    assert written["modules_to_save"] is None
    assert written["lora_dropout"] == 0
    assert written["target_modules"] == sorted(TARGETS["llama"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {min(tensor.shape) for tensor in tensors.values()} == {8}
    assert PeftConfig.from_pretrained(tmp_path).revision == "main"
    # What a server computes, alpha / r from the file, is the update.
    for name, (A, B) in adapter.trained_factors(model).items():
        A0, B0 = start.factors[name]
        prefix = f"base_model.model.{name}"
        seen = tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
        update = start.scaling[name] * (B @ A - B0 @ A0)
        torch.testing.assert_close(seen * written["lora_alpha"] / written["r"], update)


@pytest.mark.slow
def test_the_adapter_loads_where_milora_cannot_be_imported(
    tiny: Callable[[str], Path], load: Load, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    model, start = trained("qwen2", load, lora_alpha=7)
    plain = plain_lora(start, adapter.trained_factors(model))
    save_plain_lora(tmp_path / "adapter", plain, load("qwen2"), str(tiny("qwen2")))
    save_file({**batch, "logits": logits(model, batch)}, tmp_path / "wanted.safetensors")
    script = """
import sys
sys.modules["milora"] = None  # import milora fails from here on
try:
    import milora
except ImportError:
    pass
else:
    raise SystemExit("milora was imported")
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
folder, wanted = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(folder)
wanted = load_file(wanted)
mask = wanted["attention_mask"]
found = model(input_ids=wanted["input_ids"], attention_mask=mask).logits[mask.bool()]
error = (found - wanted["logits"]).abs().max() / wanted["logits"].abs().max()
assert error <= 1e-5, error
print("same logits")
"""
    command = [sys.executable, "-c", script, tmp_path / "adapter", tmp_path / "wanted.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "same logits\n", done.stderr


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 10),
    st.integers(0, 99),
)
def test_truncation_is_the_best_and_states_its_error(
    m: int, n: int, r: int, rank: int, seed: int
) -> None:
    torch.manual_seed(seed)
    start = Start(
        "milora", {"w": Factors(torch.randn(r, n), torch.randn(m, r))}, {"w": 0.7}, {"w": ""}, {}
    )
    now = {"w": Factors(torch.randn(r, n), torch.randn(m, r))}
    exact = plain_lora(start, now).factors["w"]
    update = exact.B.double() @ exact.A.double()
    plain = best_of_rank(plain_lora(start, now), rank)
    A, B = plain.factors["w"]
    S = torch.linalg.svdvals(update)
    best = float(S[rank:].norm() / S.norm())
    assert plain.error == pytest.approx(best, abs=1e-6)
    made = float((update - B.double() @ A.double()).norm() / update.norm())
    assert made == pytest.approx(best, abs=1e-5)
    assert A.shape[0] <= rank


def test_two_adapters_on_one_base_do_not_touch_each_other(
    load: Load, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    alone = {}
    for name, method in (("a", "milora"), ("b", "pissa")):
        model, start = trained("llama", load, method)
        plain = plain_lora(start, adapter.trained_factors(model))
        (tmp_path / name).mkdir()
        save_plain_lora(tmp_path / name, plain, load("llama"), "tiny")
        alone[name] = logits(PeftModel.from_pretrained(load("llama"), tmp_path / name), batch)
    both = PeftModel.from_pretrained(load("llama"), tmp_path / "a", adapter_name="a")
    both.load_adapter(tmp_path / "b", adapter_name="b")
    for name in ("b", "a", "b"):
        both.set_adapter(name)
        assert torch.equal(logits(both, batch), alone[name])
    both.delete_adapter("b")
    assert torch.equal(logits(both.unload(), batch), logits(load("llama"), batch))


def test_targets_are_named_in_full_where_suffixes_would_catch_more(load: Load) -> None:
    base = load("llama")
    every = {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert target_names(dict(base.named_modules()), every) == ["q_proj"]
    one = {"model.layers.1.self_attn.q_proj"}
    assert target_names(dict(base.named_modules()), one) == sorted(one)
