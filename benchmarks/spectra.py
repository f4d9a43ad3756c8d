"""What "minor" means in real weights: spectra, 4-bit noise, and what rewriting in 16 bit loses.

    python benchmarks/spectra.py run     # benchmarks/results/spectra.json
    python benchmarks/spectra.py plot    # docs/spectra.png from it

The seven linear weights of three blocks of SmolLM2-135M, and Gaussian weights of larger sizes.
About a minute on one core.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "spectra.json"
PICTURE = ROOT / "docs" / "spectra.png"
KINDS = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
BLOCKS, SHOWN = (0, 15, 29), 15
RANK = 32
GAUSSIAN = ((2048, 2048), (512, 2048), (5504, 2048))  # as q, k and up are in a model 2048 wide


def digits(value: float) -> float:
    return float(f"{value:.4g}")


def rewritten(weight: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """What is lost when the base in `dtype` is replaced by W - W_m, stored in `dtype` again.

    error is the rounding of W - W_m relative to W_m (Frobenius); unchanged is the share of the
    entries from which nothing was subtracted at all.
    """
    from milora import minor_components

    W = weight.to(dtype).double()
    found = minor_components(W, RANK)
    minor = (found.U * found.S) @ found.Vh
    stored = (W - minor).to(dtype).double()
    return {
        "error": digits(float((stored - (W - minor)).norm() / minor.norm())),
        "unchanged": digits(float((stored == W).double().mean())),
    }


def both(weight: Tensor) -> dict[str, dict[str, float]]:
    return {
        "bfloat16": rewritten(weight, torch.bfloat16),
        "float16": rewritten(weight, torch.float16),
    }


def noise(weight: Tensor) -> dict[str, float]:
    """Singular values of a 4-bit rounding error, drawn uniformly within the steps of `weight`.

    The weights were Q4_1: in every run of 32 along a row, 16 levels at equal distance.
    """
    blocks = weight.double().reshape(weight.shape[0], -1, 32).sort(dim=-1).values
    gaps = blocks.diff(dim=-1)
    same = gaps < 1e-4 * blocks.abs().amax(dim=-1, keepdim=True)
    step = gaps.masked_fill(same, torch.inf).amin(dim=-1, keepdim=True)
    levels = (blocks[..., -1:] - blocks[..., :1]) / step
    assert levels.max() < 15.01, "not the levels of Q4_1"
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(blocks.shape, generator=generator, dtype=torch.float64) - 0.5
    S = torch.linalg.svdvals((draw * step).reshape(weight.shape))
    return {
        "norm_share": digits(float(S.norm() / weight.double().norm())),
        "largest": digits(float(S[0])),
        "median": digits(float(S.median())),
    }


def run() -> None:
    from milora.fingerprints import base_sha256
    from milora.pretrained import load_pretrained

    torch.set_num_threads(1)
    model = load_pretrained("smollm2-135m", "float32").model
    weights: dict[str, Any] = {}
    for block in BLOCKS:
        for kind, parent in KINDS.items():
            W = model.get_parameter(f"model.layers.{block}.{parent}.{kind}.weight").detach().cpu()
            S = torch.linalg.svdvals(W.double())
            weights[f"{block}.{kind}"] = {
                "shape": list(W.shape),
                "minor_mean": digits(float(S[-RANK:].mean())),
                "minor_share": digits(float(S[-RANK:].norm() / S.norm())),
                "noise": noise(W),
                "rewritten": both(W),
                "values": [digits(value) for value in S.tolist()],
            }
    generator = torch.Generator().manual_seed(0)
    gaussian = {
        f"{m}x{n}": {"rewritten": both(0.02 * torch.randn(m, n, generator=generator))}
        for m, n in GAUSSIAN
    }
    head = {
        "model": "smollm2-135m",
        "base_sha256": base_sha256(model),
        "torch": torch.__version__,
        "rank": RANK,
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for name, part in (("weights", weights), ("gaussian", gaussian)):
        inner = ",\n".join(
            f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}"
            for key, value in part.items()
        )
        lines.append(f'"{name}": {{\n{inner}\n}}')
    RESULT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


# The palette of Okabe and Ito, which the colour-blind can tell apart.
ORANGE, BLUE, SKY, GREEN, BLACK, GREY = (
    "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#222222", "#6B6B6B",
)  # fmt: skip
# Kind: colour, and where its name stands (index, singular value).
SQUARE = {"q_proj": (BLUE, (205, 1.55)), "o_proj": (SKY, (215, 4.6))}
RECTANGULAR = {
    "up_proj": (GREEN, (300, 9.8)),
    "down_proj": (BLACK, (235, 3.1)),
    "v_proj": (SKY, (204, 1.5)),
    "k_proj": (BLUE, (204, 0.68)),
}


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    weights = json.loads(RESULT.read_text(encoding="utf-8"))["weights"]
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.1), sharey=True, layout="constrained")
    parts = (
        ("Square: hard edge, falls towards zero", SQUARE, (340, 0.012), (12, 0.16)),
        ("Rectangular: soft edge, ends above zero", RECTANGULAR, (362, 0.92), (12, 0.2)),
    )
    for panel, (title, kinds, minor_at, noise_at) in zip(panels, parts, strict=True):
        medians = [weights[f"{SHOWN}.{kind}"]["noise"]["median"] for kind in kinds]
        panel.axhspan(min(medians), max(medians), color="#DDDDDD", lw=1.5, zorder=0)
        panel.annotate("4-bit rounding noise", noise_at, color=GREY, fontsize=10)
        for kind, (colour, place) in kinds.items():
            S = weights[f"{SHOWN}.{kind}"]["values"]
            index = range(1, len(S) + 1)
            panel.plot(index[:-RANK], S[:-RANK], color=colour, lw=2)
            panel.plot(index[-RANK:], S[-RANK:], color=ORANGE, lw=4, solid_capstyle="round")
            panel.annotate(kind, place, color=colour)
        panel.annotate("minor: starts\nthe adapter", minor_at, color=ORANGE, weight="bold")
        panel.set_title(title, fontsize=12, loc="left")
        panel.set_xlabel("index of the singular value, largest first")
        panel.set_xlim(0, 600)
        panel.set_yscale("log")
        panel.set_yticks([10, 1, 0.1, 0.01, 0.001], ["10", "1", "0.1", "0.01", "0.001"])
        panel.minorticks_off()
    panels[0].set_ylabel("singular value")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["run", "plot"])
    {"run": run, "plot": plot}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
