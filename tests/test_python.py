"""From Python: a PeftModel that other people's loops take as it is, and what it saves is right."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import make_tokenizer
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from milora import get_milora_model, hold_inputs
from milora.adapter import ANCHOR, Factors, decay, place
from milora.errors import UserError
from milora.matrices import adapted_matrices, name_in_base

Load = Callable[..., PreTrainedModel]
CONFIG: dict[str, Any] = {
    "r": 4, "lora_alpha": 4, "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
    "use_cpu": True, "bf16": False, "save_steps": 3, "logging_steps": 1,
}  # fmt: skip
SUMS = [(f"{a} + {b} =", f" {a + b}", f" {a + b + 1}") for a in range(6) for b in range(4)]


def own_loop(model: PeftModel, folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    live, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.tensor(make_tokenizer()([p + c for p, c, _ in SUMS[:4]])["input_ids"])
    ids = ids.to(accelerator.device)
    for _ in range(6):
        accelerator.backward(live(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()


def trainer(model: PeftModel, folder: Path) -> None:
    ids = [make_tokenizer()(p + c)["input_ids"] for p, c, _ in SUMS]
    rows = [{"input_ids": row, "labels": row} for row in ids if len(row) == len(ids[0])]
    Trainer(model, TrainingArguments(str(folder), **TRAINING), train_dataset=rows).train()  # type: ignore[arg-type]


def sft(model: PeftModel, folder: Path) -> None:
    rows = Dataset.from_list([{"prompt": p, "completion": c} for p, c, _ in SUMS])
    SFTTrainer(
        model, args=SFTConfig(str(folder), **TRAINING), train_dataset=rows,
        processing_class=make_tokenizer(),
    ).train()  # fmt: skip


def dpo_trainer(model: PeftModel, folder: Path, **changes: Any) -> DPOTrainer:
    rows = [{"prompt": p, "chosen": c, "rejected": wrong} for p, c, wrong in SUMS]
    return DPOTrainer(
        model, args=DPOConfig(str(folder), **TRAINING | changes),
        train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer(),
    )  # fmt: skip


def dpo(model: PeftModel, folder: Path) -> None:
    dpo_trainer(model, folder).train()


def anchors(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: x.clone() for n, x in model.state_dict().items() if f".{ANCHOR}." in n}


@pytest.mark.slow
@pytest.mark.parametrize("train", [own_loop, trainer, sft, dpo])
@pytest.mark.parametrize("method", ["milora", "lora"])
def test_loops_of_others(
    method: str, train: Callable[[PeftModel, Path], None], load: Load, tmp_path: Path,
    batch: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    base = load("llama")
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG), method)
    before, names = anchors(model), {n for n, p in model.named_parameters() if p.requires_grad}
    assert bool(before) == (method == "milora")
    with torch.no_grad():
        plain = base(**batch).logits
        torch.testing.assert_close(model(**batch).logits, plain, atol=1e-5, rtol=0)
    train(model, tmp_path / "work")
    model.cpu().eval()
    for name, tensor in anchors(model).items():
        assert torch.equal(tensor, before[name])
    assert {n for n, p in model.named_parameters() if p.requires_grad} - names <= {
        n for n, _ in model.named_parameters() if ".ref." in n
    }
    with torch.no_grad():
        tuned = model(**batch).logits
        assert float((tuned - plain).abs().max()) > 1e-3
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, plain)
        model.save_pretrained(tmp_path / "result")
        loaded = PeftModel.from_pretrained(load("llama"), tmp_path / "result")
        torch.testing.assert_close(loaded(**batch).logits, tuned, atol=1e-5, rtol=0)
        for folder in (tmp_path / "work").glob("checkpoint-6"):
            loaded = PeftModel.from_pretrained(load("llama"), folder)
            torch.testing.assert_close(loaded(**batch).logits, tuned, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["milora", "lora"])
def test_what_was_saved_is_no_state_to_train_on_from(
    method: str, load: Load, tmp_path: Path
) -> None:
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG), method)
    trainer(model, tmp_path)
    checkpoint = tmp_path / "checkpoint-3"
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4
    arguments = TrainingArguments(str(tmp_path), **TRAINING)
    with pytest.raises(UserError, match="is a result, a plain LoRA, and not the state"):
        Trainer(model, arguments, train_dataset=rows).train(  # type: ignore[arg-type]
            resume_from_checkpoint=str(checkpoint)
        )
    model.load_adapter(str(checkpoint), "other")  # beside it, as PEFT's
    assert "other" in model.peft_config


def test_one_process_writes(load: Load, tmp_path: Path) -> None:
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG))
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_copies_of_data_parallel_are_refused(load: Load, batch: dict[str, torch.Tensor]) -> None:
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG))
    model.base_model._is_replica = True  # as torch.nn.parallel.replicate marks them
    with pytest.raises(UserError, match=r"nn\.DataParallel does not take an anchor along"):
        model(**batch)


def test_the_reference_of_dpo_is_the_base(load: Load, tmp_path: Path) -> None:
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG))
    trainer = dpo_trainer(model, tmp_path, precompute_ref_log_probs=True)
    alone = DPOTrainer(
        load("llama"), ref_model=load("llama"),
        args=DPOConfig(str(tmp_path), **TRAINING | {"precompute_ref_log_probs": True}),
        train_dataset=trainer.train_dataset.remove_columns(
            [c for c in trainer.train_dataset.column_names if c.startswith("ref_")]
        ),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    found, wanted = (
        t.get_train_dataloader().dataset.with_format("torch") for t in (trainer, alone)
    )
    columns = [name for name in found.column_names if name.startswith("ref_")]
    assert len(columns) >= 2
    for name in columns:
        torch.testing.assert_close(found[name][:], wanted[name][:], atol=1e-4, rtol=0)


def test_switches_of_peft_leave_the_anchor_alone(
    load: Load, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG))
    wanted = model(**batch).logits
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.requires_grad_(False)
    model.set_adapter("default")
    model.enable_input_require_grads()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert torch.equal(model(**batch).logits, wanted)
    other = copy.deepcopy(model)
    assert torch.equal(other(**batch).logits, wanted)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter += 0.05
    other.set_adapter("default")
    other.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load("llama"), tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, other(**batch).logits, atol=1e-4, rtol=0)
    assert torch.equal(model(**batch).logits, wanted)
    with pytest.raises(UserError, match="'default' alone can be merged"):
        model.merge_and_unload(adapter_names=["other"])
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, load("llama")(**batch).logits)


@pytest.mark.parametrize("begin", ["published", "balanced"])
def test_what_is_merged_is_rounded_once(begin: str, load: Load) -> None:
    base = load("llama", torch.bfloat16)
    model = get_milora_model(load("llama", torch.bfloat16), LoraConfig(**CONFIG), begin=begin)
    at_once = get_milora_model(load("llama", torch.bfloat16), LoraConfig(**CONFIG), begin=begin)
    name = "model.layers.0.mlp.up_proj"
    weight = base.get_submodule(name).weight
    assert torch.equal(at_once.merge_and_unload().get_submodule(name).weight, weight)
    matrix = adapted_matrices(model)[name]
    with torch.no_grad():
        torch.manual_seed(0)
        for factor in matrix.factors("default"):
            factor += 0.02 * torch.randn_like(factor)
        (A, B), (A0, B0) = matrix.factors("default"), model.start.factors[name]  # type: ignore[union-attr]
        wanted = weight.double() + B.double() @ A.double() - B0.double() @ A0.double()
    merged = model.merge_and_unload(safe_merge=True).get_submodule(name).weight
    assert torch.equal(merged, wanted.to(torch.bfloat16))
    assert not torch.equal(merged, weight)


@pytest.mark.parametrize("method", ["milora", "lora"])
def test_what_is_saved_and_merged_has_the_previous_update(
    method: str, load: Load, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    torch.manual_seed(0)
    name = "model.layers.0.self_attn.q_proj"
    previous = {name: Factors(0.3 * torch.randn(6, 32), 0.3 * torch.randn(32, 6))}
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG), method, previous=previous)
    with torch.no_grad():
        before = load("llama")(**batch).logits
        for matrix in adapted_matrices(model).values():
            for factor in matrix.factors("default"):
                factor.add_(0.05 * torch.randn_like(factor))
        live = model.eval()(**batch).logits
        model.save_pretrained(tmp_path)
        saved = PeftModel.from_pretrained(load("llama"), tmp_path)(**batch).logits
        merged = model.merge_and_unload()(**batch).logits
    assert float((live - before).abs().max()) > 1e-2
    torch.testing.assert_close(saved, live, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged, live, atol=1e-5, rtol=0)


def of_experts() -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, pad_token_id=1,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "experts", "previous"])
def test_merged_for_a_while_the_base_comes_back(
    kind: str, dtype: torch.dtype, load: Load, batch: dict[str, torch.Tensor]
) -> None:
    """As TRL does it at each hand-over to vLLM; rounded once, and put back to the last bit."""
    changes: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if kind == "experts":
        changes["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
        changes["target_modules"] = ["q_proj"]
    elif kind == "gpt2":
        changes["target_modules"] = ["c_attn", "c_fc"]
    elif kind == "previous":
        torch.manual_seed(0)
        name = "model.layers.0.self_attn.q_proj"
        options["previous"] = {name: Factors(0.1 * torch.randn(2, 32), torch.randn(32, 2))}
    base = of_experts() if kind == "experts" else load(kind.replace("previous", "llama"))
    base, before = base.to(dtype), copy.deepcopy(base).to(dtype).state_dict()
    config = LoraConfig(**CONFIG | changes)
    model = get_milora_model(base, config, begin="published", **options)
    for step in range(2):
        with torch.no_grad():
            if step:
                for matrix in adapted_matrices(model).values():
                    for factor in matrix.factors("default"):
                        factor.add_(0.02 * torch.randn_like(factor))
            wanted = copy.deepcopy(model).merge_and_unload().state_dict()
            live, off = model(**batch).logits, logits_off(model, batch)
            for _ in range(5):
                model.merge_adapter()
                once = {name_in_base(k): v for k, v in base.state_dict().items()}
                for name, tensor in wanted.items():
                    if dtype == torch.float32:
                        torch.testing.assert_close(once[name], tensor, atol=1e-6, rtol=0)
                    else:  # fp32 and fp64 sums may round apart where they lie between two numbers
                        assert float((once[name] != tensor).float().mean()) < 0.01
                    if not step and kind != "previous":
                        assert torch.equal(once[name], before[name])
                close = 1e-5 if dtype == torch.float32 else 0.1
                torch.testing.assert_close(model(**batch).logits, live, atol=close, rtol=0)
                model.unmerge_adapter()
                assert torch.equal(model(**batch).logits, live)
            model.merge_adapter(safe_merge=True)
            assert torch.equal(logits_off(model, batch), off)  # which takes it off, as PEFT does
            model.merge_adapter(["default"])
            assert all(matrix.layer.merged for matrix in adapted_matrices(model).values())
            taken_off = copy.deepcopy(model).merge_and_unload().state_dict()
            assert all(torch.equal(taken_off[name], tensor) for name, tensor in wanted.items())
            model.unmerge_adapter()
    now = {name_in_base(name): tensor for name, tensor in base.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    with pytest.raises(UserError, match=r"adapter_names=\['other'\]: what is active is merged"):
        model.merge_adapter(["other"])
    with torch.no_grad():
        next(iter(adapted_matrices(model).values())).factors("default")[0].fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def logits_off(model: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the base: with the adapter off."""
    with torch.no_grad(), model.disable_adapter():
        logits: torch.Tensor = model(**batch).logits
    return logits


