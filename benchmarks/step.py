"""What a training step costs: MiLoRA, a LoRA, a rewritten base, and two LoRAs of PEFT.

    python benchmarks/step.py cpu [CASE]   # SmolLM2-135M in fp32; some minutes a case
    python benchmarks/step.py gpu          # 8 layers of Llama-3-8B's shape in bf16; a minute
    python benchmarks/step.py host         # 8 layers so small that a CPU hardly computes; a minute
    python benchmarks/step.py docs         # the tables of docs/speed.md, from the JSON

All are in one process and take turns, each round in another order, so that what the machine does
besides falls on all of them; a ratio is the median over the rounds of time / time of LoRA. Peak
memory is that of the GPU, or of a process of its own for each on the CPU. The factors are drawn:
a step takes as long whatever stands in them. `gpu` and `host` need no network and no file but this
project. `host` tells what a GPU waits for where its own work is short: Python, and the calls that
start kernels.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent))
from svd import RESULTS, ROOT, machine, write
from tables import fill

import milora.anchored
from milora.adapter import add_adapter
from milora.callbacks import Hold
from milora.keep import kept_loss
from milora.matrices import TRAINED, adapted_layers, adapted_matrices
from milora.protect import held
from milora.recommended import INPUTS
from milora.svd import Components
from milora.targeting import lora_config

DOCUMENT = ROOT / "docs" / "speed.md"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
RANK = 32
KEPT = 512  # tokens of general text
METHODS = {
    "lora": "LoRA of PEFT",
    "milora": "MiLoRA",
    "held": "MiLoRA, 64 inputs held (the default)",
    "keep": "MiLoRA, milora.keep",
    "rewritten": "rewritten base and a LoRA",
    "two": "two LoRAs of PEFT",
}
OTHERS = [method for method in METHODS if method != "lora"]


class Case(NamedTuple):
    rows: int
    tokens: int  # of each row
    checkpointing: bool = False
    dropout: float = 0.0
    autocast: bool = False  # to bf16
    dtype: str = "float32"  # of the base


CPU = {
    "4x256": Case(4, 256),
    "16x128": Case(16, 128),
    "4x256-checkpointing": Case(4, 256, checkpointing=True),
    "4x256-dropout": Case(4, 256, dropout=0.05),
    "4x256-bf16": Case(4, 256, dtype="bfloat16"),
    "4x256-bf16-checkpointing": Case(4, 256, checkpointing=True, dtype="bfloat16"),
}
GPU = {
    "4x512": Case(4, 512, dtype="bfloat16"),
    "4x512-autocast": Case(4, 512, autocast=True, dtype="bfloat16"),
    "4x512-checkpointing": Case(4, 512, checkpointing=True, dtype="bfloat16"),
    "4x512-dropout": Case(4, 512, dropout=0.05, dtype="bfloat16"),
}


HOST = {
    "host": Case(1, 8, dtype="bfloat16"),
    "host-autocast": Case(1, 8, autocast=True, dtype="bfloat16"),
    "host-checkpointing": Case(1, 8, checkpointing=True, dtype="bfloat16"),
    "host-dropout": Case(1, 8, dropout=0.05, dtype="bfloat16"),
}


def drawn(weight: Tensor, rank: int, component: str, seed: int = 0) -> Components:
    """In place of a decomposition."""
    (m, n), like = weight.shape, {"dtype": torch.float64, "device": weight.device}
    U, Vh = torch.randn(m, rank, **like), torch.randn(rank, n, **like)  # type: ignore[call-overload]
    S = torch.linspace(1, 0.5, rank, **like)  # type: ignore[call-overload]
    return Components(U / m**0.5, S, Vh / n**0.5, 10.0, 0.0, "drawn")


def model_of(base: PreTrainedModel, method: str, rank: int) -> PeftModel:
    """`base` with the adapter of `method`."""
    config = lora_config({"r": rank, "lora_alpha": rank, "target_modules": TARGETS})
    if method == "rewritten":
        model, _ = add_adapter(base, config, "lora")
        with torch.no_grad():
            for matrix in adapted_matrices(model).values():
                found = drawn(matrix.weight, rank, "minor")
                A, B = matrix.factors(TRAINED)
                A.copy_(found.S.sqrt()[:, None] * found.Vh)
                B.copy_(found.U * found.S.sqrt())
                matrix.weight.sub_((B @ A).to(matrix.weight.dtype))
    else:
        name = "lora" if method == "lora" else "milora"
        model, _ = add_adapter(base, config, name, decompose=drawn)
        if method == "two":  # PEFT's own forward: one active adapter after the other
            for matrix in adapted_matrices(model).values():
                del matrix.layer.forward
    return model.train()


class Trial:
    """A model, its optimizer, and a step of both."""

    def __init__(self, base: PreTrainedModel, method: str, rank: int = RANK) -> None:
        self.model = model_of(base, method, rank)
        self.device = next(self.model.parameters()).device
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.method = method
        self.hold: Hold | None = None
        matrices = adapted_matrices(self.model)
        if method == "held":  # any directions: drawn
            inputs = {}
            for name, matrix in matrices.items():
                n = matrix.shape[1]
                some = torch.randn(n, min(INPUTS, n // 2), device=self.device)
                inputs[name] = torch.linalg.qr(some)[0].T
            self.hold = Hold(matrices, held(matrices, {}, inputs))

    def use(self, case: Case) -> None:
        self.case = case
        for layer in adapted_layers(self.model).values():
            layer.lora_dropout[TRAINED] = (
                nn.Dropout(case.dropout) if case.dropout else nn.Identity()
            )
        inner = self.model.base_model.model
        if case.checkpointing:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            inner.gradient_checkpointing_disable()
        generator = torch.Generator().manual_seed(0)
        size = (case.rows, case.tokens)
        self.ids = torch.randint(0, 40_000, size, generator=generator).to(self.device)

    def step(self) -> float:
        """Its seconds; on the CPU those of all cores, so that other processes count less."""
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        self.wait()
        began = clock()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.autocast):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        if self.method == "keep":
            kept_loss(self.model, self.ids.flatten()[:KEPT].view(2, -1)).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.hold:
            self.hold.project()
        self.optimizer.zero_grad()
        self.wait()
        return clock() - began

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def own(self) -> int:
        """Bytes of weights, factors and optimizer state."""
        state = (v for one in self.optimizer.state.values() for v in one.values())
        tensors = (*self.model.parameters(), *self.model.buffers(), *state)
        sizes = {id(t): t.nbytes for t in tensors if isinstance(t, Tensor)}
        return sum(sizes.values())


def rounds(trials: dict[str, Trial], count: int) -> dict[str, list[float]]:
    """Seconds of each trial, `count` times, in turns.

    In as many rounds as there are trials each has every place once and, their number being even,
    follows each other once (Williams's square), so that what one leaves behind falls on all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    names, n = list(trials), len(trials)
    walk = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(n)]  # 0, 1, -1, 2, -2, ...
    for trial in trials.values():
        trial.step()  # warms up
    for i in range(count):
        for name in (names[(i + place) % n] for place in walk):
            seconds[name].append(round(trials[name].step(), 5))
    return seconds


