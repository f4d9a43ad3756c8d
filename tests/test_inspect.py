"""Inspection: measures of a spectrum against their definitions, ranks, the command and its page."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_svd import orthonormal
from tiny_run import run, settings
from torch import Tensor
from transformers import AutoModelForCausalLM

import milora.store
from milora.adapter import load_start
from milora.cli import main
from milora.errors import UserError
from milora.inspect_page import heat
from milora.inspection import inspect_model
from milora.progress import Progress
from milora.ranks import ranks, with_ranks
from milora.spectra import rank_within, spectrum, top_holding
from milora.store import Store

Tiny = Callable[[str], Path]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_measures_by_their_definitions() -> None:
    S = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    W = (orthonormal(6, 4, generator) * S) @ orthonormal(4, 4, generator).T
    found = spectrum(W, S, 2)
    assert found.norm == pytest.approx(math.sqrt(22))
    assert (found.largest, found.smallest) == (4, 1)
    assert found.stable_rank == pytest.approx(22 / 16)
    entropy = -(0.5 * math.log(0.5) + 0.25 * math.log(0.25) + 2 * 0.125 * math.log(0.125))
    assert found.effective_rank == pytest.approx(math.exp(entropy))
    assert found.minor_norm == pytest.approx(math.sqrt(2 / 22))
    assert found.gap == pytest.approx(2)
    assert found.edge == "soft"
    flat = spectrum(W, torch.ones(4), 1)
    assert (flat.effective_rank, flat.gap) == (pytest.approx(4), pytest.approx(1))
    hard = spectrum(W, torch.tensor([4.0, 2.0, 1.0, 1e-4]), 1)
    assert hard.edge == "hard"
    nothing = spectrum(torch.zeros(3, 3), torch.zeros(3), 1)
    assert (nothing.norm, nothing.effective_rank, nothing.minor_norm) == (0, 0, 0)


def test_rounding_is_that_of_bf16() -> None:
    W = drawn(400, 300) * torch.exp(3 * drawn(400, 1, seed=1))
    S = torch.linalg.svdvals(W.double())
    found = spectrum(W, S, 20)
    error = (W.bfloat16().float() - W).double().norm()
    assert found.rounding == pytest.approx(float(error / S[-20:].norm()), rel=0.05)
    assert math.isfinite(spectrum(torch.diag(torch.tensor([1.0, 2.0])), torch.ones(2), 1).rounding)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.floats(1e-6, 1 - 1e-6))
def test_shares_of_the_energy(values: list[float], share: float) -> None:
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    total = float(S.square().sum())
    r, k = rank_within(S, share), top_holding(S, share)
    assert 0 <= r < len(S) + 1
    assert 1 <= k <= len(S)
    slack = 1e-9 * total
    assert float(S[len(S) - r :].square().sum()) <= share * total + slack
    assert r == len(S) or float(S[len(S) - r - 1 :].square().sum()) > share * total - slack
    assert float(S[:k].square().sum()) >= share * total - slack
    assert float(S[: k - 1].square().sum()) < share * total + slack


def test_ranks_from_an_energy_and_from_a_budget() -> None:
    spectra = {
        "square": torch.logspace(0, -6, 64, dtype=torch.float64),
        "flat": torch.ones(16, dtype=torch.float64),
    }
    shapes = {"square": (64, 64), "flat": (16, 48)}
    found = ranks(spectra, shapes, {"energy": 0.01})
    assert found == {"square": 32, "flat": 1}  # half at most, one at least
    found = ranks(spectra, shapes, {"energy": 0.2})
    assert found["flat"] == 3
    for budget in (192, 1000, 2500, 10**6):
        found = ranks(spectra, shapes, {"parameters": budget})
        assert sum(r * sum(shapes[name]) for name, r in found.items()) <= budget
    assert found == {"square": 32, "flat": 8}
    with pytest.raises(UserError, match=r"191 parameters are fewer than rank 1 takes .*\(192\)"):
        ranks(spectra, shapes, {"parameters": 191})


def test_the_scale_stays() -> None:
    found = with_ranks({"r": 8, "lora_alpha": 16, "target_modules": ["q"]}, {"a.q": 3, "b.q": 5})
    assert found["rank_pattern"] == {r"a\.q": 3, r"b\.q": 5}
    assert found["alpha_pattern"] == {r"a\.q": 6, r"b\.q": 10}
    for key, value in (("rank_pattern", {"q": 2}), ("use_rslora", True)):
        with pytest.raises(UserError, match=f"leave lora.{key} out"):
            with_ranks({"r": 8, "lora_alpha": 8, key: value}, {})


def test_a_run_with_ranks_by_layer(tiny: Tiny, tmp_path: Path) -> None:
    arguments = settings(
        tiny("llama"), tmp_path, milora={"rank": {"energy": 0.05}}, lora={"lora_dropout": 0.0}
    )
    record = run(arguments)
    start = load_start(tmp_path / "run" / "init" / "factors.safetensors")
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    seen = set()
    for name, module in base.named_modules():
        if name in start.factors:
            S = torch.linalg.svdvals(module.weight.detach().double())
            wanted = max(1, min(rank_within(S, 0.05), len(S) // 2))
            assert len(start.factors[name].A) == wanted
            assert start.scaling[name] == pytest.approx(1.0)
            seen.add(wanted)
    assert len(seen) > 1
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert written["r"] == 2 * max(seen)  # one rank for servers, padded
    assert not written["rank_pattern"]
    assert record["state"] == "done"
    with pytest.raises(UserError, match=r"milora.rank: full fine-tuning has no factors"):
        run(arguments | {"method": "full", "output_dir": str(tmp_path / "full")})


@pytest.mark.slow
def test_init_decomposes_what_train_then_finds(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MILORA_STORE", str(tmp_path / "store"))
    values = settings(tiny("llama"), tmp_path, milora={"rank": {"parameters": 9000}})
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    command(monkeypatch, "init", str(config))
    assert "14 weights: 14 decomposed" in capsys.readouterr().out
    record = run(values)
    assert record["parameters"]["trainable"] <= 9000
    assert "14 of 14 weights were in the store" in capsys.readouterr().err


@pytest.mark.slow
def test_init_leaves_no_largest_components_to_train(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILORA_STORE", str(tmp_path / "store"))
    protect = {"q_proj": 4, "down_proj": {"energy": 0.3}}
    values = settings(tiny("llama"), tmp_path, milora={"protect": protect})
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    command(monkeypatch, "init", str(config))
    files = sorted((tmp_path / "store").glob("*/*"))
    forbidden = lambda *args, **kwargs: pytest.fail("decomposed again")  # noqa: E731
    monkeypatch.setattr(milora.store, "components", forbidden)
    record = run(values)
    assert sorted((tmp_path / "store").glob("*/*")) == files
    held = {layer["protected"] for layer in record["interference"]["layers"].values()}
    assert {0, 4} < held


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["milora", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_every_linear_weight(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    found = inspect_model(str(tiny(kind)), 4, store, Progress())
    model = AutoModelForCausalLM.from_pretrained(tiny(kind))
    modules = dict(model.named_modules())
    for row in found["weights"]:
        weight = modules[row["module"]].weight.detach().double()
        assert sorted(row["shape"]) == sorted(weight.shape)
        S = torch.linalg.svdvals(weight)
        assert row["norm"] == pytest.approx(float(weight.norm()), rel=1e-6)
        assert row["minor_norm"] == pytest.approx(float(S[-4:].norm() / S.norm()), rel=1e-4)
        assert row["singular_values"][0][1] == pytest.approx(float(S[0]), rel=1e-3)
        assert row["singular_values"][-1][0] == len(S) - 1
        assert row["layer"] in (0, 1)
    assert sum(one["weights"] for one in found["kinds"].values()) == len(found["weights"])
    advised = found["advice"]["lora"]["target_modules"]
    assert set(advised) <= set(found["kinds"])
    made = store.made
    again = inspect_model(str(tiny(kind)), 4, store, Progress())
    assert store.made == made  # every spectrum was kept
    assert again["kinds"] == found["kinds"]


def test_a_damaged_spectrum_is_computed_again(tmp_path: Path) -> None:
    said: list[str] = []
    store = Store(tmp_path, say=said.append)
    W = drawn(8, 6)
    S = store.spectrum(W)
    (path,) = tmp_path.glob("*/*-spectrum.safetensors")
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    assert torch.equal(store.spectrum(W), S)
    assert "is computed again" in said[0]
    assert (store.made, store.found) == (2, 0)


@pytest.mark.slow
def test_the_command(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, figures = tmp_path / "p.html", tmp_path / "f.json"
    words = ["--rank", "4", "--html", str(page), "--json", str(figures)]
    assert command(monkeypatch, "inspect", str(tiny("llama")), *words) == 0
    out = capsys.readouterr().out
    assert "down_proj" in out
    assert "lora: {r: 4, lora_alpha: 4" in out
    found = json.loads(figures.read_text())
    assert len(found["weights"]) == 14
    text = page.read_text()
    assert text.count("<svg") == 1
    assert "://" not in text.replace("http://www.w3.org/", "")  # names of XML alone
    assert command(monkeypatch, "inspect", str(tmp_path / "none")) == 2

    values: dict[str, Any] = settings(tiny("llama"), tmp_path, training={"max_steps": 2})
    run(values)
    assert command(monkeypatch, "inspect", str(tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.mlp.up_proj " in out
    assert "largest" in out


def test_the_map_shows_the_largest_of_a_place() -> None:
    rows = [{"layer": 0, "kind": "dense", "rho": rho} for rho in (0.1, 0.9, 0.02)]
    assert heat(rows, "rho")["rows"][0]["cells"] == [{"text": "90", "share": 1.0}]
