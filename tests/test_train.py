"""A whole run on tiny models: the run folder, the invariants in it, and resuming."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from tiny_run import result_hashes, run, settings, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_pt_utils import LengthGroupedSampler

import milora.export
import milora.pretrained
import milora.preview
import milora.train
from milora.arguments import OneDevice
from milora.artefacts import export_run
from milora.callbacks import Reporter
from milora.data import IGNORED, encode
from milora.errors import DivergedError, UserError
from milora.export import PlainLora
from milora.files import locked, sha256
from milora.generation import answer_loss
from milora.logits import Pair
from milora.loop import Grouped
from milora.progress import Progress
from milora.rows import read_rows, split_rows
from milora.smaller import Smaller
from milora.verify import open_adapter, verify

Tiny = Callable[[str], Path]
FEW = {"max_steps": 2, "eval_strategy": "no"}


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of method milora, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("finished")
    run(settings(tiny("llama"), folder))
    return folder / "run"


@pytest.mark.slow
def test_the_run_folder(finished: Path, tiny: Tiny) -> None:
    assert files(finished) >= {
        "config.yaml",
        "run.json",
        "init/factors.safetensors",
        "init/spectra.json",
        "checkpoints/trained.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
        "adapter/milora.json",
        "adapter/tokenizer.json",
        "adapter/chat_template.jinja",
        "metrics.jsonl",
        "evaluation.json",
        "samples.jsonl",
    }
    record = json.loads((finished / "run.json").read_text())
    assert record["state"] == "done"
    assert record["base"]["unchanged"] is True
    assert 0 <= record["step0"]["difference"] <= 1e-5
    assert record["adapter"]["exported_against_trained"] <= 1e-5
    assert record["data"]["train"]["kept"] == 19
    assert record["parameters"]["trainable"] == sum(
        tensor.numel()
        for tensor in load_file(finished / "checkpoints/trained.safetensors").values()
    )
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2, 3, 4, 5, 6]
    losses = [m["loss"] for m in metrics if "loss" in m]
    assert losses[-1] < losses[0]
    assert [m["step"] for m in metrics if "eval_loss" in m] == [2, 4, 6]
    assert yaml.safe_load((finished / "config.yaml").read_text())["model"] == str(tiny("llama"))
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation["knowledge"][0]["kl"] > 0
    assert evaluation["tasks"]["rows"]["rows"] == 4
    assert len((finished / "samples.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_the_base_on_disk_is_untouched(tiny: Tiny, tmp_path: Path) -> None:
    base = tiny("tied")
    before = {name: sha256(base / name) for name in files(base)}
    run(settings(base, tmp_path))
    assert {name: sha256(base / name) for name in files(base)} == before


def test_one_artefact(finished: Path, tiny: Tiny) -> None:
    """No folder of the run but adapter/ loads as an adapter or a model."""
    folders = [finished, *(p for p in finished.rglob("*") if p.is_dir())]
    assert len(folders) > 3
    for folder in folders:
        if folder == finished / "adapter":
            AutoPeftModelForCausalLM.from_pretrained(folder)
            continue
        base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
        with pytest.raises(Exception, match=r"(?i)config|not|find"):
            PeftModel.from_pretrained(base, folder)
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)
    assert not list(finished.rglob("*.bin"))
    assert not list(finished.rglob("training_args*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "tied"])
def test_the_exported_adapter_is_what_was_trained(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    run(settings(tiny(kind), tmp_path, lora={"lora_alpha": 6, "use_rslora": True}))
    checks = verify(tmp_path / "run")
    assert [check.name for check in checks] == [
        "base",
        "step 0",
        "file",
        "format",
        "probes, base",
        "tokens",
        "probes, tuned",
    ]
    assert all(check.holds for check in checks)


def test_a_run_that_does_not_start_at_the_base_is_stopped(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("milora.begin.step0_difference", lambda *_: 2e-5)
    with pytest.raises(RuntimeError, match=r"step 0 is not the base: .* 2.0e-05 .* bound 1e-05"):
        run(settings(tiny("llama"), tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_run_that_changed_the_base_has_no_result(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state = milora.train.save_state

    def meddle(path: Path, model: Any, write: bool = True) -> None:
        with torch.no_grad():
            model.get_base_model().model.norm.weight[0] += 1
        save_state(path, model, write=write)

    monkeypatch.setattr(milora.train, "save_state", meddle)
    with pytest.raises(RuntimeError, match="the base changed during the run"):
        run(settings(tiny("llama"), tmp_path, training=FEW))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] != "done"


def test_an_export_that_is_not_what_was_trained_is_no_result(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = milora.export.save_plain_lora

    def other(folder: Path, plain: PlainLora, *rest: Any, **options: Any) -> int:
        factors = {name: one._replace(B=1.001 * one.B) for name, one in plain.factors.items()}
        return save(folder, plain._replace(factors=factors), *rest, **options)

    monkeypatch.setattr(milora.export, "save_plain_lora", other)
    with pytest.raises(RuntimeError, match="loaded by PEFT, is not the trained one"):
        run(settings(tiny("llama"), tmp_path, training=FEW))
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_starts_exactly_at_the_base(dtype: str, tiny: Tiny, tmp_path: Path) -> None:
    record = run(settings(tiny("llama"), tmp_path, dtype=dtype, training={"learning_rate": 1e-3}))
    assert record["step0"] == {"difference": 0.0, "bound": 0.0}
    assert all(check.holds for check in verify(tmp_path / "run"))
    # The probes do not tell so small an update from none: the hash of the file does.
    export_run(tmp_path / "run", tmp_path / "small", "lora", Smaller(2))
    for folder in (tmp_path / "run" / "adapter", tmp_path / "small"):
        assert all(check.holds for check in verify(folder))
        file = folder / "adapter_model.safetensors"
        nothing = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
        save_file(nothing, file, {"format": "pt"})
        assert "file" in [check.name for check in verify(folder) if not check.holds]


def test_autocast(tiny: Tiny, tmp_path: Path) -> None:
    record = run(settings(tiny("llama"), tmp_path, training={"bf16": True, "learning_rate": 1e-3}))
    assert record["step0"]["difference"] <= 1e-5
    assert all(check.holds for check in verify(tmp_path / "run"))


@pytest.mark.parametrize("start", ["published", "balanced"])
def test_zero_singular_values_are_reported(
    start: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[5:] = 0
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "base")
    run(settings(tmp_path / "base", tmp_path, milora={"start": start}))
    said = capsys.readouterr().err
    assert "4 singular values are zero" in said
    assert ("those pairs start with B = 0" in said) == (start == "published")
    trained = load_file(tmp_path / "run/checkpoints/trained.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert (trained[name].abs().amax(dim=0) > 0).all()  # every rank has learned


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pissa", "middle", "random", "lora"])
def test_the_other_methods(method: str, tiny: Tiny, tmp_path: Path) -> None:
    record = run(settings(tiny("llama"), tmp_path, method=method))
    assert record["adapter"]["rank"] == (4 if method == "lora" else 8)
    assert all(check.holds for check in verify(tmp_path / "run"))


def test_full_fine_tuning(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trains, evaluate_all = [], milora.train.evaluate_all

    def noting(pair: Pair, *args: Any) -> Any:
        trains.append(pair.model.training)
        return evaluate_all(pair, *args)

    monkeypatch.setattr(milora.train, "evaluate_all", noting)
    training = {"learning_rate": 1e-3, "eval_strategy": "no"}
    record = run(settings(tiny("tied"), tmp_path, method="full", training=training))
    assert trains == [False]  # evaluated without dropout
    assert record["state"] == "done"
    assert record["parameters"]["trainable"] == record["parameters"]["all"]
    assert not (tmp_path / "run" / "adapter").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    base = AutoModelForCausalLM.from_pretrained(tiny("tied"))
    assert not torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    (kept,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())["knowledge"]
    assert kept["kl"] > 0
    # The Trainer turns it off, and a server would compute every token anew.
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["use_cache"]


def test_two_runs_are_equal_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        rows = {"train": str(write_rows(tmp_path / "rows.jsonl"))}
        run(settings(tiny("gpt2"), tmp_path / name, data=rows))
    a, b = (load_file(tmp_path / n / "run/adapter/adapter_model.safetensors") for n in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a | b)


@pytest.mark.slow
def test_accumulating_gradients_gives_the_same_adapter(tiny: Tiny, tmp_path: Path) -> None:
    """4 x 2 equals 1 x 8, although the answers are of unequal length: the loss is per token."""
    found = []
    for size, steps in ((8, 1), (2, 4)):
        folder = tmp_path / str(size)
        folder.mkdir()
        training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        run(settings(tiny("llama"), folder, lora={"lora_dropout": 0.0}, training=training))
        found.append(load_file(folder / "run/checkpoints/trained.safetensors"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_adapter(tiny: Tiny, tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        folder = tmp_path / str(on)
        folder.mkdir()
        run(settings(tiny("llama"), folder, training={"gradient_checkpointing": on}))
        found.append(load_file(folder / "run/checkpoints/trained.safetensors"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_the_first_loss_is_that_of_the_base(tiny: Tiny, tmp_path: Path) -> None:
    """An independent forward over the same rows: mask, normalisation and step 0 in one figure."""
    arguments = settings(
        tiny("llama"),
        tmp_path,
        lora={"lora_dropout": 0.0},
        training={"per_device_train_batch_size": 10, "gradient_accumulation_steps": 2},
    )
    run(arguments)
    train, _ = split_rows(read_rows(arguments["data"]["train"]).rows, 0.2, 0)
    assert len(train) == 19  # both batches of the first step
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    total, count = 0.0, 0
    for row in train:
        example: Any = encode(tokenizer, row, 64)
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        for place, label in enumerate(example.labels):
            if label != IGNORED:
                total, count = total - float(logits[place - 1, label]), count + 1
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(total / count, rel=1e-5)
    assert answer_loss(model, tokenizer, train) == (pytest.approx(total / count, rel=1e-5), 19)


@pytest.mark.slow
def test_the_held_out_loss_is_the_mean_over_labels(tiny: Tiny, tmp_path: Path) -> None:
    """However many rows are computed at once, and as the evaluation has it.

    A last batch that is not full is dropped in training alone.
    """
    lengths, held = (1, 30, 2, 17, 5), tmp_path / "held.jsonl"
    rows = [{"prompt": "say", "completion": "ab cd" * length} for length in lengths]
    held.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for size in (1, 2, 4, 5, 8):
        folder = tmp_path / str(size)
        folder.mkdir()
        training = {"per_device_eval_batch_size": size, "max_steps": 1, "eval_steps": 1}
        training["dataloader_drop_last"] = size in (4, 8)
        data = {"eval": str(held), "max_length": 256}
        run(settings(tiny("llama"), folder, data=data, training=training))
        lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
        found += [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(found) == 5
    assert found == pytest.approx([found[0]] * 5, rel=1e-6)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "1/run/adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    loss, _ = answer_loss(model, tokenizer, read_rows(held).rows)
    assert found[0] == pytest.approx(loss, rel=1e-5)


def test_weight_decay_is_for_the_factors_alone(tiny: Tiny, tmp_path: Path) -> None:
    found = {}
    for decay in (0.0, 50.0):
        folder = tmp_path / str(decay)
        folder.mkdir()
        lora = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
        training = {"weight_decay": decay, "max_steps": 2, "warmup_steps": 0}
        run(settings(tiny("llama"), folder, method="lora", lora=lora, training=training))
        tensors = load_file(folder / "run/checkpoints/trained.safetensors")
        for kind in ("lora_A", "lm_head"):
            some = [tensor for name, tensor in tensors.items() if kind in name]
            found[kind, decay] = sum(float(tensor.norm()) for tensor in some)
    assert found["lora_A", 50.0] < 0.8 * found["lora_A", 0.0]
    assert found["lm_head", 50.0] > 0.95 * found["lm_head", 0.0]


@pytest.mark.slow
def test_weight_decay_reaches_the_optimizer(tiny: Tiny, tmp_path: Path) -> None:
    size = {}
    for decay in (0.0, 0.5):
        folder = tmp_path / str(decay)
        folder.mkdir()
        run(settings(tiny("llama"), folder, method="lora", training={"weight_decay": decay}))
        tensors = load_file(folder / "run/checkpoints/trained.safetensors")
        size[decay] = sum(float(tensor.norm()) for tensor in tensors.values())
    assert size[0.5] < 0.99 * size[0.0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["milora", "pissa", "random"])
def test_weight_decay_shrinks_the_update(method: str, tiny: Tiny, tmp_path: Path) -> None:
    """And not B A, which would take the components that it starts from out of the model."""
    size, kept = {}, {}
    for decay in (0, 30, 100):  # times the rate, 0.01, of what was learned is taken off a step
        folder = tmp_path / str(decay)
        folder.mkdir()
        training = {"weight_decay": decay, "lr_scheduler_type": "constant", "warmup_steps": 0}
        run(settings(tiny("llama"), folder, method=method, training=training))
        update = load_file(folder / "run/adapter/adapter_model.safetensors")
        size[decay] = sum(
            float((update[n.replace("lora_A", "lora_B")] @ A).square().sum())
            for n, A in update.items()
            if "lora_A" in n
        )
        kept[decay] = json.loads((folder / "run/evaluation.json").read_text())["knowledge"][0]["kl"]
    assert 0 < size[30] < 0.6 * size[0]
    assert size[100] < 1e-12
    assert kept[100] < 1e-8 < kept[30] < kept[0]  # what rounding makes of a KL of 0


def test_a_tracker_gets_the_figures(tiny: Tiny, tmp_path: Path) -> None:
    run(settings(tiny("llama"), tmp_path, training={"report_to": "tensorboard"}))
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.v1", "min-max", "with space", "slash/"])
def test_folder_names_that_broke_other_tools(name: str, tiny: Tiny, tmp_path: Path) -> None:
    arguments = settings(tiny("llama"), tmp_path) | {"output_dir": f"{tmp_path}/{name}"}
    run(arguments)
    assert all(check.holds for check in verify(tmp_path / name))


def test_one_process_at_a_run(tiny: Tiny, tmp_path: Path) -> None:
    """A command that was given twice: the second is refused, and goes on when the first is gone."""
    arguments = settings(tiny("llama"), tmp_path)
    other = [
        sys.executable, "-c",
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1])\n"
        "lock.acquire(); print('held', flush=True); time.sleep(600)",
        str(tmp_path / ".run.lock"),
    ]  # fmt: skip
    with subprocess.Popen(other, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"another process is at work on .*/run: wait for it"):
            run(arguments)
        assert not (tmp_path / "run").exists()
        holder.kill()
    run(arguments)
    assert not (tmp_path / ".run.lock").exists()


def test_a_run_that_began_and_ended_meanwhile_is_not_taken_over(
    finished: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check of the folder and its lock."""
    arguments = settings(tiny("llama"), tmp_path, seed=7)

    def locked_late(path: Path, error: Exception) -> AbstractContextManager[None]:
        shutil.copytree(finished, tmp_path / "run")
        return locked(path, error)

    monkeypatch.setattr("milora.train.locked", locked_late)
    with pytest.raises(UserError, match="already holds another run"):
        run(arguments)
    assert json.loads((tmp_path / "run/run.json").read_text())["seed"] == 0


