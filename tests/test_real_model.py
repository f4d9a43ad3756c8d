"""The invariants on SmolLM2-135M, the bundled model, and the traps of its tokenizer."""

import json
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from tiny_run import result_hashes, run, settings
from transformers import AutoModelForCausalLM

from milora import adapter, fingerprints, targeting
from milora.artefacts import export_run
from milora.checkpoint import open_checkpoint
from milora.data import IGNORED, Encoded, encode, prompt_ids
from milora.errors import UserError
from milora.export import plain_lora
from milora.files import cache_folder
from milora.knowledge import knowledge_kept
from milora.logits import Pair, base_only, logits_of, step0_bound, step0_difference
from milora.matrices import adapted_matrices
from milora.pretrained import BUNDLED, fetch_bundled, load_pretrained
from milora.protect import held, measure, project, top_vectors, worst
from milora.rows import Row
from milora.svd import components, minor_components
from milora.verify import open_adapter, verify

pytestmark = pytest.mark.slow
# Three of the thirty blocks, so that the decomposition takes seconds.
LORA = {
    "r": 8,
    "lora_alpha": 12,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "layers_to_transform": [0, 15, 29],
}
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def base_folder() -> Path:
    load_pretrained(BUNDLED)  # fetches and converts on first use
    return cache_folder() / BUNDLED


@pytest.fixture(scope="module")
def finished(
    base_folder: Path, tmp_path_factory: pytest.TempPathFactory, children: ForkServerContext
) -> Path:
    folder = tmp_path_factory.mktemp("real")
    arguments = settings(Path(BUNDLED), folder, lora=LORA, training=TRAINING)
    child = children.Process(target=run, args=(arguments,))
    child.start()
    child.join()
    assert child.exitcode == 0
    return folder


