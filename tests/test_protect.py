"""Protection and interference: against dense computation, and held through real training."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_run import break_off, run, settings
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from milora.adapter import add_adapter, load_start, trained_factors
from milora.callbacks import Hold
from milora.config import load_config
from milora.errors import UserError
from milora.export import plain_lora
from milora.matrices import adapted_matrices
from milora.protect import (
    Held,
    Top,
    begin_outside,
    held,
    load_tops,
    measure,
    moved,
    project,
    save_tops,
    top_vectors,
    worst,
)
from milora.spectra import Interference, directions, interference
from milora.svd import components
from milora.targeting import lora_config

Load = Callable[..., PreTrainedModel]
Tiny = Callable[[str], Path]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(P: Tensor, Q: Tensor, U: Tensor, Vh: Tensor) -> tuple[float, float]:
    D = P @ Q
    total = float(D.square().sum())
    return float((U.T @ D).square().sum()) / total, float((D @ Vh.T).square().sum()) / total


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6), st.floats(-6, 6))
def test_the_same_as_from_the_dense_update(seed: int, q: int, k: int, power: float) -> None:
    W = drawn(seed, 12, 9)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    P, Q = 10**power * drawn(seed + 1, 12, q), drawn(seed + 2, q, 9)
    norm = float(W.norm())
    minor = (U[:, -2:], Vh[-2:])
    found = interference(P, Q, U[:, :k], Vh[:k], norm, minor)
    assert (found.left, found.right) == pytest.approx(dense(P, Q, U[:, :k], Vh[:k]), abs=1e-6)
    inside = U[:, -2:].T @ P @ Q @ Vh[-2:].T
    assert found.minor == pytest.approx(float(inside.norm() / (P @ Q).norm()) ** 2, abs=1e-6)
    assert found.size == pytest.approx(float((P @ Q).norm()) / norm, rel=1e-9)


@given(st.integers(0, 10**6), st.floats(1e-4, 1e4))
def test_neither_rotation_nor_scale_changes_a_share(seed: int, scale: float) -> None:
    U, _, Vh = torch.linalg.svd(drawn(seed, 10, 8), full_matrices=False)
    P, Q = drawn(seed + 1, 10, 3), drawn(seed + 2, 3, 8)
    R = torch.linalg.qr(drawn(seed + 3, 10, 10)).Q
    T = torch.linalg.qr(drawn(seed + 4, 8, 8)).Q
    X = drawn(seed + 5, 3, 3)  # other factors of the same update
    one = interference(P, Q, U[:, :2], Vh[:2], 1.0, (U[:, -1:], Vh[-1:]))
    other = interference(
        scale * R @ P @ X, torch.linalg.solve(X, Q) @ T.T, R @ U[:, :2], Vh[:2] @ T.T, 1.0,
        (R @ U[:, -1:], Vh[-1:] @ T.T),
    )  # fmt: skip
    assert other[:3] == pytest.approx(one[:3], abs=1e-6)


def test_the_ends_of_the_scale() -> None:
    U, _, Vh = torch.linalg.svd(drawn(0, 10, 8), full_matrices=False)
    top, minor = (U[:, :3], Vh[:3]), (U[:, -2:], Vh[-2:])
    within = interference(U[:, -2:] @ drawn(1, 2, 2), Vh[-2:], *top, 1.0, minor)
    assert within[:3] == pytest.approx((0, 0, 1), abs=1e-12)
    above = interference(U[:, :3] @ drawn(1, 3, 2), drawn(2, 2, 3) @ Vh[:3], *top, 1.0, minor)
    assert above[:3] == pytest.approx((1, 1, 0), abs=1e-12)
    P, Q = drawn(1, 10, 2), drawn(2, 2, 8)
    both = torch.cat([P, -P], 1), torch.cat([Q, Q])
    assert interference(*both, *top, 1.0, minor) == (0, 0, 0, 0)


def test_an_update_that_is_no_number_is_the_worst() -> None:
    U, _, Vh = torch.linalg.svd(drawn(0, 6, 5), full_matrices=False)
    broken = interference(torch.full((6, 2), math.nan), drawn(1, 2, 5), U, Vh, 1.0, None)
    assert all(math.isnan(share) for share in (broken.left, broken.right, broken.size))
    fine = Interference(0.9, 0.2, None, 0.3)
    for found in ({"a": broken, "b": fine}, {"b": fine, "a": broken}):
        assert worst(found)["module"] == "a"


def adapted(load: Load, method: str, r: int = 2, **more: Any) -> Any:
    config = lora_config(
        {"r": r, "lora_alpha": r, "target_modules": ["q_proj", "v_proj", "down_proj"]} | more
    )
    model, start = add_adapter(load("llama"), config, method)
    return model, start, adapted_matrices(model)


def tops_of(layers: Any, start: Any, protect: Any, watched: int = 0) -> dict[str, Top]:
    return top_vectors(layers, start, protect, watched, 0, components)


@pytest.mark.parametrize("method", ["milora", "lora"])
def test_the_update_is_kept_out(method: str, load: Load) -> None:
    model, start, layers = adapted(load, method)
    tops = tops_of(layers, start, 3)
    assert {top.protected for top in tops.values()} == {3}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.3
    )
    ids = torch.randint(2, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    if method == "lora":
        project(layers, held(layers, tops, {}))
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        project(layers, held(layers, tops, {}))
    found = measure(layers, start, tops)
    assert worst(found)["max"] < 1e-10
    assert worst(found)["size"] > 0.01
    update = plain_lora(start, trained_factors(model)).factors
    for name, layer in layers.items():
        before = torch.linalg.svdvals(layer.weight.double())[:3]
        A, B = update[name]
        merged = layer.weight.double() + B.double() @ A.double()
        after = torch.linalg.svd(merged)
        # They are singular triplets of W + dW still, though larger ones may have joined them.
        U, Vh = tops[name].U.double(), tops[name].Vh.double()
        kept = (U.T @ merged @ Vh.T).diagonal()
        torch.testing.assert_close(kept, before, rtol=1e-5, atol=0)
        assert float(after.S[0]) >= float(before[0]) * (1 - 1e-5)


def test_fewer_are_held_than_watched(load: Load) -> None:
    _, start, layers = adapted(load, "milora")
    tops = tops_of(layers, start, 2, watched=4)
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        for part in (layer.layer.lora_A, layer.layer.lora_B):
            weight = part["default"].weight.data
            weight.add_(torch.randn(weight.shape, generator=generator))
    project(layers, held(layers, tops, {}))
    assert worst(measure(layers, start, tops))["max"] > 1e-3
    for name, top in tops.items():
        _, B = layers[name].factors("default")
        assert float((top.U[:, :2].T @ B).detach().abs().max()) < 1e-5
        assert float((top.U[:, 2:].T @ B).detach().abs().max()) > 1e-2


def any_holds(layers: Any) -> tuple[dict[str, Held], dict[str, tuple[Tensor, Tensor]]]:
    """Drawn factors in `layers`, other numbers of directions of each, and what is left in fp64."""
    generator = torch.Generator().manual_seed(0)
    holds, wanted = {}, {}
    for place, (name, layer) in enumerate(layers.items()):
        A, B = layer.factors("default")
        with torch.no_grad():
            A.copy_(torch.randn(A.shape, generator=generator))
            B.copy_(torch.randn(B.shape, generator=generator))
        U, V = (
            torch.linalg.qr(torch.randn(size, count, generator=generator))[0]
            for size, count in ((len(B), place % 3), (A.shape[1], 1 + place % 2))
        )
        holds[name] = Held(U, V.T)
        P, Q, u, v = B.detach().double(), A.detach().double(), U.double(), V.double()
        wanted[name] = P - u @ u.T @ P, Q - Q @ v @ v.T
    return holds, wanted


def experts() -> Any:
    """Whose factors are views of what PEFT has for all of them."""
    config = MixtralConfig(
        vocab_size=258, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    lora = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    model, _ = add_adapter(MixtralForCausalLM(config), lora_config(lora), "milora")
    return adapted_matrices(model)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["llama", "experts"])
@pytest.mark.parametrize("at_once", [1, 2**24])
def test_each_factor_is_projected(
    at_once: int, kind: str, autocast: bool, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are to a product, and in a loop of somebody's own under autocast too."""
    monkeypatch.setattr("milora.protect.AT_ONCE", at_once)
    layers = experts() if kind == "experts" else adapted(load, "milora")[2]
    holds, wanted = any_holds(layers)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        project(layers, holds)
    for name, layer in layers.items():
        A, B = layer.factors("default")
        torch.testing.assert_close(B.detach().double(), wanted[name][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(A.detach().double(), wanted[name][1], rtol=0, atol=1e-5)


def test_what_is_held_is_fetched_once(load: Load) -> None:
    """From where it was made to where the model is now; another dtype stands for a device."""
    layers = adapted(load, "milora")[2]
    holds, wanted = any_holds(layers)
    hold = Hold(layers, {name: Held(*(x.double() for x in one)) for name, one in holds.items()})
    hold.project()
    fetched = dict(hold.holds)
    hold.project()
    for name, layer in layers.items():
        assert fetched[name].Vh.dtype == torch.float32
        assert hold.holds[name].U is fetched[name].U
        assert hold.holds[name].Vh is fetched[name].Vh
        A, _ = layer.factors("default")
        torch.testing.assert_close(A.detach().double(), wanted[name][1], rtol=0, atol=1e-5)


def test_b_of_zeros_alone_is_no_dead_pair(load: Load) -> None:
    """`directions` begins there: what of A lies outside of what is held stays."""
    config = lora_config({"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]})
    model, start = add_adapter(load("llama"), config, "milora", begin="directions")
    layers = adapted_matrices(model)
    holds, _ = any_holds(layers)
    for name, (A, B) in moved(start, layers, holds, {}).items():
        Vh, A0 = holds[name].Vh, start.factors[name].A
        torch.testing.assert_close(A, A0 - A0 @ Vh.T @ Vh, atol=1e-6, rtol=0)
        assert not B.any()


def test_as_many_inputs_as_the_rank_are_enough(load: Load) -> None:
    _, _, layers = adapted(load, "milora")
    layers = {name: layer for name, layer in layers.items() if "q_proj" in name}
    rows = torch.linalg.qr(drawn(0, 32, 32)).Q.float()
    assert held(layers, {}, {name: rows[:30] for name in layers})
    with pytest.raises(UserError, match="hold 31 of the 32 inputs"):
        held(layers, {}, {name: rows[:31] for name in layers})


def test_how_many(load: Load) -> None:
    _, start, layers = adapted(load, "milora")
    shapes = {name: min(layer.weight.shape) for name, layer in layers.items()}
    tops = tops_of(layers, start, 10**6)
    for name, top in tops.items():
        assert (top.protected, top.limited) == (shapes[name] - 2, True)
    for share in (0.2, 0.9):
        for name, top in tops_of(layers, start, {"energy": share}).items():
            S = torch.linalg.svdvals(layers[name].weight.double())
            part = S.square().cumsum(0) / S.square().sum()
            assert float(part[top.protected - 1]) >= share * (1 - 1e-9)
            assert top.protected == 1 or float(part[top.protected - 2]) < share
            assert top.energy == pytest.approx(float(part[top.protected - 1]), rel=1e-9)
    patterns = {"q_proj": 4, r".*\.1\.mlp\.down_proj": {"energy": 0.3}}
    tops = tops_of(layers, start, patterns, watched=6)
    for name, top in tops.items():
        if name.endswith("q_proj"):
            assert (top.protected, top.U.shape[1]) == (4, 6)
        elif name.endswith("1.mlp.down_proj"):
            assert top.protected > 0
        else:
            assert (top.protected, top.U.shape[1]) == (0, 6)
    assert set(tops_of(layers, start, patterns)) < set(layers)  # nothing to watch: left out
    with pytest.raises(UserError, match="'k_proj' matches none of the 6 adapted weights"):
        tops_of(layers, start, {"k_proj": 3})
    with pytest.raises(UserError, match="is no pattern"):
        tops_of(layers, start, {"(": 3})


def test_the_minor_directions(load: Load) -> None:
    _, start, layers = adapted(load, "milora")
    for name, (A, B) in start.factors.items():
        U, Vh = directions(A, B)
        found = components(layers[name].weight, 2, "minor")
        torch.testing.assert_close(U @ U.T, found.U @ found.U.T, atol=1e-5, rtol=0)
        torch.testing.assert_close(Vh.T @ Vh, found.Vh.T @ found.Vh, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "targets", "protect", "inputs"),
    [("llama", ["q_proj", "v_proj", "down_proj"], 0, 8), ("llama", ["q_proj", "up_proj"], 3, 8),
     ("gpt2", ["c_attn"], 4, 0)],
)  # fmt: skip
def test_their_share_where_the_start_was_moved(
    kind: str, targets: list[str], protect: int, inputs: int, load: Load
) -> None:
    """Against full decompositions in fp64: the start moves out of what is held, they do not."""
    config = lora_config({"r": 3, "lora_alpha": 3, "target_modules": targets})
    live, start = add_adapter(load(kind), config, "milora", begin="balanced")
    layers = adapted_matrices(live)
    tops = tops_of(layers, start, protect, 2)
    some = {
        name: torch.linalg.qr(drawn(seed, layer.shape[1], inputs)).Q.T.float()
        for seed, (name, layer) in enumerate(layers.items())
    }
    holds = held(layers, tops, some if inputs else {})
    assert set(moved(start, layers, holds, tops)) == set(layers)
    begin_outside(start, layers, holds, tops)
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in layers.values():
            for factor in layer.factors("default"):
                factor.add_(0.1 * torch.randn_like(factor))
    project(layers, holds)
    update = plain_lora(start, trained_factors(live)).factors
    for name, found in measure(layers, start, tops).items():
        W, dW = layers[name].weight.double(), update[name].B.double() @ update[name].A.double()
        parts = layers[name].parts or [torch.arange(len(W))]
        each = 3 // len(parts)
        U, rows = W.new_zeros(len(W), 3), []
        for i, part in enumerate(parts):
            own, _, Vh = torch.linalg.svd(W[part], full_matrices=False)
            U[part, i * each : (i + 1) * each] = own[:, -each:]
            rows.append(Vh[-each:])
        V = torch.linalg.qr(torch.cat(rows).T).Q
        wanted = float((U.T @ dW @ V).norm() / dW.norm()) ** 2
        assert found.minor == pytest.approx(wanted, rel=1e-4)
        assert 0.001 < wanted < 0.9


def test_without_all_minor_directions_their_share_is_not_said(load: Load) -> None:
    """A singular value of zero begins with B0 = 0, which has no direction."""
    model = load("llama")
    name = "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[3] = 0
    live, start = add_adapter(
        model, lora_config({"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}), "milora"
    )
    layers = adapted_matrices(live)
    tops = tops_of(layers, start, 0, 4)
    assert measure(layers, start, tops)[name].minor is None
    other = name.replace("layers.0", "layers.1")
    assert measure(layers, start, tops)[other].minor is not None


def test_they_are_stored_with_their_base(load: Load, tmp_path: Path) -> None:
    _, start, layers = adapted(load, "milora")
    tops = tops_of(layers, start, {"q_proj": 3}, 2)
    path = tmp_path / "top.safetensors"
    save_tops(path, tops, {}, start.sha256)
    for name, top in load_tops(path, start.sha256)[0].items():
        assert top[2:6] == tops[name][2:6]
        assert torch.equal(top.U, tops[name].U)
        assert top.minor is not None
        assert all(map(torch.equal, top.minor, tops[name].minor or ()))
    older = {name: top._replace(minor=None) for name, top in tops.items()}
    save_tops(path, older, {}, start.sha256)
    tops, _ = load_tops(path, start.sha256)
    assert {one.minor for one in measure(layers, start, tops).values()} == {None}
    other = {name: "0" * 64 for name in start.sha256}
    with pytest.raises(UserError, match="wrong base"):
        load_tops(path, other)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        load_tops(path, start.sha256)


HELD: dict[str, Any] = {"milora": {"protect": 5, "interference": {"every": 2, "top": 0}}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"gradient_accumulation_steps": 2, "weight_decay": 0.5},
        {"optim": "sgd", "learning_rate": 1.0},
        {"bf16": True},
    ],
    ids=["adamw", "accumulated", "sgd", "autocast"],
)
@pytest.mark.parametrize("method", ["milora", "lora"])
def test_a_run_holds_it(method: str, training: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    arguments = settings(
        tiny("llama"), tmp_path, method=method, training=training, lora={"lora_dropout": 0.0},
        **HELD,
    )  # fmt: skip
    record = run(arguments)
    found = record["interference"]
    assert found["max"] < 1e-8  # with sgd the update is small beside the rounding of A and B
    assert found["size"] > 1e-4
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    measured = [json.loads(line) for line in lines if '"interference":' in line]
    assert [line["step"] for line in measured] == [2, 4, 6]
    assert set(measured[-1]["interference"]) == set(found["layers"])
    assert any("interference_max" in json.loads(line) for line in lines)
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    start = load_start(tmp_path / "run" / "init" / "factors.safetensors")
    tops, _ = load_tops(tmp_path / "run" / "init" / "top.safetensors", start.sha256)
    for name, module in base.named_modules():
        if name in tops:
            U, S, _ = torch.linalg.svd(module.weight.double(), full_matrices=False)
            mine = tops[name].U.double()
            torch.testing.assert_close(mine @ mine.T, U[:, :5] @ U[:, :5].T, atol=1e-5, rtol=0)
            assert tops[name].energy == pytest.approx(
                float((S[:5].square().sum() / S.square().sum()).detach()), rel=1e-6
            )


@pytest.mark.parametrize(
    ("method", "rank", "said"),
    [
        ("milora", 14, ["the top 2 to 2 directions of 4 weights",
                        "in 4 weights fewer than asked for, since the initial factors begin"]),
        ("milora", 16, ["in 4 weights fewer than asked for, in 4 of them none"]),
        ("random", 8, ["directions of 2 weights", "in 4 weights fewer than asked for, in 2 of"]),
    ],
)  # fmt: skip
def test_what_the_start_leaves_no_room_for_is_said(
    method: str, rank: int, said: list[str], tiny: Tiny, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Of weights of 16 x 32."""
    lora, held = {"r": rank, "target_modules": ["k_proj", "v_proj"]}, {"protect": 4}
    training = {"max_steps": 1, "eval_strategy": "no"}
    run(settings(tiny("llama"), tmp_path, method=method, lora=lora, milora=held, training=training,
                 evaluate={"tasks": []}))  # fmt: skip
    err = capsys.readouterr().err
    assert [one for one in said if one not in err] == []
    assert ("protected: " in err) == (len(said) > 1)


def test_without_it_the_top_is_touched(tiny: Tiny, tmp_path: Path) -> None:
    record = run(settings(tiny("llama"), tmp_path))
    assert record["interference"]["max"] > 1e-3
    assert {layer["k"] for layer in record["interference"]["layers"].values()} == {16}


@pytest.mark.slow
def test_resumed_as_unbroken(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import milora.begin

    files = {}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        arguments = settings(tiny("llama"), tmp_path / name, **HELD)
        if name == "broken":
            break_off(arguments, 6, monkeypatch)
            forbidden = lambda *args, **kwargs: pytest.fail("decomposed again")  # noqa: E731
            monkeypatch.setattr(milora.begin, "top_vectors", forbidden)
        run(arguments, resume=name == "broken")
        adapter = tmp_path / name / "run" / "adapter" / "adapter_model.safetensors"
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        figures = [line for line in lines if '"interference":' in line]
        files[name] = adapter.read_bytes(), figures
    assert files["whole"] == files["broken"]


@pytest.mark.slow
def test_a_run_measures_the_minor_share_of_the_base(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As recommended, with inputs held, where the stored A0 is no longer minor; resumed."""
    arguments = settings(
        tiny("llama"), tmp_path, milora={"start": "balanced", "protect_inputs": 8},
        lora={"lora_dropout": 0.0},
    )  # fmt: skip
    break_off(arguments, 6, monkeypatch)
    layers = run(arguments, resume=True)["interference"]["layers"]
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for name, found in layers.items():
        A, B = (adapter[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        W = base.get_submodule(name).weight.detach().double()
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        r = len(A) // 2
        wanted = float((U[:, -r:].T @ B @ A @ Vh[-r:].T).norm() / (B @ A).norm()) ** 2
        assert found["minor"] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
def test_a_limit_warns_and_stops(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = {"interference": {"every": 1, "top": 2, "limit": 1e-9}}
    (tmp_path / "warned").mkdir()
    record = run(settings(tiny("llama"), tmp_path / "warned", milora=watch))
    assert record["state"] == "done"
    assert "stopped" not in record
    err = capsys.readouterr().err
    assert err.count("above milora.interference.limit (1e-09)") == 1

    lines = (tmp_path / "warned" / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines if "interference_max" in line]
    largest = {line["step"]: line["interference_max"] for line in logged}
    limit = (largest[3] + largest[4]) / 2
    assert max(largest[step] for step in (1, 2, 3)) < limit < largest[4]
    (tmp_path / "stopped").mkdir()
    watch["interference"] |= {"limit": limit, "stop": True}
    record = run(settings(tiny("llama"), tmp_path / "stopped", milora=watch))
    assert record["stopped"] == {"step": 4, "interference_limit": limit}
    assert record["interference"]["max"] == pytest.approx(largest[2], rel=1e-3)
    assert "the result is that of checkpoint-2" in capsys.readouterr().err

    watch["interference"]["limit"] = 1e-9
    for name, further in (("early", {}), ("epochs", {"save_strategy": "epoch", "max_steps": 24})):
        (tmp_path / name).mkdir()
        asked = settings(tiny("llama"), tmp_path / name, milora=watch, training=further)
        if further:
            del asked["training"]["save_steps"]
        with pytest.raises(UserError, match="before there was a checkpoint to go back to"):
            run(asked)
        assert not list((tmp_path / name).glob("run/checkpoints/checkpoint-*"))


def test_the_last_state_is_measured(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where none is written, so that nothing else asks for it; and none is written unseen."""
    watch = {"interference": {"top": 4, "every": 50, "limit": 1e-9}}
    asked = settings(tiny("llama"), tmp_path, milora=watch)
    del asked["training"]["save_steps"]
    asked["training"] |= {"save_strategy": "no"}
    run(asked)
    assert "above milora.interference.limit" in capsys.readouterr().err
    watch["interference"] |= {"stop": True}
    for strategy, said in (
        ("no", r"interference\.stop goes back to the last checkpoint, and .*save_strategy is no"),
        ("best", r"save_strategy: best .*interference\.limit"),
    ):
        asked = settings(tiny("llama"), tmp_path, milora=watch)
        del asked["training"]["save_steps"]
        asked["training"] |= {
            "save_strategy": strategy,
            "load_best_model_at_end": strategy == "best",
        }
        with pytest.raises(UserError, match=said):
            run(asked | {"output_dir": str(tmp_path / strategy)})


@pytest.mark.parametrize(
    ("method", "milora", "said"),
    [
        ("pissa", {"protect": 4}, "pissa starts from the largest components"),
        ("full", {"protect": 4}, "full fine-tuning has no factors to hold"),
        ("milora", {"protect": {"gate": 4}}, "'gate' matches none"),
    ],
)
def test_what_cannot_be_held(
    method: str, milora: dict[str, Any], said: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        run(settings(tiny("llama"), tmp_path, method=method, milora=milora))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"protect": -1}, "milora.protect"),
        ({"protect": {"energy": 1.5}}, "milora.protect"),
        ({"protect": {"energy": 50}}, "milora.protect is {'energy': 50}: it is"),
        ({"protect": {"energy": 1}}, "milora.protect"),
        ({"protect": {"energy": 0.5, "q_proj": 3}}, "milora.protect"),
        ({"protect": {"tasks": 3}}, "milora.protect"),
        ({"protect": {"tasks": "all", "weights": {"energy": 50}}}, "milora.protect"),
        ({"protect": True}, "milora.protect is True: it is a whole number"),
        ({"protect": {"q_proj": True}}, "milora.protect"),
        ({"protect": {"q_proj": {"energie": 0.5}}}, "milora.protect"),
        ({"protec": 4}, "did you mean protect"),
        ({"interference": {"stop": True}}, "stop needs milora.interference.limit"),
        ({"interference": {"top": 0, "limit": 0.1}}, "needs top above 0"),
        ({"interference": {"limit": math.nan}}, "milora.interference.limit"),
    ],
)
def test_the_configuration(block: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    values = {"model": "m", "output_dir": "o", "data": {"train": "t"}, "milora": block}
    path.write_text(json.dumps(values).replace("NaN", ".nan"))
    with pytest.raises(UserError, match=said):
        load_config(path)
