"""GGUF files are read back by the library, and by llama.cpp's layout of query and key."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import make_tokenizer
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file
from test_architectures import ARCHITECTURES, GROUPED
from test_merge import export, make_adapter
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from milora.checkpoint import open_checkpoint
from milora.errors import UserError
from milora.export import load_plain_lora
from milora.ggufs import _describe, _rope_factors

KINDS = ("llama", "gemma3", *(pytest.param(x, marks=pytest.mark.slow) for x in ("qwen2", "qwen3")))


# The library does not read how wide a head of Qwen 3 is, nor by what Gemma scales its queries.
DEFAULTS = {
    "qwen3": {"head_dim": 128},
    "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256},
}


def base_of(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """As make_base, with a tokenizer that merges."""
    config = copy.deepcopy(ARCHITECTURES[kind].config)
    for key, value in (DEFAULTS.get(kind, {}) | changes).items():
        setattr(config, key, value)
    torch.manual_seed(0)
    ARCHITECTURES[kind].model(config).to(dtype).save_pretrained(folder)
    tokenizer = make_tokenizer()
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = parts["model"]["vocab"]
    for place, pair in ((256, ["t", "h"]), (257, ["th", "e"])):
        del vocabulary[next(token for token, i in vocabulary.items() if i == place)]
        vocabulary["".join(pair)] = place
        parts["model"]["merges"].append(pair)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.save_pretrained(folder)
    return folder


def read(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(2, 258, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_read_back_by_the_library(kind: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", kind)
    adapter = make_adapter(tmp_path / "adapter", base, kind)
    export(adapter, tmp_path / "merged")
    said = export(adapter, tmp_path / "gguf", "gguf-merged")
    assert "merged GGUF, float32" in said
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    found = read(tmp_path / "gguf" / "model.gguf")
    torch.testing.assert_close(logits(found), logits(wanted), atol=1e-5, rtol=1e-5)
    fields = GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens == [tokenizer.convert_ids_to_tokens(i) for i in range(258)]
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_lora_on_the_gguf_of_the_base_is_the_merged_gguf(kind: str, tmp_path: Path) -> None:
    """In the layout of GGUF: W' = W + B A for every adapted tensor, and no other changes."""
    base = base_of(tmp_path / "base", kind)
    adapter = make_adapter(tmp_path / "adapter", base, kind)
    nothing = make_adapter(tmp_path / "nothing", base, kind, scale=0.0)
    export(adapter, tmp_path / "merged", "gguf-merged")
    export(nothing, tmp_path / "plain", "gguf-merged")
    export(adapter, tmp_path / "lora", "gguf")
    merged, plain, lora = (
        {t.name: np.array(t.data) for t in GGUFReader(tmp_path / file).tensors}
        for file in ("merged/model.gguf", "plain/model.gguf", "lora/adapter.gguf")
    )
    fields = GGUFReader(tmp_path / "lora" / "adapter.gguf").fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.type"].contents() == "lora"
    ranks = {len(value) for name, value in lora.items() if name.endswith("lora_a")}
    assert ranks == {fields["adapter.lora.alpha"].contents()}  # the scale is 1
    adapted = {name.rpartition(".lora_")[0] for name in lora}
    assert len(adapted) == 10
    for name, before in plain.items():
        after = merged[name]
        if name in adapted:
            update = lora[f"{name}.lora_b"] @ lora[f"{name}.lora_a"]
            np.testing.assert_allclose(after, before + update, atol=2e-6)
            assert np.abs(update).max() > 1e-3
        else:
            assert np.array_equal(before, after)


def test_queries_and_keys_of_llama_are_interleaved(tmp_path: Path) -> None:
    """The rows of B are moved as transformers moves those of the weight back."""
    base = base_of(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, "llama")
    export(adapter, tmp_path / "lora", "gguf")
    tensors = {t.name: np.array(t.data) for t in GGUFReader(tmp_path / "lora/adapter.gguf").tensors}
    plain = load_plain_lora(adapter, open_checkpoint(str(base)).skeleton)
    for part, heads in (("q", 4), ("k", 2), ("v", None)):
        B = plain.factors[f"model.layers.1.self_attn.{part}_proj"].B.numpy()
        found = tensors[f"blk.1.attn_{part}.weight.lora_b"]
        if heads:
            size = len(B) // heads
            order = [
                h * size + half * size // 2 + pair
                for h in range(heads)
                for pair in range(size // 2)
                for half in (0, 1)
            ]
            assert order != list(range(len(B)))
            B = B[order]
        np.testing.assert_array_equal(found, B)


def test_the_lora_is_for_its_base_alone(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, "llama")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    weights[f"{name}.weight"] = weights[f"{name}.weight"] + 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"wrong base: {name} in the files"):
        export(adapter, tmp_path / "lora", "gguf")
    weights[f"{name}.weight"] = weights[f"{name}.weight"] - 1e-3
    weights["lm_head.weight"] = 1.5 * weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"wrong base: .* weights that are not adapted"):
        export(adapter, tmp_path / "lora", "gguf-merged")
    wide = base_of(tmp_path / "wide", "llama", hidden_size=64, head_dim=8)
    for to in ("gguf", "gguf-merged", "merged"):
        with pytest.raises(UserError, match=r"wrong base: .* is \d+ x 64 there"):
            export(adapter, tmp_path / "lora", to, base=str(wide))
    assert not (tmp_path / "lora").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_files_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "qwen2", dtype)
    adapter = make_adapter(tmp_path / "adapter", base, "qwen2")
    export(adapter, tmp_path / "merged")
    export(adapter, tmp_path / "gguf", "gguf-merged")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    found = read(tmp_path / "gguf" / "model.gguf")
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


