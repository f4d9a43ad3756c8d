"""Models that read pictures, from a tiny random model and rows with pictures to the artefacts."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from conftest import SHARED_DATA, make_tokenizer
from peft import LoraConfig, PeftModel
from PIL import Image
from tiny_run import break_off, run, settings
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from milora import get_milora_model, hold_inputs
from milora.adapter import add_adapter, load_start
from milora.artefacts import export_run
from milora.compress import principal_parts, sentence
from milora.data import IGNORED, Collator, encode, prepare, prompt_ids
from milora.errors import UserError
from milora.evaluate import Task, load_task
from milora.generation import generate
from milora.material import read_material
from milora.matrices import adapted_matrices
from milora.pretrained import load_pretrained, reads_pictures
from milora.preview import coverage, marked
from milora.progress import Progress
from milora.protect import load_tops
from milora.result import plainly_asked, save_reader
from milora.rows import read_rows
from milora.store import Store, decompose_checkpoint
from milora.targeting import lora_config
from milora.verify import open_run, verify
from milora.vision import MARK, pixels, tokenizer_of

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
LLAMA = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
KINDS = ("llava", "idefics3")


def make(kind: str, folder: Path) -> None:
    """A model of 16 patches a picture, with its processor."""
    tokenizer, size = make_tokenizer(chat=False), {"height": 32, "width": 32}
    processor: Any
    if kind == "llava":
        tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
        processor = hf.LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size), tokenizer,
            patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=TEMPLATE,
        )  # fmt: skip
    else:
        places = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
        own = ["<fake_token_around_image>", MARK, "<end_of_utterance>", "<global-img>", *places]
        tokenizer.add_special_tokens({"additional_special_tokens": own})
        images = Idefics3ImageProcessorPil(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
        )
        processor = hf.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=TEMPLATE)
    token = tokenizer.convert_tokens_to_ids(MARK)
    text = hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer))
    torch.manual_seed(0)
    model: PreTrainedModel
    if kind == "llava":
        model = hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                vision_config=hf.CLIPVisionConfig(**VISION),
                text_config=text,
                image_token_index=token,
            )
        )
    else:
        model = hf.Idefics3ForConditionalGeneration(
            hf.Idefics3Config(
                vision_config=VISION, text_config=text.to_dict(), scale_factor=2,
                image_token_id=token, pad_token_id=1,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """folder(kind) -> a saved tiny model."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            make(kind, made[kind])
        return made[kind]

    return get


def draw(path: Path, shade: int, size: tuple[int, int] = (40, 40)) -> Path:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (shade, 255 - shade, 128)).save(path)
    return path


