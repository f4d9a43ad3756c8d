"""Runs that continue runs: step 0 is the earlier result, the base is the first one's."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_run import break_off, run, settings
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from milora.adapter import Factors, add_adapter, place, trained_factors
from milora.approximation import best_of_rank, norm
from milora.cli import app, main
from milora.continual import Earlier, _check_same, check_material
from milora.errors import UserError
from milora.export import plain_lora
from milora.files import files_sha256, read_json, sha256, write_json
from milora.fingerprints import base_sha256
from milora.lineage import chain, current, read_link
from milora.logits import base_only, logits_of
from milora.matrices import adapted_matrices, matrix_in
from milora.protect import held, moved, project, used_by_tasks
from milora.quantised import SHORT
from milora.spectra import apart, span
from milora.svd import components
from milora.targeting import lora_config
from milora.verify import verify

Tiny = Callable[[str], Path]
Load = Callable[..., PreTrainedModel]


def config() -> Any:
    return lora_config({"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]})


def shaken(model: PeftModel, size: float, seed: int = 0) -> None:
    """What training does: the factors move."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for matrix in adapted_matrices(model).values():
            for factor in matrix.factors("default"):
                factor.add_(size * (factor.abs().mean() + 0.02) * torch.randn_like(factor))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["milora", "lora", "middle"])