def llama3_like(device: str, part: int = 1) -> PreTrainedModel:
    """8 layers of Llama-3-8B's shape, or of a part of its widths, with drawn weights, in bf16."""
    config = LlamaConfig(
        hidden_size=4096 // part, intermediate_size=14336 // part, num_hidden_layers=8,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256 // part,
        max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def gpu() -> None:
    torch.manual_seed(0)
    began = time.monotonic()
    base = llama3_like("cuda")
    trials = {method: Trial(copy.deepcopy(base), method) for method in METHODS}
    print(f"built: {time.monotonic() - began:.0f} s", flush=True)
    for name, case in GPU.items():
        began = time.monotonic()
        for trial in trials.values():
            trial.use(case)
        seconds = rounds(trials, 24)
        memory = {}
        for method, trial in trials.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            trial.step()
            memory[method] = torch.cuda.max_memory_allocated() - before + trial.own()
        keep(f"gpu-{name}", "Llama-3-8B's shape, 8 layers", case, seconds, memory)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def host() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    milora.anchored.BY_HAND = ()  # as a GPU has it
    base = llama3_like("cpu", 64)
    trials = {method: Trial(copy.deepcopy(base), method, 4) for method in METHODS}
    for name, case in HOST.items():
        for trial in trials.values():
            trial.use(case)
            trial.ids %= base.config.vocab_size
        keep(name, "a 64th of Llama-3-8B's widths, 8 layers", case, rounds(trials, 120), {}, 4)


def smollm2(dtype: str) -> PreTrainedModel:
    from milora.pretrained import load_pretrained

    return load_pretrained("smollm2-135m", dtype).model


def cpu(name: str) -> None:
    case = CPU[name]
    memory = {method: statistics.median(peak(method, name) for _ in range(3)) for method in METHODS}
    trials = {method: Trial(smollm2(case.dtype), method) for method in METHODS}
    for trial in trials.values():
        trial.use(case)
    seconds = rounds(trials, 2 * len(trials))  # two squares
    keep(f"cpu-{name}", "SmolLM2-135M", case, seconds, memory)


def peak(method: str, name: str) -> int:
    """Bytes that a process of its own needs above what it has before the model."""
    command = [sys.executable, __file__, "peak", method, name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def print_peak(method: str, name: str) -> None:
    before = resident("VmRSS")
    trial = Trial(smollm2(CPU[name].dtype), method)
    trial.use(CPU[name])
    for _ in range(2):  # the second has the optimizer's state
        trial.step()
    print(resident("VmHWM") - before)


def resident(line: str) -> int:
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(line):
            return 1024 * int(text.split()[1])
    raise KeyError(line)


def keep(
    name: str, model: str, case: Case, seconds: dict[str, list[float]], memory: dict[str, int],
    rank: int = RANK,
) -> None:  # fmt: skip
    device = "cuda" if name.startswith("gpu") else "cpu"
    result = {
        "model": model, **case._asdict(), "rank": rank, "targets": TARGETS,
        "device": machine(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "seconds": seconds, "peak_bytes": memory,
    }  # fmt: skip
    for method, (ratio, low, high) in ratios(seconds).items():
        print(f"{name} {method}: {ratio:.3f} ({low:.3f} to {high:.3f}) of LoRA", flush=True)
    write(RESULTS / f"step-{name}.json", result)


def ratios(seconds: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    """Median, and lower and upper quartile, of the ratio to LoRA in the same round."""
    found = {}
    for method, times in seconds.items():
        paired = [a / b for a, b in zip(times, seconds["lora"], strict=True)]
        low, middle, high = statistics.quantiles(paired, n=4)
        found[method] = (middle, low, high)
    return found


def tables() -> dict[str, Iterator[str]]:
    """Of time and of memory, a row a case."""
    paths = sorted(RESULTS.glob("step-*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return {"step": times(found), "step memory": peaks(found)}


def times(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from _head(f"{METHODS['lora']}: a step, tokens/s")
    for result in results:
        own = statistics.median(result["seconds"]["lora"])
        cells = [f"{own:.3g} s, {result['rows'] * result['tokens'] / own:,.0f}"]
        found = ratios(result["seconds"])
        said = {one: "**{:.3f}** ({:.2f} to {:.2f})".format(*found[one]) for one in found}
        yield _row(result, [*cells, *(said.get(one, "") for one in OTHERS)])


def peaks(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from _head(f"{METHODS['lora']}: peak")
    for result in results:
        if peak := result["peak_bytes"]:
            others = [f"{peak[one] / peak['lora']:.3f}" if one in peak else "" for one in OTHERS]
            yield _row(result, [f"{peak['lora'] / 1e9:.2f} GB", *others])


def _head(lora: str) -> Iterator[str]:
    head = ["base, device", "rows × tokens", "with", lora, *(METHODS[one] for one in OTHERS)]
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"


def _row(result: dict[str, Any], cells: list[str]) -> str:
    options = [key for key in ("checkpointing", "autocast") if result[key]]
    options += [f"dropout {result['dropout']}"] if result["dropout"] else []
    where = f"{result['model']}, {result['dtype']}, {result['device']}"
    if result["torch"].endswith("+cpu"):
        where += f", {result['threads']} thread" + "s" * (result["threads"] > 1)
    first = [where, f"{result['rows']} × {result['tokens']}", ", ".join(options)]
    return f"| {' | '.join([*first, *cells])} |"


def docs() -> None:
    fill(DOCUMENT, tables())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["cpu", "gpu", "host", "docs", "peak"])
    parser.add_argument("rest", nargs="*", help=f"for cpu: of {', '.join(CPU)}")
    given = parser.parse_args()
    if given.what == "gpu":
        gpu()
    elif given.what == "host":
        host()
    elif given.what == "peak":
        print_peak(*given.rest)
    elif given.what == "docs":
        docs()
    else:
        for name in given.rest or CPU:
            cpu(name)


if __name__ == "__main__":
    main()
