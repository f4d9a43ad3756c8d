"""Every architecture of docs/architectures.md, from a tiny random model to its artefacts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from conftest import make_tokenizer
from peft import PeftModel
from tiny_run import run, settings
from transformers import AutoModelForCausalLM, PreTrainedModel

import milora.train
from milora.artefacts import export_run
from milora.errors import UserError

SHAPE: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
GROUPED = SHAPE | {"num_key_value_heads": 2}


class Architecture(NamedTuple):
    model: Callable[[Any], PreTrainedModel]
    config: Any
    targets: list[str]  # the paper's, by the names of this architecture
    parameters: list[str] = []  # noqa: RUF012


QKV = ["q_proj", "k_proj", "v_proj"]
LLAMA = [*QKV, "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ARCHITECTURES = {
    "llama": Architecture(hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED), LLAMA),
    "mistral": Architecture(hf.MistralForCausalLM, hf.MistralConfig(**GROUPED), LLAMA),
    "qwen2": Architecture(hf.Qwen2ForCausalLM, hf.Qwen2Config(**GROUPED), LLAMA),
    "qwen3": Architecture(hf.Qwen3ForCausalLM, hf.Qwen3Config(**GROUPED, head_dim=8), LLAMA),
    "gemma2": Architecture(hf.Gemma2ForCausalLM, hf.Gemma2Config(**GROUPED, head_dim=8), LLAMA),
    "gemma3": Architecture(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**GROUPED, head_dim=8), LLAMA),
    "opt": Architecture(
        hf.OPTForCausalLM,
        hf.OPTConfig(**SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        [*QKV, "fc1", "fc2"],
    ),
    "gpt2": Architecture(
        hf.GPT2LMHeadModel,
        hf.GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=512,
                      bos_token_id=0, eos_token_id=1),
        ["c_attn", "c_fc", "c_proj"],
    ),
    "gpt-neox": Architecture(
        hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**SHAPE),
        ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "falcon": Architecture(
        hf.FalconForCausalLM, hf.FalconConfig(**SHAPE, ffn_hidden_size=64),
        ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"],
    ),
    "phi3": Architecture(
        hf.Phi3ForCausalLM, hf.Phi3Config(**GROUPED), ["qkv_proj", "gate_up_proj", "down_proj"]
    ),
    "mixtral": Architecture(
        hf.MixtralForCausalLM, hf.MixtralConfig(**GROUPED, num_local_experts=4), QKV, EXPERTS
    ),
    "qwen2-moe": Architecture(
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                          shared_expert_intermediate_size=32),
        LLAMA, EXPERTS,
    ),
    "qwen3-moe": Architecture(
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
        QKV, EXPERTS,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """folder(name) -> a tiny model of that architecture, with its tokenizer."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp(name)
            architecture = ARCHITECTURES[name]
            architecture.model(architecture.config).save_pretrained(made[name])
            make_tokenizer().save_pretrained(made[name])
        return made[name]

    return get


TRAINING = {"max_steps": 20, "save_steps": 10, "eval_steps": 10, "learning_rate": 3e-2}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_from_the_base_to_the_artefacts(
    name: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, targets, parameters = ARCHITECTURES[name]
    lora = {"target_modules": targets, "target_parameters": parameters or None, "lora_dropout": 0.0}
    adapters, ran = {}, tmp_path / "unbroken" / "run"
    for way in ("unbroken", "resumed"):
        (tmp_path / way).mkdir()
        asked = settings(folder(name), tmp_path / way, lora=lora, training=TRAINING)
        if way == "resumed":
            with monkeypatch.context() as context:
                context.setattr(milora.train, "save_state", stop)
                with pytest.raises(KeyboardInterrupt):
                    run(asked)
            for path in (tmp_path / way / "run" / "checkpoints" / "checkpoint-20").iterdir():
                path.unlink()  # killed before the last checkpoint
        record = run(asked, resume=way == "resumed")
        adapter = tmp_path / way / "run" / "adapter"
        adapters[way] = (adapter / "adapter_model.safetensors").read_bytes()
    assert adapters["unbroken"] == adapters["resumed"]
    assert record["base"]["unchanged"]
    assert record["step0"]["difference"] <= record["step0"]["bound"]
    kinds = {*targets, *(parameter.rpartition(".")[2] for parameter in parameters)}
    assert set(record["coverage"]["adapted"]) == kinds
    evaluated = json.loads((ran / "evaluation.json").read_text())["tasks"]["rows"]
    assert evaluated["tuned"]["loss"] < evaluated["base"]["loss"] - 0.01

    base = AutoModelForCausalLM.from_pretrained(folder(name))
    ids = torch.randint(2, 258, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = base(ids).logits
        tuned = PeftModel.from_pretrained(base, ran / "adapter")
        wanted = tuned(ids).logits
        with tuned.disable_adapter():
            assert torch.equal(tuned(ids).logits, plain)
        export_run(ran, tmp_path / "merged", "merged", None)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert float((wanted - plain).abs().max()) > 1e-2 * float(plain.abs().max())
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def stop(*args: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_wrong_targets_name_the_eligible(
    name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    asked = settings(folder(name), tmp_path, lora={"target_modules": ["projection"]})
    with pytest.raises(UserError) as error:
        run(asked)
    assert "'projection' matches no module" in str(error.value)
    for target in ARCHITECTURES[name].targets:
        assert target in str(error.value)