@pytest.mark.parametrize("keep_apart", [False, True])
def test_five_foldings_without_a_step_are_one_function(
    method: str, keep_apart: bool, load: Load, batch: dict[str, Tensor]
) -> None:
    model, _ = add_adapter(load("llama"), config(), "milora")
    shaken(model, 1.0)
    first = add_adapter(load("llama"), config(), "milora")[1]
    previous = plain_lora(first, trained_factors(model)).factors
    with torch.no_grad():
        wanted = logits_of(model, batch)
        with base_only(model):
            base = logits_of(model, batch)
    assert (wanted - base).abs().max() > 1e-2 * base.abs().max()
    for _ in range(5):
        model, start = add_adapter(
            load("llama"), config(), method, previous=previous, keep_apart=keep_apart
        )
        with torch.no_grad():
            assert (logits_of(model, batch) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
            with base_only(model):
                assert torch.equal(logits_of(model, batch), base)
        previous = plain_lora(start, trained_factors(model), previous=previous).factors


def test_the_components_are_those_of_the_effective_weight(load: Load) -> None:
    _, first = add_adapter(load("llama"), config(), "milora")
    torch.manual_seed(0)
    previous = {
        name: Factors(torch.randn(3, A.shape[1]) / 5, torch.randn(len(B), 3) / 5)
        for name, (A, B) in first.factors.items()
    }
    _, start = add_adapter(load("llama"), config(), "milora", previous=previous)
    base = load("llama")
    for name, (A0, B0) in start.factors.items():
        A, B = previous[name]
        found = components((matrix_in(base, name) + B @ A).double(), 4, "minor")
        torch.testing.assert_close((B0 @ A0).double(), (found.U * found.S) @ found.Vh,
                                   atol=1e-5, rtol=1e-4)  # fmt: skip
        assert start.sha256[name] == first.sha256[name]  # of W, not of W + dW


@given(
    shape=st.tuples(st.integers(12, 40), st.integers(12, 40)),
    used=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_apart_leaves_what_is_small_outside(shape: tuple[int, int], used: int, seed: int) -> None:
    torch.manual_seed(seed)
    m, n = shape
    W, A, B = torch.randn(m, n), torch.randn(used, n), torch.randn(m, used)
    U, Vh = span(A, B)
    assert len(Vh) == used
    dW = B.double() @ A.double()
    torch.testing.assert_close(U @ (U.T @ dW) @ Vh.T @ Vh, dW)
    found = components(apart(W, U, Vh), min(m, n) - used, "minor")
    assert (U.T @ found.U).abs().max() < 1e-5
    assert (found.Vh @ Vh.T).abs().max() < 1e-5
    outside = W.double() - U @ (U.T @ W.double())
    outside = outside - outside @ Vh.T @ Vh
    torch.testing.assert_close(
        found.S, torch.linalg.svdvals(outside)[: min(m, n) - used], atol=1e-4, rtol=1e-4
    )


def test_an_update_that_cancels_uses_nothing() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(3, 20), torch.randn(12, 3)
    U, Vh = span(torch.cat([A, A]), torch.cat([B, -B], 1))
    assert (U.shape, Vh.shape) == ((12, 0), (0, 20))
    assert span(torch.zeros(3, 20), B)[1].shape == (0, 20)
    torch.testing.assert_close(apart(B @ A, U, Vh).float(), B @ A)


@pytest.mark.parametrize("method", ["milora", "lora"])
@pytest.mark.parametrize("steps", [1, 7])
def test_what_earlier_tasks_use_is_untouched(method: str, steps: int, load: Load) -> None:
    """U'ᵀ dW = 0 and dW V' = 0 to rounding, whatever the steps were."""
    model, first = add_adapter(load("qwen2"), config(), "milora")
    shaken(model, 3.0)
    previous = plain_lora(first, trained_factors(model)).factors
    model, start = add_adapter(load("qwen2"), config(), method, previous=previous, keep_apart=True)
    matrices = adapted_matrices(model)
    for name, about in start.spectra.items():  # of W + dW, and not of what it is moved apart in
        norm = float(matrices[name].effective.double().norm())
        assert about["frobenius_norm"] == pytest.approx(norm)
        assert about["spectral_norm_at_least"] is None
    holds = held(matrices, {}, {}, used_by_tasks(matrices))
    start.factors.update(moved(start, matrices, holds, {}))
    place(matrices, start)
    for step in range(steps):
        shaken(model, 0.5, step + 10)
        project(matrices, holds)
    update = plain_lora(start, trained_factors(model)).factors
    for name, (A, B) in update.items():
        dW = B.double() @ A.double()
        P, Q = previous[name].B.double(), previous[name].A.double()
        assert dW.norm() > 1e-3  # it does learn
        size = dW.norm()
        assert (torch.linalg.qr(P).Q.T @ dW).norm() < 1e-5 * size
        assert (dW @ torch.linalg.qr(Q.T).Q).norm() < 1e-5 * size


def test_the_cuts_of_a_chain_add_up(load: Load) -> None:
    """The result is never further from the sum of all updates than the errors said."""
    budget, said = 9, 0.0
    exact: dict[str, Tensor] = {}
    previous: dict[str, Factors] = {}
    for update in range(5):
        model, start = add_adapter(load("llama"), config(), "milora", previous=previous)
        shaken(model, 1.0, update)
        own = plain_lora(start, trained_factors(model))
        for name, (A, B) in own.factors.items():
            exact[name] = exact.get(name, 0) + B.double() @ A.double()
        whole = plain_lora(start, trained_factors(model), previous=previous)
        cut = best_of_rank(whole, budget)
        assert max(len(A) for A, _ in cut.factors.values()) <= budget
        said += cut.error * norm(whole)
        previous = cut.factors
        off = sum(
            float((B.double() @ A.double() - exact[name]).square().sum())
            for name, (A, B) in previous.items()
        )
        assert off**0.5 <= said * (1 + 1e-6) + 1e-5
    assert said > 0


# --- whole runs


def hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p) for p in folder.rglob("*") if p.is_file()}


