"""The configuration file: strict keys, real numbers, one sentence for all that is wrong."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from milora.arguments import HELD, check_here, training_arguments
from milora.config import DEFAULT, Config, load_config
from milora.errors import UserError

MINIMAL = "model: m\noutput_dir: r\ndata: {train: t.jsonl}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_annotated_default_states_the_true_defaults(tmp_path: Path) -> None:
    shown = load(tmp_path, DEFAULT).model_dump()
    real = load(
        tmp_path, "model: smollm2-135m\noutput_dir: runs/first\ndata: {train: data/train.jsonl}\n"
    ).model_dump()
    keys = {field.alias or name for name, field in Config.model_fields.items()}
    assert set(yaml.safe_load(DEFAULT)) == keys
    assert shown.pop("training") == {"num_train_epochs": 3, "per_device_train_batch_size": 16}
    assert f"# learning_rate: {HELD:.1e}".replace("e-03", "e-3") in DEFAULT
    assert real.pop("training") == {}  # arguments.py fills these in, the rate by method
    assert shown == real
    arguments = training_arguments("milora", {}, tmp_path, 0, 0, None)
    assert arguments.learning_rate == HELD
    assert training_arguments("milora", {}, tmp_path, 0, 0).learning_rate == 1e-4  # published
    assert (arguments.num_train_epochs, arguments.per_device_train_batch_size) == (3, 16)


@pytest.mark.parametrize(
    ("override", "scale", "rate"),
    [("lora.r=16", 1, 1e-3), ("method=lora", 1, 3e-4), ("milora=published", 1, 1e-4)],
)
def test_what_the_annotated_default_leaves_to_other_keys(
    override: str, scale: float, rate: float, tmp_path: Path
) -> None:
    config = load(tmp_path, DEFAULT, override)
    assert config.lora.lora_alpha == scale * config.lora.r
    begin = config.milora.start
    arguments = training_arguments(config.method, config.training, tmp_path, 0, 0, begin)
    assert arguments.learning_rate == rate


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("milora.protect=abc", "milora.protect is 'abc': it is a whole number of at least 0, {en"),
        ("milora.protect=-3", "milora.protect is -3: it is a whole number of at least 0"),
        ("milora.text=null", "milora.text is None: it is sampled, or text files that"),
        ("milora.text=[]", "milora.text is []: it is sampled, or text files that"),
        ("milora.rank=8", "milora.rank is 8: it is {energy: 0.001} or {parameters: 2000000}; one"),
        ("quantization=nf8", "quantization is 'nf8': it is nf4, int8, or keys of BitsAndBytes"),
        ("milora=Published", "milora is 'Published': it is a block of keys, or published"),
        ("data=t.jsonl", "data is 't.jsonl': it is a block of keys"),
        ("milora.protect_inputs=-1", "milora.protect_inputs is -1: input should be greater than"),
        ("seed=4294967296", "seed is 4294967296: input should be less than or equal to 4294967295"),
    ],
)
def test_keys_of_several_forms(override: str, said: str, tmp_path: Path) -> None:
    found = refused(tmp_path, MINIMAL, override)
    assert said in found
    assert found.count(" is ") <= 3


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("learning_rate", -1, "a number of at least 0"),
        ("learning_rate", "abc", "a number of at least 0"),
        ("learning_rate", math.nan, "a number of at least 0"),
        ("learning_rate", math.inf, "a number of at least 0"),
        ("num_train_epochs", 0, "a number above 0"),
        ("num_train_epochs", "abc", "a number above 0"),
        ("per_device_train_batch_size", 0, "a whole number of at least 1"),
        ("gradient_accumulation_steps", 1.5, "a whole number of at least 1"),
        ("per_device_train_batch_size", 4.0, "a whole number of at least 1"),
        ("max_steps", 0, "a whole number of at least 1, or -1 for all epochs,"),
        ("max_steps", 6.0, "a whole number of at least 1, or -1 for all epochs,"),
        ("max_steps", "5", "a whole number of at least 1, or -1 for all epochs,"),
        ("max_steps", None, "a whole number of at least 1, or -1 for all epochs,"),
        ("save_total_limit", "2", "a whole number of at least 1"),
        ("eval_accumulation_steps", "x", "a whole number of at least 1"),
        ("eval_delay", "a", "a number of at least 0"),
        ("dataloader_num_workers", -1, "a whole number of at least 0"),
        ("logging_steps", "abc", "a number above 0"),
    ],
)
def test_numbers_of_training(key: str, value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"training\.{key} is {value!r}: {said} is needed"):
        training_arguments("milora", {key: value}, tmp_path, 0, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 0), ("disable_tqdm", False), ("prediction_loss_only", False),
        ("ignore_data_skip", True), ("metric_for_best_model", "accuracy"),
        ("greater_is_better", True), ("label_smoothing_factor", 0.1),
        ("include_num_input_tokens_seen", "all"), ("dataloader_persistent_workers", True),
        ("auto_find_batch_size", True),
    ],
)  # fmt: skip
def test_what_milora_sets_itself(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"training\.{key} is set by milora: "):
        training_arguments("milora", {key: value}, tmp_path, 7, 0)
    same = {"seed": 7, "disable_tqdm": True, "fsdp": None, "ignore_data_skip": False}
    assert training_arguments("milora", same, tmp_path, 7, 0).seed == 7


@pytest.mark.parametrize(
    ("training", "patience", "said"),
    [
        ({"eval_steps": 1, "save_steps": 3}, 9, r"save_steps is 3 and eval_steps 1, .* equal"),
        ({"load_best_model_at_end": False}, 9, r"load_best_model_at_end is off, and early_stop"),
        ({"eval_strategy": False, "save_strategy": False}, 9, "early_stopping_patience needs eval"),
        ({"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"}, 0,
         r"training\.load_best_model_at_end needs evaluations"),
        ({"train_sampling_strategy": "length"}, 0, "is 'length': it is one of random, sequential"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}, 0,
         r"accelerator_config\.gradient_accumulation_kwargs does nothing"),
        ({"accelerator_config": {"split_batches": True}}, 0, "rows, which this would share out"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, 0,
         r"use_seedable_sampler is off: a run that is resumed would train other rows"),
        ({"save_strategy": "best", "eval_strategy": False}, 0,
         r"training\.save_strategy: best needs evaluations"),
    ],
)  # fmt: skip
def test_what_would_be_passed_over(
    training: dict[str, Any], patience: int, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        training_arguments("milora", training, tmp_path, 0, patience)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "foo"),
        ({"adam_beta1": 1.5}, "beta"),
        ({"adam_beta1": "a"}, "str"),
        ({"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}, "galore"),
        ({"fp16": True, "use_cpu": True}, "fp16 is for GPUs"),
        ({"use_liger_kernel": True}, "pip install liger-kernel"),
        ({"optim_args": "foo=1"}, r"\.optim_args: foo=1 does nothing with optim: adamw_torch"),
        ({"optim": "sgd", "optim_args": "momentum=0.9, nesterv=true"}, "nesterv=true does nothing"),
        ({"optim": "sgd", "optim_args": "weight_decay=0.9"}, r"use training\.weight_decay"),
    ],
)
def test_what_cannot_be_made_here(training: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"training.*{said}"):
        check_here(training_arguments("milora", training, tmp_path, 0, 0))


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "rmsprop"])
def test_optimizers_that_can_be_made(optim: str, tmp_path: Path) -> None:
    check_here(training_arguments("milora", {"optim": optim}, tmp_path, 0, 0))
    with_args = {"optim": "sgd", "optim_args": "momentum=0.9"}
    check_here(training_arguments("milora", with_args, tmp_path, 0, 0))


def test_no_in_yaml_is_false(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "training.eval_strategy=no", "training.save_strategy=no")
    arguments = training_arguments("milora", config.training, tmp_path, 0, 0)
    assert (arguments.eval_strategy, arguments.save_strategy) == ("no", "no")


def test_one_gpu_a_process(tmp_path: Path) -> None:
    """transformers' Trainer would make copies of the model for the others."""
    arguments = training_arguments("milora", {}, tmp_path, 0, 0)
    assert arguments.n_gpu == min(1, torch.cuda.device_count())
    arguments._n_gpu = 4
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 16


