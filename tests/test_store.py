"""The store: nothing computed twice, nothing wrong ever used, whatever happens to it."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, TARGETS, make_tokenizer
from safetensors.torch import load_file, save_file
from tiny_run import kill_at_write, run, settings
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)

import milora.begin
import milora.store
from milora.adapter import add_adapter
from milora.checkpoint import open_checkpoint
from milora.errors import UserError
from milora.progress import Progress
from milora.store import Store, decompose_checkpoint
from milora.svd import Component, components
from milora.targeting import lora_config

Tiny = Callable[[str], Path]
COMPONENTS: tuple[Component, ...] = ("minor", "principal", "middle", "random")


def weight(m: int = 20, n: int = 14, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def no_computing(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("something was decomposed that the store has")


def lora(kind: str, rank: int = 4) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": rank, "target_modules": TARGETS[kind]}


def decompose(model: Path, folder: Path, kind: str = "llama", **changes: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"method": "milora", "dtype": "float32", "lora": lora(kind)} | changes
    store = Store(folder)
    return decompose_checkpoint(model=str(model), store=store, progress=Progress(), **asked)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_smaller_rank_is_a_slice_of_a_larger(
    component: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    W = weight()
    store = Store(tmp_path)
    large = store.components(W, 9, component, 3)
    assert torch.equal(large.U, components(W, 9, component, 3).U)
    monkeypatch.setattr(milora.store, "components", no_computing)
    for rank in (9, 4, 1):
        found, wanted = store.components(W, rank, component, 3), components(W, rank, component, 3)
        for a, b in zip(found[:3], wanted[:3], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert (found.norm, found.solver) == (wanted.norm, wanted.solver)
    assert (store.made, store.found) == (1, 3)


def test_a_larger_rank_is_computed_and_kept(tmp_path: Path) -> None:
    W, store = weight(), Store(tmp_path)
    for rank in (3, 7, 5):
        store.components(W, rank, "minor")
    assert (store.made, store.found) == (2, 1)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1


def test_one_entry_for_one_weight(tmp_path: Path) -> None:
    store = Store(tmp_path)
    W = weight().bfloat16()
    store.components(W, 3, "minor")
    store.components(W.float(), 3, "minor")  # the same values
    assert (store.made, store.found) == (1, 1)
    store.components(W.T, 3, "minor")
    store.components(weight(seed=1), 3, "minor")
    store.components(W, 3, "principal")
    for seed in (0, 1):
        store.components(W, 3, "random", seed)
    assert store.made == 6


def damage(kind: str, path: Path) -> None:
    data = bytearray(path.read_bytes())
    if kind == "a bit flipped":
        data[-5] ^= 1
    elif kind == "cut":
        del data[-100:]
    elif kind == "empty":
        data.clear()
    elif kind == "not a safetensors file":
        data[:] = b"\x00" * 64
    elif kind == "another format":
        save_file({"U": torch.ones(2, 2)}, path)
        return
    path.write_bytes(data)


@pytest.mark.parametrize(
    "kind", ["a bit flipped", "cut", "empty", "not a safetensors file", "another format"]
)
def test_a_damaged_entry_is_never_used(kind: str, tmp_path: Path) -> None:
    W = weight()
    wanted = Store(tmp_path).components(W, 4, "minor")
    (entry,) = tmp_path.rglob("*.safetensors")
    damage(kind, entry)
    said: list[str] = []
    store = Store(tmp_path, said.append)
    assert torch.equal(store.components(W, 4, "minor").U, wanted.U)
    assert store.made == 1
    assert entry.name in said[0]
    assert "computed again" in said[0]
    assert len(said) == 1
    quiet = Store(tmp_path, no_computing)
    quiet.components(W, 4, "minor")
    assert quiet.found == 1


def test_an_entry_under_another_name_is_never_used(tmp_path: Path) -> None:
    W, other = weight(), weight(seed=1)
    store = Store(tmp_path)
    store.components(other, 4, "minor")
    (stray,) = tmp_path.rglob("*.safetensors")
    data = stray.read_bytes()
    for component in ("minor", "principal"):
        wanted = store.components(W, 4, component)
        (entry,) = (p for p in store.folder.glob(f"*-{component}.*") if p != stray)
        entry.write_bytes(data)
        said: list[str] = []
        assert torch.equal(Store(tmp_path, said.append).components(W, 4, component).U, wanted.U)
        assert "it says that it is" in said[0]


def test_a_changed_number_in_an_entry_is_noticed(tmp_path: Path) -> None:
    W = weight()
    found = Store(tmp_path).components(W, 4, "minor")
    (entry,) = tmp_path.rglob("*.safetensors")
    data = entry.read_bytes()
    start = data.index(repr(found.norm).encode())
    entry.write_bytes(data[:start] + b"9" + data[start + 1 :])
    said: list[str] = []
    assert Store(tmp_path, said.append).components(W, 4, "minor").norm == found.norm
    assert "not what was written" in said[0]


def test_train_goes_on_without_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    store = Store(tmp_path / "file", said.append, optional=True)
    for seed in (0, 1):
        W = weight(seed=seed)
        assert torch.equal(store.components(W, 3, "minor").U, components(W, 3, "minor").U)
    assert len(said) == 1
    assert "going on without it" in said[0]


def test_a_store_of_another_version_is_named_and_not_used(tmp_path: Path) -> None:
    W = weight()
    Store(tmp_path).components(W, 4, "minor")
    (tmp_path / "v1").rename(tmp_path / "v0")
    said: list[str] = []
    store = Store(tmp_path, said.append)
    store.components(W, 4, "minor")
    assert store.made == 1
    assert "another version" in said[0]
    assert "v0" in said[0]


def test_leftovers_of_killed_writers_are_removed_in_time(tmp_path: Path) -> None:
    folder = Store(tmp_path).folder
    for name, age in ((".old.tmp", 7200), (".new.tmp", 5)):
        (folder / name).write_text("half")
        then = (folder / name).stat().st_mtime - age
        os.utime(folder / name, (then, then))
    Store(tmp_path)
    assert [path.name for path in folder.iterdir()] == [".new.tmp"]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_init_leaves_nothing_for_train_to_compute(
    kind: str, sharded: bool, tmp_path: Path, tiny: Tiny,
    load: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tiny(kind)
    if sharded:
        folder = tmp_path / "sharded"
        load(kind).save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    done = decompose(folder, tmp_path / "store", kind)
    assert done["made"] == done["weights"] > 0
    config = lora_config(lora(kind))
    _, wanted = add_adapter(load(kind), config, "milora")
    monkeypatch.setattr(milora.store, "components", no_computing)
    for rank in (4, 2):
        store = Store(tmp_path / "store")
        config = lora_config(lora(kind, rank))
        _, start = add_adapter(load(kind), config, "milora", decompose=store.components)
        # Of three matrices in one weight (GPT-2's c_attn) two share a rank of two.
        assert store.found == (done["weights"] if rank == 4 or kind != "gpt2" else 10)
    _, start = add_adapter(
        load(kind), lora_config(lora(kind)), "milora", decompose=store.components
    )
    for name, factors in wanted.factors.items():
        assert torch.equal(start.factors[name].A, factors.A)
        assert torch.equal(start.factors[name].B, factors.B)


@pytest.mark.parametrize("method", ["pissa", "middle", "random"])
def test_every_method_is_found_again(
    method: str, tmp_path: Path, tiny: Tiny, load: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pattern = {"rank_pattern": {"v_proj": 2}}
    decompose(tiny("llama"), tmp_path, method=method, lora=lora("llama") | pattern, seed=5)
    _, wanted = add_adapter(load("llama"), lora_config(lora("llama") | pattern), method, seed=5)
    monkeypatch.setattr(milora.store, "components", no_computing)
    _, start = add_adapter(
        load("llama"), lora_config(lora("llama") | pattern), method, seed=5,
        decompose=Store(tmp_path).components,
    )  # fmt: skip
    for name, factors in wanted.factors.items():
        assert torch.equal(start.factors[name].A, factors.A)


def test_a_dtype_that_rounds_is_another_weight(
    tmp_path: Path, tiny: Tiny, load: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    decompose(tiny("llama"), tmp_path, dtype="bfloat16")
    monkeypatch.setattr(milora.store, "components", no_computing)
    model, config = load("llama", torch.bfloat16), lora_config(lora("llama"))
    add_adapter(model, config, "milora", decompose=Store(tmp_path).components)
    with pytest.raises(AssertionError, match="was decomposed"):
        add_adapter(load("llama"), config, "milora", decompose=Store(tmp_path).components)


def test_a_changed_shard_is_decomposed_anew(
    tmp_path: Path, load: Callable[..., PreTrainedModel]
) -> None:
    folder = tmp_path / "model"
    load("llama").save_pretrained(folder, max_shard_size="20KB")
    decompose(folder, tmp_path / "store")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.self_attn.q_proj.weight"
    shard = folder / index[name]
    tensors = load_file(shard)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, shard, {"format": "pt"})
    done = decompose(folder, tmp_path / "store")
    assert (done["made"], done["found"]) == (1, done["weights"] - 1)


def broken(kind: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.v_proj.weight"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
        return
    if kind == "NaN":
        tensors[name][3, 5] = float("nan")
    elif kind == "missing":
        del tensors[name]
    elif kind == "of another shape":
        tensors[name] = tensors[name][:, :16].contiguous()
    elif kind == "quantised":
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (folder / "config.json").write_text(json.dumps(config))
        card = "---\nbase_model: acme/whole\n---\n"
        (folder / "README.md").write_text(card)
    elif kind == "no files":
        path.unlink()
        return
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("truncated", r"model\.safetensors cannot be read .*truncated or damaged"),
        ("NaN", r"model\.layers\.0\.self_attn\.v_proj\.weight holds NaN"),
        ("missing", r"hold no weight for model\.layers\.0\.self_attn\.v_proj \(1 in all\)"),
        ("of another shape", r"v_proj\.weight is \(16, 16\).*says \(16, 32\)"),
        ("quantised", r"quantised \(gptq\).*full-precision.*acme/whole"),
        ("no files", r"neither model\.safetensors nor"),
    ],
)
def test_a_broken_checkpoint(kind: str, said: str, tmp_path: Path, tiny: Tiny) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama"), folder)
    broken(kind, folder)
    with pytest.raises(UserError, match=said):
        decompose(folder, tmp_path / "store")


def test_a_shard_that_the_index_names_and_that_is_not_there(
    tmp_path: Path, load: Callable[..., PreTrainedModel]
) -> None:
    folder = tmp_path / "model"
    load("llama").save_pretrained(folder, max_shard_size="20KB")
    gone = sorted(folder.glob("*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(UserError, match=f"has no {gone.name}, which its .* names: fetch it again"):
        decompose(folder, tmp_path / "store")


@pytest.mark.parametrize(
    "content", ["[]", "null", '{"weight_map": null}', '{"weight_map": {"a": 1}}', "{", "{}"]
)
def test_a_damaged_index(
    content: str, tmp_path: Path, load: Callable[..., PreTrainedModel]
) -> None:
    folder = tmp_path / "model"
    load("llama").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json is damaged .*: fetch it again"):
        decompose(folder, tmp_path / "store")


def test_an_index_and_a_shard_that_do_not_agree(
    tmp_path: Path, load: Callable[..., PreTrainedModel]
) -> None:
    folder = tmp_path / "model"
    load("llama").save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = sorted(content["weight_map"])
    name = "model.layers.0.self_attn.q_proj.weight"
    other = next(n for n in names if content["weight_map"][n] != content["weight_map"][name])
    content["weight_map"][name] = content["weight_map"][other]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"has no {name}, though .*: fetch both again"):
        decompose(folder, tmp_path / "store")


def test_one_file_goes_before_shards_as_in_the_library(
    tmp_path: Path, load: Callable[..., PreTrainedModel]
) -> None:
    folder = tmp_path / "model"
    load("llama").save_pretrained(folder, max_shard_size="20KB")
    changed = load("llama")
    name = "model.layers.0.self_attn.q_proj"
    changed.get_submodule(name).weight.mul_(2)  # type: ignore[operator, union-attr]
    changed.save_pretrained(tmp_path / "one")
    shutil.copy(tmp_path / "one" / "model.safetensors", folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    found = open_checkpoint(str(folder)).read(name)
    assert torch.equal(found, loaded.get_submodule(name).weight)


@pytest.mark.parametrize("length", [0, 20, 200, 2000])
def test_a_damaged_gguf_file(length: int, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_description("x" * 5000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"model\.gguf (cannot be (loaded|read)|hold no weight)"):
        decompose(path, tmp_path / "store")


@pytest.mark.parametrize("command", ["init", "train"])
def test_a_pattern_of_no_weight_is_refused_before_anything_is_decomposed(
    command: str, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (milora.store, milora.begin):
        monkeypatch.setattr(module, "components", no_computing)
    protect = {"q_proj": 2, "gate": 4}
    call: Callable[[], Any] = {
        "init": lambda: decompose(tiny("llama"), tmp_path / "store", protect=protect),
        "train": lambda: run(settings(tiny("llama"), tmp_path, milora={"protect": protect})),
    }[command]
    with pytest.raises(UserError, match=r"milora\.protect: 'gate' matches none of the \d+ adapted"):
        call()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "sets the ranks: leave lora.rank_pattern out"),
        ({"target_parameters": ["experts.up"]}, "experts have no .* leave lora.target_parameters"),
    ],
)
@pytest.mark.parametrize("command", ["init", "train"])
def test_ranks_that_cannot_be_are_refused_before_any_spectrum(
    command: str, option: dict[str, Any], said: str, tmp_path: Path, tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Store, "spectrum", no_computing)
    ranked, lora = {"energy": 0.1}, {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]} | option
    call: Callable[[], Any] = {
        "init": lambda: decompose(tiny("llama"), tmp_path / "store", lora=lora, ranked=ranked),
        "train": lambda: run(
            settings(
                tiny("llama"), tmp_path, milora={"rank": ranked}, lora=lora | {"lora_dropout": 0}
            )
        ),
    }[command]
    with pytest.raises(UserError, match=rf"milora\.rank:? {said}"):
        call()


def test_what_is_no_model(tmp_path: Path) -> None:
    for model, said in (
        (f"{tmp_path}/none", "is not a folder, a .gguf file or a hub id"),
        (f"{tmp_path}/none.gguf", "does not exist"),
        (str(tmp_path), "cannot be loaded"),
    ):
        with pytest.raises(UserError, match=said):
            open_checkpoint(model)


def test_methods_without_components_are_refused(tmp_path: Path, tiny: Tiny) -> None:
    for method in ("lora", "full"):
        with pytest.raises(UserError, match=f"method {method} starts from no components"):
            decompose(tiny("llama"), tmp_path, method=method)


def init_and_kill(model: str, store: str, at_write: int) -> None:
    """In a child process: an init that kills itself just before the n-th change to the store."""
    torch.set_num_threads(1)
    kill_at_write(store, at_write)
    decompose(Path(model), Path(store))


@pytest.mark.slow
@pytest.mark.parametrize("at_write", [*range(1, 10), 23])
def test_killed_at_the_nth_write(
    at_write: int, tmp_path: Path, tiny: Tiny, children: ForkServerContext
) -> None:
    store = tmp_path / "store"
    child = children.Process(target=init_and_kill, args=(str(tiny("llama")), str(store), at_write))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    whole = {path.name for path in store.rglob("*.safetensors")}
    said: list[str] = []
    again = Store(store, said.append)
    done = decompose_checkpoint(
        model=str(tiny("llama")), method="milora", lora=lora("llama"), store=again,
        progress=Progress(),
    )  # fmt: skip
    assert not said  # what was there was whole
    assert (done["found"], done["made"]) == (len(whole), done["weights"] - len(whole))
    fresh = tmp_path / "fresh"
    decompose(tiny("llama"), fresh)
    names = {path.name: path.read_bytes() for path in fresh.rglob("*.safetensors")}
    assert {path.name: path.read_bytes() for path in store.rglob("*.safetensors")} == names


CONFIG = """\
model: {model}
output_dir: run
data: {{train: rows.jsonl}}
lora: {{r: 4, lora_alpha: 4, target_modules: [q_proj, k_proj, v_proj, up_proj, down_proj]}}
"""


def command(folder: Path, model: Path, **options: Any) -> subprocess.Popen[str]:
    (folder / "run.yaml").write_text(CONFIG.format(model=model), encoding="utf-8")
    environment = os.environ | {"MILORA_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "milora", "init", "run.yaml"], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_two_at_once_share_the_work(tmp_path: Path, tiny: Tiny) -> None:
    both = [command(tmp_path, tiny("llama")) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    counts = [re.match(r"10 weights: (\d+) decomposed, (\d+) were", out) for out, _ in outputs]
    assert all(counts), outputs
    assert sum(int(count[1]) for count in counts if count) == 10  # none twice
    left = {path.suffix for path in (tmp_path / "store" / "v1").iterdir()}
    assert left == {".safetensors"}
    done = decompose(tiny("llama"), tmp_path / "store")
    assert (done["found"], done["made"]) == (10, 0)


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path, tiny: Tiny) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    process = command(tmp_path, tiny("llama"), preexec_fn=limit)
    _, err = process.communicate()
    assert process.returncode == 2
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert re.search(r"store cannot write .*: free some space, or set MILORA_STORE", last)
    assert not list((tmp_path / "store" / "v1").iterdir())


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set MILORA_STORE to a folder that can be written"):
        Store(tmp_path / "file")


def test_fused_weights_are_read_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=258, intermediate_size=64, **shape))
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    name = "gpt_neox.layers.0.attention.query_key_value"
    assert torch.equal(checkpoint.read(name), model.get_submodule(name).weight)  # type: ignore[arg-type]
    assert all(p.device.type == "meta" for p in checkpoint.skeleton.parameters())