def test_early_stopping_keeps_the_best(tiny: Tiny, tmp_path: Path) -> None:
    training = {"learning_rate": 0.3, "max_steps": 40, "save_steps": 1, "eval_steps": 1}
    run(settings(tiny("llama"), tmp_path, early_stopping_patience=2, training=training))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = {m["step"]: m["eval_loss"] for m in map(json.loads, lines) if "eval_loss" in m}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 2 < 40
    kept = load_file(tmp_path / f"run/checkpoints/checkpoint-{best}/trained.safetensors")
    final = load_file(tmp_path / "run/checkpoints/trained.safetensors")
    assert all(torch.equal(final[name], kept[name]) for name in final)
    assert json.loads((tmp_path / "run/run.json").read_text())["result_step"] == best


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 20},
         r"rows\.jsonl has 19 rows to train on, fewer than one batch of 20"),
        ({"adam_beta1": 1.5}, "training: Invalid beta parameter"),
    ],
)  # fmt: skip
def test_what_would_train_nothing_is_refused_before_decomposing(
    training: dict[str, Any], said: str, tiny: Tiny, tmp_path: Path
) -> None:
    arguments = settings(tiny("llama"), tmp_path, training=training)
    for dry_run in (True, False):
        with pytest.raises(UserError, match=said):
            run(arguments, dry_run=dry_run)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("again", [6, 7, 8])
