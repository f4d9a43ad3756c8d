"""What only a GPU can get wrong: tensors on two devices, and the same run as on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import break_off, run, settings
from transformers import PreTrainedModel

import milora.pretrained
from milora.adapter import COMPONENT, add_adapter, load_start, save_start, trained_factors
from milora.export import plain_lora
from milora.svd import components
from milora.targeting import lora_config
from milora.verify import verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
Tiny = Callable[[str], Path]
HELD: dict[str, Any] = {"milora": {"protect": 5, "interference": {"every": 1, "top": 0}}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["milora", "lora", "pissa", "full"])
def test_a_run(method: str, dtype: str, tiny: Tiny, tmp_path: Path) -> None:
    changes: dict[str, Any] = HELD if method in ("milora", "lora") else {}
    record = run(settings(tiny("llama"), tmp_path, method=method, dtype=dtype, **changes))
    assert record["state"] == "done"
    assert 0 < record["peak_memory_bytes"] <= torch.cuda.max_memory_allocated()  # of training
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["settings"]["device"] == torch.cuda.get_device_name()
    if method != "full":
        assert record["step0"]["difference"] <= record["step0"]["bound"]
        assert record["base"]["unchanged"]
        assert all(check.holds for check in verify(tmp_path / "run"))
    if changes:
        assert record["interference"]["max"] < 1e-8


def test_resumed_as_unbroken(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        arguments = settings(tiny("llama"), tmp_path / name, **HELD)
        if name == "broken":
            break_off(arguments, 6, monkeypatch)
        run(arguments, resume=name == "broken")
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        losses[name] = [row["loss"] for row in rows if "loss" in row]
    assert losses["broken"] == pytest.approx(losses["whole"], rel=1e-3)


def test_the_same_components(load: Callable[..., PreTrainedModel]) -> None:
    weight = load("llama").get_submodule("model.layers.0.mlp.up_proj").weight.detach()
    for component in ("minor", "principal", "middle"):
        here, there = (components(w, 4, component) for w in (weight, weight.cuda()))  # type: ignore[arg-type]
        products = [(found.U * found.S @ found.Vh).cpu() for found in (here, there)]
        torch.testing.assert_close(*products, atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", ["lora", *COMPONENT])
def test_the_start_is_kept_on_the_cpu(
    method: str, load: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    config = lora_config({"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]})
    model, start = add_adapter(load("llama").cuda(), config, method)
    save_start(tmp_path / "factors.safetensors", start)
    stored = load_start(tmp_path / "factors.safetensors")
    for one in (start, stored):  # of this process, and of one that resumes
        for A, B in plain_lora(one, trained_factors(model)).factors.values():
            assert A.device == B.device == torch.device("cpu")
            if method != "lora":
                assert float((B.double() @ A.double()).abs().max()) < 1e-6


def test_sixteen_bits_are_the_default(tiny: Tiny) -> None:
    loaded = milora.pretrained.load_pretrained(str(tiny("llama"))).model
    assert loaded.dtype == torch.bfloat16
    assert loaded.device.type == "cuda"
