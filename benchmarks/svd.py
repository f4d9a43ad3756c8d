"""How fast and how exact the minor components are, against a full SVD and the best alternatives.

    python benchmarks/svd.py run           # drawn weights, one thread and two; about an hour
    python benchmarks/svd.py real          # every weight of SmolLM2 and MiniLM; some minutes
    python benchmarks/svd.py real FILE     # of a GGUF file, for example Gemma-3-270M
    python benchmarks/svd.py plot          # docs/decomposition.png and the tables, from the JSON

`run` writes one JSON a shape and number of threads and leaves alone what is there, so that it
goes on where it was stopped. Methods are interleaved in one process and the figures are ratios of
medians to torch.linalg.svd in fp32 in the same process: absolute times are those of the machine.
With a GPU, `run` measures there instead, against each driver of torch.linalg.svd.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from milora.svd import SOLVER, minor_components

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tables import fill
from weights import llm_like, real

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT, PICTURE = ROOT / "docs" / "decomposition.md", ROOT / "docs" / "decomposition.png"

SHAPES = (
    (192, 576), (576, 576), (1536, 576), (1024, 1024), (2048, 2048), (4096, 1024),
    (4096, 4096), (11008, 4096), (14336, 4096),
)  # fmt: skip
RANKS = (32, 8, 128)  # the reference of large weights is timed with the first
BOUNDS = {(4096, 4096): 0.12, (2048, 2048): 0.22, (11008, 4096): 0.17, (4096, 1024): 0.40}


REFERENCE = "torch svd fp32"


class Triplets(NamedTuple):
    U: Tensor
    S: Tensor
    Vh: Tensor


Method = Callable[[Tensor, int], Any]


def full_svd(W: Tensor, rank: int, dtype: torch.dtype, driver: str | None = None) -> Triplets:
    U, S, Vh = torch.linalg.svd(W.to(dtype), full_matrices=False, driver=driver)
    return Triplets(U[:, -rank:], S[-rank:], Vh[-rank:])


def gram_eigh(W: Tensor, rank: int) -> Triplets:
    """All eigenvectors of the fp64 Gram matrix, then a Rayleigh-Ritz step on W."""
    A = tall(W)
    vectors = torch.linalg.eigh(A.T @ A).eigenvectors
    return ritz(A, vectors[:, :rank], W.shape)


def gram_evr(W: Tensor, rank: int) -> Triplets:
    """The wanted eigenvectors of the fp64 Gram matrix by LAPACK's evr, then Rayleigh-Ritz."""
    from scipy.linalg import eigh

    A = tall(W)
    _, vectors = eigh((A.T @ A).numpy(), subset_by_index=(0, rank - 1), driver="evr")
    return ritz(A, torch.from_numpy(vectors), W.shape)


def gesdd_scipy(W: Tensor, rank: int) -> Triplets:
    from scipy.linalg import svd

    U, S, Vh = svd(W.float().numpy(), full_matrices=False, lapack_driver="gesdd")
    return Triplets(*(torch.from_numpy(x) for x in (U[:, -rank:], S[-rank:], Vh[-rank:])))


def arpack(W: Tensor, rank: int) -> Triplets:
    """ARPACK on the inverse through an fp64 LU, then Rayleigh-Ritz; square weights."""
    from scipy.linalg import lu_factor, lu_solve
    from scipy.sparse.linalg import LinearOperator, eigsh

    A = W.double()
    n, factors = len(A), lu_factor(A.numpy())
    inverse = LinearOperator(
        (n, n), matvec=lambda x: lu_solve(factors, lu_solve(factors, x, trans=1)), dtype=float
    )
    _, vectors = eigsh(inverse, k=rank, which="LM")
    return ritz(A, torch.from_numpy(vectors), W.shape)


def tall(W: Tensor) -> Tensor:
    A = W.double()
    return A if A.shape[0] >= A.shape[1] else A.T


def ritz(A: Tensor, V: Tensor, shape: torch.Size) -> Triplets:
    V = torch.linalg.qr(V.to(A)).Q
    Q, R = torch.linalg.qr(A @ V)
    P, S, Zh = torch.linalg.svd(R)
    U, Vh = Q @ P, Zh @ V.T
    return Triplets(U, S, Vh) if A.shape == shape else Triplets(Vh.T, S, U.T)