def test_rows_grouped_by_length_resume_as_unbroken(again: int, tiny: Tiny, tmp_path: Path) -> None:
    """In the second epoch, of five steps each: at its beginning, and within it."""
    training = {
        "train_sampling_strategy": "group_by_length", "save_steps": 1, "max_steps": 12,
        "save_total_limit": 50,
    }  # fmt: skip
    arguments = settings(tiny("llama"), tmp_path, training=training)
    run(arguments)
    checkpoints = tmp_path / "run/checkpoints"
    wanted = sha256(checkpoints / "trained.safetensors")
    (checkpoints / "trained.safetensors").unlink()
    for step in range(again, 13):
        shutil.rmtree(checkpoints / f"checkpoint-{step}")
    run(arguments, resume=True)
    assert sha256(checkpoints / "trained.safetensors") == wanted


@pytest.mark.slow
def test_an_evaluation_at_the_start_is_not_done_again(tiny: Tiny, tmp_path: Path) -> None:
    """It would count against the patience: the best state is no better than itself."""
    training = {"eval_on_start": True, "save_steps": 1, "eval_steps": 1, "save_total_limit": 50}
    arguments = settings(tiny("llama"), tmp_path, early_stopping_patience=1, training=training)
    run(arguments)
    checkpoints, log = tmp_path / "run/checkpoints", tmp_path / "run/metrics.jsonl"
    wanted = sha256(checkpoints / "trained.safetensors")
    lines = len(log.read_text().splitlines())
    (checkpoints / "trained.safetensors").unlink()
    for step in range(3, 7):
        shutil.rmtree(checkpoints / f"checkpoint-{step}")
    run(arguments, resume=True)
    assert sha256(checkpoints / "trained.safetensors") == wanted
    assert len(log.read_text().splitlines()) == lines


