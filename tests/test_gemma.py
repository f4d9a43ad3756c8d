"""Gemma-3-270M: no chat template, 262,144 tokens, a tied head that scales what it embeds.

Real weights under the Gemma Terms of Use, fetched by this test alone.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_run import run, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from milora.data import IGNORED, Encoded, encode
from milora.files import cache_folder
from milora.rows import read_rows
from milora.verify import verify

pytestmark = pytest.mark.slow
LORA = {"r": 8, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 9, 17]}
ROWS = [
    {"prompt": f"今日は{i}度です。 How warm is it?", "completion": f"{i} degrees 𠮷 مرحبا <|mark|>"}
    for i in range(24)
]


@pytest.fixture(scope="module")
def gguf() -> Path:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "weights.py"
    spec = importlib.util.spec_from_file_location("weights", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Path = module.gemma()
    return found


@pytest.mark.parametrize("tokens", [[], ["<|mark|>"]])
def test_from_the_base_to_the_result(tokens: list[str], gguf: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
    rows.write_text("".join(lines), encoding="utf-8")
    text = tmp_path / "text.txt"
    text.write_text("What goes up must come down. 降りるだけ。\n" * 20, encoding="utf-8")
    asked = settings(
        gguf, tmp_path, lora=LORA, data={"train": str(rows), "eval": 0.2, "max_length": 128},
        tokenizer={"tokens": tokens},
        training={"max_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 2},
        evaluate={"tasks": [], "knowledge": str(text)},
    )  # fmt: skip
    record = run(asked)
    assert record["step0"]["difference"] <= record["step0"]["bound"]
    assert record["base"]["unchanged"]
    ids = torch.randint(5, 200_000, (1, 12), generator=torch.Generator().manual_seed(1))
    (converted,) = cache_folder().glob("gemma-3-270m-q4_k_m-*")
    base = AutoModelForCausalLM.from_pretrained(converted)
    where = tmp_path / "run" / "model" if tokens else converted
    tokenizer = AutoTokenizer.from_pretrained(where)
    with torch.no_grad():
        plain = base(ids).logits
        if tokens:
            tuned = AutoModelForCausalLM.from_pretrained(where)
            (mark,) = tokenizer("<|mark|>", add_special_tokens=False)["input_ids"]
            assert mark == record["tokens"]["ids"]["<|mark|>"]
            before, after = (m.get_input_embeddings().weight for m in (base, tuned))
            same = (after[: len(before)] == before).all(1)
            assert same.sum() == len(before) - (mark < len(before))
        else:
            assert record["coverage"]["others"]["embed_tokens"]["parameters"] == 262_144 * 640
            assert record["coverage"]["adapted"]["q_proj"]["weights"] == 3
            found = encode(tokenizer, read_rows(str(rows)).rows[0], 128)
            assert isinstance(found, Encoded)
            answer = tokenizer.decode([label for label in found.labels if label != IGNORED])
            assert answer.endswith("degrees 𠮷 مرحبا <|mark|><eos>")
            assert all(check.holds for check in verify(tmp_path / "run"))
            tuned = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
        moved = float((tuned(ids).logits[..., : plain.shape[-1]] - plain).abs().max())
    assert 0 < moved < float("inf")