def methods(shape: tuple[int, int], rank: int, device: str) -> dict[str, Method]:
    n = min(shape)
    if device == "cuda":
        chosen: dict[str, Method] = {REFERENCE: lambda W, r: full_svd(W, r, torch.float32)}
        for driver in ("gesvd", "gesvdj"):
            chosen[f"torch svd fp32, {driver}"] = lambda W, r, d=driver: full_svd(
                W, r, torch.float32, d
            )
        return chosen | {"milora": minor_components}
    chosen = {REFERENCE: lambda W, r: full_svd(W, r, torch.float32)}
    chosen["milora"] = minor_components
    if n <= 1024 or (rank == 32 and n <= 2048):
        chosen["torch svd fp64"] = lambda W, r: full_svd(W, r, torch.float64)
    if n <= 1024 or rank == 32:
        chosen["Gram fp64, scipy evr"] = gram_evr
    if n <= 2048:
        chosen["Gram fp64, torch eigh"] = gram_eigh
    if n <= 1024 and rank == 32:
        chosen["scipy gesdd fp32"] = gesdd_scipy
    if shape[0] == shape[1] and rank == 32:
        chosen["LU fp64, ARPACK"] = arpack
    return chosen


def judge(W: Tensor, found: Any, truth: Tensor) -> dict[str, float]:
    """Residual and orthogonality in fp64, whatever the method worked in; energy above the least."""
    A, (U, S, Vh) = W.double(), (x.double() for x in found[:3])
    eye, norm = torch.eye(len(S)).to(A), float(truth[0])
    least = truth[-len(S) :].norm()

    def spectral(X: Tensor) -> float:
        return float(torch.linalg.matrix_norm(X, 2))

    return {
        "residual": max(spectral(A @ Vh.T - U * S), spectral(A.T @ U - Vh.T * S)) / norm,
        "orthogonality": max(
            float((U.T @ U - eye).abs().max()), float((Vh @ Vh.T - eye).abs().max())
        ),
        "energy_excess": float(S.norm() / least) - 1,
    }


def gemm_limit(shape: tuple[int, int], device: str) -> float:
    """Seconds for the unavoidable factorisation at the rate of a matrix product of that size.

    Square: 2/3 n³ in fp64 (LU). Rectangular: m n² + n³/3 in fp32 (half of AᵀA, and Cholesky).
    """
    m, n = max(shape), min(shape)
    dtype, flops = torch.float64, 2 / 3 * n**3
    if m > n:
        dtype, flops = torch.float32, m * n**2 + n**3 / 3
    A = torch.randn(n, n, dtype=dtype, device=device)
    seconds = [clock(device, torch.matmul, A, A)[0] for _ in range(4)]
    return flops / (2 * n**3 / min(seconds))


def clock(device: str, work: Callable[..., Any], *given: Any) -> tuple[float, Any]:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = work(*given)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def measure(shape: tuple[int, int], threads: int, device: str) -> None:
    torch.set_num_threads(threads)
    W = llm_like(*shape).to(device)
    truth = torch.linalg.svdvals(W.double())
    repeats = 21 if min(shape) <= 576 else 5 if min(shape) <= 1024 else 3
    ranks: dict[str, Any] = {}
    for rank in RANKS:
        chosen = methods(shape, rank, device)
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        judged, solver = {}, ""
        if min(shape) >= 4096 and ranks:  # a full SVD takes as long whatever the rank
            seconds[REFERENCE] = ranks[str(RANKS[0])]["seconds"][REFERENCE]
            chosen.pop(REFERENCE)
        for _ in range(repeats):
            for name, method in chosen.items():
                second, found = clock(device, method, W, rank)
                seconds[name].append(round(second, 5))
                judged[name] = judge(W, found, truth)
                if name == "milora":
                    solver = found.solver
        ranks[str(rank)] = {"solver": solver, "seconds": seconds, "judged": judged}
        print(f"{shape} r={rank} {threads} threads: {ratios(ranks[str(rank)])}", flush=True)
    write(
        result_path(shape, threads, device),
        {
            "shape": shape, "threads": threads, "device": machine(device),
            "torch": torch.__version__, "solver_version": SOLVER,
            "gemm_limit_seconds": round(gemm_limit(shape, device), 5), "ranks": ranks,
        },
    )  # fmt: skip


