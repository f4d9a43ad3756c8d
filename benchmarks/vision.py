"""LLaVA's class on pictures of cloth: is there a fault?

    python benchmarks/vision.py         # all of it, into benchmarks/results/vision.json
    python benchmarks/vision.py docs    # that file's table into docs/results.md

No weights of a model that reads pictures can be packaged with this project, so one is put together:
the text weights of SmolLM2-135M, a small vision tower that has learned to tell the same training
pictures apart, and a projector drawn at random. It shows that the path works. It says nothing about
how well a real vision-language model would learn.
"""

import copy
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from tables import fill
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from weights import ROOT, textiles

from milora.files import new_folder, read_json, read_lines, write_json, write_text
from milora.grade import grader
from milora.pretrained import bundled

BUILD, RESULT = Path("build/vision"), Path("benchmarks/results/vision.json")
CONFIG = "examples/vision/textiles.yaml"
EACH, TEST = 500, 300  # pictures of either kind; of them held out
SIZE, PATCH = 96, 16  # the middle of a picture of 250, and 36 tokens for it
STEPS, BATCH, RATE = 400, 64, 2e-3
QUESTION = "Is there a fault in this cloth? Answer yes or no."
IMAGE_TOKEN = "<file_sep>"  # one of SmolLM2's that no conversation has
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<file_sep>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows() -> tuple[list[tuple[Path, bool]], list[tuple[Path, bool]]]:
    """(training, held out): pictures and whether they have a fault, half and half."""
    folder, found = textiles(), list[tuple[Path, bool]]()
    for kind, fault in (("nominal", False), ("global", True)):
        found += [(path, fault) for path in sorted((folder / kind).glob("*.jpg"))[:EACH]]
    random.Random(0).shuffle(found)
    return found[TEST:], found[:TEST]


def write_rows(name: str, found: list[tuple[Path, bool]]) -> None:
    lines = [
        {"prompt": QUESTION, "completion": "yes" if fault else "no",
         "image": os.path.relpath(path, BUILD)}
        for path, fault in found
    ]  # fmt: skip
    write_text(BUILD / name, "".join(json.dumps(line) + "\n" for line in lines))


def grey(found: list[tuple[Path, bool]]) -> Tensor:
    """(pictures, 250, 250) in [-1, 1]; the pictures have no colour."""
    pixels = [torch.tensor(bytearray(Image.open(p).convert("L").tobytes())) for p, _ in found]
    return torch.stack(pixels).view(-1, 250, 250).float() / 127.5 - 1


def patches(tower: nn.Module, x: Tensor) -> Tensor:
    """(b, 36, 64): what LLaVA takes from the tower for (b, 96, 96)."""
    seen = tower(x[:, None].expand(-1, 3, -1, -1), output_hidden_states=True)
    features: Tensor = seen.hidden_states[-1][:, 1:]
    return features


