"""What a run will need, from shapes alone, against what tiny runs and the benchmarks took."""

import itertools
import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, TARGETS, make_model
from tiny_run import run, settings
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TrainingArguments,
)
from typer.testing import CliRunner

from milora import adapter, costs, targeting
from milora.cli import app
from milora.errors import UserError
from milora.estimate import estimate, lines
from milora.preview import compute_dtype, prepared
from milora.protect import held

Tiny = Callable[[str], Path]
ROOT = Path(__file__).resolve().parent.parent
ROWS, TOKENS = 4, 48
RATES = {torch.float32: 1e10, torch.float64: 5e9}


def of_shapes(model: str, method: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """costs.step of a tiny model, or of "deep", one of five layers; `options` of the arguments."""
    with torch.device("meta"):
        if model == "deep":
            shape = {"num_attention_heads": 4, "num_hidden_layers": 5, "vocab_size": 258}
            skeleton: Any = LlamaForCausalLM(
                LlamaConfig(hidden_size=32, intermediate_size=64, **shape)
            )
        else:
            skeleton = make_model(model)
    kind = "llama" if model == "deep" else model
    config = targeting.lora_config({"r": 4, "target_modules": TARGETS[kind]})
    arguments = TrainingArguments(use_cpu=True, **options)
    live, _ = prepared(skeleton.to(dtype), None if method == "full" else config, method, arguments)
    return costs.step(live, ROWS, TOKENS, 258, autocast=compute_dtype(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["milora", "lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_shapes_is_a_step(kind: str, method: str) -> None:
    """The same sum over the tensors of a real step."""
    model: Any = make_model(kind).requires_grad_(method == "full")
    if method != "full":
        config = targeting.lora_config({"r": 4, "target_modules": TARGETS[kind]})
        model, _ = adapter.add_adapter(model, config, method)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [torch.empty_like(p) for p in trained for _ in range(2)]
    live = costs._Live()
    for tensor in (*model.parameters(), *model.buffers(), *state):
        live.see(tensor)
    ids = torch.ones(ROWS, TOKENS, dtype=torch.long)
    padded = ids.clone()
    padded[0, -1] = 0  # of rows of one length the library would leave the mask out
    with live:
        model(input_ids=ids, attention_mask=padded, labels=ids, use_cache=False).loss.backward()
    found = of_shapes(kind, method)
    assert found.peak == pytest.approx(live.peak, rel=0.01)
    assert found.memory["weights"] >= sum(
        p.nbytes for n, p in model.named_parameters() if ".lora_" not in n
    )
    assert found.memory["optimizer"] == sum(t.nbytes for t in state)
    assert bool(found.memory["anchor"]) == (method == "milora")
    assert found.memory["logits"] >= ROWS * (TOKENS - 1) * 258 * 4


@pytest.mark.slow
def test_what_changes_the_memory_of_a_step() -> None:
    plain = of_shapes("deep", "milora")
    again = of_shapes("deep", "milora", gradient_checkpointing=True)
    assert again.memory["activations"] < 0.6 * plain.memory["activations"]
    assert again.operations > 1.2 * plain.operations
    cast = of_shapes("deep", "milora", bf16=True)
    assert cast.memory["activations"] < 0.9 * plain.memory["activations"]
    sixteen = of_shapes("deep", "milora", torch.bfloat16)
    assert sixteen.memory["weights"] < 0.6 * plain.memory["weights"]
    # PEFT keeps each layer's input in fp32 for the fp32 factors, the fused layer does not.
    lora = of_shapes("deep", "lora", torch.bfloat16)
    assert sixteen.memory["activations"] < 0.9 * lora.memory["activations"]


def test_attention_without_a_fused_kernel_keeps_its_probabilities() -> None:
    """On a GPU fp32 with shared keys: more than with a fused one."""

    def model(keys: int, dtype: torch.dtype) -> Any:
        shape = {"num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 258}
        with torch.device("meta"):
            config = LlamaConfig(
                hidden_size=32, intermediate_size=64, num_key_value_heads=keys, **shape
            )
            return LlamaForCausalLM(config).to(dtype)

    single, half = torch.float32, torch.bfloat16
    unfused = costs.attention_unfused
    assert unfused(model(2, single), "cuda", None)
    assert not unfused(model(2, single), "cpu", None)
    assert not unfused(model(2, single), "cuda", half)
    assert not unfused(model(2, half), "cuda", None)
    assert not unfused(model(4, single), "cuda", None)
    fused, apart = (
        costs.step(model(2, single), 1, 512, 258, unfused=how).memory["activations"]
        for how in (False, True)
    )
    of_a_layer = 4 * 512**2 * 4  # heads, tokens², bytes
    assert 3 * of_a_layer < apart - fused < 5 * of_a_layer  # of the last one twice


def test_several_devices() -> None:
    whole = of_shapes("llama", "milora")
    replicated = costs.per_device(whole, 1000, 4, False, 0).memory
    assert replicated == whole.memory | {"gradients": whole.memory["gradients"] + 1000}
    shared = costs.per_device(whole, 1000, 4, True, 500).memory
    assert shared["weights"] == -(-whole.memory["weights"] // 4) + 500
    assert shared["optimizer"] == -(-whole.memory["optimizer"] // 4)
    for kind in ("anchor", "activations", "logits"):
        assert shared[kind] == whole.memory[kind]


def test_what_is_whole_in_a_sharded_run() -> None:
    """Two blocks, and embedding, head and last norm, which are in none."""
    with torch.device("meta"):
        model = make_model("llama")
    body: Any = model.model
    block, *others = (
        sum(p.nbytes for p in module.parameters())
        for module in (body.layers[0], body.embed_tokens, body.norm, model.lm_head)
    )
    assert costs.gathered(model, ["LlamaDecoderLayer"]) == 2 * block + sum(others)
    assert costs.gathered(model, []) == sum(p.nbytes for p in model.parameters())


def test_decomposition_at_the_measured_rates() -> None:
    """Every committed measurement of weights of 1024 and more, at the rates of its own run."""
    compared = 0
    for path in (ROOT / "benchmarks" / "results").glob("svd-*x*-threads.json"):
        found = json.loads(path.read_text())
        m, n = max(found["shape"]), min(found["shape"])
        if n < 1024:
            continue
        limit = found["gemm_limit_seconds"]
        rates = {torch.float64: 2 / 3 * n**3 / limit}
        if m > n:
            single = (m * n**2 + n**3 / 3) / limit
            rates = {torch.float32: single, torch.float64: single / 2}
        for rank, one in found["ranks"].items():
            took = statistics.median(one["seconds"]["milora"])
            said = costs.decomposition_seconds((m, n), int(rank), "minor", rates)
            assert 0.5 < said / took < 2, (path.name, rank)
            compared += 1
    assert compared >= 30


@pytest.mark.slow
def test_disk(tiny: Tiny, tmp_path: Path) -> None:
    arguments = settings(tiny("llama"), tmp_path)
    run(arguments)
    found = estimate(**arguments)["disk"]
    for place in ("init/", "adapter/"):
        files = (tmp_path / "run" / place).glob("*.safetensors")
        assert sum(f.stat().st_size for f in files) == pytest.approx(found[place], rel=0.2)


@pytest.mark.slow
def test_no_weight_is_read(tiny: Tiny, tmp_path: Path) -> None:
    """A folder with a config alone is enough; nothing is written."""
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny("llama") / "config.json", tmp_path / "bare")
    changes: dict[str, Any] = {"training": {"max_steps": -1, "num_train_epochs": 3}}
    arguments = settings(tmp_path / "bare", tmp_path, **changes)
    found = estimate(**arguments, rates=RATES, speed=1e9, processes=2)
    assert found["training"]["batches"] == 9  # 20 of 24 rows, 8 at a time, three times
    assert found["training"]["seconds"] == pytest.approx(9 * found["training"]["operations"] / 1e9)
    assert found["peak_bytes"] == sum(found["memory"].values())
    assert found["parameters"]["all"] == make_model("llama").num_parameters()
    assert not (tmp_path / "run").exists()
    said = "\n".join(lines(found))
    assert "each of 2 devices" in said
    assert "9 batches" in said
    steps = {"training": {"max_steps": 6, "gradient_accumulation_steps": 2}}
    found = estimate(**arguments | steps, rates=RATES, speed=1e9)
    assert found["training"]["batches"] == 12
    elsewhere = arguments | {"data": arguments["data"] | {"train": "some/data"}}
    found = estimate(**elsewhere, rates=RATES, speed=1e9)
    assert found["training"]["batches"] is None
    assert "set training.max_steps" in "\n".join(lines(found))


@pytest.mark.slow
def test_as_many_batches_as_the_run_has(tiny: Tiny, tmp_path: Path) -> None:
    """A share of less than one row holds out one, and one of 7.7 of them 8."""
    for share, batches in ((0.01, 23), (0.32, 16)):
        arguments = settings(
            tiny("llama"), tmp_path, data={"eval": share},
            training={"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 1},
        )  # fmt: skip
        assert estimate(**arguments, rates=RATES, speed=1e9)["training"]["batches"] == batches


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"max_length": 300}}, "data.max_length is 300, but .* has 256 positions"),
        ({"milora": {"protect_inputs": 4000}}, "milora.protect_inputs is 4000, but .* at most "),
        ({"milora": {"protect": {"q_prj": 2}}}, "milora.protect: 'q_prj' matches none of"),
        ({"milora": {"protect": 2}, "method": "pissa"}, "milora.protect: pissa starts from"),
        ({"milora": {"protect": 2}, "method": "full"}, "milora.protect: full fine-tuning has no"),
        ({"milora": {"start": "balanced"}, "method": "lora"}, "milora.start is balanced, which "),
        ({"gates": ["row.accuracy >= 0.5"]}, "is on row, which is no task of this run: did you"),
    ],
)
def test_what_a_run_refuses_is_refused_here(
    changes: dict[str, Any], said: str, tiny: Tiny, tmp_path: Path
) -> None:
    asked = settings(tiny("gpt2"), tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        estimate(**asked, rates=RATES, speed=1e9)
    with pytest.raises(UserError, match=said):
        run(asked, dry_run=True)


def test_gates_on_tasks_and_what_has_no_effect(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = settings(
        tiny("llama"), tmp_path, method="lora", milora={"text": "general.txt"},
        evaluate={"tasks": ["a/own.jsonl", "harness:arc_easy", {"file": "b.csv", "name": "mine"},
                            {"harness": "piqa"}]},
        gates=[f"{name}.accuracy > base" for name in ("own", "arc_easy", "mine", "piqa")],
    )  # fmt: skip
    estimate(**asked, rates=RATES, speed=1e9)
    assert "milora.text is not used" in capsys.readouterr().err


def test_the_rate_of_a_product_and_what_training_reaches_of_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        ticks = itertools.count()
        patch.setattr("time.perf_counter", lambda: float(next(ticks)))
        assert costs.product_rate(torch.float32, "cpu", (3, 4, 5)) == 2 * 3 * 4 * 5
    monkeypatch.setattr(costs, "product_rate", lambda *_: 1e12)
    found = estimate(**settings(tiny("llama"), tmp_path), rates=RATES)
    assert found["training"]["speed"] == 0.8e12


@pytest.mark.slow
def test_directions_are_counted(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes that a run has on its device of what is held and watched, and a dry run says it."""
    seen: list[int] = []

    def noting(matrices: Any, tops: Any, inputs: Any, used: Any) -> Any:
        found = held(matrices, tops, inputs, used)
        vectors = [x for one in tops.values() for x in (one.U, one.Vh)]
        vectors += [x for one in found.values() for x in one]
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in vectors}
        seen.append(sum(sizes.values()))
        return found

    monkeypatch.setattr("milora.begin.held", noting)
    text = tmp_path / "general.txt"
    text.write_text("of this and that " * 400)
    for place, (protect, inputs, top) in enumerate(
        [(2, 0, 0), (0, 3, 0), (0, None, 5), (3, 3, 5), (200, 0, 0), ({}, 0, 16)]
    ):
        asked = settings(
            tiny("llama"), tmp_path, output_dir=str(tmp_path / str(place)),
            milora={"protect": protect, "protect_inputs": inputs, "text": str(text),
                    "interference": {"top": top}},
        )  # fmt: skip
        expected = estimate(**asked, speed=1.0, rates=RATES)["memory"]["directions"]
        assert run(asked, dry_run=True)["memory_by_kind"]["directions"] == expected
        run(asked)
        assert seen[-1] == expected > 0
    asked["milora"]["interference"]["top"] = 0
    assert estimate(**asked, speed=1.0, rates=RATES)["memory"]["directions"] == 0
    sharded = {"speed": 1.0, "rates": RATES, "processes": 2, "sharded": True}
    asked["milora"]["protect"], asked["milora"]["interference"]["top"] = 2, 16
    first = estimate(**asked, **sharded)["memory"]["directions"]
    asked["milora"]["interference"]["top"] = 0
    assert estimate(**asked, **sharded)["memory"]["directions"] == first > 0


def test_the_verb(tiny: Tiny, tmp_path: Path) -> None:
    settings(tiny("llama"), tmp_path)  # the rows
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {tiny('llama')}\noutput_dir: {tmp_path / 'run'}\n"
        f"data: {{train: {tmp_path / 'rows.jsonl'}, max_length: 64}}\nlora: {{r: 4}}\n"
        "milora: {rank: {energy: 0.01}, protect: {energy: 0.5}}\n"
    )
    done = CliRunner().invoke(app, ["estimate", str(config), "--processes", "2", "--sharded"])
    assert done.exit_code == 0, done.output
    assert "memory of each of 2 devices, 16 x 64 tokens, sharded" in done.output
    assert "note: milora.rank" in done.output
    assert "note: milora.protect" in done.output
    done = CliRunner().invoke(app, ["estimate", str(config), "--sharded"])
    assert isinstance(done.exception, UserError)


def test_experts(tmp_path: Path) -> None:
    """Which rows go to which expert depends on values: followed, or refused in one sentence."""
    config = MixtralConfig(
        vocab_size=258, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with torch.device("meta"):
        skeleton = MixtralForCausalLM(config)
    lora = targeting.lora_config({"r": 2, "target_modules": ["q_proj"]})
    live, _ = prepared(skeleton, lora, "milora", TrainingArguments(use_cpu=True))
    with pytest.raises(UserError, match="--dry-run"):
        costs.step(live, ROWS, TOKENS, 258)
