"""A smaller base: packed folders that load and train, and principal parts that are the best."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import run, settings
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    PreTrainedModel,
)

from milora.compress import pack, parts, principal_parts, sentence, table
from milora.errors import UserError
from milora.files import read_json

Tiny = Callable[[str], Path]
Load = Callable[..., PreTrainedModel]


@given(st.integers(2, 9), st.integers(2, 9), st.floats(0.05, 0.999), st.integers(0, 99))
def test_parts_are_the_best_of_their_rank_for_the_inputs(
    m: int, n: int, energy: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    X = torch.randn(40, n, generator=generator, dtype=torch.float64) * torch.logspace(0, 2, n)
    U, V = parts(W, X.T @ X, energy)
    outputs, left = X @ W.T, X @ (W - U @ V).T
    S = torch.linalg.svdvals(outputs)
    k = U.shape[1]
    torch.testing.assert_close(left.norm(), S[k:].norm(), atol=1e-7 * float(S[0]), rtol=1e-6)
    assert float(left.square().sum()) <= (1 - energy) * float(S.square().sum()) * (1 + 1e-9)
    if k > 1:  # one less would not have been enough
        assert float(S[k - 1 :].square().sum()) > (1 - energy) * float(S.square().sum())
    U, V = parts(W, None, energy)
    S = torch.linalg.svdvals(W)
    torch.testing.assert_close(
        (W - U @ V).norm(), S[U.shape[1] :].norm(), atol=1e-7 * float(S[0]), rtol=1e-6
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "saw",
        "that",
        "it",
        "was",
        "good",
        "for",
        "all",
        "of",
        "us",
        "there",
    ]
    order = torch.randint(len(words), (20_000,), generator=torch.Generator().manual_seed(0))
    (tmp_path / "text.txt").write_text(" ".join(words[i] for i in order), encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("aware", [True, False])
def test_principal_parts(kind: str, aware: bool, tiny: Tiny, text: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(tiny(kind)).state_dict()
    found, model = principal_parts(str(tiny(kind)), 0.6, str(text), 2, aware=aware)
    after = model.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == sum(kind["factored"] for kind in found["kinds"].values()) > 0
    saved = 0
    for name in changed:
        rank = int(torch.linalg.matrix_rank(after[name].double(), rtol=1e-5))
        assert rank * sum(after[name].shape) < after[name].numel()
        saved += 4 * (after[name].numel() - rank * sum(after[name].shape))
    assert found["bytes"]["before"] - found["bytes"]["after"] == saved
    assert found["knowledge"]["kl"] > 0
    assert "KL" in sentence(found)
    assert table(found)[1]


def test_a_model_without_layers_to_pack_is_refused(text: Path, tmp_path: Path) -> None:
    """Falcon's are of a class of their own, which bitsandbytes passes by."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = FalconConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    FalconForCausalLM(config).save_pretrained(tmp_path / "falcon")
    make_tokenizer().save_pretrained(tmp_path / "falcon")
    with pytest.raises(UserError, match="no linear layer that bitsandbytes packs"):
        pack(str(tmp_path / "falcon"), tmp_path / "out", 4, str(text), 1)
    assert not (tmp_path / "out").exists()


def test_nothing_is_smaller_at_nearly_all_energy(tiny: Tiny, text: Path) -> None:
    found, _ = principal_parts(str(tiny("llama")), 0.9999, str(text), 1, aware=False)
    assert found["knowledge"]["kl"] == 0
    assert "no layer is smaller as two factors" in sentence(found)


def test_the_size_before_is_that_of_the_files(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    """Which are of 16 bits, and are computed with in 32 on a CPU."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = tmp_path / "base"
    shutil.copytree(tiny("llama"), base)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    found = pack(str(base), tmp_path / "packed", 4, str(text), 1)
    assert found["bytes"]["before"] == (base / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bits"), [("llama", 4), ("llama", 8), ("gpt2", 4)])
def test_a_packed_folder_loads_and_trains(
    kind: str, bits: int, tiny: Tiny, text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    out = tmp_path / "packed"
    found = pack(str(tiny(kind)), out, bits, str(text), 1)
    assert found["bytes"]["after"] < found["bytes"]["before"]
    errors = [kind["error"] for kind in found["kinds"].values()]
    assert len(errors) == (7 if kind == "llama" else 3)
    assert found["whole"]
    assert 0 < min(errors) <= max(errors) < 0.5
    assert read_json(out / "compression.json") == found
    assert f"factors_from: {tiny(kind)}" in (out / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(out).config.quantization_config
    changes: dict[str, Any] = {"milora": {"factors_from": str(tiny(kind))}}
    record = run(settings(out, tmp_path, training={"max_steps": 2}, **changes))
    assert record["state"] == "done"
    with pytest.raises(UserError, match="exists already"):
        pack(str(tiny(kind)), out, bits, str(text), 1)
    with pytest.raises(UserError, match="quantised already"):
        pack(str(out), tmp_path / "twice", bits, str(text), 1)


def test_what_cannot_be_made_smaller_is_refused(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    model = str(tiny("llama"))
    with pytest.raises(UserError, match="4 and 8 are known"):
        pack(model, tmp_path / "out", 3, str(text), 1)
    with pytest.raises(UserError, match="between 0 and 1"):
        principal_parts(model, 1.5, str(text), 1)
    with pytest.raises(UserError, match="use auto, float32"):
        principal_parts(model, 0.5, str(text), 1, dtype="half")
    (tmp_path / "word.txt").write_text("a")
    with pytest.raises(UserError, match="--text: it has fewer than 2 tokens"):
        pack(model, tmp_path / "out", 4, str(tmp_path / "word.txt"), 1)
    with pytest.raises(UserError, match="too short"):
        principal_parts(model, 0.9, str(text), 10_000)
    with pytest.raises(UserError, match="GGUF"):
        pack("some.gguf", tmp_path / "out", 4, str(text), 1)
    assert set(os.listdir(tmp_path)) == {"text.txt", "word.txt"}