def some_text() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("method", ["milora", "pissa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_0_and_the_base_afterwards(dtype: str, method: str, base_folder: Path) -> None:
    loaded = load_pretrained(BUNDLED, dtype)
    before = fingerprints.base_sha256(loaded.model)
    with torch.no_grad():
        logits = loaded.model(**some_text()).logits
    model, _ = adapter.add_adapter(loaded.model, targeting.lora_config(LORA), method)
    difference = step0_difference(model, some_text())
    assert difference <= step0_bound(loaded.model.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    with base_only(model), torch.no_grad():
        assert torch.equal(model(**some_text()).logits, logits)
    assert fingerprints.base_sha256(model) == before


def test_a_tied_head_and_a_rank_too_large_are_refused(base_folder: Path) -> None:
    model = load_pretrained(BUNDLED).model
    with pytest.raises(UserError, match="lm_head shares its weight with the input embedding"):
        adapter.add_adapter(
            model, targeting.lora_config({"r": 4, "target_modules": ["lm_head"]}), "milora"
        )
    model = load_pretrained(BUNDLED).model
    with pytest.raises(UserError, match="k_proj is 192 x 576: at most 192 fits"):
        adapter.add_adapter(
            model, targeting.lora_config({"r": 200, "target_modules": ["k_proj"]}), "milora"
        )


def test_the_tokenizer(base_folder: Path) -> None:
    """EOS is the padding token and must train all the same; one BOS; prompts agree."""
    tokenizer = load_pretrained(BUNDLED).tokenizer
    assert tokenizer.eos_token_id == tokenizer.pad_token_id
    turns = [
        {"role": "user", "content": "Naïve café, 語? 🙂"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And 1 + 1?"},
        {"role": "assistant", "content": "Two, naturally."},
    ]
    found = encode(tokenizer, Row(turns, "x"), 512)
    assert isinstance(found, Encoded)
    trained = tokenizer.decode([label for label in found.labels if label != IGNORED])
    assert trained == "Yes.<|im_end|>Two, naturally.<|im_end|>"
    assert tokenizer.decode(found.input_ids).startswith("<|im_start|>system\n")
    prompt = prompt_ids(tokenizer, turns[:3])
    assert found.input_ids[: len(prompt)] == prompt


def test_the_bundled_model_is_the_real_one(base_folder: Path) -> None:
    loaded = load_pretrained(BUNDLED)
    kept = knowledge_kept(
        Pair(loaded.model),
        loaded.tokenizer,
        "The Eiffel Tower is in Paris, the capital of France. Water boils at one hundred degrees "
        "Celsius at sea level. The Earth goes around the Sun once a year.",
    )
    assert kept["base_perplexity"] < 20  # a random model of this vocabulary would have 49,152
    assert loaded.license == "apache-2.0"


def test_a_gguf_file_is_read_as_the_library_loads_it(tmp_path: Path) -> None:
    model = load_pretrained(BUNDLED).model
    checkpoint = open_checkpoint(str(fetch_bundled(tmp_path)))
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert len(names) == 211
    for name in names[:-1]:  # the last is the head, which is tied
        assert torch.equal(checkpoint.read(name), model.get_submodule(name).weight), name


def test_components_of_real_weights() -> None:
    model = load_pretrained(BUNDLED).model
    for block in (0, 15, 29):
        for kind in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"):
            W = model.get_parameter(f"model.layers.{block}.{kind}.weight").detach()
            found, S = minor_components(W, 32), torch.linalg.svdvals(W.double())
            miss = torch.linalg.matrix_norm(W.double().T @ found.U - found.Vh.T * found.S, 2)
            assert miss <= 1e-6 * S[0]
            assert float(found.S.norm() / S[-32:].norm()) == pytest.approx(1, abs=1e-6)


def test_the_run_and_its_artefact(finished: Path, base_folder: Path, tmp_path: Path) -> None:
    record = json.loads((finished / "run" / "run.json").read_text())
    assert record["step0"]["difference"] <= 1e-5
    assert record["base"]["unchanged"] is True
    assert record["adapter"] == {
        "rank": 16,
        "exported_against_trained": pytest.approx(0, abs=1e-5),
    }
    assert all(check.holds for check in verify(finished / "run"))
    opened = open_adapter(finished / "run")
    with torch.no_grad():
        logits = opened.model(**some_text()).logits
    save_file({**some_text(), "logits": logits}, tmp_path / "wanted.safetensors")
    script = """
import sys
sys.modules["milora"] = None
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
base, folder, wanted = sys.argv[1:]
wanted = load_file(wanted)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
found = model(input_ids=wanted["input_ids"], attention_mask=wanted["attention_mask"]).logits
error = (found - wanted["logits"]).abs().max() / wanted["logits"].abs().max()
assert error <= 1e-5, error
print("same logits")
"""
    arguments: list[Any] = [
        base_folder,
        finished / "run" / "adapter",
        tmp_path / "wanted.safetensors",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True
    )
    assert done.stdout == "same logits\n", done.stderr
    export_run(finished / "run", tmp_path / "merged", "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        error = (merged(**some_text()).logits - logits).abs().max() / logits.abs().max()
    assert error <= 1e-5


def test_no_other_folder_loads(finished: Path, base_folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    for folder in (finished / "run").rglob("*"):
        if folder.is_dir() and folder.name != "adapter":
            with pytest.raises(Exception, match=r"(?i)config|not|find"):
                PeftModel.from_pretrained(base, folder)


def test_killed_and_resumed(finished: Path, tmp_path: Path, children: ForkServerContext) -> None:
    """Half way through the run by the clock, then to the end: the same bits."""
    wanted = result_hashes(finished / "run")
    arguments = settings(Path(BUNDLED), finished, lora=LORA, training=TRAINING)
    arguments["output_dir"] = str(tmp_path / "run")
    child = children.Process(target=run, args=(arguments,))
    child.start()
    first = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    while child.is_alive() and not first.exists():
        time.sleep(0.02)
    child.kill()
    child.join()
    assert not (tmp_path / "run" / "adapter").exists()
    child = children.Process(target=run, args=(arguments,), kwargs={"resume": True})
    child.start()
    child.join()
    assert child.exitcode == 0
    assert result_hashes(tmp_path / "run") == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_five_updates_without_a_step_are_one_function(dtype: str, base_folder: Path) -> None:
    """Folded and decomposed again five times: the first update's function, and the base below."""
    base = load_pretrained(BUNDLED, dtype).model
    before = fingerprints.base_sha256(base)
    model, start = adapter.add_adapter(base, targeting.lora_config(LORA), "milora")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    previous, norms = plain_lora(start, adapter.trained_factors(model)).factors, []
    base = adapter.take_off(model)
    wanted = None
    for _ in range(5):
        model, start = adapter.add_adapter(
            base, targeting.lora_config(LORA), "milora", previous=previous
        )
        model.eval()  # or the dropout of LORA acts
        with torch.no_grad():
            logits = logits_of(model, some_text())
            with base_only(model):
                norms.append(float((logits - logits_of(model, some_text())).abs().max()))
        wanted = logits if wanted is None else wanted
        assert (logits - wanted).abs().max() <= (1e-5 if dtype == "float32" else 2e-2) * (
            wanted.abs().max()
        )
        trained = adapter.trained_factors(model)
        previous = plain_lora(start, trained, previous=previous).factors
        base = adapter.take_off(model)
    assert min(norms) > 0.1
    assert fingerprints.base_sha256(base) == before


def test_what_is_protected_stays(base_folder: Path) -> None:
    """Two hundred steps at a high rate: the top 64 directions, and their singular values, stay."""
    base: Any = load_pretrained(BUNDLED, "float32").model
    base.model.layers = base.model.layers[:4]  # what the others add to the loss takes its time
    options = LORA | {"lora_dropout": 0.0, "r": 16, "lora_alpha": 16, "layers_to_transform": [0, 3]}
    model, start = adapter.add_adapter(base, targeting.lora_config(options), "milora")
    layers = adapted_matrices(model)
    tops = top_vectors(layers, start, 64, 0, 0, components)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    ids = some_text()["input_ids"]
    for _ in range(200):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        project(layers, held(layers, tops, {}))
    found = measure(layers, start, tops)
    assert worst(found)["max"] <= 1e-6
    assert worst(found)["size"] > 1e-3
    plain = plain_lora(start, adapter.trained_factors(model))
    for name, layer in layers.items():
        A, B = plain.factors[name]
        W = layer.weight.double()
        merged, S = W + B.double() @ A.double(), torch.linalg.svdvals(W)
        U, Vh = tops[name].U.double(), tops[name].Vh.double()
        size = float(S[0])
        # Its 64 largest triplets are triplets still, though the update may have grown larger ones.
        assert float((merged @ Vh.T - U * S[:64]).abs().max()) <= 1e-5 * size
        assert float((merged.T @ U - Vh.T * S[:64]).abs().max()) <= 1e-5 * size
        after = torch.linalg.svdvals(merged)
        nearest = (after[None] - S[:64, None]).abs().min(1).values
        assert float((nearest / S[:64]).max()) <= 1e-5
