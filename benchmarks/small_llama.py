"""Pretrain a small Llama in fp32 on general English: a base whose weights were never rounded.

    python benchmarks/small_llama.py        build/small-llama and results/small-llama.json

4 M parameters: 4 layers of width 256, 4,096 byte-level BPE tokens, on 3 M tokens of Wikipedia,
WikiText-2 valid, C4, HellaSwag's true endings, GSM8K's problems, Shakespeare and Python's help
topics, twice over, in about an hour on one core or a minute on a GPU; goes on where it stopped.
It writes English that is right for a few words. Held out: WikiText-2 test and the last 50
documents of C4.
"""

import bz2
import json
import os
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from svd import machine
from tasks import DATA, ROOT, require_data
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from milora.files import read_lines

MODEL = Path("build/small-llama")
RESULT = Path("benchmarks/results/small-llama.json")
HELD_OUT = MODEL / "c4_held_out.txt"
VOCABULARY, LENGTH, EPOCHS = 4096, 256, 2
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def corpus() -> tuple[list[str], list[str]]:
    """Documents to train on, and C4's held out."""
    general = DATA / "general_text"
    c4 = [row["text"] for row in read_lines(general / "c4_demo.jsonl")]
    documents = c4[:-50]
    documents += (general / "wiki_demo.txt").read_text(encoding="utf-8").splitlines()
    for name, parting in (("wikitext2_valid.txt", "\n = "), ("tinyshakespeare.txt", "\n\n\n")):
        documents += (general / name).read_text(encoding="utf-8").split(parting)
    (path,) = (DATA / "hellaswag").glob("*.bz2")
    with bz2.open(path, "rt", encoding="utf-8") as opened:
        lines = opened.read().splitlines()
    for first in range(0, len(lines), 6):  # context, label, four endings
        context, label = lines[first : first + 2]
        documents.append(f"{context} {lines[first + 2 + int(label)]}")
    documents += [row["question"] for row in read_lines(DATA / "gsm8k" / "train.jsonl")]
    documents += pydoc_data.topics.topics.values()
    return [d.strip() for d in documents if d.strip()], c4[-50:]


def tokenizer_of(documents: list[str]) -> PreTrainedTokenizerFast:
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trained.decoder = ByteLevelDecoder()
    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trained.train_from_iterator(
        documents,
        BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, show_progress=False,
            initial_alphabet=ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )


def blocks(tokenizer: Any, documents: list[str]) -> torch.Tensor:
    """(count, LENGTH) token ids, the documents one after the other with an end token between."""
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
    count = len(ids) // LENGTH
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def main() -> None:
    require_data()
    os.chdir(ROOT)
    set_seed(0)
    documents, held_out = corpus()
    MODEL.mkdir(parents=True, exist_ok=True)
    HELD_OUT.write_text("\n\n".join(held_out), encoding="utf-8")
    if not (MODEL / "tokenizer.json").exists():
        tokenizer_of(documents).save_pretrained(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    data = blocks(tokenizer, [documents[i] for i in order])
    kept = blocks(tokenizer, held_out)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
            tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {data.numel():,} tokens")
    checkpoints = MODEL / "checkpoints"
    trainer = Trainer(
        model,
        TrainingArguments(
            str(checkpoints), num_train_epochs=EPOCHS, per_device_train_batch_size=16,
            per_device_eval_batch_size=32, learning_rate=2e-3, lr_scheduler_type="cosine",
            warmup_steps=100, weight_decay=0.1, adam_beta2=0.95, logging_steps=50,
            eval_strategy="steps", eval_steps=100, save_steps=100, save_total_limit=1, seed=0,
            report_to="none", dataloader_pin_memory=False, disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in data],
        eval_dataset=[{"input_ids": row, "labels": row} for row in kept],
    )  # fmt: skip
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    done = trainer.train(resume_from_checkpoint=last)
    model.save_pretrained(MODEL)
    history = [line for line in trainer.state.log_history if "eval_loss" in line]
    found = {
        "parameters": model.num_parameters(),
        "tokens": data.numel(),
        "epochs": EPOCHS,
        "seconds": done.metrics["train_runtime"],
        "held_out_loss": {str(line["step"]): line["eval_loss"] for line in history},
        "device": machine(model.device.type),
        "torch": torch.__version__,
    }
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    prompt = tokenizer("The first time that", return_tensors="pt").to(model.device)
    said = model.generate(**prompt, do_sample=False, max_new_tokens=40, repetition_penalty=1.2)
    print(tokenizer.decode(said[0]))


if __name__ == "__main__":
    main()
