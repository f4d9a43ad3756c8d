"""The constraints on general text, and the other starts."""

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import yaml
from conftest import TARGETS, make_tokenizer, with_bos
from safetensors.torch import load_file
from tiny_run import NOT_SAID, break_off, result_hashes, run, settings
from transformers import AutoTokenizer, PreTrainedModel

import milora.loop
from milora import keep
from milora.adapter import add_adapter, load_start
from milora.errors import UserError
from milora.keep import Keep, cut, input_directions, kept_loss, sampled
from milora.logits import step0_difference
from milora.matrices import adapted_matrices
from milora.progress import Progress
from milora.protect import load_tops
from milora.recommended import PUBLISHED, as_before, recommended
from milora.targeting import lora_config

Load = Callable[..., PreTrainedModel]
Tiny = Callable[[str], Path]


def pieces(count: int, length: int = 16, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 258, (count, length), generator=generator).tolist()


def adapted(load: Load, kind: str = "llama", method: str = "milora", rank: int = 4) -> Any:
    config = lora_config({"r": rank, "lora_alpha": rank, "target_modules": TARGETS[kind]})
    return add_adapter(load(kind), config, method)


def disturb(model: Any, size: float = 0.3) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for matrix in adapted_matrices(model).values():
            for factor in matrix.factors("default"):
                factor.add_(size * torch.randn_like(factor))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "general.txt"
    path.write_text(topics["yield"] + topics["with"], encoding="utf-8")  # English, of a kind
    return path


def test_the_loss_is_the_divergence_and_zero_at_the_base(load: Load) -> None:
    model, _ = adapted(load)
    ids = torch.tensor(pieces(2))
    kept_loss(model, ids).backward()  # type: ignore[no-untyped-call]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and float(p.grad.abs().max()) < 1e-6 for p in trained)
    disturb(model)
    found = kept_loss(model, ids)
    with torch.no_grad(), model.disable_adapter():
        p = model(ids).logits.double().log_softmax(-1)
    q = model(ids).logits.double().log_softmax(-1)
    assert float(found.detach()) == pytest.approx(
        float((p.exp() * (p - q)).sum(-1).mean().detach()), rel=1e-4
    )
    assert float(found) > 1e-3
    found.backward()
    assert max(float(p.grad.abs().max()) for p in trained) > 1e-3


def test_dropout_takes_no_part_in_it(load: Load) -> None:
    config = lora_config({"r": 4, "lora_dropout": 0.5, "target_modules": TARGETS["llama"]})
    model, _ = add_adapter(load("llama"), config, "milora")
    model.train()
    assert abs(float(kept_loss(model, torch.tensor(pieces(2))).detach())) < 1e-9
    assert model.training


def test_a_step_has_its_own_pieces() -> None:
    soft = Keep(pieces(3), 1.0, every=2, tokens=32)
    assert [step for step in range(5) if soft.due(step)] == [0, 2, 4]
    assert soft.batch(2).tolist() == [soft.pieces[2], soft.pieces[0]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_directions_are_those_of_the_inputs(kind: str, load: Load) -> None:
    model, _ = adapted(load, kind)
    disturb(model)  # the inputs are the base's
    model.train(kind == "llama")
    matrices = adapted_matrices(model)
    text, k = pieces(4), 5
    found = input_directions(model, matrices, text, k)
    assert model.training == (kind == "llama")  # as it was
    assert set(found) == set(matrices)
    base = load(kind)
    for name in matrices:
        seen: list[torch.Tensor] = []
        module = base.get_submodule(name)
        hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))  # noqa: B023
        with torch.no_grad():
            for piece in text:
                base(torch.tensor([piece]))
        hook.remove()
        X = torch.cat([x.flatten(0, -2) for x in seen]).double()
        V = torch.linalg.svd(X, full_matrices=False)[2][:k]
        mine = found[name].double()
        # Not the projectors: where two singular values are close, either is as good.
        assert float((X @ mine.T).norm()) == pytest.approx(float((X @ V.T).norm()), rel=1e-5)
        torch.testing.assert_close(mine @ mine.T, torch.eye(k).double(), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["milora", "lora"])
