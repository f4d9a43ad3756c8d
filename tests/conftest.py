"""Tiny models and a tokenizer, built in code and saved as any local model folder is."""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never reaches for the network
os.environ["MILORA_STORE"] = tempfile.mkdtemp(prefix="milora-store-")  # nor for the user's store
os.environ["MILORA_ANSWERS"] = tempfile.mkdtemp(prefix="milora-answers-")

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

torch.set_num_threads(1)
settings.register_profile("dev", max_examples=25, deadline=None)
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

# Files that take minutes go first: a file is one worker's, and the others would wait at the end.
LONG = ("test_processes.py", "test_gemma.py", "test_real_model.py", "test_kill.py", "test_train.py")


def pytest_unconfigure() -> None:
    for name in ("MILORA_STORE", "MILORA_ANSWERS"):
        shutil.rmtree(os.environ[name], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


SHARED_DATA = Path(
    os.environ.get("SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
KINDS = ("llama", "qwen2", "gpt2", "tied")
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "tied": ["q_proj", "v_proj", "down_proj"],
}


def make_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and <s>, </s>: every text has ids, and offsets are easy to read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a BOS in front by itself, as Llama's does."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def make_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random two-layer model, 32 wide, with 258 tokens; grouped-query where there is such."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=256,
                bos_token_id=0, eos_token_id=1,
            )
        ).eval()  # fmt: skip
    shape = {
        "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
        "tie_word_embeddings": kind == "tied",
    }  # fmt: skip
    if kind == "qwen2":
        model: PreTrainedModel = Qwen2ForCausalLM(Qwen2Config(**shape))
        with torch.no_grad():  # its biases start at zero, which would test nothing
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    else:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    return model.eval()


@pytest.fixture(scope="session")
def children() -> ForkServerContext:
    """Processes that begin with everything imported, so that one costs no ten seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["milora.train"])
    return context


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny(kind) -> the folder of a saved tiny model with its tokenizer."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(f"tiny-{kind}")
            make_model(kind).save_pretrained(made[kind])
            make_tokenizer().save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture
def load(tiny: Callable[[str], Path]) -> Callable[..., PreTrainedModel]:
    """load(kind, dtype) -> a fresh tiny model."""

    def loaded(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=dtype).eval()
        model.requires_grad_(False)
        return model

    return loaded


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two rows of tokens, the second padded."""
    ids = torch.randint(2, 258, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}