def test_groups_are_of_the_rows_of_a_step_of_all_processes() -> None:
    lengths = [(7 * i) % 30 for i in range(60)]

    def order(size: int, processes: int, epoch: int) -> list[int]:
        own = LengthGroupedSampler(size, lengths=lengths)
        args: Any = SimpleNamespace(world_size=processes, seed=3)
        return list(Grouped(own, args, lambda: epoch))

    assert order(8, 1, 1) == order(4, 2, 1) != order(8, 1, 2)
    assert sorted(order(8, 1, 1)) == list(range(60))


def test_a_loss_that_is_no_number_stops_the_run(tiny: Tiny, tmp_path: Path) -> None:
    training = {"learning_rate": 1e30, "max_grad_norm": 0.0}
    with pytest.raises(UserError, match=r"diverged; use a lower training\.learning_rate"):
        run(settings(tiny("llama"), tmp_path, training=training))
    (tmp_path / "training").mkdir()  # and where no held-out row tells
    training |= {"eval_strategy": "no", "logging_steps": 50}
    arguments = settings(tiny("llama"), tmp_path / "training", training=training)
    with pytest.raises(DivergedError, match=r"train_loss is nan .* diverged"):
        run(arguments)
    with pytest.raises(DivergedError, match=r"lora_A.* holds NaN .* at step 6: .* diverged"):
        run(arguments, resume=True)  # no step is left to do
    assert not (tmp_path / "training/run/checkpoints/trained.safetensors").exists()


