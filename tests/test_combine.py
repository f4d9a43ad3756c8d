"""Adapters of one base made one: the sum is exact, TIES and DARE are PEFT's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_run import run, settings
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from milora.adapter import Factors
from milora.artefacts import export_run
from milora.cli import app
from milora.combine import combine, combined, shared
from milora.errors import UserError
from milora.export import load_plain_lora
from milora.logits import logits_of
from milora.matrices import adapted_matrices
from milora.progress import Progress
from milora.smaller import Smaller
from milora.verify import verify

Tiny = Callable[[str], Path]


def factors(seed: int, m: int = 12, n: int = 20, r: int = 3) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": Factors(torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator))
    }


def test_what_two_updates_have_in_common() -> None:
    one = factors(0)
    same = shared(one, one)
    assert (same.cosine, same.inputs, same.outputs) == pytest.approx((1, 1, 1))
    opposite = {"w": Factors(one["w"].A, -one["w"].B)}
    assert shared(one, opposite).cosine == pytest.approx(-1)
    # The same inputs, other outputs: B's columns outside of those of the first.
    Q = torch.linalg.qr(one["w"].B).Q
    B = factors(1)["w"].B
    apart = {"w": Factors(one["w"].A, B - Q @ (Q.T @ B))}
    found = shared(one, apart)
    assert found.inputs == pytest.approx(1)
    assert found.outputs == pytest.approx(0, abs=1e-9)
    assert found.cosine == pytest.approx(0, abs=1e-6)
    dense = [f["w"].B.double() @ f["w"].A.double() for f in (one, factors(2))]
    wanted = (dense[0] * dense[1]).sum() / dense[0].norm() / dense[1].norm()
    assert shared(one, factors(2)).cosine == pytest.approx(float(wanted))
    assert shared(one, {"v": one["w"]}) == (0.0, 0.0, 0.0, "", 0.0)


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one base, of different ranks and targets."""
    folder, made = tmp_path_factory.mktemp("runs"), []
    for name, r, targets in (("one", 4, ["q_proj", "down_proj"]), ("two", 3, ["q_proj", "k_proj"])):
        about: dict[str, Any] = {
            "lora": {"r": r, "target_modules": targets}, "seed": len(made),
            "training": {"max_steps": 3, "eval_strategy": "no"},
            "evaluate": {"tasks": []}, "output_dir": str(folder / name),
        }  # fmt: skip
        run(settings(tiny("llama"), folder, **about))
        made.append(folder / name)
    return made


def updates(runs: list[Path], tiny: Tiny) -> list[dict[str, Factors]]:
    return [
        load_plain_lora(
            one / "adapter", AutoModelForCausalLM.from_pretrained(tiny("llama"))
        ).factors
        for one in runs
    ]


@pytest.mark.slow
def test_the_sum_is_exact(
    runs: list[Path], tiny: Tiny, tmp_path: Path, batch: dict[str, Tensor]
) -> None:
    done = CliRunner().invoke(
        app, ["combine", *map(str, runs), "--weights", "1,-0.5", "--out", str(tmp_path / "both")]
    )
    assert done.exit_code == 0, done.exception
    assert "rank 14, sum of 2 adapters, exact" in done.output
    assert "cosine" in done.output
    assert all(check.holds for check in verify(tmp_path / "both"))
    assert "file" in [check.name for check in verify(tmp_path / "both")]
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    wanted = {name: p.clone() for name, p in base.state_dict().items()}
    for weight, update in zip((1.0, -0.5), updates(runs, tiny), strict=True):
        for name, (A, B) in update.items():
            wanted[f"{name}.weight"] += weight * B @ A
    loaded = PeftModel.from_pretrained(base, tmp_path / "both")
    with torch.no_grad():
        found = logits_of(loaded, batch)
        base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
        base.load_state_dict(wanted)
        logits = logits_of(base, batch)
    assert (found - logits).abs().max() <= 1e-5 * logits.abs().max()
    record = json.loads((tmp_path / "both" / "milora.json").read_text())
    assert [one["name"] for one in record["combined"]["of"]] == ["one", "two"]
    assert "exported_against_trained" not in record  # which was measured on the first
    card = (tmp_path / "both" / "README.md").read_text()
    assert "-0.5 × `two` (milora)" in card


