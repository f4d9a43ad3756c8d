"""Every architecture of docs/architectures.md, from a tiny random model to its artefacts."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from conftest import make_tokenizer
from peft import PeftModel
from tiny_run import break_off, run, settings
from transformers import AutoModelForCausalLM, PreTrainedModel

import milora.store
import milora.train
from milora.adapter import add_adapter, load_start
from milora.artefacts import export_run
from milora.errors import UserError
from milora.export import load_plain_lora
from milora.inspection import inspect_model
from milora.matrices import adapted_matrices, fused_rows, matrix_in
from milora.pretrained import load_pretrained, task_of
from milora.preview import coverage, covered_lines
from milora.progress import Progress
from milora.store import Store, decompose_checkpoint
from milora.targeting import lora_config
from milora.verify import verify

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
    load: Any = AutoModelForCausalLM


QKV = ["q_proj", "k_proj", "v_proj"]
LLAMA = [*QKV, "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
BERT = ["query", "key", "value", "intermediate.dense", "output.dense"]
CLASSES = hf.AutoModelForSequenceClassification
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
        hf.Qwen3MoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2,
                          moe_intermediate_size=16, head_dim=8),
        QKV, EXPERTS,
    ),
    "t5": Architecture(
        hf.T5ForConditionalGeneration,
        hf.T5Config(vocab_size=258, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                    decoder_start_token_id=0, eos_token_id=1, pad_token_id=1),
        ["q", "k", "v", "wi", "wo"], [], hf.AutoModelForSeq2SeqLM,
    ),
    "bert": Architecture(hf.BertForMaskedLM, hf.BertConfig(**SHAPE), BERT, [], CLASSES),
    "roberta": Architecture(hf.RobertaForMaskedLM, hf.RobertaConfig(**SHAPE), BERT, [], CLASSES),
    "llama, classes": Architecture(
        hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED), LLAMA, [], CLASSES
    ),
}  # fmt: skip
HEADS = {  # what is trained in full; BERT's pooler is not in files of a language model
    "bert": {"bert.pooler.dense", "classifier"}, "roberta": {"classifier"},
    "llama, classes": {"score"},
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


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


QUICK = ("llama", "gpt2")  # weights as they are, and transposed
RESUMED = (*QUICK, "mixtral", "t5", "bert")  # the kinds of weights, answers and heads
EACH = [*QUICK, *slow(*(name for name in ARCHITECTURES if name not in QUICK))]


def asked_of(name: str, folder: Callable[[str], Path], home: Path, **changes: Any) -> Any:
    """The arguments of a run in `home`, on rows with labels where the model is a classifier."""
    if ARCHITECTURES[name].load is CLASSES:
        rows = [
            {"text": f"{a} {b}", "label": label}
            for a, label in (("up", "north"), ("down", "south"))
            for b in range(12)
        ]
        (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes["evaluate"] = {"tasks": [str(home / "rows.jsonl")]}
    return settings(folder(name), home, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_from_the_base_to_the_artefacts(
    name: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, targets, parameters, load = ARCHITECTURES[name]
    lora = {"target_modules": targets, "target_parameters": parameters or None, "lora_dropout": 0.0}
    adapters, ran = {}, tmp_path / "unbroken" / "run"
    for way in ("unbroken", *(("resumed",) if name in RESUMED else ())):
        (tmp_path / way).mkdir()
        asked = asked_of(name, folder, tmp_path / way, lora=lora, training=TRAINING)
        if way == "resumed":
            break_off(asked, 20, monkeypatch)
        record = run(asked, resume=way == "resumed")
        adapter = tmp_path / way / "run" / "adapter"
        adapters[way] = (adapter / "adapter_model.safetensors").read_bytes()
    assert len(set(adapters.values())) == 1
    assert record["base"]["unchanged"]
    assert record["step0"]["difference"] <= record["step0"]["bound"]
    assert record["adapter"]["exported_against_trained"] <= 1e-5
    kinds = {target.rpartition(".")[2] for target in [*targets, *parameters]}
    assert set(record["coverage"]["adapted"]) == kinds
    assert set(record["coverage"]["trained"]) == HEADS.get(name, set())
    evaluated = json.loads((ran / "evaluation.json").read_text())["tasks"]["rows"]
    first = json.loads((ran / "metrics.jsonl").read_text().partition("\n")[0])["loss"]
    assert evaluated["tuned"]["loss"] < evaluated["base"].get("loss", first) - 0.01

    base = load.from_pretrained(folder(name))
    ids = torch.randint(2, 258, (2, 12), generator=torch.Generator().manual_seed(1))
    asked = {"input_ids": ids}
    if load is hf.AutoModelForSeq2SeqLM:
        asked["decoder_input_ids"] = ids.flip(1)
    with torch.no_grad():
        plain = base(**asked).logits
        tuned = PeftModel.from_pretrained(base, ran / "adapter")
        wanted = tuned(**asked).logits
        with tuned.disable_adapter():
            assert torch.equal(tuned(**asked).logits, plain)
        export_run(ran, tmp_path / "merged", "merged")
        found = load.from_pretrained(tmp_path / "merged")(**asked).logits
    assert float((wanted - plain).abs().max()) > 1e-2 * float(plain.abs().max())
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral"])
@pytest.mark.parametrize("protect", [0, {"tasks": "all"}])
def test_a_run_goes_on_from_another(
    name: str, protect: Any, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every pair of the new adapter learns, outside of what the earlier one uses where asked."""
    _, _, targets, parameters, _ = ARCHITECTURES[name]
    lora = {"target_modules": targets, "target_parameters": parameters or None, "lora_dropout": 0.0}
    short = {"max_steps": 3, "eval_strategy": "no"}
    about: dict[str, Any] = {"lora": lora, "training": short, "evaluate": {"tasks": []}}
    run(settings(folder(name), tmp_path, **about))
    about |= {"milora": {"protect": protect}, "continue": {"run": str(tmp_path / "run")}}
    record = run(settings(folder(name), tmp_path, output_dir=str(tmp_path / "next"), **about))
    assert record["step0"]["difference"] <= record["step0"]["bound"]
    assert all(check.holds for check in verify(tmp_path / "next"))
    start = load_start(tmp_path / "next" / "init" / "factors.safetensors")
    for one, (A, B) in start.factors.items():
        assert ((A.norm(dim=1) > 1e-5) | (B.norm(dim=0) > 1e-5)).all(), one
    skeleton = AutoModelForCausalLM.from_pretrained(folder(name))
    before = load_plain_lora(tmp_path / "run" / "adapter", skeleton).factors
    skeleton = AutoModelForCausalLM.from_pretrained(folder(name))
    after = load_plain_lora(tmp_path / "next" / "adapter", skeleton).factors
    for one, (A, B) in after.items():
        earlier = before[one].B.double() @ before[one].A.double()
        dW = B.double() @ A.double() - earlier
        if protect and dW.norm() > 1e-6:
            assert (earlier.T @ dW).norm() < 1e-4 * earlier.norm() * dW.norm()
            assert (dW @ earlier.T).norm() < 1e-4 * earlier.norm() * dW.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_wrong_targets_name_the_eligible(
    name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    asked = asked_of(name, folder, tmp_path, lora={"target_modules": ["projection"]})
    with pytest.raises(UserError) as error:
        run(asked)
    assert "'projection' matches no module" in str(error.value)
    for target in ARCHITECTURES[name].targets:
        assert target.rpartition(".")[2] in str(error.value)
    for head in HEADS.get(name, ()):
        assert head not in str(error.value)


@pytest.mark.parametrize(
    ("name", "lora", "said"),
    [
        ("llama", {"target_modules": ["q_proj", "mlp"]},
         r"'mlp' means model.layers.0.mlp, of class LlamaMLP; only linear layers"),
        ("llama", {"target_modules": ["input_layernorm"]}, "LlamaRMSNorm; only linear layers"),
        ("mixtral", {"target_modules": ["experts"]}, "MixtralExperts; only linear layers"),
        ("mixtral", {"target_modules": ["gate"]}, "MixtralTopKRouter; only linear layers"),
        ("llama", {"target_modules": "q_prj"}, "'q_prj' matches the full name of no module"),
        ("llama", {"target_modules": "q_proj"}, r"as a list, \[q_proj\], it means the ends of"),
        ("mixtral", {"target_modules": r".*\.w1", "target_parameters": EXPERTS},
         "matches the full name of no module"),
    ],
)  # fmt: skip
def test_what_is_no_linear_layer_is_said(
    name: str, lora: dict[str, Any], said: str, folder: Callable[[str], Path]
) -> None:
    """In one sentence, with what can be adapted; PEFT passes over a router and an odd regex."""
    model = AutoModelForCausalLM.from_pretrained(folder(name))
    config = lora_config({"r": 2, "lora_alpha": 2} | lora)
    with pytest.raises(UserError, match=said) as error:
        add_adapter(model, config, "milora")
    assert "its linear layers are " in str(error.value)
    assert "k_proj, lm_head, o_proj, q_proj" in str(error.value)
    assert ("lora.target_parameters: experts.down_proj" in str(error.value)) == (name == "mixtral")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"target_modules": ".*(q_proj"}, "target_modules: .* is no regular expression"),
        ({"target_modules": [3]}, "target_modules: 3 is no name of a module"),
        ({"exclude_modules": "*x"}, "exclude_modules: .* is no regular expression"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: .* is no regular expression"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern: .* is no regular expression"),
    ],
)
def test_patterns_are_checked(lora: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        lora_config({"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]} | lora)


FUSED = {
    "gpt2": ARCHITECTURES["gpt2"].config,
    "gpt-neox": ARCHITECTURES["gpt-neox"].config,
    "falcon": ARCHITECTURES["falcon"].config,
    "falcon, each head": hf.FalconConfig(**SHAPE, ffn_hidden_size=64, multi_query=False),
    "falcon, grouped": hf.FalconConfig(
        **SHAPE, ffn_hidden_size=64, new_decoder_architecture=True, num_kv_heads=2
    ),
    "phi3": ARCHITECTURES["phi3"].config,
}
AFTER = {  # what the attention, and where gate and up are fused the MLP, ends in
    "gpt2": ["attn.c_proj"], "gpt_neox": ["attention.dense"], "falcon": ["self_attention.dense"],
    "phi3": ["self_attn.o_proj", "mlp.down_proj"],
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_the_rows_are_what_the_library_takes_apart(name: str) -> None:
    """Without values attention gives nothing; without queries what it gives without keys."""
    config = FUSED[name]
    torch.manual_seed(0)
    model = ARCHITECTURES[name.partition(",")[0]].model(config).eval()
    ids = torch.randint(2, 258, (2, 12))

    def without(targets: list[str], pick: Callable[[int], list[int]] | None = None) -> torch.Tensor:
        """Logits with the rows of some parts at zero, or the whole weight."""
        changed = copy.deepcopy(model)
        for module_name in dict(changed.named_modules()):
            if module_name.endswith(tuple(targets)):
                weight = matrix_in(changed, module_name)
                parts = fused_rows(config, module_name, len(weight))
                assert bool(parts) == (pick is not None)
                rows = [parts[i] for i in pick(len(parts))] if pick else [torch.arange(len(weight))]
                weight[torch.cat(rows)] = 0
        with torch.no_grad():
            return changed(ids).logits

    qkv = [
        t
        for t in ("c_attn", "query_key_value", "qkv_proj")
        if t in ARCHITECTURES[name.partition(",")[0]].targets
    ]
    attention, *mlp = AFTER[config.model_type]
    torch.testing.assert_close(without(qkv, lambda _: [2]), without([attention]))
    queries, keys = without(qkv, lambda _: [0]), without(qkv, lambda _: [1])
    torch.testing.assert_close(queries, keys)
    with torch.no_grad():
        assert not torch.allclose(queries, model(ids).logits)
    for part in (0, 1) if mlp else ():
        torch.testing.assert_close(without(["gate_up_proj"], lambda _, p=part: [p]), without(mlp))


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "falcon", "phi3", "mixtral"])
def test_each_logical_matrix_gives_its_own_components(
    name: str, folder: Callable[[str], Path]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder(name))
    _, _, targets, parameters, _ = ARCHITECTURES[name]
    config = lora_config(
        {
            "r": 6,
            "lora_alpha": 3,
            "target_modules": targets,
            "target_parameters": parameters or None,
        }
    )
    model, start = add_adapter(base, config, "milora")
    seen = 0
    for module, matrix in adapted_matrices(model).items():
        W, (A, B) = matrix.weight.double(), start.factors[module]
        found = start.scaling[module] * B.double() @ A.double()
        parts = matrix.parts or [torch.arange(len(W))]
        assert sorted(torch.cat(parts).tolist()) == list(range(len(W)))
        for rows in parts:
            r = 6 // len(parts)
            U, S, Vh = torch.linalg.svd(W[rows], full_matrices=False)
            minor = U[:, -r:] * S[-r:] @ Vh[-r:]
            torch.testing.assert_close(found[rows], minor, atol=1e-6, rtol=0)
        seen += len(parts) > 1
    assert seen


@pytest.mark.slow
@pytest.mark.parametrize("method", ["milora", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_built_upon(
    dtype: str, method: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    _, _, targets, parameters, _ = ARCHITECTURES["mixtral"]
    lora = {"target_modules": targets, "target_parameters": parameters, "lora_dropout": 0.0}
    same: dict[str, Any] = {"lora": lora, "method": method, "dtype": dtype, "training": TRAINING}
    run(asked_of("mixtral", folder, tmp_path, output_dir=str(tmp_path / "first"), **same))
    same["continue"] = {"run": str(tmp_path / "first"), "how": "fold"}
    record = run(asked_of("mixtral", folder, tmp_path, **same))
    first = record["step0"]
    assert first["difference"] <= first["bound"]
    assert first.get("of", "logits") == ("logits" if dtype == "float32" else "factors")
    assert all(check.holds for check in verify(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "phi3", "mixtral", "t5", "bert"])
def test_protection_and_init(
    name: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, targets, parameters, _ = ARCHITECTURES[name]
    lora = {"target_modules": targets, "target_parameters": parameters or None, "lora_dropout": 0.0}
    held = {"protect": {".*": 5}, "interference": {"top": 0, "every": 5}}
    asked = asked_of(name, folder, tmp_path, lora=lora, training=TRAINING, milora=held)
    if name != "mixtral":  # whose files hold the experts one by one
        monkeypatch.setenv("MILORA_STORE", str(tmp_path / "store"))
        keys = ("model", "method", "lora", "seed", "dtype")
        decompose_checkpoint(
            **{key: asked[key] for key in keys}, protect=held["protect"],
            store=Store(), progress=Progress(),
        )  # fmt: skip
        monkeypatch.setattr(milora.store, "components", lambda *a, **k: pytest.fail("again"))
    record = run(asked)
    assert record["step0"]["difference"] <= record["step0"]["bound"]
    assert record["interference"]["max"] < 1e-8
    assert record["interference"]["size"] > 1e-4
    assert {layer["protected"] for layer in record["interference"]["layers"].values()} == {5}


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_inspect_knows_encoders(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    found = inspect_model(str(folder(name)), 4, Store(tmp_path), Progress())
    assert {target.rpartition(".")[2] for target in ARCHITECTURES[name].targets} <= set(
        found["kinds"]
    )
    assert not {"classifier", "lm_head"} & set(found["kinds"])


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"target_modules": "all-linear"}, r"add lora.target_parameters: \[experts.down_proj, exp"),
        ({"target_modules": ["down_proj"]}, r"by lora.target_parameters: experts.down_proj, exp"),
        ({"target_parameters": ["down_prj"]}, r"'down_prj' matches no stack.*it has experts.down"),
        (
            {"target_parameters": EXPERTS, "lora_dropout": 0.1},
            r"lora_dropout is 0.1: PEFT has none",
        ),
    ],
)
def test_experts_that_are_not_covered_are_said(
    lora: dict[str, Any], said: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = {"target_modules": ["q_proj"], "lora_dropout": 0.0} | lora
    with pytest.raises(UserError, match=said):
        run(settings(folder("mixtral"), tmp_path, lora=whole))


@pytest.mark.slow
def test_weights_out_of_the_ordinary(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A stack with an expert of zeros, a weight of one row, a rank that is all there is."""
    model = AutoModelForCausalLM.from_pretrained(folder("qwen2-moe"))
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.experts.down_proj")[2] = 0
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    lora = {
        "r": 16, "target_modules": ["k_proj", "shared_expert_gate"], "lora_dropout": 0.0,
        "target_parameters": EXPERTS, "rank_pattern": {"shared_expert_gate": 1},
    }  # fmt: skip
    record = run(settings(tmp_path / "model", tmp_path, lora=lora, training=TRAINING))
    assert record["base"]["unchanged"]
    assert record["step0"]["difference"] <= record["step0"]["bound"]
    spectra = json.loads((tmp_path / "run" / "init" / "spectra.json").read_text())
    zeros = {name: found["zero"] for name, found in spectra.items() if found["zero"]}
    assert zeros == {"model.layers.0.mlp.experts.down_proj.2": 16}
    assert spectra["model.layers.1.mlp.shared_expert_gate"]["shape"] == [1, 32]


def test_a_damaged_expert_is_named(folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder("mixtral"))
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")[3, 0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    lora = {"target_modules": QKV, "target_parameters": EXPERTS, "lora_dropout": 0.0}
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp\.experts\.gate_up_proj\.3\.weight holds NaN"
    ):
        run(settings(tmp_path / "model", tmp_path, lora=lora))


@pytest.mark.parametrize("what", ["module", "weight"])
def test_a_weight_of_two_layers_is_refused(what: str, folder: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder("llama"))
    first, second = (layer.mlp for layer in model.model.layers)
    if what == "module":
        second.up_proj = first.up_proj
    else:
        second.up_proj.weight = first.up_proj.weight
    config = lora_config({"r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]})
    with pytest.raises(UserError, match=r"0\.mlp\.up_proj shares its weight with model\.layers\.1"):
        add_adapter(model, config, "milora")


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (
            {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"]},
            "'up_proj' is adapted nowhere, since .*exclude_modules",
        ),
        (
            {"target_modules": r".*\.q_proj", "exclude_modules": ["q_proj"]},
            "No modules were targeted",
        ),
        ({"exclude_modules": ["lm_hed"]}, "exclude_modules: 'lm_hed' matches no module"),
        ({"exclude_modules": ".*vision.*"}, r"exclude_modules: '\.\*vision\.\*' matches no module"),
        ({"layers_to_transform": [0, 5]}, "no adapted weight is in layer 5"),
        (
            {"target_modules": ["model.layers.0.self_attn.q_proj", "k_proj"],
             "layers_to_transform": [1]},
            "model.layers.0.self_attn.q_proj' is in other layers, but not in layer 1",
        ),
        (
            {"target_modules": ["model.layers.0.self_attn.q_proj", "self_attn.q_proj"],
             "layers_to_transform": [1]},
            "model.layers.0.self_attn.q_proj",
        ),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, "not found in the base model"),
    ],
)  # fmt: skip
def test_what_is_not_covered_is_said(
    lora: dict[str, Any], said: str, folder: Callable[[str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder("llama"))
    config = lora_config({"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "k_proj"]} | lora)
    with pytest.raises(UserError, match=said):
        add_adapter(model, config, "milora")


def test_a_target_that_only_some_layers_have(folder: Callable[[str], Path]) -> None:
    """Layer 1 has no gate of its own; asked for by name and layer, that is said."""

    def made() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(folder("llama"))
        model.model.layers[0].extra_proj = torch.nn.Linear(4, 4)
        return model

    options = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "extra_proj"]}
    live, _ = add_adapter(made(), lora_config(options), "lora")
    assert coverage(live)["adapted"]["extra_proj"]["weights"] == 1
    with pytest.raises(UserError, match="'extra_proj' is in other layers, but not in layer 1"):
        add_adapter(made(), lora_config(options | {"layers_to_transform": [0, 1]}), "lora")
    with pytest.raises(UserError, match="'extra_proj' is adapted nowhere"):
        add_adapter(made(), lora_config(options | {"layers_to_transform": [1]}), "lora")


def test_layers_do_not_hold_for_experts(folder: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder("mixtral"))
    options = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    config = lora_config(options | {"target_parameters": EXPERTS})
    with pytest.raises(
        UserError, match=r"layers_to_transform is \[0\], but model.layers.1.mlp.exp"
    ):
        add_adapter(model, config, "lora")


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3"])
def test_every_matrix_is_counted_once(name: str, folder: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder(name))
    wanted = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    _, _, targets, parameters, _ = ARCHITECTURES[name]
    config = lora_config(
        {"r": 2, "lora_alpha": 2, "target_modules": targets[:1],
         "target_parameters": parameters[:1] or None}
    )  # fmt: skip
    live, _ = add_adapter(model, config, "lora")
    found = coverage(live)
    parts = ("adapted", "not_adapted", "others")
    assert sum(kind["parameters"] for p in parts for kind in found[p].values()) == wanted
    assert set(found["adapted"]) == {targets[0], *(p.rpartition(".")[2] for p in parameters[:1])}
    assert ("gate" in found["others"]) == (name == "mixtral")  # its router is no linear layer
    assert ("lm_head" in found["not_adapted"]) == (name in ("llama", "mixtral"))
    rows = covered_lines(found)
    assert len(rows) == len({*found["adapted"], *found["not_adapted"]})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, one in ARCHITECTURES.items() if not one.parameters]
)
def test_all_linear_means_all(name: str, folder: Callable[[str], Path]) -> None:
    options = {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"}
    labels = ("down", "up") if ARCHITECTURES[name].load is CLASSES else ()
    base = load_pretrained(str(folder(name)), labels=labels)
    config = lora_config(options, task_of(base.model), base.in_full)
    live, _ = add_adapter(base.model, config, "lora")
    # But for the head, as PEFT has it.
    assert set(coverage(live)["not_adapted"]) <= {"lm_head", "embed_out"}


def test_a_damaged_weight_that_is_not_adapted(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder("llama"))
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.gate_proj.weight")[3, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.gate_proj\.weight holds NaN"):
        run(settings(tmp_path / "model", tmp_path, lora={"target_modules": ["q_proj"]}))


def test_a_weight_of_zeros_learns(folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder("llama"))
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight").zero_()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    run(settings(tmp_path / "model", tmp_path, lora={"target_modules": ["down_proj"]}))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tuned = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").merge_and_unload()
    learned = tuned.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert learned.isfinite().all()
    assert learned.abs().max() > 0