@pytest.mark.parametrize(
    ("rate", "said", "changes"),
    [
        (1e39, "lora_A.* holds NaN or infinite values at step 1", {}),
        (1e39, "weight holds NaN or infinite values at step 1", {"method": "full"}),
        (1e30, "logits that are no numbers", {}),
        (1e4, "logits that are all zero", {}),
        (1e30, "logits that are no numbers", {"lora": {"modules_to_save": ["lm_head"]}}),
    ],
)
def test_a_last_step_that_leads_to_no_numbers_has_no_result(
    rate: float, said: str, changes: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    """Of it there is no loss."""
    training = FEW | {"max_steps": 1, "learning_rate": rate, "warmup_steps": 0}
    arguments = settings(tiny("llama"), tmp_path, training=training, **changes)
    for resume in (False, True):
        with pytest.raises(DivergedError, match=rf"{said}.*: the run has diverged; use a lower"):
            run(arguments, resume=resume)
    assert not {"adapter", "model"} & {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.slow
def test_resume_goes_on_where_the_run_stood(
    finished: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milora import train as module

    arguments = settings(tiny("llama"), tmp_path)
    wanted = json.loads((finished / "metrics.jsonl").read_text().splitlines()[4])

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_state", stop)  # after the last step, before the result
        with pytest.raises(KeyboardInterrupt):
            run(arguments)
    with pytest.raises(UserError, match="already holds another run"):
        run(arguments)
    with pytest.raises(UserError, match="configuration has changed: seed was 0 and is 1"):
        run(arguments | {"seed": 1}, resume=True)
    stored = tmp_path / "run/config.yaml"
    before = stored.read_text()
    stored.write_text(before + "tokenizer: {eos_token: </s>}\n")  # and now it is left out
    with pytest.raises(UserError, match=r"has changed: tokenizer was {.*} and is None"):
        run(arguments, resume=True)
    stored.write_text(before)

    def no_svd(*args: object, **kwargs: object) -> None:
        raise AssertionError("decomposed again")

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", no_svd)
        run(arguments, resume=True)
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines if "loss" in m] == [1, 2, 3, 4, 5, 6]
    assert lines[4]["loss"] == wanted["loss"]
    took = json.loads((tmp_path / "run/run.json").read_text())["seconds"]["training"]
    assert took == max(m.get("seconds", 0) for m in lines) > 0  # before it was stopped
    ours, theirs = result_hashes(tmp_path / "run"), result_hashes(finished)
    for name in ("init/factors.safetensors", "adapter/adapter_model.safetensors"):
        assert ours[name] == theirs[name]
    rows = Path(arguments["data"]["train"])
    told = rows.read_text()
    rows.write_text(told.replace("0 + 0", "0 + 00"))
    with pytest.raises(UserError, match=r"rows.jsonl has changed since the run in .* began"):
        run(arguments, resume=True)
    rows.write_text(told)
    # Resuming a finished run changes nothing.
    run(arguments, resume=True)
    assert result_hashes(tmp_path / "run") == ours


@pytest.mark.slow
def test_half_a_state_is_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without it the run goes on from what is before it, to the same result."""
    arguments = settings(tiny("llama"), tmp_path)
    run(arguments)
    wanted, home = result_hashes(tmp_path / "run"), tmp_path / "run" / "checkpoints"
    for name, length in (
        ("trained.safetensors", 0.5),
        ("checkpoint-6/trained.safetensors", 0.5),
        ("checkpoint-6/optimizer.pt", 0.5),
        ("checkpoint-6/scheduler.pt", 0),
        ("checkpoint-6/rng_state.pth", 0.5),
    ):
        folder = (home / name).parent
        kept = tmp_path / "kept"
        shutil.copytree(home, kept)
        whole = (home / name).read_bytes()
        if folder != home:
            (home / "trained.safetensors").unlink()
            edit = home / "checkpoint-6/trainer_state.json"  # not ended, so that all is read
            state = json.loads(edit.read_text())
            state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"] = False
            edit.write_text(json.dumps(state))
        (home / name).write_bytes(whole[: int(len(whole) * length)])
        with pytest.raises(UserError, match=r"is damaged .*: remove it, and `--resume` goes on"):
            run(arguments, resume=True)
        if folder == home:
            (home / name).unlink()
        else:
            shutil.rmtree(folder)
        run(arguments, resume=True)
        assert result_hashes(tmp_path / "run") == wanted, name
        shutil.rmtree(home)
        kept.rename(home)


@pytest.mark.slow
def test_initial_factors_that_are_gone_are_not_made_again(tiny: Tiny, tmp_path: Path) -> None:
    arguments = settings(tiny("llama"), tmp_path)
    run(arguments)
    (tmp_path / "run" / "init" / "factors.safetensors").unlink()
    with pytest.raises(UserError, match=r"factors.safetensors is gone, and what .* put it back"):
        run(arguments, resume=True)
    (tmp_path / "run" / "checkpoints" / "trained.safetensors").unlink()
    with pytest.raises(UserError, match=r"factors.safetensors is gone"):
        run(arguments, resume=True)


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_resumed(tiny: Tiny, tmp_path: Path) -> None:
    """Before milora.start, protect_inputs and text could be said."""
    arguments = settings(tiny("llama"), tmp_path)
    run(arguments)
    wanted = result_hashes(tmp_path / "run")
    stored = tmp_path / "run/config.yaml"
    asked = yaml.safe_load(stored.read_text())
    for key in ("start", "protect_inputs", "text"):
        del asked["milora"][key]
    stored.write_text(yaml.safe_dump(asked))
    (tmp_path / "run/evaluation.json").unlink()
    for key, before, now in (("start", "published", "balanced"), ("text", "sampled", "a.txt")):
        said = rf"has changed: milora\.{key} was '{before}' and is '{now}'"
        with pytest.raises(UserError, match=said):
            run(settings(tiny("llama"), tmp_path, milora={key: now}), resume=True)
    run(arguments, resume=True)
    assert result_hashes(tmp_path / "run") == wanted


@pytest.mark.parametrize("damage", ["milora: [", "- a\n", "milora: 3\n", None])
def test_a_configuration_that_is_damaged_or_gone(
    damage: str | None, finished: Path, tiny: Tiny, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    stored = tmp_path / "run/config.yaml"
    stored.unlink()
    if damage:
        stored.write_text(damage)
    with pytest.raises(
        UserError, match=r"run/config\.yaml is (damaged \(.*|not there): put .*back"
    ):
        run(settings(tiny("llama"), tmp_path), resume=True)


def test_lines_that_a_kill_cut_are_left_out(tmp_path: Path) -> None:
    path, whole = tmp_path / "metrics.jsonl", '{"step": 1, "interference": {"q": [0.1]}}'
    path.write_text(f"{whole}\n{whole[:-1]}")
    with Progress() as progress:
        assert Reporter(path, tmp_path / "checkpoint-2", progress).kept == [whole]


def test_a_folder_that_cannot_be_written_is_refused_before_decomposing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = settings(tiny("llama"), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"output_dir: .*/file/run cannot be written: .*/file is no"
    ):
        run(arguments | {"output_dir": str(tmp_path / "file" / "run")}, dry_run=True)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, *how: path != tmp_path and real(path, *how))
    with pytest.raises(UserError, match=r"output_dir: .*/deep/run cannot be written: .* no folder"):
        run(arguments | {"output_dir": str(tmp_path / "deep" / "run")})


def test_resuming_on_a_changed_base_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(base)
    arguments = settings(base, tmp_path)
    run(arguments)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(base)
    with pytest.raises(UserError, match="wrong base"):
        run(arguments, resume=True)
    with pytest.raises(UserError, match=r"wrong base: .* differs .* in 1 weights"):
        open_adapter(tmp_path / "run")


def test_exports_of_a_finished_run(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    said = export_run(finished, tmp_path / "merged", "merged").said
    assert "merged weights" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    opened = open_adapter(finished)
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        wanted = opened.model.cpu()(input_ids=ids).logits
        found = merged(input_ids=ids).logits
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    said = export_run(finished, tmp_path / "exact", "lora").said
    assert "rank 8, exact" in said
    assert all(check.holds for check in verify(tmp_path / "exact"))
    said = export_run(finished, tmp_path / "small", "lora", Smaller(2)).said
    assert "rank 2; relative error of the update" in said
    assert all(check.holds for check in verify(tmp_path / "small"))
    assert "plain LoRA of rank 2; relative" in (tmp_path / "small" / "README.md").read_text()
    for arguments, reason in (
        ((tmp_path / "small", "lora"), "exists already"),
        ((tmp_path / "new", "lora", Smaller(9)), "has rank 8"),
        ((tmp_path / "new", "zip"), "use lora, merged, gguf or gguf-merged"),
        ((tmp_path / "new", "merged", Smaller(2)), "go with --to lora"),
        ((tmp_path / "new", "lora", Smaller(2, 0.1)), "give one of them"),
        ((tmp_path / "new", "lora", Smaller(max_error=1.5)), "between 0 and 1"),
        ((tmp_path / "new", "lora", Smaller(spread=True)), "needs --rank or --max-error"),
        ((tmp_path / "new", "lora", Smaller(bits=4)), "8 and 32 are known"),
        ((tmp_path / "new", "lora", Smaller(max_error=1e-4, bits=8)), "rounding alone"),
    ):
        with pytest.raises(UserError, match=reason):
            export_run(finished, *arguments)
    assert not (tmp_path / "new").exists()


def test_verify_sees_a_changed_adapter_and_a_wrong_base(
    finished: Path, tiny: Tiny, tmp_path: Path
) -> None:
    export_run(finished, tmp_path / "copy", "lora")
    path = tmp_path / "copy" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] *= 1.5
    save_file(tensors, path, {"format": "pt"})
    failed = [check.name for check in verify(tmp_path / "copy") if not check.holds]
    assert failed == ["file", "probes, tuned"]
    export_run(finished, tmp_path / "mended", "lora")
    template = tmp_path / "mended" / "chat_template.jinja"
    written = template.read_text()
    for changed in ("{% for m in messages %}XX{{ m.content }}{% endfor %}", None):
        template.unlink() if changed is None else template.write_text(changed)
        failed = [check.name for check in verify(tmp_path / "mended") if not check.holds]
        assert failed == ["tokens"]
    template.write_text("{# strftime_now #}" + written)
    assert all(check.holds for check in verify(tmp_path / "mended"))
    for other in ("qwen2", "gpt2"):
        with pytest.raises(UserError, match="wrong base"):
            verify(finished, str(tiny(other)))
    base = tmp_path / "base"
    shutil.copytree(tiny("llama"), base)
    config = (base / "config.json").read_text()
    changed = json.loads(config) | {"rms_norm_eps": 0.5}
    (base / "config.json").write_text(json.dumps(changed))
    failed = {check.name: check for check in verify(finished, str(base)) if not check.holds}
    assert "its config.json, is not as it was" in failed["probes, base"].detail
    (base / "config.json").write_text(config)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for ask in (verify, open_adapter):
        with pytest.raises(UserError, match=r"wrong base: .* but others differ"):
            ask(finished, str(base))


def test_chat_answers_from_both(finished: Path) -> None:
    from milora.chat import replies

    opened = open_adapter(finished)
    said = list(replies(Pair(opened.model), opened.base.tokenizer, ["1 + 1 =", "2 + 2 ="], 4))
    assert len(said) == 2
    assert said == list(
        replies(Pair(opened.model), opened.base.tokenizer, ["1 + 1 =", "2 + 2 ="], 4)
    )


@pytest.mark.slow
def test_a_dry_run_counts_all_that_is_decomposed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    real = milora.preview.components

    def noting(weight: Any, rank: int, component: Any) -> Any:
        taken.append(component)
        return real(weight, rank, component)

    monkeypatch.setattr(milora.preview, "components", noting)
    for method, top, wanted in (
        ("milora", 16, ["minor"] * 4 + ["principal"]), ("milora", 0, ["minor"] * 4),
        ("lora", 16, ["principal"]), ("lora", 0, []),
    ):  # fmt: skip
        taken.clear()
        asked = settings(tiny("llama"), tmp_path, method=method)
        asked["milora"] |= {"interference": asked["milora"]["interference"] | {"top": top}}
        assert (run(asked, dry_run=True)["decomposition_seconds"] > 0) == bool(wanted)
        assert taken == wanted


@pytest.mark.slow
def test_a_dry_run_writes_nothing_and_shows_what_is_trained(tiny: Tiny, tmp_path: Path) -> None:
    plan = run(settings(tiny("llama"), tmp_path), dry_run=True)
    assert not (tmp_path / "run").exists()
    trained = "".join(text for text, is_trained in plan["samples"][0] if is_trained)
    assert trained == "0</s>"
    assert len(plan["samples"]) == 3
    assert set(plan["coverage"]["adapted"]) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert plan["coverage"]["not_adapted"] == {"lm_head": {"weights": 1, "parameters": 258 * 32}}
    assert plan["memory_bytes"] > 0
    assert "milora.keep" not in plan["estimate"]
    plan = run(settings(tiny("llama"), tmp_path, milora={"keep": {}}), dry_run=True)
    assert plan["estimate"].endswith("; milora.keep: its passes over general text are not counted")


def test_a_dry_run_counts_the_batches_of_each_process(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, training = milora.train.plan, {"max_steps": -1, "num_train_epochs": 2}

    def of_two(*args: Any) -> Any:
        monkeypatch.setattr(OneDevice, "world_size", 2)
        return plan(*args)

    arguments = settings(tiny("llama"), tmp_path, training=training)
    size = arguments["training"]["per_device_train_batch_size"]
    found = run(arguments, dry_run=True)
    monkeypatch.setattr(milora.train, "plan", of_two)
    shared = run(arguments, dry_run=True)
    rows = len(Path(arguments["data"]["train"]).read_text().splitlines())
    assert 2 * math.ceil(0.5 * rows / size) <= found["batches"] <= 2 * math.ceil(rows / size)
    assert shared["batches"] in (found["batches"] / 2, (found["batches"] + 2) / 2)


def test_test_rows_that_took_part_are_counted(
    finished: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads((finished / "run.json").read_text())["data"]["test_overlap"]
    assert found == {"rows": {"train": 3, "eval": 1}}
    card = (finished / "adapter" / "README.md").read_text()
    assert (
        "- of the questions of `rows` 3 also stand in the training rows and 1 in the held" in card
    )
    rows = write_rows(tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    rows[0] = '{"prompt": "Sum?", "completion": "1"}\n'
    (tmp_path / "own.jsonl").write_text("".join(rows[:2]))
    (tmp_path / "held.jsonl").write_text(rows[0].replace("Sum", "SUM"))
    held = {"eval": str(tmp_path / "held.jsonl")}
    tasks = {"tasks": [str(tmp_path / "own.jsonl")]}
    run(settings(tiny("llama"), tmp_path, data=held, evaluate=tasks), dry_run=True)
    said = capsys.readouterr().err
    assert "warning: 1 questions of the task own also stand in the training rows" in said
    assert "warning: 1 questions of the task own also stand in the held-out rows" in said


def test_questions_by_likelihood_that_took_part_are_counted(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked in the words of their own files, and in those of the prompt."""
    likely: dict[str, Any] = {"protocol": "likelihood", "prompt": "Q: {question} A:"}
    instruction = (
        "Please choose: What  is it?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2"
    )
    files = {
        "plain": {"question": "How many?", "choices": ["1", "2"], "answer": 0},
        "shown": {"question": "How much?", "choices": ["1", "2"], "answer": 1},
        "lists": {"instruction": instruction, "answer": "answer2"},
        "other": {"question": "Where?", "choices": ["1", "2"], "answer": 0},
    }
    for name, record in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([record]))
    asked = ("how many?", "Q: How much? A:", instruction.replace("  ", " "), "Q: Who? A:")
    train = [{"prompt": prompt, "completion": "1"} for prompt in asked]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    write_rows(tmp_path / "held.jsonl")
    data: dict[str, Any] = {"train": str(tmp_path / "train.jsonl"), "max_length": 256}
    data["eval"] = str(tmp_path / "held.jsonl")
    tasks = [likely | {"file": str(tmp_path / f"{name}.json")} for name in files]
    run(settings(tiny("llama"), tmp_path, data=data, evaluate={"tasks": tasks}), dry_run=True)
    said = capsys.readouterr().err
    for name in files:
        warned = f"warning: 1 questions of the task {name} also stand in the training rows" in said
        assert warned == (name != "other"), name
    assert "held-out rows" not in said


@pytest.mark.parametrize("name", ["knowledge", "interference", "continual", "knowledge.own"])
def test_a_task_cannot_have_the_name_of_another_measure(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    tasks = {"tasks": [{"file": str(write_rows(tmp_path / "rows.jsonl")), "name": name}]}
    with pytest.raises(UserError, match=rf"evaluate\.tasks: gates read '{name}' as a measure"):
        run(settings(tiny("llama"), tmp_path, evaluate=tasks), dry_run=True)


def test_the_held_out_file_is_read_as_carefully(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": 1, "id": 2}\n{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n')
    data = {"eval": str(held), "format": "prompt-completion", "on_bad_row": "skip"}
    record = run(settings(tiny("llama"), tmp_path, data=data, evaluate={"tasks": []}))
    assert (record["data"]["skipped"], record["data"]["eval"]["kept"]) == (2, 1)
    said = capsys.readouterr().err
    assert f"{held}: 1 rows, read as prompt-completion; columns not used: id" in said
    assert f"skipped: {held}, line 3: 'completion' is missing" in said
    for format, row in (
        ("classification", '{"text": "a", "label": "b"}'),
        ("text", '{"text": ""}'),
    ):
        held.write_text(row)
        with pytest.raises(
            UserError, match=rf"held\.jsonl is read as {format} and .*rows\.jsonl as"
        ):
            run(
                settings(
                    tiny("llama"),
                    tmp_path,
                    data={"eval": str(held)},
                    output_dir=str(tmp_path / "other"),
                ),
                dry_run=True,
            )


def test_held_out_rows_of_the_hub_are_its_test_split(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "1 + 1 =", "completion": "2"}
    rows = {"train": [row], "test": [row] * 3}
    monkeypatch.setattr("datasets.load_dataset", lambda source, split: rows[split])
    run(settings(tiny("llama"), tmp_path, data={"eval": "some/set"}), dry_run=True)
    assert "eval: 3 rows kept" in capsys.readouterr().err


def test_resuming_after_the_last_step_of_early_stopping(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from milora import train as module

    training = {"learning_rate": 0.3, "max_steps": 40, "save_steps": 1, "eval_steps": 1}
    arguments = settings(tiny("llama"), tmp_path, early_stopping_patience=2, training=training)
    real = module.save_state

    def stop(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            run(arguments)
    final = tmp_path / "run/checkpoints/trained.safetensors"
    wanted = sha256(final)
    steps = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
    final.unlink()
    run(arguments, resume=True)
    assert sha256(final) == wanted
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == steps


def test_lengths_that_the_model_cannot_take_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    arguments = settings(tiny("gpt2"), tmp_path, data={"max_length": 300})
    with pytest.raises(UserError, match=r"data.max_length is 300, but .* has 256 positions"):
        run(arguments)
    tasks = {"tasks": [{"file": arguments["data"]["train"], "max_new_tokens": 250}]}
    with pytest.raises(UserError, match=r"rows.jsonl, line 1: the question and max_new_tokens"):
        run(settings(tiny("gpt2"), tmp_path, evaluate=tasks))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_auto_is_what_it_was_when_the_run_is_resumed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine it may mean another dtype, and so another base."""
    arguments = settings(tiny("llama"), tmp_path, dtype="auto")
    run(arguments)
    (tmp_path / "run/evaluation.json").unlink()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    real = milora.pretrained.dtype_of
    monkeypatch.setattr(
        milora.pretrained, "dtype_of", lambda n: real("bfloat16" if n == "auto" else n)
    )
    record = run(arguments, resume=True)
    assert record["base"]["dtype"] == "float32"
    assert record["base"]["unchanged"]