def test_the_annotated_default_names_what_must_be_given(tmp_path: Path) -> None:
    said = refused(tmp_path, "{}\n")
    assert "model is missing; output_dir is missing; data is missing" in said
    assert "# model, output_dir and data.train must be given" in DEFAULT
    assert "data.train is missing" in refused(tmp_path, MINIMAL.replace("{train: t.jsonl}", "{}"))


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "1E-4", "0.0001", "+1e-4"])
def test_numbers_are_numbers(written: str, tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL + f"training: {{learning_rate: {written}}}\n")
    assert config.training["learning_rate"] == 1e-4
    config = load(tmp_path, MINIMAL, f"training.learning_rate={written}")
    assert config.training["learning_rate"] == 1e-4


def test_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        MINIMAL,
        "method=pissa",
        "lora.r=8",
        "lora.target_modules=[q_proj, k_proj]",
        "data.eval=held.jsonl",
        "training.report_to=none",
        "data.columns={prompt: question}",
    )
    assert config.method == "pissa"
    lora = config.lora.model_dump()
    assert lora == {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"]}
    assert config.data.eval == "held.jsonl"
    assert config.data.columns == {"prompt": "question"}
    assert "write key=value" in refused(tmp_path, MINIMAL, "method")
    assert "write key=value" in refused(tmp_path, MINIMAL, "=3")
    assert "model holds a value, not keys" in refused(tmp_path, MINIMAL, "model.name=x")
    assert "not valid YAML" in refused(tmp_path, MINIMAL, "model=[")


def test_overrides_make_blocks_and_replace_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL + "seed: 1\ntraining:\n  # max_steps: 3\n", "seed=2")
    assert (config.seed, config.training) == (2, {})
    config = load(tmp_path, MINIMAL + "training:\n", "training.max_steps=5", "evaluate.chunks=2")
    assert config.training == {"max_steps": 5}
    assert config.evaluate.chunks == 2
    assert "unknown key data.max_len, did you mean max_length?" in refused(
        tmp_path, MINIMAL, "data.max_len=3"
    )
    # A value may hold "=", and one run does not see another's.
    assert load(tmp_path, MINIMAL, "output_dir=a=b").output_dir == "a=b"
    assert load(tmp_path, MINIMAL, "lora.r=4", "lora.alpha_pattern={x: 1}").lora.lora_alpha == 4
    assert load(tmp_path, MINIMAL).lora.model_dump().keys() == {
        "r", "lora_alpha", "target_modules",
    }  # fmt: skip