def test_inputs_are_held(method: str, tiny: Tiny, text: Path, tmp_path: Path) -> None:
    asked = {"text": str(text), "protect_inputs": 20, "protect": 3}
    record = run(settings(tiny("llama"), tmp_path, method=method, milora=asked))
    assert record["step0"]["difference"] <= record["step0"]["bound"]
    start = load_start(tmp_path / "run" / "init" / "factors.safetensors")
    _, inputs = load_tops(tmp_path / "run" / "init" / "top.safetensors", start.sha256)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name, Vh in inputs.items():
        assert Vh.shape[0] == 20
        A = adapter[f"base_model.model.{name}.lora_A.weight"]
        B = adapter[f"base_model.model.{name}.lora_B.weight"]
        update = B.double() @ A.double()
        assert float((update @ Vh.double().T).norm()) < 1e-6 * max(1.0, float(update.norm()))
        assert float(update.norm()) > 1e-4
    assert record["data"]["sha256"][str(text)]
    assert record["interference"]["max"] <= 1 + 1e-9


def test_the_divergence_is_added_once_a_step_however_many_its_batches(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = [], milora.loop.kept_loss

    def noting(model: Any, ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return real(model, ids)

    monkeypatch.setattr(milora.loop, "kept_loss", noting)
    asked = {"text": str(text), "keep": {"tokens": 64}}
    training = {"max_steps": 3, "gradient_accumulation_steps": 2, "eval_strategy": "no"}
    run(settings(tiny("llama"), tmp_path, milora=asked, training=training))
    assert len(seen) == 3


@pytest.mark.slow
def test_the_divergence_is_smaller_with_it(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    found = {}
    for weight in (0, 200):
        (tmp_path / str(weight)).mkdir()
        asked = {"text": str(text), "keep": {"weight": weight, "tokens": 64}} if weight else {}
        training = {"max_steps": 20, "learning_rate": 3e-2, "eval_steps": 20, "save_steps": 20}
        record = run(
            settings(tiny("llama"), tmp_path / str(weight), milora=asked, training=training)
        )
        result = json.loads((tmp_path / str(weight) / "run" / "evaluation.json").read_text())
        found[weight] = result["knowledge"][0]["kl"]
        assert record["state"] == "done"
    assert found[200] < 0.7 * found[0]
    lines = (tmp_path / "200" / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [one for one in map(json.loads, lines) if "loss" in one]
    assert len(logged) == 20
    assert all("kept_kl" in one for one in logged)  # also where the interference is measured
    assert any("interference_max" in one for one in logged)


@pytest.mark.slow
def test_resumed_as_unbroken(
    tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {
        "text": str(text), "protect_inputs": 8, "start": "balanced",
        "keep": {"weight": 1, "every": 2, "tokens": 64},
    }  # fmt: skip
    hashes = {}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        arguments = settings(
            tiny("llama"), tmp_path / name, milora=asked,
            training={"gradient_accumulation_steps": 2, "weight_decay": 0.1},
        )  # fmt: skip
        if name == "broken":
            break_off(arguments, 6, monkeypatch)
        run(arguments, resume=name == "broken")
        hashes[name] = result_hashes(tmp_path / name / "run")
        del hashes[name]["samples.jsonl"]  # it names the rows' folder
    assert hashes["whole"] == hashes["broken"]


@pytest.mark.parametrize("begin", ["directions", "balanced"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_other_starts_are_the_base_too(
    kind: str, begin: Any, load: Load, batch: dict[str, torch.Tensor]
) -> None:
    config = lora_config({"r": 4, "lora_alpha": 4, "target_modules": TARGETS[kind]})
    model, start = add_adapter(load(kind), config, "milora", begin=begin)
    _, published = add_adapter(load(kind), config, "milora")
    assert step0_difference(model, batch) <= 1e-5
    for name, (A, B) in start.factors.items():
        there = published.factors[name].A.double()
        apart = A.double() - A.double() @ torch.linalg.pinv(there) @ there
        assert float(apart.abs().max()) < 1e-5  # the same directions
        if begin == "directions":
            assert not B.any()
        elif kind == "llama":
            squares = A.square().sum(1) + B.square().sum(0)
            torch.testing.assert_close(squares, torch.full_like(squares, 1 / 3))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"milora": {"text": "same.txt", "keep": {}}}, "milora.text and evaluate.knowledge both"),
        (
            {"milora": {"text": "./same.txt", "keep": {}}},
            r"both have same.txt \(a copy of ./same.txt\)",
        ),
        ({"milora": {"text": "none.txt", "keep": {}}}, "milora.text: none.txt does not exist"),
        ({"milora": {"text": "short.txt", "keep": {}}}, "fewer than 256 tokens"),
        ({"method": "full", "milora": {"text": "long.txt", "keep": {}}}, "no adapter to hold"),
        ({"method": "lora", "milora": {"start": "balanced"}}, "method lora does not have"),
        ({"milora": {"text": "long.txt", "protect_inputs": 30}}, "at most 28"),
        ({"milora": {"text": "long.txt", "protect_inputs": 26, "protect": 20}}, "lower one of"),
    ],
)
def test_refused(
    changes: dict[str, Any], reason: str, tiny: Tiny, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, length in (("same", 900), ("long", 900), ("short", 100)):
        words = f"The {name} brown fox. "[:19]
        Path(f"{name}.txt").write_text(words * (length // len(words) + 1))
    evaluate = {"knowledge": "same.txt"}
    with pytest.raises(UserError, match=reason):
        run(settings(tiny("llama"), tmp_path, evaluate=evaluate, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_more_inputs_than_can_be_spared_are_refused_before_decomposing(
    tiny: Tiny, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry_run: bool
) -> None:
    held = {"text": str(text), "protect_inputs": 30}
    with pytest.raises(UserError, match="at most 28"):
        run(settings(tiny("llama"), tmp_path, milora=held), dry_run=dry_run)
    assert "decomposing" not in capsys.readouterr().err


@pytest.mark.parametrize(("tokens", "said"), [(300, "256 are taken: whole pieces"), (512, "")])
def test_whole_pieces_are_taken_and_that_is_said(
    tokens: int, said: str, tiny: Tiny, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    keep = {"text": str(text), "keep": {"tokens": tokens}}
    run(settings(tiny("llama"), tmp_path, milora=keep, training={"max_steps": 1}))
    found = capsys.readouterr().err
    assert said in found
    assert ("milora.keep.tokens" in found) == bool(said)


def test_a_text_that_nothing_uses_is_said(
    tiny: Tiny, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(settings(tiny("llama"), tmp_path, milora={"text": str(text)}), dry_run=True)
    assert "milora.text is not used" in capsys.readouterr().err


@pytest.mark.slow
def test_the_base_writes_as_it_predicts(load: Load, tiny: Tiny) -> None:
    model, tokenizer = load("llama"), AutoTokenizer.from_pretrained(tiny("llama"))
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    pieces = sampled(model, tokenizer, 40, 100)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert pieces == sampled(model, tokenizer, 40, 100)
    assert [len(piece) for piece in pieces] == [100] * 40
    assert {piece[0] for piece in pieces} == {tokenizer.bos_token_id}
    with torch.no_grad():
        log_p = model(torch.tensor(pieces)).logits[:, :-1].double().log_softmax(-1)
    said = log_p.gather(2, torch.tensor(pieces)[:, 1:, None])[..., 0]
    expected = (log_p.exp() * log_p).sum(-1)
    spread = ((log_p.exp() * log_p.square()).sum(-1) - expected.square()).sum().sqrt()
    assert abs(float((said - expected).sum())) < 4 * float(spread)  # temperature 1, nothing cut
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(UserError, match="no token that a text begins or ends with"):
        sampled(model, tokenizer, 1, 100)


@pytest.mark.parametrize(
    "setting",
    [{"min_p": 0.9}, {"suppress_tokens": [5, 6, 7]}, {"forced_eos_token_id": 1},
     {"stop_strings": ["a"]}, {"prompt_lookup_num_tokens": 3}, {"return_dict_in_generate": True},
     {"max_time": 1e-9}],
    ids=lambda setting: next(iter(setting)),
)  # fmt: skip
def test_settings_of_the_base_do_not_change_what_it_writes(
    setting: dict[str, Any], load: Load
) -> None:
    tokenizer = make_tokenizer()
    wanted = sampled(load("llama"), tokenizer, 2, 24)
    model = load("llama")
    model.generation_config.update(**setting)
    own = model.generation_config.to_dict()
    assert sampled(model, tokenizer, 2, 24) == wanted
    assert model.generation_config.to_dict() == own


def test_settings_and_mode_come_back_after_an_error(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("llama").train()
    own = model.generation_config
    monkeypatch.setattr(model, "forward", lambda **given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampled(model, make_tokenizer(), 1, 24)
    assert model.generation_config is own
    assert model.training


def test_the_directions_of_many_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    X = torch.randn(400, 96) * torch.arange(1, 97) ** -0.5 @ torch.linalg.qr(torch.randn(96, 96))[0]
    exact = keep.leading(X.T @ X, 8)
    monkeypatch.setattr(keep, "IN_FULL", 32)
    near = keep.leading(X.T @ X, 8)
    torch.testing.assert_close(near @ near.T, torch.eye(8), atol=1e-5, rtol=0)
    assert float((X @ near.T).norm()) == pytest.approx(float((X @ exact.T).norm()), rel=1e-4)


@pytest.mark.slow
def test_what_is_recommended(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Balanced factors, inputs held, at a rate of its own: whole, broken off, and published."""
    hashes = {}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        arguments = settings(tiny("llama"), tmp_path / name, milora=NOT_SAID)
        del arguments["training"]["learning_rate"]
        if name == "broken":
            break_off(arguments, 6, monkeypatch)
        record = run(arguments, resume=name == "broken")
        hashes[name] = result_hashes(tmp_path / name / "run")
        del hashes[name]["samples.jsonl"]  # it names the rows' folder
    assert hashes["whole"] == hashes["broken"]
    written = yaml.safe_load((tmp_path / "whole" / "run" / "config.yaml").read_text())
    assert written["milora"] | {"start": "balanced", "protect_inputs": 8} == written["milora"]
    assert record["step0"]["difference"] <= record["step0"]["bound"]
    init = tmp_path / "whole" / "run" / "init"
    start = load_start(init / "factors.safetensors")
    pieces = load_file(init / "general.safetensors")["ids"]
    assert tuple(pieces.shape) == (16, 256)
    adapter = load_file(tmp_path / "whole" / "run" / "adapter" / "adapter_model.safetensors")
    for name, Vh in load_tops(init / "top.safetensors", start.sha256)[1].items():
        A = adapter[f"base_model.model.{name}.lora_A.weight"]
        B = adapter[f"base_model.model.{name}.lora_B.weight"]
        update = B.double() @ A.double()
        assert len(Vh) == 8  # a quarter of 32 inputs
        assert float((update @ Vh.double().T).norm()) < 1e-6 * max(1.0, float(update.norm()))
    said = capsys.readouterr().err
    assert said.count("4096 tokens of milora.text run through the base") == 2
    (init / "general.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        keep.load_pieces(init / "general.safetensors")


def test_a_method_without_recommendations(tiny: Tiny, tmp_path: Path) -> None:
    run(settings(tiny("llama"), tmp_path, method="lora", milora=NOT_SAID))
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["milora"]
    assert written | PUBLISHED == written
    assert not (tmp_path / "run" / "init" / "general.safetensors").exists()
    asked = {"output_dir": str(tmp_path / "run"), "method": "milora", "milora": NOT_SAID}
    assert as_before(asked, resume=False)["milora"] == NOT_SAID
    assert as_before(asked, resume=True)["milora"] == PUBLISHED  # as that run was
    # One that trains on, and was called to resume before it began: as the run that it continues.
    asked |= {
        "output_dir": str(tmp_path / "next"), "continue": {"run": str(tmp_path / "run"),
                                                            "how": "same"},
    }  # fmt: skip
    for resume in (False, True):
        assert as_before(asked, resume)["milora"] == PUBLISHED


@pytest.mark.parametrize("unfit", [None, "experts"])
def test_narrow_weights_and_others(unfit: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        found = recommended(NOT_SAID, [576, 96], unfit, progress)
        kept = recommended({"start": "published", "protect_inputs": 3}, [576], None, progress)
    assert found == {"start": "balanced", "protect_inputs": 0 if unfit else 24}
    assert kept == {"start": "published", "protect_inputs": 3}
    assert ("it is not for experts" in capsys.readouterr().err) == bool(unfit)


def test_pieces_are_whole(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    assert [len(piece) for piece in cut(tokenizer, ["a" * 600, "b" * 300], 10**9)] == [256] * 3
    assert len(cut(tokenizer, ["a" * 600], 100)) == 6
    begun = cut(with_bos(), ["a" * 600, "b" * 254], 10**9)
    assert [(piece[0], len(piece)) for piece in begun] == [(0, 256)] * 2
    assert 0 not in begun[1][1:]
