"""The paper's settings as configurations: each loads, and dry-runs on a small model of its kind."""

from pathlib import Path

import pytest
from conftest import make_tokenizer
from tiny_run import write_rows
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from milora.config import load_config
from milora.progress import Progress
from milora.train import train

RECIPES = sorted((Path(__file__).resolve().parents[1] / "examples" / "recipes").glob("*.yaml"))
SHAPE = {
    "vocab_size": 258, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    assert f"milora train examples/recipes/{recipe.name}" in text
    assert "# Published: " in text
    whole = load_config(recipe)
    assert whole.method == "milora"
    assert whole.lora.lora_alpha == whole.lora.r
    small = (
        Qwen2ForCausalLM(Qwen2Config(**SHAPE))
        if "Qwen" in whole.model
        else LlamaForCausalLM(LlamaConfig(**SHAPE))
    )
    small.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl")
    settings = load_config(
        recipe,
        [f"model={tmp_path / 'model'}", f"data.train={rows}", "data.columns={}", "data.eval=0.2",
         "evaluate.tasks=[]", "dtype=float32", f"output_dir={tmp_path / 'run'}"],
    )  # fmt: skip
    with Progress() as progress:
        plan = train(**settings.model_dump(), dry_run=True, progress=progress)
    kinds = {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert set(plan["coverage"]["adapted"]) == kinds
    assert not (tmp_path / "run").exists()


def test_there_are_recipes() -> None:
    assert len(RECIPES) == 5