def test_alpha_is_r_unless_said(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).lora.lora_alpha == 32
    assert load(tmp_path, MINIMAL + "lora: {r: 8}\n").lora.lora_alpha == 8
    assert load(tmp_path, MINIMAL, "lora.lora_alpha=64").lora.lora_alpha == 64


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methd: milora\n", "unknown key methd, did you mean method?"),
        ("xyzzy: 1\nsede: 1\n", "unknown key xyzzy; unknown key sede, did you mean seed?"),
        ("learning_rat: 1e-4\n", "unknown key learning_rat, did you mean training.learning_rate?"),
        ("max_lenght: 9\n", "unknown key max_lenght, did you mean data.max_length?"),
        ("evaluate: {task: []}\n", "unknown key evaluate.task, did you mean tasks?"),
        ("seed: -1\n", "seed is -1: input should be greater than or equal to 0"),
        ("seed: x\n", "seed is 'x': input should be a valid integer"),
        ("dtype: int8\n", "dtype is 'int8'"),
        ("training: [1]\n", "training is [1]"),
        ("1: 2\n", "1 is 1: keys should be strings"),
        ("seed: x\nmethd: lora\n", "seed is 'x': input should be a valid integer, unable to"),
        ("seed: x\nmethd: lora\n", "; unknown key methd, did you mean method?"),
        ("evaluate: {tasks: [{file: a, match: fuzzy}]}\n", "evaluate.tasks.0.match is 'fuzzy'"),
        ("evaluate: {tasks: [{file: a, limit: 0}]}\n", "evaluate.tasks.0.limit is 0"),
    ],
)
def test_all_that_is_wrong_in_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, MINIMAL + text)


def test_missing_and_nested_keys(tmp_path: Path) -> None:
    said = refused(tmp_path, "method: lora\n")
    assert "model is missing; output_dir is missing; data is missing" in said
    tasks = "evaluate: {tasks: [{file: a.jsonl, patern: x}]}\n"
    said = refused(tmp_path, MINIMAL + tasks)
    assert said.endswith("unknown key evaluate.tasks.0.patern, did you mean pattern?")
    for both in ("{name: a}", "{file: a.jsonl, harness: arc_easy}"):
        said = refused(tmp_path, MINIMAL + f"evaluate: {{tasks: [{both}]}}\n")
        assert said.endswith("evaluate.tasks.0 needs either file or harness")
    said = refused(tmp_path, MINIMAL + tasks)
    assert said.count(";") == 0  # nothing about what else a task could have been


