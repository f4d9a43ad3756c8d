"""Is `milora estimate` right? Against short real runs, each in a process of its own.

    python benchmarks/estimate.py cpu [CASE]   # SmolLM2-135M, Gemma-3-270M; minutes a case
    python benchmarks/estimate.py gpu          # drawn models of their shapes; two minutes
    python benchmarks/estimate.py plan         # 70 and 405 billion parameters, on paper
    python benchmarks/estimate.py docs         # the tables of docs/speed.md, from the JSON

A run is `milora train` for three steps of rows that all fill data.max_length. What it needed is,
on the CPU, the peak of resident memory above that before the model is loaded, and on a GPU the
peak of what PyTorch has allocated.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from step import resident
from svd import RESULTS, ROOT, machine, write
from tables import fill
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig

from milora.config import Config
from milora.costs import Step, per_device
from milora.estimate import estimate
from milora.preview import by_kind, size
from milora.progress import duration

DOCUMENT = ROOT / "docs" / "speed.md"
BUILD = ROOT / "build" / "estimate"
STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "smollm2": {"rows": 4, "tokens": 256},
    "smollm2-checkpointing": {"rows": 8, "tokens": 256, "checkpointing": True},
    "smollm2-lora": {"rows": 8, "tokens": 128, "method": "lora"},
    "smollm2-full": {"rows": 4, "tokens": 128, "method": "full"},
    "gemma": {"rows": 2, "tokens": 128},
}
GPU: dict[str, dict[str, Any]] = {
    "drawn": {"rows": 8, "tokens": 512},
    "drawn-checkpointing": {"rows": 8, "tokens": 512, "checkpointing": True},
    "drawn-autocast": {"rows": 8, "tokens": 512, "bf16": True},
    "drawn-full": {"rows": 4, "tokens": 512, "method": "full"},
    "drawn-gemma": {"rows": 4, "tokens": 512},
}
PLANS = {  # hidden, feed-forward, layers, heads, and GPUs to share it out among
    "70B": (8192, 28672, 80, 64, (4, 8, 16, 64)),
    "405B": (16384, 53248, 126, 128, (16, 32, 64, 256)),
}


def settings(name: str, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The arguments of `train` and `estimate`; the rows to train on are written into `folder`."""
    model = "smollm2-135m"
    if name == "gemma":
        from weights import gemma

        model = str(gemma())
    elif name.startswith("drawn"):
        model = str(drawn("gemma" if name == "drawn-gemma" else "smollm2"))
    data = folder / "rows.jsonl"
    count = case["rows"] * (STEPS + 1)
    data.write_text(
        "".join(json.dumps({"text": f"{i} " + "a word " * 2000}) + "\n" for i in range(count))
    )
    training: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": case["rows"], "logging_steps": 1,
        "save_strategy": "no", "eval_strategy": "no",
        "gradient_checkpointing": case.get("checkpointing", False), "bf16": case.get("bf16", False),
    }  # fmt: skip
    values: dict[str, Any] = {
        "model": model, "method": case.get("method", "milora"), "output_dir": str(folder / "run"),
        "data": {"train": str(data), "eval": 0.2, "max_length": case["tokens"]},
        "lora": {"r": 32, "lora_alpha": 32}, "milora": "published",
        "training": training, "evaluate": {"chunks": 1, "batch_size": 1},
    }  # fmt: skip
    return Config.model_validate(values).model_dump()