@pytest.mark.parametrize(("options", "balanced"), [({}, True), ({"begin": "published"}, False)])
def test_factors_begin_balanced_as_those_of_a_run(
    options: dict[str, Any], balanced: bool, load: Load
) -> None:
    for A, B in get_milora_model(
        load("llama"), LoraConfig(**CONFIG), **options
    ).start.factors.values():  # type: ignore[union-attr]
        squares = A.square().sum(1) + B.square().sum(0)
        assert torch.allclose(squares, torch.full_like(squares, 1 / 3)) == balanced


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_saves_what_it_is(
    dtype: torch.dtype, load: Load, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    """The anchor is rounded with the rest, so that the start cancels still."""
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG)).to(dtype)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name in adapted_matrices(model):
        A = tensors[f"base_model.model.{name}.lora_A.weight"].double()
        B = tensors[f"base_model.model.{name}.lora_B.weight"].double()
        assert float((B @ A).norm()) < 1e-12


def test_the_start_is_the_base_where_only_what_trains_is_cast(
    load: Load, batch: dict[str, torch.Tensor]
) -> None:
    """As TRL's trainers cast it on a quantised base."""
    base = load("llama")
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG))
    wanted = model.state_dict()
    for dtype in (torch.bfloat16, torch.float32):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        if dtype == torch.float32:
            place(adapted_matrices(model), model.start)  # type: ignore[arg-type]
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, base(**batch).logits)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name])