@pytest.mark.parametrize(
    ("protect", "said"),
    [
        ("0", "limit needs top above 0"),
        ("{tasks: all}", "limit needs top above 0"),
        ("{q_proj: 0, v_proj: 0}", "milora.protect is {'q_proj': 0, 'v_proj': 0}, which holds"),
        ("{tasks: all, weights: {q_proj: 0}}", "milora.protect is {'q_proj': 0}, which holds"),
    ],
)
def test_a_limit_on_what_is_not_measured(protect: str, said: str, tmp_path: Path) -> None:
    watch = "milora.interference={top: 0, limit: 0.1}"
    assert said in refused(tmp_path, MINIMAL, watch, f"milora.protect={protect}")
    measured = protect.replace("0", "1").replace("all}", "all, weights: 1}")
    assert load(tmp_path, MINIMAL, watch, f"milora.protect={measured}").milora.protect != 0


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1", "0.0"])
def test_the_share_held_out(share: str, tmp_path: Path) -> None:
    assert "a share between 0 and 1, or a file" in refused(tmp_path, MINIMAL, f"data.eval={share}")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    assert "must hold keys and values" in refused(tmp_path, "- a\n- b\n")
    assert "not valid YAML" in refused(tmp_path, "a: [\n")
    assert "line 4: the key 'model' is given twice" in refused(tmp_path, MINIMAL + "model: n\n")
    twice = MINIMAL + "lora:\n  r: 1\n  r: 2\n"
    assert "line 6: the key 'r' is given twice" in refused(tmp_path, twice)
    for unsafe in ("object/apply:os.getcwd []", "name:os.system", "object:pathlib.Path {}"):
        assert "not valid YAML" in refused(tmp_path, f"model: !!python/{unsafe}\n")
    assert "unhashable key" in refused(tmp_path, "model: {{name}}\n")
    (tmp_path / "latin.yaml").write_bytes("model: ü".encode("latin-1"))
    with pytest.raises(UserError, match="not valid YAML: 'utf-8'"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match=r"does not exist; `milora train --print-default`"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("2026-13-45", "month must be in 1..12"),
        ("1" * 5000, "Exceeds the limit"),
        ("[" * 3000, "nested too deeply"),
    ],
)
def test_values_that_yaml_stumbles_over(value: str, said: str, tmp_path: Path) -> None:
    found = refused(tmp_path, MINIMAL + f"training: {value}\n")
    assert f"run.yaml is not valid YAML: {said}" in found
    found = refused(tmp_path, MINIMAL, f"output_dir={value}")
    assert f"the value is not valid YAML: {said}" in found
    assert len(found) < 300


def test_a_home_folder_is_expanded_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TrainingArguments expand that of checkpoints alone, and the run would be in two places."""
    monkeypatch.setenv("HOME", "/home/u")
    text = """\
model: ~/m
output_dir: ~/runs/x
data: {train: ~/t.jsonl, eval: ~/e.jsonl}
milora: {factors_from: ~/f, text: [~/a.txt, b~.txt]}
tokenizer: {chat_template: ~/c.jinja}
evaluate: {knowledge: ~/k.txt, tasks: [~/t.jsonl, {file: ~/u.jsonl}]}
continue: {run: ~/r}
"""
    found = load(tmp_path, text)
    assert (found.model, found.output_dir) == ("/home/u/m", "/home/u/runs/x")
    assert (found.data.train, found.data.eval) == ("/home/u/t.jsonl", "/home/u/e.jsonl")
    assert found.milora.factors_from == "/home/u/f"
    assert found.milora.text == ["/home/u/a.txt", "b~.txt"]
    assert found.tokenizer.chat_template == "/home/u/c.jinja"
    assert found.evaluate.knowledge == "/home/u/k.txt"
    assert found.evaluate.tasks[0] == "/home/u/t.jsonl"
    assert found.model_dump()["evaluate"]["tasks"][1]["file"] == "/home/u/u.jsonl"
    assert found.continue_.run == "/home/u/r"
    assert load(tmp_path, MINIMAL, "output_dir=~/y", "data.eval=0.5").output_dir == "/home/u/y"


def test_the_metric_by_which_states_are_judged_may_be_named(tmp_path: Path) -> None:
    named = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    found = training_arguments("milora", named | {"greater_is_better": False}, tmp_path, 0, 0)
    assert found.metric_for_best_model == "eval_loss"
    found = training_arguments("milora", {"save_strategy": "best"}, tmp_path, 0, 0)
    assert (found.metric_for_best_model, found.greater_is_better) == ("eval_loss", False)


def test_one_key_gives_the_published_method(tmp_path: Path) -> None:
    for text, overrides in ((MINIMAL + "milora: published\n", []), (MINIMAL, ["milora=published"])):
        found = load(tmp_path, text, *overrides).milora
        assert (found.start, found.protect_inputs, found.keep) == ("published", 0, None)
    found = load(tmp_path, MINIMAL).milora
    assert (found.start, found.protect_inputs, found.text) == (None, None, "sampled")
    assert "milora is 'publish'" in refused(tmp_path, MINIMAL + "milora: publish\n")


@pytest.mark.parametrize("what", ["save", "eval"])
def test_steps_are_not_passed_over(what: str, tmp_path: Path) -> None:
    found = training_arguments("milora", {f"{what}_steps": 50}, tmp_path, 0, 0)
    assert getattr(found, f"{what}_strategy") == "steps"
    assert getattr(found, f"{what}_steps") == 50
    both = {f"{what}_steps": 50, f"{what}_strategy": "epoch"}
    with pytest.raises(UserError, match=rf"{what}_steps does nothing with {what}_strategy: epoch"):
        training_arguments("milora", both, tmp_path, 0, 0)
    for off in (False, "no"):  # as by an override: what it says is clear
        found = training_arguments("milora", both | {f"{what}_strategy": off}, tmp_path, 0, 0)
        assert getattr(found, f"{what}_strategy") == "no"