def drawn(shape: str) -> Path:
    """A model of the shape of SmolLM2 or Gemma-3-270M with drawn weights; a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = BUILD / f"drawn-{shape}"
    if not (folder / "tokenizer.json").exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config_of(shape)).save_pretrained(folder)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(letters)}
        inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
        ).save_pretrained(folder)
    return folder


def config_of(shape: str) -> PreTrainedConfig:
    if shape == "smollm2":
        return LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
        )  # fmt: skip
    return Gemma3TextConfig(
        hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, vocab_size=262144, sliding_window=512,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def child(name: str) -> None:
    """Train, and print what it took as JSON in the last line."""
    from milora.progress import Progress
    from milora.train import train

    case = {**CASES, **GPU}[name]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = settings(name, case, Path(scratch))
        expected = estimate(**arguments)
        before = resident("VmRSS")
        with Progress() as progress:
            record = train(**arguments, progress=progress)
    took = record["peak_memory_bytes"] - (0 if torch.cuda.is_available() else before)
    print(
        json.dumps(
            {
                "case": name, "method": arguments["method"], **case,
                "parameters": expected["parameters"], "dtype": record["base"]["dtype"],
                "estimated": expected["memory"], "estimated_bytes": expected["peak_bytes"],
                "measured_bytes": took, "training": expected["training"],
                "measured_training_seconds": record["seconds"]["training"],
                "decomposition": expected["decomposition"],
            }
        )
    )  # fmt: skip


def measure(names: list[str], where: str) -> None:
    path = RESULTS / f"estimate-{where}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in names:
        command = [sys.executable, __file__, "child", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows = [row for row in rows if row["case"] != name]
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        ratio = rows[-1]["estimated_bytes"] / rows[-1]["measured_bytes"]
        print(f"{name}: estimated / measured {ratio:.3f}", flush=True)
        device = "cuda" if where == "gpu" else "cpu"
        write(
            path,
            {"device": machine(device), "threads": torch.get_num_threads(),
             "torch": torch.__version__, "rows": rows},
        )  # fmt: skip


def shape_of(name: str) -> Path:
    """A folder with no more than the config of a model of PLANS."""
    hidden, wide, layers, heads, _ = PLANS[name]
    folder = BUILD / name
    LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, vocab_size=128256,
        architectures=["LlamaForCausalLM"], dtype="bfloat16", max_position_embeddings=131072,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def product_rates() -> dict[torch.dtype, float]:
    """Of the two cores that benchmarks/svd.py ran on."""
    square = json.loads((RESULTS / "svd-4096x4096-2-threads.json").read_text())
    tall = json.loads((RESULTS / "svd-14336x4096-2-threads.json").read_text())
    m, n = tall["shape"]
    return {
        torch.float64: 2 / 3 * n**3 / square["gemm_limit_seconds"],
        torch.float32: (m * n**2 + n**3 / 3) / tall["gemm_limit_seconds"],
    }


def plan() -> None:
    rates, rows = product_rates(), []
    for name, (*_, counts) in PLANS.items():
        values = {
            "model": str(shape_of(name)), "output_dir": "unused", "dtype": "bfloat16",
            "data": {"train": "unused", "max_length": 4096}, "lora": {"r": 32, "lora_alpha": 32},
            "training": {
                "per_device_train_batch_size": 1, "max_steps": 1, "gradient_checkpointing": True,
            },
        }  # fmt: skip
        asked = Config.model_validate(values).model_dump()
        found = estimate(**asked, rates=rates, speed=1.0, sharded=True)
        whole = Step(found["memory"], found["training"]["operations"])
        for count in counts:
            one = per_device(whole, 0, count, True, found["gathered_bytes"])
            rows.append(
                {"model": name, "parameters": found["parameters"], "devices": count,
                 "memory": one.memory, "operations": whole.operations,
                 "decomposition": found["decomposition"], "disk": found["disk"]}
            )  # fmt: skip
    write(RESULTS / "estimate-plan.json", {"rows": rows, "tokens": 4096})


def tables() -> dict[str, str]:
    checked = [
        "| device | run | tokens | estimated | measured | ratio | by kind |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("estimate-?pu.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        for row in result["rows"]:
            options = [k for k in ("checkpointing", "bf16") if row.get(k)]
            checked.append(
                f"| {result['device']} | {', '.join([row['case'], row['method'], *options])} | "
                f"{row['rows']} × {row['tokens']} | {row['estimated_bytes'] / 1e9:.2f} GB | "
                f"{row['measured_bytes'] / 1e9:.2f} GB | "
                f"**{row['estimated_bytes'] / row['measured_bytes']:.2f}** | "
                f"{by_kind(row['estimated'])} |"
            )
    planned = [
        "| parameters | GPUs | memory of each | weights | activations and logits | operations a "
        "batch | initial factors | the 16 largest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    path = RESULTS / "estimate-plan.json"
    for row in json.loads(path.read_text())["rows"] if path.exists() else []:
        memory, took = row["memory"], row["decomposition"]["seconds"]
        planned.append(
            f"| {row['model']} | {row['devices']} | **{size(sum(memory.values()))}** | "
            f"{size(memory['weights'])} | {size(memory['activations'] + memory['logits'])} | "
            f"{row['operations']:.2g} | {duration(took['initial factors'])} | "
            f"{duration(took['the largest'])} |"
        )
    return {"estimate": "\n".join(checked), "plan": "\n".join(planned)}


def docs() -> None:
    fill(DOCUMENT, {name: [table] for name, table in tables().items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["cpu", "gpu", "plan", "docs", "child"])
    parser.add_argument("rest", nargs="*", help=f"for cpu: of {', '.join(CASES)}")
    given = parser.parse_args()
    if given.what == "child":
        child(given.rest[0])
    elif given.what == "cpu":
        measure(given.rest or list(CASES), "cpu")
    elif given.what == "gpu":
        measure(list(GPU), "gpu")
    elif given.what == "plan":
        plan()
    else:
        docs()


if __name__ == "__main__":
    main()