def question_file(folder: Path, count: int = 24) -> Path:
    """Is the picture dark? One row in four has none."""
    rows = []
    for i in range(count):
        shade = 20 + 200 * (i % 2)
        draw(folder / "pictures" / f"{i}.png", shade + i // 2, (40 + 2 * (i % 3), 40))
        answer = "no" if i % 2 else "yes"
        rows.append({"prompt": "Dark?", "completion": answer, "image": f"pictures/{i}.png"})
        if i % 4 == 3:
            rows[-1] = {"prompt": f"{i} + 1", "completion": str(i + 1), "image": None}
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


TRAINING = {"max_steps": 20, "save_steps": 10, "eval_steps": 10, "learning_rate": 3e-2}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_from_the_base_to_the_artefacts(
    kind: str, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"target_modules": LLAMA, "lora_dropout": 0.0}
    rows = question_file(tmp_path)
    tasks = [{"file": str(rows), "max_new_tokens": 4, "limit": 6, "match": "exact"}]
    adapters = {}
    for way in ("unbroken", "resumed"):
        asked = settings(
            folder(kind), tmp_path, lora=lora, training=TRAINING, data={"max_length": 128},
            output_dir=str(tmp_path / way), evaluate={"tasks": tasks},
        )  # fmt: skip
        if way == "resumed":
            break_off(asked, 20, monkeypatch)
        record = run(asked, resume=way == "resumed")
        adapters[way] = (tmp_path / way / "adapter" / "adapter_model.safetensors").read_bytes()
    ran = tmp_path / "unbroken"
    assert adapters["unbroken"] == adapters["resumed"]
    assert record["base"]["unchanged"]
    assert record["step0"]["difference"] <= record["step0"]["bound"]
    assert set(record["coverage"]["adapted"]) == set(LLAMA)
    assert all(check.holds for check in verify(ran))
    evaluated = json.loads((ran / "evaluation.json").read_text())["tasks"]["rows"]
    assert evaluated["tuned"]["loss"] < evaluated["base"]["loss"] - 0.01

    base = AutoModelForImageTextToText.from_pretrained(folder(kind)).eval()
    processor = AutoProcessor.from_pretrained(ran / "adapter")
    asked_row = read_rows(str(rows), pictures=True).rows[0]
    ids = prompt_ids(processor, asked_row.messages[:-1], asked_row.pictures)
    batch = {"input_ids": torch.tensor([ids])} | pixels(processor, [[asked_row.pictures[0].path]])
    with torch.no_grad():
        plain = base(**batch).logits
        tuned = PeftModel.from_pretrained(base, ran / "adapter")
        wanted = tuned(**batch).logits
        with tuned.disable_adapter():
            assert torch.equal(tuned(**batch).logits, plain)
        said = export_run(ran, tmp_path / "merged", "merged").said
        assert "only the adapted" not in said  # all weights were compared with the recorded hash
        found = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")(**batch).logits
        assert AutoProcessor.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE
    assert float((wanted - plain).abs().max()) > 1e-2 * float(plain.abs().max())
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_pictures_are_seen(kind: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Tokens and pixels of a batch give the logits of the processor's own, row by row."""
    rows = read_rows(str(question_file(tmp_path)), pictures=True).rows[:4]
    base = load_pretrained(str(folder(kind)))
    examples = prepare(base.reader, rows, 128, "rows").examples
    batch = Collator(base.reader, base.model)(examples)
    assert base.processor is not None
    with torch.no_grad():
        asked = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
        together = base.model(**{k: v for k, v in batch.items() if k in asked}).logits
        for i, row in enumerate(rows):
            parts = [{"type": "image", "path": p.path} for p in row.pictures]
            conversation = [
                {
                    "role": m["role"],
                    "content": [{"type": "text", "text": m["content"].replace(MARK, "")}],
                }
                for m in row.messages
            ]
            conversation[0]["content"][:0] = parts
            alone = base.processor.apply_chat_template(
                conversation, tokenize=True, return_dict=True, return_tensors="pt"
            )
            length = alone["input_ids"].shape[1]
            same = batch["input_ids"][i, :length]
            assert same[:-1].equal(alone["input_ids"][0, :-1])  # but for the line after the end
            torch.testing.assert_close(
                together[i, : length - 1], base.model(**alone).logits[0, :-1], atol=1e-4, rtol=1e-4
            )
            answer = [
                token
                for token, label in zip(same, batch["labels"][i], strict=False)
                if label != IGNORED
            ]
            said = str(base.tokenizer.decode(answer))
            assert said == row.messages[-1]["content"] + "</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_generated_is_about_the_picture(
    kind: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A batch of prompts, with and without pictures, is answered like each alone, uncached."""
    rows = read_rows(str(question_file(tmp_path)), pictures=True).rows[:4]
    base = load_pretrained(str(folder(kind)))
    prompts = [prompt_ids(base.reader, row.messages[:-1], row.pictures) for row in rows]
    answers = generate(
        base.model, base.reader, prompts, 5, batch_size=4, pictures=[row.pictures for row in rows]
    )
    for row, ids, answer in zip(rows, prompts, answers, strict=True):
        said: list[int] = []
        seen = pixels(base.reader, [[p.path for p in row.pictures]])
        with torch.no_grad():
            while len(said) < 5 and 1 not in said:
                logits = base.model(input_ids=torch.tensor([ids + said]), **seen).logits[0, -1]
                said.append(int(logits.argmax()))
        text = base.tokenizer.decode([t for t in said if t != 1], skip_special_tokens=True)
        assert answer.text == str(text).strip()


def test_q_proj_is_that_of_the_language_model(folder: Callable[[str], Path]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder("llava"))
    assert any("vision_tower" in n for n, _ in model.named_modules() if n.endswith("q_proj"))
    config = lora_config({"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]})
    live, start = add_adapter(model, config, "milora")
    assert list(start.factors) == [
        f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]
    found = coverage(live)
    assert set(found["adapted"]) == {"q_proj"}
    assert found["not_adapted"]["vision_tower.q_proj"] == {"weights": 2, "parameters": 2048}
    assert found["not_adapted"]["multi_modal_projector.linear_1"]["weights"] == 1


@pytest.mark.parametrize(
    ("exclude", "tower"),
    [(None, False), ([], True), (["layers.0.self_attn.q_proj"], False), (r".*\.0\..*", False)],
)
def test_the_tower_is_adapted_when_asked(
    exclude: Any, tower: bool, folder: Callable[[str], Path]
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder("llava"))
    config = LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=exclude)
    live, _ = add_adapter(model, config, "milora")
    names = set(adapted_matrices(live))
    assert any("vision_tower" in name for name in names) == tower
    assert "model.language_model.layers.1.self_attn.q_proj" in names
    assert ("model.language_model.layers.0.self_attn.q_proj" in names) == (not exclude)


def test_inputs_that_no_text_enters_are_not_held(folder: Callable[[str], Path]) -> None:
    """No covariance, no directions: they would be arbitrary coordinates."""
    texts, tokenizer = ["A general text. "] * 40, make_tokenizer()
    lora: dict[str, Any] = {"r": 2, "exclude_modules": []}
    model = AutoModelForImageTextToText.from_pretrained(folder("llava"))
    both = get_milora_model(model, LoraConfig(target_modules=["q_proj", "linear_1"], **lora))
    with pytest.warns(UserWarning, match=r"no text enters 3 of 5 .* the first is model.vision_t"):
        holds = hold_inputs(both, tokenizer, texts).holds
    assert {name for name in adapted_matrices(both) if "language_model" in name} == set(holds)
    for hold in holds.values():
        assert hold.Vh.abs().max() < 0.99
    model = AutoModelForImageTextToText.from_pretrained(folder("llava"))
    alone = get_milora_model(model, LoraConfig(target_modules=["linear_1", "linear_2"], **lora))
    with pytest.raises(UserError, match=r"no text enters .*linear_1 nor any other of the 2 adapt"):
        hold_inputs(alone, tokenizer, texts)


@pytest.mark.slow
def test_a_run_says_what_no_text_enters(
    folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question_file(tmp_path)
    asked = settings(
        folder("llava"), tmp_path, data={"max_length": 128}, training=TRAINING,
        lora={"target_modules": ["q_proj", "linear_1"], "exclude_modules": []},
        milora={"protect_inputs": 8},
    )  # fmt: skip
    run(asked)
    assert "inputs: no text enters 3 of 5 adapted weights, the first is" in capsys.readouterr().err
    start = load_start(tmp_path / "run" / "init" / "factors.safetensors")
    _, inputs = load_tops(tmp_path / "run" / "init" / "top.safetensors", start.sha256)
    assert len(inputs) == 2
    assert all("language_model" in name for name in inputs)


def test_the_projector_alone_beside_the_language_model(folder: Callable[[str], Path]) -> None:
    """As docs/vision.md has it."""
    page = (Path(__file__).parents[1] / "docs" / "vision.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\nlora:\n  exclude_modules.*?```", page, re.DOTALL)
    asked = yaml.safe_load(block.strip("`").removeprefix("yaml"))["lora"]
    model = AutoModelForImageTextToText.from_pretrained(folder("llava"))
    live, _ = add_adapter(model, lora_config({"r": 2, "lora_alpha": 2, **asked}), "milora")
    assert set(coverage(live)["adapted"]) == {
        *LLAMA, "multi_modal_projector.linear_1", "multi_modal_projector.linear_2",
    }  # fmt: skip


@pytest.mark.slow
def test_the_projector_in_full_gives_whole_weights(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """No plain LoRA holds it, as it holds no row of an embedding."""
    rows = question_file(tmp_path)
    lora = {"target_modules": LLAMA, "modules_to_save": ["multi_modal_projector"]}
    asked = settings(
        folder("llava"), tmp_path, data={"max_length": 128}, lora=lora, training=TRAINING,
        evaluate={"tasks": [str(rows)]},
    )  # fmt: skip
    record = run(asked)
    assert record["base"]["unchanged"]
    assert record["step0"]["difference"] <= record["step0"]["bound"]
    assert set(record["merged"]["rows_of"]) == {
        "model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2",
    }  # fmt: skip
    assert set(record["coverage"]["adapted"]) == set(LLAMA)
    assert "multi_modal_projector.linear_1" in record["coverage"]["trained"]
    before, after = (
        AutoModelForImageTextToText.from_pretrained(one).state_dict()
        for one in (folder("llava"), tmp_path / "run" / "model")
    )
    moved = {name.split(".")[1] for name in before if not before[name].equal(after[name])}
    assert moved == {"language_model", "multi_modal_projector"}
    assert AutoProcessor.from_pretrained(tmp_path / "run" / "model").chat_template == TEMPLATE
    opened = open_run(tmp_path / "run")
    assert opened.pair.other_base is not None
    assert not isinstance(opened.reader, PreTrainedTokenizerBase)


@pytest.mark.slow
def test_a_template_of_the_user_is_the_processors(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    own = TEMPLATE.replace("<|assistant|>", "<|model|>").replace(
        "<|{{ m['role'] }}|>", "<|{{ 'model' if m['role'] == 'assistant' else m['role'] }}|>"
    )
    base = tmp_path / "base"  # with its template in the older kind of file
    shutil.copytree(folder("llava"), base)
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    question_file(tmp_path)
    asked = settings(
        base, tmp_path, data={"max_length": 128}, tokenizer={"chat_template": own},
        training={"max_steps": 1}, evaluate={"tasks": []},
    )  # fmt: skip
    run(asked)
    opened = open_run(tmp_path / "run")
    (row,) = read_rows(asked["data"]["train"], pictures=True).rows[:1]
    ids = prompt_ids(opened.reader, row.messages[:-1], row.pictures)
    assert str(tokenizer_of(opened.reader).decode(ids)).endswith("Dark?<|model|>\n")
    export_run(tmp_path / "run", tmp_path / "merged", "merged")
    assert AutoProcessor.from_pretrained(tmp_path / "merged").chat_template == own


def test_without_a_template_the_card_says_the_form(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A processor's template gets parts, and would read otherwise than the run did."""
    processor = AutoProcessor.from_pretrained(folder("llava"))
    processor.chat_template = processor.tokenizer.chat_template = None
    record = {"data": {"format": "messages"}, "base": {"reads": "pictures"}}
    form = plainly_asked(processor, record)
    assert str(form).endswith("\n\n### Instruction:\nQUESTION\n\n### Response:\nANSWER</s>")
    save_reader(processor, tmp_path, record | {"plain_form": form})
    assert not (tmp_path / "chat_template.jinja").exists()


@pytest.mark.slow
def test_full_fine_tuning_leaves_the_tower(folder: Callable[[str], Path], tmp_path: Path) -> None:
    question_file(tmp_path)
    asked = settings(
        folder("llava"), tmp_path, method="full", data={"max_length": 128},
        training={"max_steps": 2}, evaluate={"tasks": []},
    )  # fmt: skip
    run(asked)
    before, after = (
        AutoModelForImageTextToText.from_pretrained(one).state_dict()
        for one in (folder("llava"), tmp_path / "run" / "model")
    )
    moved = {name.split(".")[1] for name in before if not before[name].equal(after[name])}
    assert moved == {"language_model", "multi_modal_projector", "weight"}  # of lm_head


@pytest.mark.parametrize("kind", KINDS)
def test_init_reads_the_files(kind: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    lora = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    done = decompose_checkpoint(
        model=str(folder(kind)), method="milora", lora=lora, store=Store(tmp_path),
        progress=Progress(),
    )  # fmt: skip
    assert done["made"] == 2


def test_packed_is_refused(folder: Callable[[str], Path], tmp_path: Path) -> None:
    question_file(tmp_path)
    asked = settings(folder("llava"), tmp_path, data={"max_length": 128}, quantization="nf4")
    with pytest.raises(UserError, match="reads pictures; such a base must be in full precision"):
        run(asked)


def test_all_linear_layers_are_those_of_the_language_model(folder: Callable[[str], Path]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder("idefics3"))
    config = lora_config({"r": 2, "lora_alpha": 2, "target_modules": "all-linear"})
    live, _ = add_adapter(model, config, "lora")
    assert {name.partition("model.")[2].split(".")[0] for name in adapted_matrices(live)} == {
        "text_model"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_targets_name_the_eligible(kind: str, folder: Callable[[str], Path]) -> None:
    """Those of the language model; with exclude_modules: [] the tower's and the projector's too."""
    for exclude, tower in ((None, False), ([], True)):
        model = AutoModelForImageTextToText.from_pretrained(folder(kind))
        config = LoraConfig(r=2, target_modules=["q_prj"], exclude_modules=exclude)
        with pytest.raises(UserError, match=r"'q_prj' matches no module.*did you mean q_proj") as e:
            add_adapter(model, config, "milora")
        assert all(target in str(e.value) for target in LLAMA)
        assert ("fc1" in str(e.value)) == tower


def test_targets_of_the_tower_alone_are_said(folder: Callable[[str], Path]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder("llava"))
    config = lora_config({"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "fc1"]})
    with pytest.raises(UserError, match=r"'fc1' is in the vision tower or projector alone"):
        add_adapter(model, config, "milora")


def rows_of(tmp_path: Path, *rows: Any, name: str = "rows.json") -> str:
    (tmp_path / name).write_text(json.dumps(rows), encoding="utf-8")
    return str(tmp_path / name)


SAME = [{"role": "user", "content": f"{MARK}\nWhat?"}, {"role": "assistant", "content": "A cat"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [
            {"role": "user", "content": [
                {"type": "image", "path": "a.png"}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]}]},
        {"messages": [
            {"role": "user", "content": [
                {"type": "image", "image": "a.png"}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": "A cat"}]},
        {"messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]},
            {"role": "assistant", "content": "A cat"}], "images": ["a.png"]},
        {"messages": SAME, "images": ["a.png"]},
        {"id": "1", "image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}]},
        {"conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}],
         "images": ["a.png"]},
        {"prompt": "\nWhat?", "completion": "A cat", "image": "a.png"},
        {"instruction": "\nWhat?", "output": "A cat", "images": ["a.png"]},
    ],
)  # fmt: skip
def test_the_shapes_that_rows_with_pictures_have(row: Any, tmp_path: Path) -> None:
    picture = draw(tmp_path / "a.png", 3)
    found = read_rows(rows_of(tmp_path, row), pictures=True)
    ((messages, _, pictures),) = found.rows
    assert messages == SAME
    assert [(p.path, p.width, p.height) for p in pictures] == [(str(picture), 40, 40)]
    assert set(found.unused) <= {"id"}


TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat"}]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"images": ["b.png"]}, r"row 2: the picture .*b\.png cannot be read: No such file"),
        ({"images": ["rows.json"]}, r"row 2: .*rows\.json is no whole picture .*: replace it"),
        ({"images": ["half.png"]}, r"row 2: .*half\.png is no whole picture"),
        ({"images": ["https://a/b.png"]}, r"row 2: https://a/b.png is no file: save"),
        ({"images": [{"bytes": "x"}]}, r"row 2: a picture is dict; the path of a file"),
        ({"messages": SAME}, r"row 2: 1 times <image> in the messages and 0 pictures"),
        ({"messages": SAME, "images": ["a.png"] * 2}, r"1 times <image> .* and 2 pictures"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "<image>"}],
          "image": "a.png"}, r"row 2: a picture in an answer"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "path": "a"}]}, TURNS[1]]},
         r"row 2, message 1: .*video.* is no part"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>"}]},
                       TURNS[1]]}, r"row 2, message 1: a text part says <image>"),
    ],
)  # fmt: skip
def test_bad_pictures_are_refused_by_row_and_path(changed: Any, said: str, tmp_path: Path) -> None:
    whole = draw(tmp_path / "a.png", 3, (300, 300)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    file = rows_of(tmp_path, {"messages": TURNS}, {"messages": TURNS} | changed)
    with pytest.raises(UserError, match=said) as error:
        read_rows(file, pictures=True)
    assert str(error.value).startswith(file)
    kept = read_rows(file, pictures=True, on_bad_row="skip")
    assert (len(kept.rows), kept.skipped) == (1, [str(error.value)])


def test_a_picture_is_never_cut(folder: Callable[[str], Path], tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 3)
    late = [*TURNS, {"role": "user", "content": f"{MARK} and this one?"}, TURNS[1]]
    file = rows_of(tmp_path, {"messages": late, "image": "a.png"})
    (row,) = read_rows(file, pictures=True).rows
    for kind in KINDS:
        reader = load_pretrained(str(folder(kind))).reader
        whole = encode(reader, row, 1000)
        assert not isinstance(whole, str)
        token = reader.image_token_id  # type: ignore[attr-defined]
        count = whole.input_ids.count(token)
        seen = set()
        for length in range(2, len(whole.input_ids) + 1):
            found = encode(reader, row, length)
            if isinstance(found, str):
                seen.add(re.sub(r"\d+", "N", found))
            else:
                assert found.input_ids.count(token) == count
        assert seen == {"its pictures do not fit into max_length (N)"}


def test_special_tokens_in_a_text_are_refused(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    file = rows_of(tmp_path, {"prompt": f"{MARK} what?", "completion": "A cat"})
    reader = load_pretrained(str(folder("llava"))).reader
    (row,) = read_rows(file).rows
    assert encode(reader, row, 64) == f"it spells the special token {MARK}"
    with pytest.raises(UserError, match="1 times <image> in the messages and 0 pictures"):
        read_rows(file, pictures=True)


def test_samples_show_how_many_tokens_a_picture_has(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    reader = load_pretrained(str(folder("llava"))).reader
    rows = read_rows(str(question_file(tmp_path)), pictures=True).rows[:1]
    (example,) = prepare(reader, rows, 128, "rows").examples
    assert marked(reader, example)[0] == ("<s><|user|>\n<image>×16\nDark?<|assistant|>\n", False)


def test_a_text_model_reads_rows_as_before(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Whose pictures are a column that is not used, and said so."""
    assert not reads_pictures(str(tiny("llama")))
    rows = read_rows(str(question_file(tmp_path)))
    assert rows.unused == ["image"]
    assert not any(row.pictures for row in rows.rows)


def test_other_pictures_are_other_data(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question_file(tmp_path)
    asked = settings(folder("llava"), tmp_path, data={"max_length": 128}, training={"max_steps": 2})
    break_off(asked, 2, monkeypatch)
    draw(tmp_path / "pictures" / "4.png", 77)
    with pytest.raises(UserError, match=r"--resume: 18 pictures of data has changed"):
        run(asked, resume=True)


def test_a_seed_changes_no_hash_of_pictures(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Though it says which rows are held out: a comparison is over several."""
    files = []
    for seed in (0, 1):
        data = {"train": question_file(tmp_path), "eval": 0.5, "max_length": 128}
        asked = settings(folder("llava"), tmp_path, data=data | {"train": str(data["train"])})
        read = read_material(asked | {"seed": seed}, "float32", False, True, None, Progress())
        files.append(read.files)
    assert files[0] == files[1]
    assert any("pictures of data" in name for name in files[0])


def test_without_pillow_one_sentence(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UserError, match=r"pillow is missing: pip install 'milora\[vision\]'"):
        load_pretrained(str(folder("llava")))


def test_likelihood_refuses_pictures(tmp_path: Path) -> None:
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "image": "a.png"}
    task = {"file": rows_of(tmp_path, row), "protocol": "likelihood"}
    load_task(task)
    with pytest.raises(UserError, match="row 1 has a picture, and the likelihood protocol"):
        load_task(task, pictures=True)


REAL = SHARED_DATA / "vision_language"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the shared data is not here")
def test_real_pictures(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """ShareGPT rows with an images column as LLaMA-Factory publishes them, through a run."""
    file = str(REAL / "mllm_demo.json")
    found = read_rows(file, pictures=True)
    assert [len(row.pictures) for row in found.rows] == [2, 1, 1, 2, 1, 1]
    task = load_task({"file": file, "match": "contains"}, pictures=True)
    assert isinstance(task, Task)
    asked = settings(
        folder("llava"), tmp_path, data={"train": file, "max_length": 512, "eval": 0.3},
        training={"max_steps": 2}, evaluate={"tasks": []},
    )  # fmt: skip
    record = run(asked)
    assert record["data"]["train"]["kept"] + record["data"]["eval"]["kept"] == 6
    assert record["step0"]["difference"] <= record["step0"]["bound"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 as from 4B on: with a vision tower, and loaded as a causal model."""
    config = hf.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "vocab_size": 258}, vision_config=VISION,
        image_token_index=5, mm_tokens_per_image=16,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gemma")
    hf.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_a_tower_that_is_not_used_is_left_alone_too(targets: Any, gemma: Path) -> None:
    base = load_pretrained(str(gemma))
    assert base.processor is None
    config = lora_config({"r": 2, "lora_alpha": 2, "target_modules": targets})
    live, start = add_adapter(base.model, config, "milora")
    assert {name.split(".")[1] for name in start.factors} == {"language_model"}
    assert coverage(live)["not_adapted"]["vision_tower.q_proj"]["weights"] == 2


@pytest.mark.slow
def test_text_alone_through_a_run(gemma: Path, tmp_path: Path) -> None:
    lora = {"target_modules": LLAMA, "lora_dropout": 0.0}
    run(settings(gemma, tmp_path, lora=lora, training=TRAINING))
    assert all(check.holds for check in verify(tmp_path / "run"))
    said = export_run(tmp_path / "run", tmp_path / "merged", "merged").said
    assert "only the adapted" not in said
    ids = torch.arange(2, 30)[None]
    base = hf.AutoModelForCausalLM.from_pretrained(gemma).eval()
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")(input_ids=ids).logits
        found = merged(input_ids=ids).logits
    assert float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_principal_parts_leave_what_the_text_does_not_run_through(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("It is what it was, and so is this. " * 400)
    base = str(folder("llava"))
    found, kept = principal_parts(base, 0.6, str(tmp_path / "text.txt"), 1)
    before = load_pretrained(base).model.state_dict()
    after = kept.model.state_dict()
    seen = {name for name in before if "vision" in name or "projector" in name}
    assert all(torch.equal(before[name], after[name]) for name in seen)
    assert any(not torch.equal(before[name], after[name]) for name in set(before) - seen)
    assert all("vision" in name or "projector" in name for name in found["unseen"])
    assert "the text does not run through" in sentence(found)