@pytest.mark.parametrize("rank", [4, 8])
def test_another_adapter_is_a_lora_by_itself(
    rank: int, load: Load, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    torch.manual_seed(0)
    other = get_peft_model(load("llama"), LoraConfig(**CONFIG | {"r": rank, "lora_alpha": 2}))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "other")
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG), begin="published")
    before = model(**batch).logits
    model.load_adapter(str(tmp_path / "other"), "other")
    model.set_adapter("other", inference_mode=True)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    torch.testing.assert_close(model(**batch).logits, other(**batch).logits)
    model.add_adapter("fresh", LoraConfig(**CONFIG))
    model.set_adapter("fresh")
    torch.testing.assert_close(model(**batch).logits, load("llama")(**batch).logits)
    with pytest.raises(UserError, match=r"selected_adapters=.* is the result of 'default'"):
        model.save_pretrained(tmp_path / "x", selected_adapters=["other"])
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, before)
    with pytest.raises(UserError, match="adapter_names: a batch of several"):
        model.eval()(**batch, adapter_names=["default"] * len(batch["input_ids"]))


def test_seeds_of_the_caller_stay(load: Load) -> None:
    drawn = set()
    for seed in (1, 2):
        base = load("llama")
        torch.manual_seed(seed)
        get_milora_model(base, LoraConfig(**CONFIG), "lora")
        drawn.add(float(torch.rand(())))
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [("mica", {}, "'mica' is none of milora,"), ("full", {}, "'full' is none of"),
     ("milora", {"begin": "blanced"}, "'blanced' is none of published,"),
     ("lora", {"begin": "balanced"}, "lora starts as PEFT does")],
)  # fmt: skip
def test_unknown_ways_to_start(method: str, options: dict[str, Any], said: str, load: Load) -> None:
    with pytest.raises(UserError, match=said):
        get_milora_model(load("llama"), LoraConfig(**CONFIG), method, **options)