@pytest.mark.slow
def test_what_a_chain_was_cut_by_is_said_of_all_that_is_made_of_it(
    runs: list[Path], tiny: Tiny, tmp_path: Path
) -> None:
    """Of an approximation too, whose own part in a sum is not to be called exact later."""
    about: dict[str, Any] = {
        "lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]}, "evaluate": {"tasks": []},
        "training": {"max_steps": 3, "eval_strategy": "no"}, "output_dir": str(tmp_path / "chain"),
        "continue": {"run": str(runs[0]), "rank": 6},
    }  # fmt: skip
    cut = run(settings(tiny("llama"), tmp_path, **about))["adapter"]["cut"]
    lost = f"cut by continue.rank, by at most {cut['summed_error']:.2e} of it in all"
    out = tmp_path / "chain-lora"
    assert export_run(tmp_path / "chain", out, "lora").said.endswith(f"rank 6, as it is, {lost}")
    for to in ("gguf", "merged"):
        out = tmp_path / f"chain-{to}"
        assert lost in export_run(tmp_path / "chain", out, to).said
        assert json.loads((out / "milora.json").read_text())["cut"] == cut
        assert lost in (out / "README.md").read_text()
    done = export_run(tmp_path / "chain", tmp_path / "small", "lora", Smaller(3))
    error = json.loads((tmp_path / "small" / "milora.json").read_text())["approximation_error"]
    both = f"an approximation of relative error {error:.2e}; {lost}"
    assert lost in done.said
    assert f"at most {cut['summed_error']:.1e}" in (tmp_path / "small" / "README.md").read_text()
    assert both in export_run(tmp_path / "small", tmp_path / "small-gguf", "gguf").said
    for name, said in (("chain", lost), ("small", both)):
        out = tmp_path / f"{name}-two"
        made = combine([tmp_path / name, runs[1]], out)
        assert made.endswith(f"of which no longer as trained: {name} ({said})")
        assert f"; no longer as trained: {said}" in (out / "README.md").read_text()
        again = export_run(out, tmp_path / f"{name}-two-gguf", "gguf")
        assert again.said.endswith(f"as it is, with {name} in it: {said}")
        assert (
            f"with {name} in it: {said}"
            in (tmp_path / f"{name}-two-gguf" / "README.md").read_text()
        )


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_it_is_what_peft_makes(how: str, runs: list[Path], tiny: Tiny) -> None:
    """add_weighted_adapter at full rank, module by module; DARE where both drop the same."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny("llama")), runs[0] / "adapter", "one"
    )
    model.load_adapter(runs[1] / "adapter", "two")
    torch.manual_seed(0)
    model.add_weighted_adapter(
        ["one", "two"], [1.0, 0.7], "both", f"{how}_svd" if how == "ties" else "dare_linear_svd",
        svd_rank=16, density=0.5 if how == "ties" else 0.999999,
    )  # fmt: skip
    found = combined(
        updates(runs, tiny), how, [1.0, 0.7], 0.5 if how == "ties" else 0.999999, 16, 0
    ).factors
    for name, matrix in adapted_matrices(model).items():
        A, B = matrix.factors("both")
        wanted = matrix.scaling("both") * B.detach() @ A.detach()
        torch.testing.assert_close(found[name].B @ found[name].A, wanted, atol=1e-5, rtol=1e-3)


def test_dare_drops_by_the_seed_and_keeps_the_mean() -> None:
    one, two = factors(0, 30, 40), factors(1, 30, 40)
    makes = [combined([one, two], "dare", [1.0, 1.0], 0.5, 30, seed) for seed in (0, 0, 1)]
    a, b, c = (made.factors["w"].B @ made.factors["w"].A for made in makes)
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)
    several = [combined([one, two], "dare", [1.0, 1.0], 0.5, 30, seed) for seed in range(40)]
    mean = sum(made.factors["w"].B @ made.factors["w"].A for made in several) / 40
    exact = combined([one, two], "sum", [1.0, 1.0], 0.5, None, 0).factors["w"]
    assert (mean - exact.B @ exact.A).norm() < 0.3 * (exact.B @ exact.A).norm()


def test_the_error_within_a_rank_is_the_true_one() -> None:
    one, two = factors(0), factors(1)
    for how in ("sum", "ties", "dare"):
        whole = combined([one, two], how, [1.0, 1.0], 0.5, 12, 0)
        assert whole.error < 1e-6
        made = combined([one, two], how, [1.0, 1.0], 0.5, 4, 0)
        full, cut = (x.factors["w"].B @ x.factors["w"].A for x in (whole, made))
        assert len(made.factors["w"].A) == 4
        assert made.error == pytest.approx(float((full - cut).norm() / full.norm()), rel=1e-3)
        assert made.worst[1] == pytest.approx(made.error)


@pytest.mark.slow
def test_what_cannot_be_combined_is_refused(runs: list[Path], tiny: Tiny, tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["combine", *arguments])
        assert isinstance(done.exception, UserError)
        return str(done.exception)

    one, two, out = str(runs[0]), str(runs[1]), ["--out", str(tmp_path / "new")]
    assert "name two adapters or more" in said(one, *out)
    assert "--how median: use sum, ties or dare" in said(one, two, "--how", "median", *out)
    assert "one number for each of the 2" in said(one, two, "--weights", "1,2,3", *out)
    assert "--density 1.5: a share between 0 and 1" in said(
        one, two, "--how", "ties", "--density", "1.5", *out
    )
    assert "--density: a sum keeps all" in said(one, two, "--density", "0.5", *out)
    assert "--seed says which entries DARE keeps, and not --how ties" in said(
        one, two, "--how", "ties", "--seed", "0", *out
    )
    assert "exists already" in said(one, two, "--out", str(tmp_path))
    export_run(runs[0], tmp_path / "merged", "merged")
    merged = str(tmp_path / "merged")
    assert "holds milora merged weights 1, not an adapter" in said(one, merged, *out)
    short: dict[str, Any] = {
        "lora": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
        "training": {"max_steps": 1}, "evaluate": {"tasks": []},
    }  # fmt: skip
    for name, earlier in (("child", runs[0]), ("grandchild", tmp_path / "child")):
        about = short | {"output_dir": str(tmp_path / name), "continue": {"run": str(earlier)}}
        run(settings(tiny("llama"), tmp_path, **about))
        assert f"{name} continues {one}, whose update is part of" in said(
            one, str(tmp_path / name), *out
        )
    run(settings(tiny("qwen2"), tmp_path, training={"max_steps": 1}, evaluate={"tasks": []}))
    assert "wrong base: " in said(one, str(tmp_path / "run"), *out)
    assert not (tmp_path / "new").exists()
    combine(runs, tmp_path / "both")
    export_run(runs[0], tmp_path / "small", "lora", Smaller(4))
    for made, of in (("both", two), ("small", one)):
        assert f"{made} was made from {of}, whose update is part of its own" in said(
            str(tmp_path / made), of, *out
        )
    for made in ("both", "child"):
        twice = said(str(tmp_path / made), str(tmp_path / "small"), *out)
        assert "both have the update of one adapter" in twice


@pytest.mark.slow
def test_each_is_compared_with_the_base_and_the_template_is_said(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs[1] / "adapter", other)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with Progress() as progress:
        combine([runs[0], other], tmp_path / "both", progress=progress)
    assert f"{other} has another chat template than {runs[0]}" in capsys.readouterr().err
    combine([run / "adapter" for run in runs], tmp_path / "named")
    combined = json.loads((tmp_path / "named" / "milora.json").read_text())["combined"]
    names = [run.name for run in runs]
    assert [one["name"] for one in combined["of"]] == combined["in_common"][0]["of"] == names
    settings_file = other / "tokenizer_config.json"
    ends = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps(ends | {"eos_token": "Z"}))
    with pytest.raises(UserError, match=f"{other} ends its answers with 'Z', and .* with '</s>'"):
        combine([runs[0], other], tmp_path / "again")
    settings_file.write_text(json.dumps(ends))
    record = json.loads((other / "milora.json").read_text())
    name = next(name for name in record["weights_sha256"] if "k_proj" in name)
    record["weights_sha256"][name] = "0" * 64
    (other / "milora.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"wrong base: .* the first is {name}"):
        combine([runs[0], other], tmp_path / "again")
