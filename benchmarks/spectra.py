"""The spectra of SmolLM2's own weights: what "minor" means in a square and in a rectangular one.

python benchmarks/spectra.py run     # benchmarks/results/spectra.json
python benchmarks/spectra.py plot    # docs/spectra.png from it
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "spectra.json"
KINDS = ("q_proj", "o_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
BLOCKS = (0, 15, 29)
RANK = 32


def run() -> None:
    import torch

    from milora.pretrained import load_pretrained

    model = load_pretrained("smollm2-135m", "float32").model
    spectra = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1] in KINDS and int(parts[2]) in BLOCKS:
            S = torch.linalg.svdvals(module.weight.detach().double())
            spectra[name] = {
                "shape": list(module.weight.shape),
                "minor_share": float(S[-RANK:].norm() / S.norm()),
                "values": [float(f"{value:.4g}") for value in S.tolist()],
            }
    about = {"model": "smollm2-135m", "rank": RANK, "spectra": spectra}
    RESULT.write_text(json.dumps(about, separators=(",", ":")) + "\n")


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    spectra = json.loads(RESULT.read_text())["spectra"]
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    chosen = (
        ("square: q, o (576 × 576)", {"q_proj": "#0072B2", "o_proj": "#56B4E9"}),
        (
            "rectangular: k, v (192 × 576), up, down (1536 × 576)",
            {
                "k_proj": "#0072B2",
                "v_proj": "#56B4E9",
                "up_proj": "#009E73",
                "down_proj": "#6B6B6B",
            },
        ),
    )
    for panel, (title, kinds) in zip(panels, chosen, strict=True):
        for kind, colour in kinds.items():
            values = spectra[
                f"model.layers.15.{'self_attn' if kind[0] in 'qokv' else 'mlp'}.{kind}"
            ]
            S = values["values"]
            kept = range(1, len(S) - RANK + 1)
            panel.plot(kept, S[:-RANK], color=colour, label=kind, lw=1.6)
            panel.plot(range(len(S) - RANK, len(S) + 1), S[-RANK - 1 :], color="#D55E00", lw=3)
        panel.plot([], [], color="#D55E00", lw=3, label=f"minor: last {RANK}, start the adapter")
        panel.set_yscale("log")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("index of the singular value")
        panel.grid(axis="y", alpha=0.25)
        panel.legend(fontsize=8, frameon=False, loc="lower left")
    panels[0].set_ylabel("singular value")
    figure.tight_layout()
    (ROOT / "docs").mkdir(exist_ok=True)
    figure.savefig(ROOT / "docs" / "spectra.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "plot"])
    if parser.parse_args().what == "run":
        run()
    else:
        plot()


if __name__ == "__main__":
    main()