@pytest.mark.slow
def test_a_base_given_as_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on the dequantised copy; what the file says of model and tokenizer is kept."""
    monkeypatch.setenv("MILORA_CACHE", str(tmp_path / "cache"))
    base = base_of(tmp_path / "base", "llama")
    nothing = make_adapter(tmp_path / "nothing", base, "llama", scale=0.0)
    export(nothing, tmp_path / "given", "gguf-merged")
    given = tmp_path / "given" / "model.gguf"
    adapter = make_adapter(tmp_path / "adapter", base, "llama")
    export(adapter, tmp_path / "merged", base=str(base))
    for to, file in (("merged", None), ("gguf-merged", "model.gguf")):
        export(adapter, tmp_path / f"from-{to}", to, base=str(given))
        found = tmp_path / f"from-{to}"
        model = read(found / file) if file else AutoModelForCausalLM.from_pretrained(found)
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(model), logits(wanted), atol=1e-5, rtol=1e-5)
    one, other = (
        {name: field.contents() for name, field in GGUFReader(path).fields.items()}
        for path in (given, tmp_path / "from-gguf-merged" / "model.gguf")
    )
    assert one == other
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.eos_token, tokenizer.chat_template = "Z", "own {{ messages }}"
    tokenizer.save_pretrained(adapter)
    export(adapter, tmp_path / "own", "gguf-merged", base=str(given))
    fields = GGUFReader(tmp_path / "own" / "model.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id != 1
    assert fields["tokenizer.chat_template"].contents() == "own {{ messages }}"


def test_several_chat_templates(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, "llama")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(adapter)
    export(adapter, tmp_path / "gguf", "gguf-merged")
    fields = GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"


@pytest.mark.slow
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path: Path) -> None:
    def refused(kind: str, said: str, to: str = "gguf-merged", **changes: Any) -> None:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        base = base_of(place / "base", kind, **changes)
        adapter = make_adapter(place / "adapter", base, kind)
        with pytest.raises(UserError, match=said):
            export(adapter, place / "out", to)
        assert not (place / "out").exists()

    refused("gpt2", "models of type gpt2 are not written as GGUF here", "gguf")
    refused("gemma3", "full attention in every sixth layer",
            layer_types=["full_attention", "sliding_attention"])  # fmt: skip
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 128}  # fmt: skip
    refused("qwen2", "rotary positions of type yarn", rope_parameters=yarn)
    refused("llama", "computes llama with silu; this model has hidden_act gelu", hidden_act="gelu")
    refused("gemma3", "with gelu_pytorch_tanh; .* hidden_activation silu",
            hidden_activation="silu", layer_types=["sliding_attention"] * 2)  # fmt: skip


@pytest.mark.parametrize("config", [hf.Qwen2Config, hf.Qwen3Config])
def test_a_sliding_window_of_qwen_is_refused(config: Any, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "qwen")
    with pytest.raises(UserError, match=r"llama\.cpp has no sliding window for qwen"):
        _describe(writer, config(use_sliding_window=True), "tiny")


def test_llama_3_stretches_as_the_library_does() -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = hf.LlamaConfig(**GROUPED | {"rope_parameters": rope, "hidden_size": 64})
    found = _rope_factors(config)["rope_freqs.weight"]
    plain = 1 / 5e5 ** (np.arange(0, 16, 2) / 16)
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    wanted = LlamaRotaryEmbedding(config).inv_freq.numpy()
    np.testing.assert_allclose(plain / found, wanted, rtol=1e-6)
    assert found.max() == pytest.approx(8)
    assert found.min() == pytest.approx(1)
