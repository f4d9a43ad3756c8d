"""Quantised bases: factors of full precision, packed numbers that stay, where the result fits."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tiny_run import break_off, result_hashes, run, settings
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from milora import adapter, fingerprints, targeting
from milora.artefacts import export_run
from milora.checkpoint import open_checkpoint, original_of
from milora.combine import combine
from milora.errors import UserError
from milora.evaluate import evaluate_all
from milora.export import get_milora_model
from milora.files import files_sha256
from milora.inspection import inspect_model
from milora.knowledge import general_texts
from milora.logits import Pair, step0_difference
from milora.matrices import adapted_matrices
from milora.pretrained import load_pretrained
from milora.progress import Progress
from milora.quantised import (
    is_packed,
    keep_packing,
    linear_shape,
    loaded_bytes,
    quantization_config,
    require,
)
from milora.smaller import Smaller
from milora.store import Store
from milora.svd import minor_components
from milora.verify import open_adapter, open_run, verify

Tiny = Callable[[str], Path]
NAME = "model.layers.1.mlp.down_proj"
HELD = {"protect": 4, "interference": {"top": 4}}
SHORT: dict[str, Any] = {"milora": HELD, "training": {"max_steps": 2}}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture
def bitsandbytes() -> Any:
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One nf4 run with protection, shared by the tests that only read it."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = tmp_path_factory.mktemp("nf4")
    run(settings(tiny("llama"), folder, quantization="nf4", **SHORT))
    return folder / "run"


def next_logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(2, 40)[None]).logits
    return found


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.slow
def test_a_run_on_nf4(finished: Path, tiny: Tiny) -> None:
    record = json.loads((finished / "run.json").read_text())
    base = record["base"]
    assert record["step0"]["difference"] <= 1e-5
    assert base["unchanged"] is True
    assert record["adapter"]["exported_against_trained"] <= 1e-5
    assert (base["quantization"], base["label"]) == ("nf4", "nf4")
    assert base["original"] == str(tiny("llama"))
    assert record["parameters"]["all"] == 35104  # of the model, not of its packed bytes
    assert record["coverage"]["adapted"]["down_proj"]["parameters"] == 2 * 32 * 64
    assert record["interference"]["layers"][NAME]["protected"] == 4
    assert record["interference"]["layers"][NAME]["left"] <= 1e-5  # in the 4 that are held
    # The packed numbers are those that a fresh load has.
    fresh = load_pretrained(str(tiny("llama")), quantization="nf4").model
    assert fingerprints.base_sha256(fresh) == base["sha256"]
    stored = json.loads((finished / "adapter" / "milora.json").read_text())["quantised_sha256"]
    assert fingerprints.packed_hashes(fresh, stored) == stored
    assert len(stored) == 14


def test_the_factors_are_of_the_full_precision_file(finished: Path, tiny: Tiny) -> None:
    start = adapter.load_start(finished / "init" / "factors.safetensors")
    whole = load_file(tiny("llama") / "model.safetensors")
    record = json.loads((finished / "run.json").read_text())
    for name, (A0, B0) in start.factors.items():
        W = whole[f"{name}.weight"]
        assert start.sha256[name] == fingerprints.tensor_sha256(W)
        U, S, Vh = minor_components(W, 4)[:3]
        assert relative(start.scaling[name] * B0 @ A0, ((U * S) @ Vh).float()) <= 1e-5
        if name in record["spectra"]:
            first = record["spectra"][name]["before"][0][1]
            assert first == pytest.approx(float(torch.linalg.norm(W.double(), 2)), rel=1e-3)


@pytest.mark.slow
def test_the_result_fits_both_bases(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    opened = open_adapter(finished)
    assert is_packed(opened.model.base_model.model.get_submodule(NAME).get_base_layer())
    packed = load_pretrained(str(tiny("llama")), quantization="nf4").model
    stock = PeftModel.from_pretrained(packed, finished / "adapter")
    assert torch.equal(next_logits(stock), next_logits(opened.model))
    assert all(check.holds for check in verify(finished))
    # On the original the same update acts: as stock PEFT has it, and merged.
    original = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    stock = PeftModel.from_pretrained(original, finished / "adapter")
    said = export_run(finished, tmp_path / "merged", "merged", base=str(tiny("llama"))).said
    assert "on the full-precision base; the update was trained on nf4" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(next_logits(merged), next_logits(stock)) <= 1e-5
    assert all(check.holds for check in verify(tmp_path / "merged"))
    with stock.disable_adapter():
        assert relative(next_logits(stock), next_logits(merged)) > 1e-3  # the update is one
    assert "rank 4" in export_run(finished, tmp_path / "small", "lora", Smaller(4)).said
    assert all(check.holds for check in verify(tmp_path / "small"))


def test_merging_into_packed_numbers_is_refused(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quantised \(nf4\).*--base .*serve .*adapter"):
        export_run(finished, tmp_path / "merged", "merged")
    make_model("llama", seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="wrong base"):
        export_run(finished, tmp_path / "merged", "merged", base=str(tmp_path / "other"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_a_base_with_other_weights_beside_the_adapted_is_refused(
    finished: Path, tiny: Tiny, tmp_path: Path
) -> None:
    """Nothing is measured anew on it, which would then agree with what is recorded."""
    other, second = tmp_path / "other", tmp_path / "second"
    shutil.copytree(tiny("llama"), other)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] = 1.7 * weights["lm_head.weight"]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    shutil.copytree(finished / "adapter", second)
    file = second / "adapter_model.safetensors"
    save_file({k: 2 * v if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    about = json.loads((second / "milora.json").read_text())
    about["files_sha256"] = files_sha256(second)
    (second / "milora.json").write_text(json.dumps(about))

    def refused(base: Path, said: str, source: Path = finished) -> None:
        for call in (
            lambda: export_run(source, tmp_path / "out", "merged", base=str(base)),
            lambda: export_run(source, tmp_path / "out", "lora", Smaller(3), base=str(base)),
            lambda: combine([source, second], tmp_path / "out", base=str(base)),
        ):
            with pytest.raises(UserError, match=f"wrong base.*{said}"):
                call()
            assert not (tmp_path / "out").exists()

    refused(other, "others differ")
    with pytest.raises(UserError, match=r"wrong base.*others differ"):
        open_run(finished, base=str(other))
    # What no hash tells the probes do: another configuration, other numbers on another machine.
    changed = tmp_path / "changed"
    shutil.copytree(tiny("llama"), changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2.0}))
    refused(changed, "answers the probes")
    about["quantised_sha256"][NAME] = "0" * 64
    about["files_sha256"] = files_sha256(finished / "adapter")
    shutil.copytree(finished / "adapter", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "milora.json").write_text(json.dumps(about))
    refused(other, "answers the probes", tmp_path / "elsewhere")
    export_run(
        tmp_path / "elsewhere", tmp_path / "small", "lora", Smaller(3), base=str(tiny("llama"))
    )


def test_a_base_packed_elsewhere_is_known_by_its_full_precision(
    finished: Path, tiny: Tiny, tmp_path: Path
) -> None:
    shutil.copytree(finished / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "milora.json"
    stored = json.loads(file.read_text())
    stored["quantised_sha256"][NAME] = "0" * 64
    file.write_text(json.dumps(stored))
    assert all(check.holds for check in verify(tmp_path / "adapter"))
    stored["weights_sha256"][NAME] = "0" * 64
    file.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=rf"wrong base.* in 1 weights, the first is {NAME}"):
        open_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_whatever_packed_numbers_are_stored_as_they_are_not_decomposed(
    storage: str, tiny: Tiny, bitsandbytes: Any, batch: dict[str, torch.Tensor]
) -> None:
    asked = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": storage,
    }
    model = load_pretrained(str(tiny("llama")), quantization=asked).model
    layer = model.get_submodule(NAME)
    assert is_packed(layer)
    assert linear_shape(layer) == (32, 64)
    before = fingerprints.base_sha256(model)
    with pytest.raises(UserError, match=r"q_proj is quantised.*factors_from"):
        adapter.add_adapter(model, targeting.lora_config(LORA), "milora")
    model = load_pretrained(str(tiny("llama")), quantization=asked).model
    original = original_of(str(tiny("llama")), asked, None)
    assert original is not None
    live, start = adapter.add_adapter(
        model, targeting.lora_config(LORA), "milora", weights=original.weights
    )
    assert start.sha256[NAME] == fingerprints.tensor_sha256(
        load_file(tiny("llama") / "model.safetensors")[f"{NAME}.weight"]
    )
    assert step0_difference(live, batch) <= 1e-5
    live(**batch, labels=batch["input_ids"]).loss.backward()
    assert adapter.trained_factors(live)[NAME].A.isfinite().all()
    assert adapted_matrices(live)[NAME].factors(adapter.TRAINED)[0].grad is not None
    live.eval()
    next_logits(live)
    assert fingerprints.base_sha256(live) == before


def test_weights_stored_transposed(
    tiny: Tiny, bitsandbytes: Any, batch: dict[str, torch.Tensor]
) -> None:
    model = load_pretrained(str(tiny("gpt2")), quantization="nf4").model
    original = original_of(str(tiny("gpt2")), "nf4", None)
    assert original is not None
    config = targeting.lora_config({"r": 4, "target_modules": ["c_attn", "c_fc", "c_proj"]})
    live, start = adapter.add_adapter(model, config, "milora", weights=original.weights)
    assert step0_difference(live, batch) <= 1e-5
    shape = start.spectra["transformer.h.0.mlp.c_fc"]["shape"]
    assert shape == [128, 32] == list(original.weights("transformer.h.0.mlp.c_fc").shape)  # type: ignore[misc]


def test_new_tokens_on_packed_numbers_are_refused(
    tiny: Tiny, tmp_path: Path, bitsandbytes: Any
) -> None:
    asked = settings(tiny("llama"), tmp_path, quantization="nf4", tokenizer={"tokens": ["<call>"]})
    with pytest.raises(UserError, match=r"rows of .*embed_tokens.* \(nf4\) nothing is merged"):
        run(asked)
    assert not (tmp_path / "run").exists()


def test_from_python(
    tiny: Tiny, tmp_path: Path, bitsandbytes: Any, batch: dict[str, torch.Tensor]
) -> None:
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def base() -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(tiny("llama"), quantization_config=packing)
        keep_packing(loaded)
        return loaded.eval()

    live = get_milora_model(base(), LoraConfig(**LORA))
    assert step0_difference(live, batch) <= 1e-5
    with torch.no_grad():
        for _, B in (m.factors(adapter.TRAINED) for m in adapted_matrices(live).values()):
            B.add_(0.02 * torch.randn(B.shape, generator=torch.Generator().manual_seed(0)))
    live.eval().save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(base(), tmp_path)
    assert relative(next_logits(stock), next_logits(live)) <= 1e-5
    with stock.disable_adapter():
        assert relative(next_logits(stock), next_logits(live)) > 1e-3


@pytest.mark.parametrize("asked", ["nf4", "int8"])
def test_what_is_merged_into_packed_numbers_is_rounded_once(
    asked: str, tiny: Tiny, tmp_path: Path, bitsandbytes: Any
) -> None:
    def base() -> Any:
        return load_pretrained(str(tiny("llama")), "float32", quantization=asked).model

    live = get_milora_model(base(), LoraConfig(**LORA))
    assert relative(next_logits(live.merge_and_unload()), next_logits(base())) <= 1e-3
    live = get_milora_model(base(), LoraConfig(**LORA))
    with torch.no_grad():
        for _, B in (m.factors(adapter.TRAINED) for m in adapted_matrices(live).values()):
            B.add_(0.02 * torch.randn(B.shape, generator=torch.Generator().manual_seed(0)))
    live.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(base(), tmp_path).merge_and_unload()
    merged = live.merge_and_unload()
    assert torch.equal(next_logits(merged), next_logits(stock))
    assert relative(next_logits(merged), next_logits(base())) > 1e-2
    live = get_milora_model(base(), LoraConfig(**LORA))
    with torch.no_grad():
        next(iter(adapted_matrices(live).values())).factors(adapter.TRAINED)[0].fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        live.merge_and_unload(safe_merge=True)
    with pytest.raises(UserError, match="base is packed, into which no update can be merged and"):
        live.merge_adapter()
    live.config.quantization_config.quant_method = "gptq"
    with pytest.raises(UserError, match=r"base is packed by gptq, .* save_pretrained"):
        live.merge_and_unload()


@pytest.mark.parametrize("asked", ["nf4", "int8", {"load_in_4bit": True}])
def test_memory_is_known_before_anything_is_loaded(
    asked: str | dict[str, Any], tiny: Tiny, bitsandbytes: Any
) -> None:
    original = original_of(str(tiny("llama")), asked, None)
    assert original is not None
    loaded = load_pretrained(str(tiny("llama")), quantization=asked).model
    assert original.full_bytes == 4 * 35104
    assert original.packed_bytes == pytest.approx(loaded_bytes(loaded), rel=0.05)


def test_what_is_refused(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = str(tiny("llama"))
    packed = tmp_path / "packed"
    shutil.copytree(tiny("llama"), packed)
    config = json.loads((packed / "config.json").read_text())
    settings_of = {"bits": 4, "group_size": 128}
    for method, said in (
        ("gptq", r"gptq weights need gptqmodel, which is not installed: pip install gptqmodel"),
        ("hqq", r"is quantised \(hqq\), through which milora cannot train; known are bitsandbytes"),
    ):
        config["quantization_config"] = {"quant_method": method, **settings_of}
        (packed / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        for call in (load_pretrained, lambda model: original_of(model, None, None)):
            with pytest.raises(UserError, match=said):
                call(str(packed))
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: object() if name == "gptqmodel" else None
    )
    with pytest.raises(UserError, match="awq weights need optimum, which is not installed"):
        require("awq")
    for asked in ("nf4", {"load_in_8bit": True}):
        with pytest.raises(UserError, match=r"bitsandbytes, .*pip install 'milora\[quantised\]'"):
            load_pretrained(plain, quantization=asked)
    with pytest.raises(UserError, match=r"packed is quantised already \(hqq\): remove"):
        load_pretrained(str(packed), quantization="nf4")
    with pytest.raises(UserError, match=r"quant_method is 'hqq': known are"):
        quantization_config({"quant_method": "hqq"}, torch.float32)
    with pytest.raises(UserError, match=r"quant_method is 'gptq': known are bitsandbytes, torchao"):
        quantization_config({"quant_method": "gptq", "bits": 4}, torch.float32)
    with pytest.raises(UserError, match=r"factors_from: .* is not quantised"):
        original_of(plain, None, plain)
    with pytest.raises(UserError, match="full fine-tuning cannot train packed numbers"):
        run(settings(Path(plain), tmp_path, quantization="nf4", method="full"))
    assert not (tmp_path / "run").exists()


def test_options_are_checked(bitsandbytes: Any) -> None:
    with pytest.raises(UserError, match="set load_in_4bit or load_in_8bit"):
        quantization_config({"quant_method": "bitsandbytes"}, torch.float32)
    asked = {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}
    with pytest.raises(
        UserError, match=r"bnb_4bit_quant_typ is .*did you mean bnb_4bit_quant_type"
    ):
        quantization_config(asked, torch.float32)


@pytest.fixture(scope="module")
def packed_folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An nf4 checkpoint as the hub has them."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    folder = tmp_path_factory.mktemp("packed")
    loaded = load_pretrained(str(tiny("llama")), quantization="nf4")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nbase_model: acme/whole\n---\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["nf4", "int8"])
def test_a_killed_run_ends_as_an_unbroken_one(
    asked: str, tiny: Tiny, tmp_path: Path, bitsandbytes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (tmp_path / name for name in ("whole", "broken"))
    for folder in (whole, broken):
        folder.mkdir()
    options: dict[str, Any] = {
        "quantization": asked, "milora": HELD, "data": {"train": str(whole / "rows.jsonl")},
        "evaluate": {"tasks": [{"file": str(whole / "rows.jsonl"), "limit": 4}]},
    }  # fmt: skip
    record = run(settings(tiny("llama"), whole, **options))
    assert record["base"]["unchanged"]
    assert record["step0"]["difference"] <= 1e-5
    assert record["adapter"]["exported_against_trained"] <= 1e-5
    arguments = settings(tiny("llama"), broken, **options)
    break_off(arguments, 6, monkeypatch)
    run(arguments, resume=True)
    assert result_hashes(broken / "run") == result_hashes(whole / "run")


@pytest.mark.slow
def test_a_checkpoint_that_comes_packed(
    packed_folder: Path, tiny: Tiny, tmp_path: Path, finished: Path
) -> None:
    for call in (
        lambda: run(settings(packed_folder, tmp_path)),
        lambda: inspect_model(str(packed_folder), 4, Store(tmp_path / "store"), Progress()),
        lambda: open_checkpoint(str(packed_folder)),
    ):
        with pytest.raises(
            UserError, match=r"quantised \(bitsandbytes\).*acme/whole.*factors_from"
        ):
            call()
    from_whole = {"factors_from": str(tiny("llama")), **HELD}
    record = run(settings(packed_folder, tmp_path, **{**SHORT, "milora": from_whole}))
    assert record["base"]["original"] == str(tiny("llama"))
    assert record["base"]["unchanged"]
    # The same packed numbers and the same factors as when it is packed while it is loaded.
    for name in ("init/factors.safetensors", "adapter/adapter_model.safetensors"):
        assert result_hashes(tmp_path / "run")[name] == result_hashes(finished)[name]
    assert all(check.holds for check in verify(tmp_path / "run"))
    opened = open_adapter(tmp_path / "run")
    with Progress() as progress:
        kept = evaluate_all(
            Pair(opened.model), opened.base.tokenizer, [], general_texts("default"), 1, 4, progress
        )[0]["knowledge"][0]
    assert kept["kl"] > 0
    said = export_run(tmp_path / "run", tmp_path / "merged", "merged", base=str(tiny("llama"))).said
    assert "only the adapted weights were compared (it came packed" in said
    export_run(tmp_path / "run", tmp_path / "gguf", "gguf")


@pytest.mark.slow
def test_factors_from_another_model_are_refused(packed_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_model("llama", seed=1).save_pretrained(other)
    with pytest.raises(UserError, match=r"q_proj differs from the quantised one by 1\d\d%"):
        run(settings(packed_folder, tmp_path, milora={"factors_from": str(other)}))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_lora_needs_no_full_precision_where_nothing_is_measured(
    packed_folder: Path, tiny: Tiny, tmp_path: Path
) -> None:
    record = run(
        settings(packed_folder, tmp_path, method="lora", milora={"interference": {"top": 0}})
    )
    assert record["base"]["original"] is None
    assert record["spectra"] == {}
    assert all(check.holds for check in verify(tmp_path / "run"))
    for base in (None, str(tiny("llama"))):
        with pytest.raises(UserError, match=r"no hash of the full-precision .* cannot be merged"):
            export_run(tmp_path / "run", tmp_path / "merged", "merged", base=base)
    with pytest.raises(UserError, match="name the checkpoint that it was made from with --base"):
        export_run(tmp_path / "run", tmp_path / "gguf", "gguf")
    export_run(tmp_path / "run", tmp_path / "gguf", "gguf", base=str(tiny("llama")))


@pytest.mark.slow
def test_torchao(tiny: Tiny, tmp_path: Path) -> None:
    config = pytest.importorskip("torchao.core.config", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    asked = {
        "quant_method": "torchao",
        "quant_type": {"default": config.config_to_dict(Int8WeightOnlyConfig())},
    }
    record = run(settings(tiny("llama"), tmp_path, quantization=asked))
    assert record["step0"]["difference"] <= 1e-5
    assert record["base"]["unchanged"]
    assert record["adapter"]["exported_against_trained"] <= 1e-5
    assert all(check.holds for check in verify(tmp_path / "run"))


PACKED: dict[str, dict[str, Any]] = {
    "gptq": {"desc_act": False, "sym": True, "checkpoint_format": "gptq"},
    "awq": {"version": "gemm", "zero_point": True},
}


def packed_by(method: str, W: torch.Tensor, group: int = 32) -> dict[str, torch.Tensor]:
    """W (m, n) in 4 bits as the files of GPTQ or AWQ have it, rounded to the nearest."""
    m, n = W.shape
    by_group = W.view(m, n // group, group)
    scale = (by_group.abs().amax(-1) / 7).half()
    q = (by_group / scale.float()[..., None]).round().clamp(-8, 7).long() + 8
    q = q.view(m, n).T  # (n, m), 0 to 15

    def together(x: torch.Tensor, order: list[int]) -> torch.Tensor:
        """Eight numbers of a row in one of 32 bits."""
        found = sum(x[:, one::8] << (4 * i) for i, one in enumerate(order))
        return torch.as_tensor(found).int().contiguous()

    order, zero = [0, 1, 2, 3, 4, 5, 6, 7], torch.full((n // group, m), 8)
    if method == "gptq":  # along the columns; zeros are kept less one
        return {
            "qweight": together(q.T, order).T.contiguous(), "qzeros": together(zero - 1, order),
            "scales": scale.T.contiguous(), "g_idx": torch.arange(n, dtype=torch.int32) // group,
        }  # fmt: skip
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    packed = {"qweight": together(q, order), "qzeros": together(zero, order)}
    return packed | {"scales": scale.T.contiguous()}


@pytest.mark.slow
@pytest.mark.parametrize("method", PACKED)
def test_gptq_and_awq(method: str, tmp_path: Path) -> None:
    """A checkpoint packed here, through a run, a stock PEFT process and a merge."""
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    pytest.importorskip("optimum", reason="optimum is not installed")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    whole, packed = LlamaForCausalLM(config), tmp_path / "packed"
    for folder in (packed, tmp_path / "whole"):
        whole.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    tensors = {}
    for name, weight in whole.state_dict().items():
        if name.endswith("_proj.weight"):
            own = packed_by(method, weight)
            tensors |= {name.replace("weight", key): value for key, value in own.items()}
        else:
            tensors[name] = weight.half()
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    about = json.loads((packed / "config.json").read_text())
    about["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    about["quantization_config"] |= PACKED[method]
    (packed / "config.json").write_text(json.dumps(about))

    from_whole = {"factors_from": str(tmp_path / "whole")}
    record = run(settings(packed, tmp_path, lora=LORA, milora=from_whole))
    assert record["step0"]["difference"] <= 1e-5
    assert record["base"]["unchanged"]
    assert record["adapter"]["exported_against_trained"] <= 1e-3  # AWQ's computes in 16 bit
    assert all(check.holds for check in verify(tmp_path / "run"))
    ours = open_adapter(tmp_path / "run").model
    base = load_pretrained(str(packed), "float32").model
    stock = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    assert torch.equal(next_logits(stock), next_logits(ours))
    with pytest.raises(UserError, match=rf"is quantised \({method}\), and merging into packed"):
        export_run(tmp_path / "run", tmp_path / "merged", "merged")
    export_run(tmp_path / "run", tmp_path / "merged", "merged", base=str(tmp_path / "whole"))


@pytest.mark.slow
def test_the_real_model_in_nf4(bitsandbytes: Any) -> None:
    original = original_of("smollm2-135m", "nf4", None)
    assert original is not None
    assert original.weights is not None
    model = load_pretrained("smollm2-135m", quantization="nf4").model
    assert original.packed_bytes == pytest.approx(loaded_bytes(model), rel=0.01)
    before = fingerprints.base_sha256(model)
    config = targeting.lora_config({**LORA, "layers_to_transform": [0, 29]})
    live, start = adapter.add_adapter(model, config, "milora", weights=original.weights)
    ids = torch.arange(100, 140)[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert step0_difference(live, batch) <= 1e-5
    assert fingerprints.base_sha256(live) == before
    whole = load_pretrained("smollm2-135m", "float32").model
    for name, digest in start.sha256.items():
        assert digest == fingerprints.tensor_sha256(whole.get_submodule(name).weight)
