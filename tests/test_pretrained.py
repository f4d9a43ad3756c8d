"""Loading a base: what its files lack is never drawn at random without a word."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file

from milora.checkpoint import open_checkpoint
from milora.errors import UserError
from milora.pretrained import load_pretrained

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_weight_that_the_files_lack_is_named(folder: Path, quantization: str | None) -> None:
    if quantization:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(UP)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"have no {UP} of the right shape \(1 such weights\)"):
        load_pretrained(str(folder), quantization=quantization)


@pytest.mark.parametrize(
    ("changes", "count"), [({"num_hidden_layers": 3}, 9), ({"intermediate_size": 48}, 6)]
)
def test_a_configuration_of_another_model_is_refused(
    folder: Path, changes: dict[str, Any], count: int
) -> None:
    configure(folder, **changes)
    with pytest.raises(UserError, match=rf"\({count} such weights\): they are incomplete, or do"):
        load_pretrained(str(folder))


def test_weights_that_the_model_does_not_use_are_said(folder: Path) -> None:
    assert load_pretrained(str(folder)).notes == ()
    configure(folder, num_hidden_layers=1)
    (note,) = load_pretrained(str(folder)).notes
    assert "model.layers.1.input_layernorm.weight and 8 more tensors: no part of this" in note


@pytest.mark.parametrize("size", [0, 2000])
def test_damaged_files_are_said(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read .*damaged"):
        load_pretrained(str(folder))


@pytest.mark.parametrize("load", [load_pretrained, open_checkpoint])
def test_other_kinds_of_models_are_refused_in_a_sentence(load: Any, tmp_path: Path) -> None:
    for config, said in (
        (hf.Qwen2_5_VLConfig(), "of those that read pictures only llava and idefics3 are known"),
        (hf.ViTConfig(), "is of type vit, which is no causal language model"),
    ):
        config.save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(UserError, match=re.escape(said)) as error:
            load(str(tmp_path))
        assert len(str(error.value)) < 300