def ratios(rank: dict[str, Any]) -> dict[str, float]:
    median = {name: statistics.median(s) for name, s in rank["seconds"].items()}
    return {name: round(value / median[REFERENCE], 3) for name, value in median.items()}


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def result_path(shape: tuple[int, int], threads: int, device: str) -> Path:
    where = "gpu" if device == "cuda" else f"{threads}-threads"
    return RESULTS / f"svd-{shape[0]}x{shape[1]}-{where}.json"


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}", flush=True)


def run() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for threads in (1, 2) if device == "cpu" else (1,):
        # The libraries of NumPy and SciPy take their number of threads at import.
        env = os.environ | {f"{x}_NUM_THREADS": str(threads) for x in ("OMP", "MKL", "OPENBLAS")}
        for m, n in SHAPES:
            if not result_path((m, n), threads, device).exists():
                one = [sys.executable, __file__, "one", str(m), str(n), str(threads), device]
                subprocess.run(one, env=env, check=True)


def measure_real(model: str) -> None:
    """Every linear weight of a model at r = 32: residual, energy, ratio to a full fp32 SVD."""
    torch.set_num_threads(2)
    rows: list[dict[str, Any]] = []
    worst, total = 0.0, {REFERENCE: 0.0, "milora": 0.0}
    for name, W in real(model):
        rank = min(32, *W.shape)
        seconds: dict[str, list[float]] = {REFERENCE: [], "milora": []}
        for _ in range(3):
            seconds[REFERENCE].append(clock("cpu", full_svd, W, 32, torch.float32)[0])
            second, found = clock("cpu", minor_components, W, rank)
            seconds["milora"].append(second)
        truth = torch.linalg.svdvals(W.double())
        judged = judge(W, found, truth)
        worst = max(worst, judged["residual"])
        median = {method: statistics.median(taken) for method, taken in seconds.items()}
        ratio = median["milora"] / median[REFERENCE]
        total = {method: total[method] + median[method] for method in total}
        rows.append(
            {"name": name, "shape": list(W.shape), "solver": found.solver,
             "ratio": round(ratio, 3), "condition": float(f"{truth[0] / truth[-1]:.3g}"),
             **{key: float(f"{value:.3g}") for key, value in judged.items()}}
        )  # fmt: skip
        print(f"{len(rows)} {name} {rows[-1]['solver']} {judged['residual']:.1e}", flush=True)
    label = Path(model).stem.removesuffix("-q4_k_m")
    head = {
        "model": label, "rank": 32, "weights": len(rows), "worst_residual": worst,
        "total_ratio": round(total["milora"] / total[REFERENCE], 3),
        "device": machine("cpu"), "torch": torch.__version__, "solver_version": SOLVER,
    }  # fmt: skip
    lines = ",\n".join(json.dumps(row) for row in rows)
    path = RESULTS / f"svd-real-{label}.json"
    path.write_text(f'{json.dumps(head)[:-1]},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}")


def results() -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in RESULTS.glob("svd-*x*-*.json")]
    return sorted(found, key=lambda r: (r["threads"], r["shape"][0] * r["shape"][1]))