def further(
    tiny: Tiny, folder: Path, name: str, earlier: Path | None = None, how: str = "fold",
    rank: int | None = None, kind: str = "llama", **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of a run in folder/name that continues `earlier`."""
    if earlier:
        changes["continue"] = {"run": str(earlier), "how": how, "rank": rank}
    changes["training"] = {"max_steps": 3, "eval_strategy": "no"} | changes.get("training", {})
    return settings(tiny(kind), folder, output_dir=str(folder / name), **changes)


@pytest.fixture(scope="module")
def first(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, shared by those that continue it, which must leave it as it is."""
    folder = tmp_path_factory.mktemp("chain")
    run(further(tiny, folder, "first", gates=["rows.accuracy >= 0"]))
    return folder / "first"


@pytest.fixture(autouse=True)
def first_is_untouched(request: pytest.FixtureRequest) -> Iterator[None]:
    if "first" not in request.fixturenames:
        yield
        return
    folder = request.getfixturevalue("first")
    before = hashes(folder)
    yield
    assert hashes(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["milora", "lora"])
@pytest.mark.parametrize("protect", [0, 2, {"tasks": "all"}, {"tasks": "all", "weights": 2}])
def test_a_new_adapter_on_the_earlier_result(
    method: str, protect: Any, first: Path, tiny: Tiny, tmp_path: Path
) -> None:
    base = {p.name: sha256(p) for p in tiny("llama").iterdir()}
    arguments = further(
        tiny, tmp_path, "second", first, method=method, milora={"protect": protect}, lora={"r": 3},
        evaluate={"tasks": []},
    )  # fmt: skip
    record = run(arguments)
    assert {p.name: sha256(p) for p in tiny("llama").iterdir()} == base
    assert record["step0"]["difference"] <= 1e-6
    assert record["step0"]["from"] == "first"
    assert record["continues"]["run"] == os.path.relpath(first, tmp_path / "second")
    assert record["continues"]["gates"][0]["holds"]
    assert record["adapter"]["rank"] == 8 + (3 if method == "lora" else 6)
    assert record["adapter"]["exported_against_trained"] <= 1e-5
    assert all(check.holds for check in verify(tmp_path / "second"))
    before, after = (
        load_file(folder / "adapter/adapter_model.safetensors")
        for folder in (first, tmp_path / "second")
    )
    for name, A in after.items():
        if "lora_A" not in name:
            continue
        key = name.replace("lora_A", "lora_B")
        P, Q = before[key].double(), before[name].double()
        dW = after[key].double() @ A.double() - P @ Q
        assert dW.norm() > 0
        if isinstance(protect, dict):
            assert (torch.linalg.qr(P).Q.T @ dW).norm() < 1e-4 * dW.norm()
            assert (dW @ torch.linalg.qr(Q.T).Q).norm() < 1e-4 * dW.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "packed"), [("bfloat16", None), ("float16", None), *(("bfloat16", p) for p in SHORT)]
)
def test_in_sixteen_bit_it_starts_at_the_very_bits(
    dtype: str, packed: str | None, tiny: Tiny, tmp_path: Path
) -> None:
    if packed:
        pytest.importorskip("bitsandbytes")
    asked: dict[str, Any] = {"dtype": dtype, "quantization": packed, "evaluate": {"tasks": []}}
    run(further(tiny, tmp_path, "first", **asked))
    record = run(further(tiny, tmp_path, "second", tmp_path / "first", **asked))
    assert record["step0"] == {"difference": 0.0, "bound": 0.0, "from": "first"}
    assert all(check.holds for check in verify(tmp_path / "second"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["milora", "lora"])
@pytest.mark.parametrize("protect", [0, 2])
def test_the_same_adapter_is_trained_on(
    method: str, protect: int, tiny: Tiny, tmp_path: Path
) -> None:
    """And, with a rate of zero, comes out as it was; on top of another too."""
    common: dict[str, Any] = {"milora": {"protect": protect}, "evaluate": {"tasks": []}}
    still = {"learning_rate": 0.0}
    run(further(tiny, tmp_path, "zero", method="milora", evaluate={"tasks": []}))
    run(further(tiny, tmp_path, "one", tmp_path / "zero", method=method, **common))
    arguments = further(
        tiny, tmp_path, "two", tmp_path / "one", "same", method=method, training=still, **common
    )
    record = run(arguments)
    assert record["step0"] == {"difference": 0.0, "bound": 0.0, "of": "factors", "from": "one"}
    one, two = (
        load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-6 if protect else 0.0, rtol=0.0)
    record = run(
        further(tiny, tmp_path, "three", tmp_path / "one", "same", method=method, **common)
    )
    assert record["adapter"]["rank"] == (12 if method == "lora" else 16)  # it did not grow
    three = load_file(tmp_path / "three/adapter/adapter_model.safetensors")
    assert not all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.slow
def test_killed_before_all_of_the_start_is_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The inputs that are held are those of the earlier run, whatever text it has of its own."""
    held_inputs = {"protect_inputs": 8}
    run(further(tiny, tmp_path, "first", milora=held_inputs, evaluate={"tasks": []}))
    text = tmp_path / "general.txt"
    text.write_text("".join(f"Of {n} apples {n // 3} were green. " for n in range(200)))
    found = []
    for name in ("whole", "broken"):
        arguments = further(
            tiny, tmp_path, name, tmp_path / "first", "same", evaluate={"tasks": []},
            milora=held_inputs | {"text": str(text), "keep": {}},
        )  # fmt: skip
        if name == "broken":
            with monkeypatch.context() as context:
                context.setattr("milora.begin.save_tops", killed)
                with pytest.raises(KeyboardInterrupt):
                    run(arguments)
        run(arguments, resume=name == "broken")
        found.append(sha256(tmp_path / name / "checkpoints/trained.safetensors"))
    assert found[0] == found[1]
    assert "inputs: the directions that are held are those of first" in capsys.readouterr().err


def killed(*args: Any) -> None:
    raise KeyboardInterrupt


def test_the_text_of_inputs_is_that_of_the_earlier_run(first: Path, tmp_path: Path) -> None:
    """Their directions are its own, whatever is said here."""
    shutil.copytree(first, tmp_path / "first")
    stored = tmp_path / "first/config.yaml"
    asked = yaml.safe_load(stored.read_text())
    asked["milora"]["protect_inputs"] = 8
    stored.write_text(yaml.safe_dump(asked))
    link = read_link(tmp_path / "first")
    _check_same(link, asked)
    asked["milora"]["text"] = "general.txt"
    with pytest.raises(UserError, match=r"whose milora\.text is 'sampled', .* 'general.txt'"):
        _check_same(link, asked)
    asked["milora"]["keep"] = {"weight": 1.0}
    _check_same(link, asked)
    (tmp_path / "first/init/top.safetensors").unlink()
    with pytest.raises(UserError, match=r"top\.safetensors is gone"):
        _check_same(link, asked)


def test_a_fold_that_cut_nothing_is_trained_on(first: Path) -> None:
    """Its record has a cut where an earlier run of the chain had one."""
    link = read_link(first)
    for error in (0.0, 0.1):
        cut = {"rank": 8, "error": error, "summed": 0.2}
        record = link.record | {"adapter": link.record["adapter"] | {"cut": cut}}
        if not error:
            _check_same(link._replace(record=record), link.asked)
            continue
        with pytest.raises(UserError, match="was cut to rank 8"):
            _check_same(link._replace(record=record), link.asked)


@pytest.mark.slow
def test_a_chain_within_a_budget(
    first: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier, cuts = first, []
    for name in ("second", "third"):
        record = run(
            further(tiny, tmp_path, name, earlier, rank=6, kind="llama", evaluate={"tasks": []})
        )
        assert record["adapter"]["rank"] == 6
        cuts.append(record["adapter"]["cut"])
        earlier = tmp_path / name
        assert all(check.holds for check in verify(earlier))
    assert cuts[0]["summed"] == pytest.approx(cuts[0]["norm"])
    assert cuts[1]["summed"] == pytest.approx(cuts[0]["norm"] + cuts[1]["norm"])
    assert 0 < cuts[0]["error"] < 0.5
    assert "cut to rank 6" in (earlier / "adapter/README.md").read_text()
    with pytest.raises(UserError, match=r"was cut to rank 6, .*: use how: fold"):
        run(further(tiny, tmp_path, "fourth", earlier, "same"))
    capsys.readouterr()
    record = run(
        further(tiny, tmp_path, "whole", earlier, rank=None, kind="llama", evaluate={"tasks": []})
    )
    assert record["adapter"]["cut"]["error"] == 0
    assert "cut to rank" not in capsys.readouterr().err
    card = (tmp_path / "whole" / "adapter" / "README.md").read_text()
    assert "cut to rank" not in card
    assert "all cuts of the chain add up to at most" in card


def test_stock_peft_reads_the_chain(first: Path, tiny: Tiny, tmp_path: Path) -> None:
    run(further(tiny, tmp_path, "second", first, evaluate={"tasks": []}))
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    sha = base_sha256(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "second" / "adapter")
    assert base_sha256(loaded) == sha


def test_a_failed_gate_leaves_the_earlier_release(first: Path, tiny: Tiny, tmp_path: Path) -> None:
    arguments = further(tiny, tmp_path, "second", first, gates=["knowledge.kl <= 0"])
    record = run(arguments)
    assert not record["gates"][0]["holds"]
    links = chain(tmp_path / "second")
    assert [link.released for link in links] == [True, False]
    released = current(links)
    assert released
    assert released.run.samefile(first)
    with pytest.raises(UserError, match=r"failed 1 of its gates .*first, which is the current rel"):
        run(further(tiny, tmp_path, "third", tmp_path / "second"))
    done = CliRunner().invoke(app, ["history", str(tmp_path / "second")])
    with contextlib.chdir(tmp_path / "second"):  # the name of "." is that of the folder
        assert "second" in CliRunner().invoke(app, ["history", "."]).stdout
    assert done.exit_code == 0
    assert "FAILED: 0 of 1 hold" in " ".join(done.stdout.split())
    assert done.stdout.splitlines()[-1].endswith("first/adapter")


@pytest.mark.slow
def test_the_command_goes_on_and_a_failed_gate_ends_it_with_3(
    first: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    page = tmp_path / "run.yaml"
    asked = further(tiny, tmp_path, "second")
    asked.pop("continue_")  # as Python has it
    page.write_text(yaml.safe_dump(asked))
    for gate, code in (("rows.accuracy >= 0", 0), ("continual.overall >= 2", 3)):
        out = tmp_path / f"ends-with-{code}"
        words = ["train", str(page), "--continue-from", str(first), f"output_dir={out}",
                 f"gates=[{gate}]"]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["milora", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        links = chain(out)
        assert [link.run.name for link in links] == ["first", out.name]
        assert links[-1].released is (code == 0)
        assert links[-1].asked["continue"]["run"] == str(first)
    assert "the logits and those of first differ by 0.0e+00" in capsys.readouterr().err


def test_history_notices_what_changed(first: Path, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "first").symlink_to(first)
    run(further(tiny, tmp_path, "second", tmp_path / "first", evaluate={"tasks": []}))
    (tmp_path / "first").unlink()
    with pytest.raises(UserError, match="holds no run: put it back"):
        chain(tmp_path / "second")


@pytest.mark.parametrize(
    ("changes", "how", "match"),
    [
        ({"method": "full"}, "fold", "full fine-tuning has no adapter"),
        ({"lora": {"r": 2}}, "same", "whose lora is .* use the same, or how: fold"),
        ({"milora": {"interference": {"top": 3}}}, "same", "whose milora.interference.top is 16"),
        ({"milora": {"start": "balanced"}}, "same", "whose milora.start is 'published'"),
        ({"milora": {"protect": {"tasks": "all"}}}, "same", "use how: fold"),
        ({"milora": {"protect": {"tasks": "all"}}, "method": "random"}, "fold", "random starts"),
        ({"dtype": "bfloat16"}, "fold", "wrong base: .*float32"),
        ({"lora": {"target_modules": ["q_proj"]}}, "fold", "name all of them"),
        ({"lora": {"modules_to_save": ["embed_tokens"]}}, "fold", "rows of embed_tokens"),
        ({"milora": {"protect": {"tasks": "all"}}, "lora": {"r": 12}}, "fold",
         "hold 8 of the 16 outputs of .* whose adapter has rank 12"),
    ],
)  # fmt: skip
def test_what_cannot_be_continued_is_refused(
    changes: dict[str, Any], how: str, match: str, first: Path, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=match):
        run(further(tiny, tmp_path, "second", first, how, **changes))
    assert not (tmp_path / "second").exists()


@pytest.mark.slow
def test_too_little_room_is_refused_before_decomposing(
    first: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the earlier update spans counts, and not the rank that its adapter has."""
    monkeypatch.setattr("milora.train.begin", lambda *args: pytest.fail("begun"))
    apart = {"milora": {"protect": {"tasks": "all"}}}
    for rank in (8, 9):
        asked = further(tiny, tmp_path, "second", first, lora={"r": rank}, **apart)
        if rank == 8:
            run(asked, dry_run=True)
            continue
        for dry_run in (True, False):
            with pytest.raises(UserError, match=r"hold 8 of the 16 outputs of .* has rank 9"):
                run(asked, dry_run=dry_run)
    shutil.copytree(first, tmp_path / "first")
    weights = tmp_path / "first/adapter/adapter_model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensor[4:] = tensor[:4]  # of rank 4 in all but name
    save_file(tensors, weights, {"format": "pt"})
    about = read_json(weights.with_name("milora.json"))
    write_json(
        weights.with_name("milora.json"), about | {"files_sha256": files_sha256(weights.parent)}
    )
    run(further(tiny, tmp_path, "third", tmp_path / "first", lora={"r": 9}, **apart), dry_run=True)


def test_rows_of_other_classes_are_refused(first: Path) -> None:
    earlier = Earlier(read_link(first), "same", {})
    base = earlier.link.record["base"]["sha256"]
    check_material(earlier, base, "m", [], [])
    with pytest.raises(UserError, match=r"the rows have the labels a, b, and .*first has none"):
        check_material(earlier, base, "m", ["a", "b"], [])
    earlier.link.record["labels"] = ["b", "a"]
    with pytest.raises(UserError, match=r"labels a, b, and .*first has b, a"):
        check_material(earlier, base, "m", ["a", "b"], [])


def test_without_an_earlier_run(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs earlier tasks: name the run with continue.run"):
        run(further(tiny, tmp_path, "run", milora={"protect": {"tasks": "all"}}))
    with pytest.raises(UserError, match=r"holds no run\.json"):
        run(further(tiny, tmp_path, "run", tmp_path))
    page = tmp_path / "run.yaml"
    page.write_text("model: m\noutput_dir: o\ndata: {train: d}\ncontinue: {rank: 8}\n")
    done = CliRunner().invoke(app, ["train", str(page)])
    assert "continue.run is missing" in str(done.exception)
    done = CliRunner().invoke(app, ["train", str(page), "continue.hows=same"])
    assert "unknown key continue.hows, did you mean how" in str(done.exception)
    done = CliRunner().invoke(app, ["train", str(page), "--continue-from", str(tmp_path / "none")])
    assert f"{tmp_path / 'none'} holds no run.json" in str(done.exception)


def test_an_unfinished_run_is_not_continued(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_off(further(tiny, tmp_path, "first", training={"save_steps": 1}), 3, monkeypatch)
    with pytest.raises(UserError, match="is not finished: finish it with"):
        run(further(tiny, tmp_path, "second", tmp_path / "first"))


def test_a_resumed_run_still_continues(
    first: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the command is given again without --continue-from."""
    asked = further(tiny, tmp_path, "second", first, training={"save_steps": 1})
    break_off(asked, 3, monkeypatch)
    with pytest.raises(UserError, match=r"has changed: continue was {.*} and is None"):
        run(asked | {"continue_": {}}, resume=True)


def test_a_resumed_run_notices_that_the_earlier_result_changed(
    first: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    asked = further(tiny, tmp_path, "second", copy, training={"save_steps": 1})
    break_off(asked, 3, monkeypatch)
    weights = copy / "adapter" / "adapter_model.safetensors"
    doubled = {name: 2 * tensor for name, tensor in load_file(weights).items()}
    save_file(doubled, weights, {"format": "pt"})
    with pytest.raises(UserError, match="put that adapter back"):
        run(asked, resume=True)


def test_an_altered_result_is_not_continued(first: Path, tiny: Tiny, tmp_path: Path) -> None:
    """No run records it as the one that it came from, and no history shows it as done."""
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    weights = copy / "adapter" / "adapter_model.safetensors"
    doubled = {name: 2 * tensor for name, tensor in load_file(weights).items()}
    save_file(doubled, weights, {"format": "pt"})
    said = r"copy/adapter/adapter_model\.safetensors is not as it was written .* put the file"
    for how in ("fold", "same"):
        with pytest.raises(UserError, match=said):
            run(further(tiny, tmp_path, "second", copy, how))
    with pytest.raises(UserError, match=said):
        chain(copy)
    assert not (tmp_path / "second").exists()


def test_an_adapter_whose_state_is_gone_is_not_trained_on(
    first: Path, tiny: Tiny, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(first, copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match=r"trained.safetensors is gone: put it back, or use how"):
        run(further(tiny, tmp_path, "second", copy, "same"))