def test_a_model_with_an_adapter_is_refused(load: Load) -> None:
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG))
    with pytest.raises(UserError, match="has an adapter already"):
        get_milora_model(model, LoraConfig(**CONFIG))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_the_reference_of_dpo_stays_the_base(
    kind: str, load: Load, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    """The copy of the adapter that TRL keeps cancels with the anchor, of stacked experts too."""
    changes: dict[str, Any] = {}
    base, own = load("llama"), load("llama")
    if kind == "experts":
        config = MixtralConfig(
            vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, pad_token_id=1,
        )  # fmt: skip
        base, own = MixtralForCausalLM(config).eval(), MixtralForCausalLM(config).eval()
        own.load_state_dict(base.state_dict())
        changes["target_modules"] = ["q_proj"]
        changes["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_milora_model(own, LoraConfig(**CONFIG | changes))
    dpo(model, tmp_path)
    model.cpu().eval()
    with torch.no_grad():
        plain, tuned = base(**batch).logits, model(**batch).logits
        model.set_adapter("ref")
        torch.testing.assert_close(model(**batch).logits, plain, atol=1e-5, rtol=0)
        model.set_adapter("default")
        assert torch.equal(model(**batch).logits, tuned)
    assert float((tuned - plain).abs().max()) > 1e-3
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, tuned, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["milora", "lora"])
@pytest.mark.parametrize("loop", ["own", "trainer"])
def test_inputs_are_held_in_loops_of_others(
    loop: str, method: str, load: Load, tmp_path: Path, batch: dict[str, torch.Tensor]
) -> None:
    base, tokenizer = load("llama"), make_tokenizer()
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG), method)
    hold = hold_inputs(
        model, tokenizer, ["A general text. " * 40], count=None if loop == "own" else 5
    )
    with torch.no_grad():
        plain = base(**batch).logits
        torch.testing.assert_close(model(**batch).logits, plain, atol=1e-5, rtol=0)
    ids = torch.tensor([tokenizer(p + c)["input_ids"] for p, c, _ in SUMS[:4]])
    if loop == "own":
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(4):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            hold.project()
            optimizer.zero_grad()
    else:
        arguments = TrainingArguments(str(tmp_path / "work"), **TRAINING)
        rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
        Trainer(model, arguments, train_dataset=rows, callbacks=[hold]).train()  # type: ignore[arg-type]
    model.cpu().eval().save_pretrained(tmp_path / "result")
    plain_lora = load_file(tmp_path / "result" / "adapter_model.safetensors")
    assert hold.holds
    for name, one in hold.holds.items():
        A = plain_lora[f"base_model.model.{name}.lora_A.weight"].double()
        B = plain_lora[f"base_model.model.{name}.lora_B.weight"].double()
        assert len(one.Vh) == (8 if loop == "own" else 5)
        assert float((B @ (A @ one.Vh.double().T)).norm()) < 1e-6 * float((B @ A).norm())
        assert float((B @ A).norm()) > 1e-4