def train_tower(train: list[tuple[Path, bool]], held_out: list[tuple[Path, bool]]) -> Any:
    """A tower that tells the training pictures apart by the mean of its patches, and its report."""
    torch.manual_seed(0)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            image_size=SIZE, patch_size=PATCH,
        )
    )  # fmt: skip
    head = nn.Linear(64, 2)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    pictures, faults = grey(train), torch.tensor([int(fault) for _, fault in train])
    began = time.monotonic()
    for step in range(STEPS):
        chosen = torch.randint(0, len(train), (BATCH,))
        top, left = torch.randint(0, 250 - SIZE + 1, (2,)).tolist()
        x = pictures[chosen, top : top + SIZE, left : left + SIZE]
        loss = nn.functional.cross_entropy(head(patches(tower, x).mean(1)), faults[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"tower: step {step + 1} of {STEPS}, loss {float(loss):.3f}", file=sys.stderr)
    seconds, tower = time.monotonic() - began, tower.eval()
    first = (250 - SIZE) // 2
    middle = slice(first, first + SIZE)
    with torch.no_grad():
        said = head(patches(tower, grey(held_out)[:, middle, middle]).mean(1)).argmax(1)
        features = patches(tower, pictures[:, middle, middle]).flatten(0, 1)
    right = sum(int(a) == int(fault) for a, (_, fault) in zip(said, held_out, strict=True))
    about = {
        "steps": STEPS, "seconds": seconds, "held_out_accuracy": right / len(held_out),
        "parameters": sum(p.numel() for p in tower.parameters()),
    }  # fmt: skip
    return tower, features, about


def build(tower: CLIPVisionModel, features: Tensor) -> None:
    """The model and its processor, into build/vision/model."""
    text = AutoModelForCausalLM.from_pretrained(bundled(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(bundled())
    tokenizer.chat_template = None  # the processor's is the one that counts
    config = LlavaConfig(
        vision_config=tower.config, text_config=copy.deepcopy(text.config),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(SIZE // PATCH) ** 2, vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    # At random, but so that its input is of mean 0 and size 1, and its output as large as words.
    projector, words = model.model.multi_modal_projector, text.model.embed_tokens.weight
    mean, size = features.mean(0), features.std(0)
    with torch.no_grad():
        projector.linear_1.weight.normal_(std=64**-0.5).div_(size)
        projector.linear_1.bias.copy_(-projector.linear_1.weight @ mean)
        projector.linear_2.weight.normal_(std=576**-0.5)
        projector.linear_2.bias.zero_()
        projector.linear_2.weight.mul_(words.std() / projector(features).std())
    processor = LlavaProcessor(
        CLIPImageProcessorPil(
            do_resize=False, crop_size={"height": SIZE, "width": SIZE},
            image_mean=[0.5] * 3, image_std=[0.5] * 3,
        ),
        tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=IMAGE_TOKEN, chat_template=TEMPLATE,
    )  # fmt: skip
    with new_folder(BUILD / "model") as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)


def main() -> None:
    os.chdir(ROOT)
    if sys.argv[1:] == ["docs"]:
        docs()
        return
    train, held_out = rows()
    BUILD.mkdir(parents=True, exist_ok=True)
    write_rows("train.jsonl", train)
    write_rows("test.jsonl", held_out)
    if not (BUILD / "model").exists():
        tower, features, about = train_tower(train, held_out)
        build(tower, features)
        write_json(BUILD / "tower.json", about)
    resume = ["--resume"] if (BUILD / "run").exists() else []
    subprocess.run([sys.executable, "-m", "milora", "train", CONFIG, *resume], check=True)
    subprocess.run([sys.executable, "-m", "milora", "verify", str(BUILD / "run")], check=True)
    record, evaluation = (read_json(BUILD / "run" / f) for f in ("run.json", "evaluation.json"))
    keep = ("step0", "coverage", "parameters", "seconds", "peak_memory_bytes", "versions")
    result = {
        "pictures": {
            "train": len(train), "held_out": len(held_out), "tokens": (SIZE // PATCH) ** 2,
        },
        "tower": read_json(BUILD / "tower.json"),
        "configuration": yaml.safe_load(Path(CONFIG).read_text(encoding="utf-8")),
        "threads": torch.get_num_threads(),
        **{key: record[key] for key in keep},
        "base_unchanged": record["base"]["unchanged"],
        "data": {part: record["data"][part] for part in ("train", "eval")},
        "evaluation": evaluation,
        "first_yes_or_no": as_choice(read_lines(BUILD / "run" / "samples.jsonl")),
    }  # fmt: skip
    write_json(RESULT, result)


def as_choice(samples: list[dict[str, Any]]) -> dict[str, float]:
    """The accuracy of the same answers where "No." and "No, there" count as no."""
    grade = grader("choice", r"\b(yes|no)\b")
    assert grade
    return {
        state: sum(grade(s[state]["answer"], s["reference"]) == "right" for s in samples)
        / len(samples)
        for state in ("base", "tuned")
    }


def docs() -> None:
    found = read_json(RESULT)
    task, kept = found["evaluation"]["tasks"]["fault"], found["evaluation"]["knowledge"][0]
    lines = [
        "| | exact (95 %) | the first yes or no | KL(base‖tuned) |",
        "| --- | --- | --- | --- |",
        f"| the commonest answer | {task['majority']:.3f} | {task['majority']:.3f} | |",
    ]
    for state in ("base", "tuned"):
        one = task[state]
        low, high = one["interval"]
        lines.append(
            f"| {state} | {one['accuracy']:.3f} ({low:.3f} to {high:.3f}) | "
            f"{found['first_yes_or_no'][state]:.3f} | {kept['kl'] if state == 'tuned' else 0:.3f} |"
        )
    tower, seconds = found["tower"], found["seconds"]
    lines.append(f"| the tower by itself | {tower['held_out_accuracy']:.3f} | | |")
    lines += [
        "",
        f"{found['pictures']['train']} pictures for training, {found['pictures']['held_out']} held "
        f"out, {found['pictures']['tokens']} tokens each; {seconds['training']:.0f} s of training "
        f"after {tower['seconds']:.0f} s for the tower, {seconds['evaluation']:.0f} s of "
        f"evaluation, {found['peak_memory_bytes'] / 2**30:.1f} GB, {found['threads']} thread(s), "
        f"{found['configuration']['dtype']}.",
    ]
    fill(Path("docs/results.md"), {"vision": lines})


if __name__ == "__main__":
    main()
