"""Merging shard by shard: the same weights as PEFT's merge, whatever the files keep them in."""

import json
import multiprocessing
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapter import perturb
from test_architectures import ARCHITECTURES, CLASSES, EACH
from tiny_run import kill_at_write
from transformers import AutoModelForCausalLM, AutoTokenizer

from milora.adapter import add_adapter, trained_factors
from milora.artefacts import KINDS, export_run
from milora.combine import combine
from milora.errors import UserError
from milora.export import plain_lora, save_plain_lora
from milora.files import files_sha256, read_json, write_json
from milora.fingerprints import base_sha256
from milora.merge import Recorded, merge_files, summed
from milora.pretrained import task_of
from milora.progress import Progress
from milora.smaller import Smaller
from milora.targeting import lora_config
from milora.verify import ADAPTER, make_probes, open_run, verify


def make_base(folder: Path, name: str, dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    """A tiny model of an architecture in a folder, with tokenizer and licence."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    architecture.model(architecture.config).to(dtype).save_pretrained(folder, **save)
    make_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("of the base")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def make_adapter(folder: Path, base: Path, name: str, scale: float = 1.0) -> Path:
    """An adapter as a run writes it, whose training was a random change."""
    _, _, targets, parameters, load = ARCHITECTURES[name]
    model = load.from_pretrained(base)
    options = {"r": 4, "target_modules": targets, "target_parameters": parameters or None}
    live, start = add_adapter(
        model, lora_config(options | {"lora_alpha": 6}, task_of(model)), "milora"
    )
    perturb(live)
    plain = plain_lora(start, trained_factors(live))
    factors = {n: f._replace(B=scale * f.B) for n, f in plain.factors.items()}
    plain = plain._replace(factors=factors)
    bare, dtype = live.unload(), str(model.dtype).removeprefix("torch.")
    folder.mkdir()
    rank = save_plain_lora(folder, plain, bare, "tiny")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    about = {
        "model": str(base), "name": "tiny", "dtype": dtype, "license": "mit",
        "sha256": base_sha256(bare),
    }  # fmt: skip
    probes = make_probes(PeftModel.from_pretrained(bare, folder), tokenizer)
    write_json(
        folder / "milora.json",
        {
            "format": ADAPTER, "base": about, "weights_sha256": start.sha256, "method": "milora",
            "rank": rank, "versions": {}, "probes": probes, "configuration": {},
            "step0": {"difference": 0.0, "bound": 1e-5},
        },
    )  # fmt: skip
    (folder / "README.md").write_text("the adapter's card")
    return folder


def export(adapter: Path, out: Path, to: str = "merged", **options: Any) -> str:
    return export_run(adapter, out, to, **options).said


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


# A classifier's head is in no file of its base: that is not merged file by file.
WRITES = [
    one
    for name, one in zip(ARCHITECTURES, EACH, strict=True)
    if ARCHITECTURES[name].load is not CLASSES
]


@pytest.mark.parametrize("name", WRITES)
def test_merged_as_by_peft(name: str, tmp_path: Path) -> None:
    load = ARCHITECTURES[name].load
    base = make_base(tmp_path / "base", name, max_shard_size="40KB")
    adapter = make_adapter(tmp_path / "adapter", base, name)
    said = export(adapter, tmp_path / "merged")
    loaded = PeftModel.from_pretrained(load.from_pretrained(base), adapter)
    wanted = loaded.merge_and_unload().state_dict()
    found = load.from_pretrained(tmp_path / "merged").state_dict()
    before = load.from_pretrained(base).state_dict()
    assert set(found) == set(wanted)
    changed = set()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=2e-6, rtol=0)
        if not torch.equal(found[key], before[key]):
            changed.add(key)
            assert not torch.equal(value, before[key])
    assert len(changed) >= 2 * len(ARCHITECTURES[name].targets)
    assert "merged weights, float32" in said
    # What is no weight is as it was, and the files are cut as they were.
    for file in base.iterdir():
        copied = tmp_path / "merged" / file.name
        if file.suffix == ".safetensors":
            assert copied.stat().st_size == file.stat().st_size
            with safe_open(file, "pt") as old, safe_open(copied, "pt") as new:
                assert old.keys() == new.keys()
                assert old.metadata() == new.metadata()
        elif file.name != "README.md":
            own = adapter / file.name  # its tokenizer is the one it was trained with
            assert copied.read_bytes() == (own if own.exists() else file).read_bytes()
    assert "of the update" in (tmp_path / "merged" / "README.md").read_text()
    # All weights were compared, so that a base with another vector, which none adapts, is refused.
    assert "only the adapted" not in said
    file, key = next(
        (file, key)
        for file in base.glob("*.safetensors")
        for key, value in load_file(file).items()
        if value.ndim == 1
    )
    content = {key: value.clone() for key, value in load_file(file).items()}  # not mapped
    save_file(content | {key: content[key] + 1e-3}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"wrong base: .* weights that are not adapted"):
        export(adapter, tmp_path / "again")
    assert not list(tmp_path.glob("*again*"))


def test_weights_that_cannot_be_compared_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", "gpt-neox")
    adapter = make_adapter(tmp_path / "adapter", base, "gpt-neox")
    monkeypatch.setattr("milora.merge.RENAMED", {})  # its head has another name in the files
    assert "only the adapted weights were compared" in export(adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.bfloat16),
        *(
            pytest.param(name, dtype, marks=pytest.mark.slow)
            for name in ("llama", "gpt2", "mixtral")
            for dtype in (torch.bfloat16, torch.float16)
            if (name, dtype) != ("llama", torch.bfloat16)
        ),
    ],
)
def test_rounded_once_and_said(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", name, dtype)
    adapter = make_adapter(tmp_path / "adapter", base, name, scale=0.1)
    export(adapter, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    exact = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    lost = whole = 0.0
    for key, value in found.items():
        assert value.dtype == before[key].dtype
        assert (
            torch.equal(value, exact[key].to(dtype))
            or (
                # A sum in another order may fall on the other side of a tie.
                (value.float() - exact[key]).abs()
                <= 1.01 * (exact[key].to(dtype).float() - exact[key]).abs() + 1e-7
            ).all()
        )
        lost += float((value.float() - exact[key]).double().square().sum())
        whole += float((exact[key] - before[key].float()).double().square().sum())
    recorded = json.loads((tmp_path / "merged" / "milora.json").read_text())["rounding"]
    assert recorded["dtype"] == str(dtype).removeprefix("torch.")
    assert recorded["all"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert recorded["worst"][1] >= recorded["all"] > 1e-4
    assert [check for check in verify(tmp_path / "merged") if not check.holds] == []
    shutil.copyfile(base / "model.safetensors", tmp_path / "merged" / "model.safetensors")
    assert "file" in [check.name for check in verify(tmp_path / "merged") if not check.holds]


def test_files_of_fp32_are_summed_in_fp64() -> None:
    torch.manual_seed(0)
    W, B, A = torch.randn(40, 30), torch.randn(40, 64), torch.randn(64, 30)
    rounded, _ = summed("w", W, B, A)
    assert torch.equal(rounded, (W.double() + B.double() @ A.double()).float())


def test_a_run_in_fp32_on_a_checkpoint_in_bf16(tmp_path: Path) -> None:
    """The hash that was recorded is of the weight as the run had it."""
    base = make_base(tmp_path / "base", "llama", torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    whole.save_pretrained(tmp_path / "fp32")
    make_tokenizer().save_pretrained(tmp_path / "fp32")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "fp32", "llama")
    assert "bfloat16" in export(adapter, tmp_path / "merged", base=str(base))
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_a_weight_that_is_kept_in_fp32_in_a_model_of_fp16(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "t5", torch.float16)
    adapter = make_adapter(tmp_path / "adapter", base, "t5")
    assert "float16" in export(adapter, tmp_path / "merged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probes_are_judged_by_what_the_dtype_lets_them_move(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", "llama", dtype)
    adapter = make_adapter(tmp_path / "adapter", base, "llama")
    written = (adapter / "milora.json").read_text()

    def failed(off: float, tokens: slice) -> list[str]:
        about = json.loads(written)
        for probe in about["probes"]:
            probe["tuned"][tokens] = [value + off for value in probe["tuned"][tokens]]
        write_json(adapter / "milora.json", about)
        return [check.name for check in verify(adapter) if not check.holds]

    sixteen = dtype == torch.bfloat16
    assert failed(2e-3, slice(1)) == ([] if sixteen else ["probes, tuned"])  # the worst, not all
    assert failed(0.15, slice(1)) == ([] if sixteen else ["probes, tuned"])  # a single one
    assert failed(0.15, slice(None)) == ["probes, tuned"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    base = make_base(folder / "base", "llama", max_shard_size="40KB")
    make_adapter(folder / "adapter", base, "llama")
    return folder


@pytest.fixture
def pair(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter that a test may spoil."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(made / "base", base)
    shutil.copytree(made / "adapter", adapter)
    about = read_json(adapter / "milora.json")
    write_json(adapter / "milora.json", about | {"base": about["base"] | {"model": str(base)}})
    return base, adapter


def test_what_cannot_be_merged_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair

    def refused(said: str, **options: Any) -> None:
        with pytest.raises(UserError, match=said):
            export(adapter, tmp_path / "merged", **options)
        assert not (tmp_path / "merged").exists()
        assert not list(tmp_path.glob(".merged*"))

    other = make_base(tmp_path / "gpt2", "gpt2")
    refused("wrong base: .* does not fit it", base=str(other))
    file = next(f for f in base.glob("*.safetensors") if any("q_proj" in k for k in load_file(f)))
    whole = file.read_bytes()
    content = {key: value.clone() for key, value in load_file(file).items()}  # not mapped
    file.write_bytes(whole[:-5])
    refused("truncated or damaged")
    file.write_bytes(b"\xff" * 40)
    refused("cannot be read")
    file.write_bytes((1).to_bytes(8, "little") + b"1")
    refused("its header is no table")
    name = next(key for key in content if "q_proj" in key)
    save_file(content | {name: content[name] + 1e-3}, file, {"format": "pt"})
    refused(f"wrong base: {name.removesuffix('.weight')}")
    broken = content[name].clone()
    broken[0, 0] = torch.nan
    save_file(content | {name: broken}, file, {"format": "pt"})
    refused(f"{name.removesuffix('.weight')}: base or adapter holds NaN or infinite|wrong base")
    save_file(content | {name: content[name].to(torch.float8_e4m3fn)}, file, {"format": "pt"})
    refused("F8_E4M3: an update can be merged only into")
    save_file({key: value for key, value in content.items() if key != name}, file, {"format": "pt"})
    refused("though model.safetensors.index.json says so")
    file.unlink()
    refused(f"has no {file.name}")
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(file.name, f"../{file.name}"))
    refused("which is not a file beside it")


def test_an_adapter_that_holds_more_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = pair
    path = adapter / "adapter_model.safetensors"
    content = {key: value.clone() for key, value in load_file(path).items()}
    save_file(content | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(UserError, match=r"also holds base_model\.model\.lm_head"):
        export(adapter, tmp_path / "merged")
    first = next(iter(content))
    save_file({key: value for key, value in content.items() if key != first}, path)
    with pytest.raises(UserError, match="not the whole adapter"):
        export(adapter, tmp_path / "merged")


def test_another_configuration_is_another_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Probes that were measured anew on it would agree with what was made there."""
    base, adapter = pair
    config = read_json(base / "config.json")
    write_json(base / "config.json", config | {"rms_norm_eps": 0.5})
    with pytest.raises(UserError, match=r"wrong base: .* answers the probes .*config\.json"):
        export(adapter, tmp_path / "small", "lora", smaller=Smaller(3))
    assert not (tmp_path / "small").exists()


def test_an_altered_adapter_goes_nowhere(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = pair
    shutil.copytree(adapter, tmp_path / "other")
    about, file = read_json(adapter / "milora.json"), adapter / "adapter_model.safetensors"
    write_json(adapter / "milora.json", about | {"files_sha256": files_sha256(adapter)})
    export(adapter, tmp_path / "copy", "lora")
    save_file({k: 2 * v if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    for call in (
        *(lambda to=to: export(adapter, tmp_path / "out", to) for to in KINDS),
        lambda: export(adapter, tmp_path / "out", "lora", smaller=Smaller(3)),
        lambda: combine([tmp_path / "other", adapter], tmp_path / "out"),
        lambda: open_run(adapter),  # eval and chat
    ):
        with pytest.raises(UserError, match=r"adapter_model\.safetensors is not as it was written"):
            call()
        assert not (tmp_path / "out").exists()
    file.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is gone .* put the file"):
        export(adapter, tmp_path / "out", "lora")


def _killed(adapter: Path, out: Path, at_write: int) -> None:
    kill_at_write(str(out.parent), at_write)
    export(adapter, out)


def test_a_kill_leaves_nothing_that_looks_whole(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = pair
    (tmp_path / "out").mkdir()
    out, context = tmp_path / "out" / "merged", multiprocessing.get_context("fork")
    for at_write in (1, 5, 9):
        child = context.Process(target=_killed, args=(adapter, out, at_write))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not out.exists()
    export(adapter, out)
    assert [path.name for path in out.parent.iterdir()] == ["merged"]


def test_it_is_worked_on_in_blocks(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of the base is in memory than a block."""
    _, adapter = pair
    export(adapter, tmp_path / "whole")
    monkeypatch.setattr("milora.merge.BLOCK", 100)
    sizes: list[int] = []
    whole = torch.frombuffer

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        result = whole(*args, **kwargs)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch, "frombuffer", counted)
    export(adapter, tmp_path / "blocks")
    assert max(sizes) <= 128
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "blocks")
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=1e-7, rtol=0)


@pytest.mark.slow
def test_one_stack_on_disk(tmp_path: Path) -> None:
    """A checkpoint that keeps its experts stacked, as the library does in memory."""
    base = make_base(tmp_path / "base", "mixtral")
    adapter = make_adapter(tmp_path / "adapter", base, "mixtral")
    export(adapter, tmp_path / "merged")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    model = AutoModelForCausalLM.from_pretrained(base)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    (tmp_path / "stacked").mkdir()
    save_file(kept, tmp_path / "stacked" / "model.safetensors", {"format": "pt"})
    from milora.export import load_plain_lora

    def skeleton() -> Any:
        with torch.device("meta"):
            return type(model)(model.config)

    factors = load_plain_lora(adapter, skeleton()).factors
    recorded = json.loads((adapter / "milora.json").read_text())["weights_sha256"]
    hashes = {name: Recorded(digest, torch.float32) for name, digest in recorded.items()}
    (tmp_path / "out").mkdir()
    with Progress() as progress:
        merge_files(
            str(tmp_path / "stacked"), skeleton(), factors, hashes, tmp_path / "out", progress
        )  # fmt: skip
    for key, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(value, wanted[key]), key


def test_one_shard_with_an_index(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    content = tensors(base)
    for file in base.glob("model*.safetensors*"):
        file.unlink()
    name = "model-00001-of-00001.safetensors"
    save_file(content, base / name, {"format": "pt"})
    write_json(
        base / "model.safetensors.index.json",
        {"metadata": {}, "weight_map": dict.fromkeys(content, name)},
    )
    export(adapter, tmp_path / "merged")
    assert all(check.holds for check in verify(tmp_path / "merged"))


def test_answers_end_where_they_did_in_training(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Though the base's files, as transformers 4 wrote them, have another end."""
    base, adapter = pair
    write_json(base / "special_tokens_map.json", {"eos_token": "</s>", "bos_token": "<s>"})
    write_json(base / "generation_config.json", {"eos_token_id": 1, "max_length": 99})
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.eos_token = "Z"
    tokenizer.save_pretrained(adapter)
    about = read_json(adapter / "milora.json")
    write_json(
        adapter / "milora.json", about | {"configuration": {"tokenizer": {"eos_token": "Z"}}}
    )
    export(adapter, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "Z"
    ends = read_json(tmp_path / "merged" / "generation_config.json")
    assert ends == {"eos_token_id": [tokenizer.eos_token_id, 1], "max_length": 99}


@pytest.mark.slow
def test_what_else_lies_in_the_folders(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A download's cache beside the adapter; weights in other formats beside the base."""
    base, adapter = pair
    (adapter / ".cache").mkdir()
    (adapter / ".cache" / "x").write_text("x")
    (adapter / "notes").mkdir()
    for name in ("rust_model.ot", "64.tflite"):
        (base / name).write_text("x")
    export(adapter, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert not names & {".cache", "notes", "rust_model.ot", "64.tflite"}
    several = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template = several
    tokenizer.save_pretrained(adapter)
    export(adapter, tmp_path / "with-tools")
    assert AutoTokenizer.from_pretrained(tmp_path / "with-tools").chat_template == several
    (adapter / "README.md").unlink()
    export(adapter, tmp_path / "small", "lora", smaller=Smaller(rank=2))
    assert "Approximation" in (tmp_path / "small" / "README.md").read_text()


def test_damaged_adapters(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = pair
    for name in ("adapter_config.json", "tokenizer.json"):
        written = (adapter / name).read_bytes()
        (adapter / name).write_bytes(written[: len(written) // 2])
        for asked in (lambda: verify(adapter), lambda: export(adapter, tmp_path / "merged")):
            with pytest.raises(UserError, match=rf"adapter.*{name}.* as written back"):
                asked()
        (adapter / name).write_bytes(written)
    config = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", config | {"r": 3, "lora_alpha": 3})
    for asked in (lambda: verify(adapter), lambda: export(adapter, tmp_path / "merged")):
        with pytest.raises(UserError, match=r"adapter_config\.json .* put both files as written"):
            asked()
    write_json(adapter / "adapter_config.json", config)
    file = adapter / "adapter_model.safetensors"
    content = load_file(file)
    broken = {name: tensor.clone() for name, tensor in content.items()}
    broken[next(name for name in broken if "lora_B" in name)][0, 0] = torch.nan
    save_file(broken, file, {"format": "pt"})
    assert [c.name for c in verify(adapter) if not c.holds] == ["probes, tuned"]
    file.write_bytes(file.read_bytes()[:-5])
    for asked in (lambda: verify(adapter), lambda: export(adapter, tmp_path / "merged")):
        with pytest.raises(UserError, match=r"adapter_model.safetensors cannot be read"):
            asked()
    file.unlink()
    with pytest.raises(UserError, match=r"adapter_model.safetensors cannot be read"):
        verify(adapter)
    (adapter / "adapter_config.json").unlink()
    for asked in (lambda: verify(adapter), lambda: export(adapter, tmp_path / "merged")):
        with pytest.raises(UserError, match=r"has no adapter_config.json: put the file as"):
            asked()
    (adapter / "milora.json").write_text('{"format": ')
    with pytest.raises(UserError, match=r"milora.json is damaged"):
        verify(adapter)


def test_verify_says_what_record_and_configuration_do_not_bear_out(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    _, adapter = pair

    def failed(name: str, **changes: Any) -> list[str]:
        written = (adapter / name).read_bytes()
        write_json(adapter / name, read_json(adapter / name) | changes)
        found = [check.name for check in verify(adapter) if not check.holds]
        (adapter / name).write_bytes(written)
        return found

    assert failed("milora.json") == []
    assert failed("milora.json", step0={"difference": 2e-5, "bound": 1e-5}) == ["step 0"]
    assert failed("milora.json", rank=7) == ["format"]
    assert "format" in failed("adapter_config.json", lora_alpha=1)


def test_exporting_what_is_no_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    with pytest.raises(UserError, match="--base: a copy of the adapter needs no base"):
        export(adapter, tmp_path / "copy", "lora", base=str(base))
    export(adapter, tmp_path / "merged")
    with pytest.raises(UserError, match="holds milora merged weights 1, not an adapter"):
        export(tmp_path / "merged", tmp_path / "again", "lora")
    with pytest.raises(UserError, match="need no --base"):
        verify(tmp_path / "merged", base="other")