@pytest.mark.parametrize("ends", [0, 1, None])
def test_inputs_are_held_without_a_padding_token(
    ends: int | None, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the tokenizers of Llama and GPT-2 come."""
    monkeypatch.setattr("milora.keep.LENGTH", 24)
    tokenizer, base = make_tokenizer(), load("llama")
    tokenizer.pad_token = None
    base.generation_config.pad_token_id = None
    base.generation_config.eos_token_id = ends
    assert hold_inputs(get_milora_model(base, LoraConfig(**CONFIG)), tokenizer).holds


@pytest.mark.parametrize("method", ["milora", "lora"])
def test_factors_from_what_is_not_packed_are_refused(method: str, load: Load) -> None:
    with pytest.raises(UserError, match=r"factors_from: none/such would not be read, since the mo"):
        get_milora_model(load("llama"), LoraConfig(**CONFIG), method, factors_from="none/such")


def test_several_processes_must_share_a_text(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG))
    with monkeypatch.context() as context:  # under a launcher, before they have met
        context.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="give texts"):
            hold_inputs(model, make_tokenizer())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="give texts"):
        hold_inputs(model, make_tokenizer())


@pytest.mark.parametrize(
    "option",
    [{"init_lora_weights": "pissa"}, {"use_dora": True}, {"bias": "lora_only"},
     {"lora_bias": True}],
)  # fmt: skip
@pytest.mark.parametrize("method", ["milora", "lora"])
def test_what_no_plain_lora_holds_is_refused(
    method: str, option: dict[str, Any], load: Load
) -> None:
    with pytest.raises(UserError, match=f"{next(iter(option))}=.* is not supported, since the"):
        get_milora_model(load("llama"), LoraConfig(**CONFIG | option), method)


def test_inputs_are_held_before_anything_else(load: Load, tmp_path: Path) -> None:
    tokenizer, texts = make_tokenizer(), ["A short text. "] * 100
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG))
    with pytest.raises(UserError, match="count is 0: 1 at least"):
        hold_inputs(model, tokenizer, texts, 0)
    one = hold_inputs(copy.deepcopy(model), tokenizer, "\n\n".join(texts), 5)
    for name, held in hold_inputs(copy.deepcopy(model), tokenizer, texts, 5).holds.items():
        assert torch.equal(held.Vh, one.holds[name].Vh)
    dpo_trainer(model, tmp_path)
    with pytest.raises(UserError, match="before a trainer is made that keeps a copy"):
        hold_inputs(model, tokenizer, texts)
    for method in ("milora", "lora"):
        trained = get_milora_model(load("llama"), LoraConfig(**CONFIG), method)
        own_loop(trained, tmp_path)
        with pytest.raises(UserError, match="call it before the first step"):
            hold_inputs(trained, tokenizer, texts)
        if method == "lora":
            with pytest.raises(UserError, match="use the optimizer's weight_decay"):
                decay(adapted_matrices(trained), 0.1)


def test_models_that_write_no_text_hold_inputs_of_a_given_one(load: Load) -> None:
    config = LoraConfig(**CONFIG | {"task_type": "SEQ_CLS"})
    of = load("llama").config
    of.num_labels, of.pad_token_id = 3, 1
    model = get_milora_model(LlamaForSequenceClassification(of), config)
    with pytest.raises(UserError, match="writes no text: give texts"):
        hold_inputs(model, make_tokenizer())
    assert hold_inputs(model, make_tokenizer(), ["A short text. "] * 100).holds


def test_it_is_saved_as_peft_saves(load: Load, tmp_path: Path) -> None:
    options = {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "lora_dropout": 0.1}
    model = get_milora_model(load("llama"), LoraConfig(**CONFIG | options))
    model.save_pretrained(save_directory=str(tmp_path / "result"))
    assert (tmp_path / "result" / "adapter_model.safetensors").exists()