def tables() -> dict[str, str]:
    """The tables of docs/decomposition.md by their names there."""
    lines = [
        "| shape | threads | r | route | ratio to full SVD | bound | of the GEMM limit | residual "
        "| orthogonality | energy above the least |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    others = [
        "| shape | method | ratio, 1 thread | ratio, 2 threads | residual | orthogonality | "
        "energy above the least |",
        "|---|---|---|---|---|---|---|",
    ]
    by_key: dict[tuple[Any, ...], dict[int, Any]] = {}
    for result in results():
        shape = tuple(result["shape"])
        for r in sorted(result["ranks"], key=int):
            rank = result["ranks"][r]
            ratio, judged = ratios(rank), rank["judged"]["milora"]
            bound = BOUNDS.get(shape, 1.1) if r == "32" else 1.1
            limit = statistics.median(rank["seconds"]["milora"]) / result["gemm_limit_seconds"]
            lines.append(
                f"| {shape[0]} × {shape[1]} | {result['threads']} | {r} | {rank['solver']} | "
                f"**{ratio['milora']:.3f}** | {bound} | {limit:.1f} × | {judged['residual']:.0e} | "
                f"{judged['orthogonality']:.0e} | {judged['energy_excess']:.0e} |"
            )
            if r == "32":
                for name in rank["judged"]:
                    by_key.setdefault((shape, name), {})[result["threads"]] = (
                        ratio[name], rank["judged"][name],
                    )  # fmt: skip
    for (shape, name), found in by_key.items():
        judged = next(iter(found.values()))[1]
        cells = [f"{found[t][0]:.3f}" if t in found else "" for t in (1, 2)]
        others.append(
            f"| {shape[0]} × {shape[1]} | {name} | {cells[0]} | {cells[1]} | "
            f"{judged['residual']:.0e} | {judged['orthogonality']:.0e} | "
            f"{judged['energy_excess']:.0e} |"
        )
    models = [
        "| model | weights | worst residual | worst energy above the least | slowest ratio | "
        "sum of the times against full SVDs | routes |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("svd-real-*.json")):
        result = json.loads(path.read_text())
        rows = result["rows"]
        routes = {row["solver"]: 0 for row in rows}
        for row in rows:
            routes[row["solver"]] += 1
        models.append(
            f"| {result['model']} | {len(rows)} | {result['worst_residual']:.1e} | "
            f"{max(row['energy_excess'] for row in rows):.0e} | "
            f"{max(row['ratio'] for row in rows):.2f} | {result['total_ratio']:.2f} | "
            f"{', '.join(f'{count} {name}' for name, count in routes.items())} |"
        )
    parts = {"svd": lines, "zoo": others, "real": models, "checkpoint": checkpoint()}
    return {name: "\n".join(part) for name, part in parts.items()}


def checkpoint() -> list[str]:
    """What benchmarks/checkpoint.py measured."""
    path = RESULTS / "checkpoint.json"
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    lines = [
        f"{result['blocks']} blocks of LLaMA-2-7B's shape in bf16, "
        f"{result['checkpoint_bytes'] / 1e9:.1f} GB in {result['blocks'] + 1} shards; "
        f"{result['weights']} weights (q, k, v, up, down) at r = {result['rank']}; "
        f"{result['cores']} cores; {result['store_bytes'] / 1e6:.0f} MB in the store.",
        "",
        "| | wall time | core-seconds | peak resident memory | said |",
        "|---|---|---|---|---|",
    ]
    for key in ("unbroken", "killed_half_way", "then_resumed", "once_more"):
        part = result[key]
        lines.append(
            f"| {key.replace('_', ' ')} | {part['wall_seconds']:.0f} s | "
            f"{part['core_seconds']:.0f} | {part['peak_resident_bytes'] / 1e9:.2f} GB | "
            f"{part['said'] or 'killed'} |"
        )
    return lines


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fill(DOCUMENT, {name: [table] for name, table in tables().items()})
    found = [r for r in results() if r["threads"] == 2 and min(r["shape"]) >= 576]
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    colours = {8: "#56B4E9", 32: "#0072B2", 128: "#222222"}
    for offset, (rank, colour) in enumerate(colours.items()):
        for place, result in enumerate(found):
            x, height = place + (offset - 1) * 0.26, ratios(result["ranks"][str(rank)])["milora"]
            axes.bar(x, height, 0.24, color=colour, label=f"r = {rank}" if not place else None)
            axes.annotate(f"{height:.2f}", (x, height), ha="center", va="bottom", fontsize=8)
    for place, result in enumerate(found):
        median = statistics.median(result["ranks"]["32"]["seconds"][REFERENCE])
        y = result["gemm_limit_seconds"] / median
        axes.hlines(y, place - 0.4, place + 0.4, color="#D55E00", lw=2,
                    label="GEMM limit" if not place else None)  # fmt: skip
    axes.axhline(1, color="#6B6B6B", lw=1, ls=":")
    axes.annotate("a full fp32 SVD", (len(found) - 0.5, 1.01), ha="right", color="#6B6B6B")
    axes.set_xticks(range(len(found)), [f"{r['shape'][0]} ×\n{r['shape'][1]}" for r in found])
    axes.set_ylabel("time, ratio to a full fp32 SVD")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(PICTURE, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["run", "real", "plot", "one"])
    parser.add_argument("rest", nargs="*", help="for real: a GGUF file")
    given = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if given.what == "run":
        run()
    elif given.what == "one":  # a process of its own for each shape and number of threads
        m, n, threads, device = given.rest
        measure((int(m), int(n)), int(threads), device)
    elif given.what == "real":
        for model in given.rest or ["smollm2-135m", "minilm"]:
            measure_real(model)
    else:
        plot()


if __name__ == "__main__":
    main()
