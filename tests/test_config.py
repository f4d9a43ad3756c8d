"""The configuration file: strict keys, real numbers, one sentence for all that is wrong."""

from pathlib import Path

import pytest
import yaml

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
    assert set(yaml.safe_load(DEFAULT)) == set(Config.model_fields)
    assert shown.pop("training") == {
        "learning_rate": 1e-4,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
    }
    assert real.pop("training") == {}  # train.py fills these in, the rate by method
    assert shown == real


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


def test_alpha_is_r_unless_said(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL).lora.lora_alpha == 32
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
    ],
)
def test_all_that_is_wrong_in_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, MINIMAL + text)


def test_missing_and_nested_keys(tmp_path: Path) -> None:
    said = refused(tmp_path, "method: lora\n")
    assert "model is missing; output_dir is missing; data is missing" in said
    tasks = "evaluate: {tasks: [{file: a.jsonl, patern: x}]}\n"
    assert "patern, did you mean pattern?" in refused(tmp_path, MINIMAL + tasks)


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1", "0.0"])
def test_the_share_held_out(share: str, tmp_path: Path) -> None:
    assert "a share between 0 and 1, or a file" in refused(tmp_path, MINIMAL, f"data.eval={share}")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    assert "must hold keys and values" in refused(tmp_path, "- a\n- b\n")
    assert "not valid YAML" in refused(tmp_path, "a: [\n")
    assert "line 4: the key 'model' is given twice" in refused(tmp_path, MINIMAL + "model: n\n")
    assert "not valid YAML" in refused(tmp_path, "model: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UserError, match=r"does not exist; `milora train --print-default`"):
        load_config(tmp_path / "none.yaml")
