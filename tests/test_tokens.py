"""Tokens and templates of the user's own: what trains, what is kept, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CHAT, make_model, make_tokenizer
from gguf import GGUFReader
from peft import LoraConfig, PeftModel
from tiny_run import break_off, run, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from milora import get_milora_model
from milora.adapter import add_adapter, trained_rows
from milora.artefacts import export_run
from milora.chat import replies
from milora.config import Config
from milora.data import PLAIN_TEMPLATE, prompt_text
from milora.errors import UserError
from milora.fingerprints import base_sha256, tensor_sha256
from milora.logits import base_only, step0_difference
from milora.pretrained import load_pretrained
from milora.report import report
from milora.tokens import add_tokens, load_with_tokens, use_template
from milora.verify import open_run, verify

TOKENS = ["<tool>", "検索"]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "tied": ["q_proj"]}


def marked_rows(path: Path) -> Path:
    """Rows in which the new tokens are the answer."""
    rows = [
        {"prompt": f"{a} or {b}?", "completion": TOKENS[(a + b) % 2]}
        for a in range(6)
        for b in range(4)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def asked_for(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    kind = next((kind for kind in TARGETS if kind in model.name), "llama")
    values: dict[str, Any] = {
        "data": {"train": str(marked_rows(folder / "marked.jsonl")), "eval": 0.2, "max_length": 64},
        "lora": {"target_modules": TARGETS[kind], "lora_dropout": 0.0},
        "tokenizer": {"tokens": TOKENS},
        "training": {"learning_rate": 3e-2},
    }
    return settings(model, folder, **values | changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", "float32"), ("tied", "float32"), ("gpt2", "float32"), ("tied", "bfloat16")],
)
def test_new_tokens_from_the_base_to_the_merged_model(
    kind: str, dtype: str, tiny: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    on_disk = {file: file.read_bytes() for file in tiny(kind).iterdir()}
    weights, ran = {}, tmp_path / "unbroken" / "run"
    for way in ("unbroken", "resumed"):
        (tmp_path / way).mkdir()
        asked = asked_for(tiny(kind), tmp_path / way, dtype=dtype)
        if way == "resumed":
            break_off(asked, 6, monkeypatch)
        record = run(asked, resume=way == "resumed")
        weights[way] = (tmp_path / way / "run" / "model" / "model.safetensors").read_bytes()
    assert weights["unbroken"] == weights["resumed"]
    assert {file: file.read_bytes() for file in tiny(kind).iterdir()} == on_disk
    assert not (ran / "adapter").exists()
    assert record["step0"]["difference"] <= record["step0"]["bound"]
    assert record["base"]["unchanged"]
    assert record["base"]["sha256"] == base_sha256(load_pretrained(str(tiny(kind)), dtype).model)
    rounding = 1e-5 if dtype == "float32" else 0.05
    assert record["merged"]["exported_against_trained"] <= rounding
    assert record["tokens"] == {"ids": {"<tool>": 258, "検索": 259}, "added": TOKENS}
    evaluated = json.loads((ran / "evaluation.json").read_text())["tasks"]["rows"]
    assert evaluated["tuned"]["loss"] != evaluated["base"]["loss"]

    base = load_pretrained(str(tiny(kind)), dtype).model
    tuned = AutoModelForCausalLM.from_pretrained(ran / "model")
    assert tuned.dtype == base.dtype
    tokenizer = AutoTokenizer.from_pretrained(ran / "model")
    assert tokenizer("a検索<tool>")["input_ids"][-2:] == [259, 258]
    assert tokenizer.decode([259, 258]) == "検索<tool>"
    started = load_with_tokens(str(tiny(kind)), dtype, False, {"tokens": TOKENS}).base.model
    for of, first, after in (
        (layer(base), layer(started), layer(tuned)) for layer in (embedding, head)
    ):
        assert torch.equal(after[:258], of)  # rows of old tokens
        assert (after[258:] - first[258:]).abs().amax(1).min() > 0  # each of the new ones trained
    assert tuned.config.tie_word_embeddings == base.config.tie_word_embeddings
    said = (ran / "model" / "README.md").read_text()
    assert "Whole weights" in said
    assert "&lt;tool&gt;, 検索" in said
    assert "merged weights" in report(ran)


def embedding(model: PreTrainedModel) -> torch.Tensor:
    weight: torch.Tensor = model.get_input_embeddings().weight.detach()
    return weight


def head(model: PreTrainedModel) -> torch.Tensor:
    weight: torch.Tensor = model.get_output_embeddings().weight.detach()
    return weight


def test_what_a_run_with_new_tokens_can_be_asked(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    record = run(asked_for(tiny("tied"), tmp_path))
    assert record["base"]["unchanged"]
    assert record["step0"]["difference"] <= record["step0"]["bound"]
    assert record["merged"]["exported_against_trained"] <= 1e-5
    ran = tmp_path / "run"
    with pytest.raises(UserError, match=r"rows of model.embed_tokens were trained, which no plain"):
        export_run(ran, tmp_path / "lora", "lora")
    with pytest.raises(UserError, match=r"has no adapter: rows of model.embed_tokens.*run/model"):
        verify(ran)
    with pytest.raises(UserError, match="--base: a copy of whole weights needs no base"):
        export_run(ran, tmp_path / "merged", "merged", base=str(tiny("qwen2")))
    assert "whole weights" in export_run(ran, tmp_path / "merged", "merged").said
    files = sorted(file.name for file in (tmp_path / "merged").iterdir())
    assert files == sorted(file.name for file in (ran / "model").iterdir())
    opened = open_run(ran)
    with opened.pair.base() as base, opened.pair.tuned() as tuned:
        assert base is not tuned
        assert torch.equal(embedding(base)[:258], embedding(tuned)[:258])
    said = list(replies(opened.pair, opened.tokenizer, ["1 or 2?"], 2))
    assert len(said) == 1


@pytest.mark.slow
def test_full_fine_tuning_with_new_tokens(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    record = run(asked_for(tiny("llama"), tmp_path, method="full"))
    assert record["tokens"]["added"] == TOKENS
    assert len(embedding(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"))) == 260


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2", "qwen2"])
def test_old_tokens_are_what_they_were(
    kind: str, dtype: torch.dtype, load: Callable[..., PreTrainedModel], batch: dict[str, Any]
) -> None:
    model, tokenizer = load(kind, dtype), make_tokenizer()
    with torch.no_grad():
        before = model(**batch).logits
        named = add_tokens(model, tokenizer, ["<a>"], ["<b>"])
        after = model(**batch).logits
    assert named.ids == {"<a>": 258, "<b>": 259}
    assert after.shape[-1] == 260
    scale = float(before.float().abs().max())
    bound = 1e-6 if dtype == torch.float32 else 1e-2  # another width, another order of sums
    assert float((after[..., :258] - before).float().abs().max()) <= bound * scale
    # Each begins as the mean of its bytes.
    pieces = make_tokenizer()("<b>", add_special_tokens=False)["input_ids"]
    wanted = embedding(model)[pieces].float().mean(0).to(dtype)
    assert torch.equal(embedding(model)[259], wanted)


def test_rows_train_and_the_base_stays(
    load: Callable[..., PreTrainedModel], batch: dict[str, Any]
) -> None:
    model = load("tied")
    named = add_tokens(model, make_tokenizer(), ["<a>"])
    digest = base_sha256(model)
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=["q_proj"], trainable_token_indices=named.rows
    )
    live, _ = add_adapter(model, config, "milora")
    batch["input_ids"][0, 3] = 258
    assert step0_difference(live, batch) == 0
    (rows,) = trained_rows(live).values()
    assert rows.ids.tolist() == [258]
    live(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {name for name, p in live.named_parameters() if p.grad is not None}
    assert {name.split(".")[-2] for name in trained} == {"trainable_tokens_delta", "default"}
    with torch.no_grad():
        rows.values.add_(1.0)
        tuned = live(**batch).logits
        with base_only(live):
            assert torch.equal(live(**batch).logits, load_grown("tied", load)(**batch).logits)
    assert base_sha256(live) == digest
    # PEFT's own way to one piece, which the message of get_milora_model names.
    merged = live.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, tuned, atol=1e-4, rtol=1e-4)


def load_grown(kind: str, load: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    model = load(kind)
    add_tokens(model, make_tokenizer(), ["<a>"])
    return model


def test_spare_rows_are_used_and_known_tokens_keep_theirs(tmp_path: Path) -> None:
    """As in Qwen, whose embedding has more rows than the tokenizer has tokens."""
    model, tokenizer = make_model("llama"), make_tokenizer()
    model.resize_token_embeddings(264, mean_resizing=False)
    tokenizer.add_tokens(["<reserved>"], special_tokens=True)
    row = embedding(model)[258].clone()
    named = add_tokens(model, tokenizer, ["<reserved>", "<new>"])
    assert named.ids == {"<reserved>": 258, "<new>": 259}
    assert named.added == ["<new>"]
    assert len(embedding(model)) == 264
    assert torch.equal(embedding(model)[258], row)
    assert named.rows == {"model.embed_tokens": [258, 259], "lm_head": [258, 259]}


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (["<a>", "<a>"], "'<a>' is named twice"),
        ([" "], "' ' is empty"),
        (["Ġ"], "'Ġ' stands in the vocabulary, but is read as 2 tokens"),
    ],
)
def test_texts_that_cannot_be_a_token(tokens: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        add_tokens(make_model("llama"), make_tokenizer(), tokens)


def test_a_head_with_a_bias_is_refused() -> None:
    model = make_model("llama")
    model.lm_head = torch.nn.Linear(32, 258)
    assert add_tokens(model, make_tokenizer(), []).rows == {}
    with pytest.raises(UserError, match="head of this model has a bias"):
        add_tokens(model, make_tokenizer(), ["<a>"])


def test_a_head_cannot_have_both(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    asked = asked_for(tiny("llama"), tmp_path, lora={"target_modules": ["lm_head"]})
    with pytest.raises(UserError, match="the head gets rows for the new tokens"):
        run(asked)


@pytest.mark.slow
def test_tokens_without_a_row_are_said(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny("llama")).save_pretrained(model)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(TOKENS)
    tokenizer.save_pretrained(model)
    asked = asked_for(model, tmp_path, tokenizer={"tokens": []})
    with pytest.raises(UserError, match=r"id 25[89], but the embedding of .* has 258 rows"):
        run(asked)
    record = run(asked_for(model, tmp_path))
    assert record["tokens"]["added"] == []
    assert len(embedding(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"))) == 260


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "entries", "trained"),
    [
        ("llama", ["embed_tokens", "lm_head"], {"model.embed_tokens", "lm_head"}),
        ("llama", ["lm_head"], {"lm_head"}),
        ("tied", ["embed_tokens", "lm_head"], {"model.embed_tokens", "lm_head"}),
        ("tied", ["embed_tokens"], {"model.embed_tokens", "lm_head"}),
    ],
)
def test_modules_to_save(
    kind: str, entries: list[str], trained: set[str], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    lora = {"target_modules": ["q_proj"], "modules_to_save": entries}
    record = run(settings(tiny(kind), tmp_path, lora=lora))
    assert record["base"]["unchanged"]
    assert record["step0"]["difference"] <= record["step0"]["bound"]
    assert set(record["merged"]["rows_of"]) == trained
    assert record["merged"]["exported_against_trained"] <= 1e-5
    base = AutoModelForCausalLM.from_pretrained(tiny(kind))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    moved = {
        name
        for name, layer in (("model.embed_tokens", embedding), ("lm_head", head))
        if not torch.equal(layer(base), layer(tuned))
    }
    assert moved == trained
    if kind == "tied":
        assert tuned.lm_head.weight is tuned.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("kind", "lora", "said"),
    [
        ("llama", {"modules_to_save": ["norm"]}, "'norm' is neither the embedding nor the head"),
        ("tied", {"modules_to_save": ["lm_head"]}, r"lm_head shares its weight with model.embed_"),
        (
            "tied",
            {"target_modules": ["q_proj", "lm_head"]},
            "lm_head shares its weight with the in",
        ),
        ("llama", {"trainable_token_indices": [1]}, "name the tokens in tokenizer.tokens"),
    ],
)
def test_what_cannot_train_in_full(
    kind: str, lora: dict[str, Any], said: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        run(settings(tiny(kind), tmp_path, lora={"target_modules": ["q_proj"]} | lora))


@pytest.mark.slow
def test_an_untied_head_is_adapted_and_the_embedding_stays(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    run(settings(tiny("llama"), tmp_path, lora={"target_modules": ["q_proj", "lm_head"]}))
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    before = tensor_sha256(embedding(base))
    tuned = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").merge_and_unload()
    assert tensor_sha256(embedding(tuned)) == before
    assert not torch.equal(head(tuned), head(AutoModelForCausalLM.from_pretrained(tiny("llama"))))


def test_from_python_it_is_refused_before_it_is_lost(load: Callable[..., PreTrainedModel]) -> None:
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]
    )
    with pytest.raises(UserError, match=r"embed_tokens.weight would train, which no plain LoRA"):
        get_milora_model(load("llama"), config)


PLAIN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.mark.slow
def test_a_template_of_the_users_own(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(PLAIN, encoding="utf-8")
    asked = settings(tiny("llama"), tmp_path, tokenizer={"chat_template": str(file)})
    record = run(asked)
    assert record["data"]["sha256"][str(file)]
    opened = open_run(tmp_path / "run")
    assert opened.tokenizer.chat_template == PLAIN
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter").chat_template == PLAIN
    assert AutoTokenizer.from_pretrained(tiny("llama")).chat_template == CHAT
    file.write_text(PLAIN.replace("[", "("), encoding="utf-8")
    with pytest.raises(UserError, match=r"mine.jinja has changed since the run"):
        run(asked, resume=True)


@pytest.fixture(scope="module")
def untemplated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has no chat template."""
    folder = tmp_path_factory.mktemp("untemplated")
    make_model("llama").save_pretrained(folder)
    make_tokenizer(chat=False).save_pretrained(folder)
    return folder


SHORT = {"max_steps": 2, "save_steps": 2, "eval_steps": 2}
NO_TASKS: dict[str, Any] = {"tasks": [], "chunks": 1}


@pytest.mark.slow
def test_the_plain_template_goes_with_all_that_is_served(untemplated: Path, tmp_path: Path) -> None:
    asked = settings(
        untemplated, tmp_path, data={"max_length": 200}, training=SHORT, evaluate=NO_TASKS,
    )  # fmt: skip
    run(asked)
    done, question = tmp_path / "run", [{"role": "user", "content": "1 + 1 ="}]
    read = prompt_text(load_pretrained(str(untemplated)).tokenizer, question)
    assert "### Instruction:\n1 + 1 =" in read
    assert all(check.holds for check in verify(done))
    for to in ("merged", "gguf", "gguf-merged"):
        export_run(done, tmp_path / to, to)
    assert all(check.holds for check in verify(tmp_path / "merged"))
    for folder in (done / "adapter", tmp_path / "merged"):
        written = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            question, tokenize=False, add_generation_prompt=True
        )
        assert written == read
    assert (tmp_path / "gguf" / "chat_template.jinja").read_text() == PLAIN_TEMPLATE
    fields = GGUFReader(tmp_path / "gguf-merged" / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == PLAIN_TEMPLATE
    for folder in (done / "adapter", *(tmp_path / to for to in ("merged", "gguf", "gguf-merged"))):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "### Instruction:\nQUESTION\n\n### Response:\nANSWER</s>\n```" in card
    # A run that goes on from it reads the same.
    again = settings(
        tmp_path / "merged", tmp_path, data={"max_length": 200}, training=SHORT, evaluate=NO_TASKS,
        output_dir=str(tmp_path / "again"),
    )  # fmt: skip
    run(again)
    opened = open_run(tmp_path / "again")
    assert prompt_text(opened.tokenizer, question) == read


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [[], ["<tool>"]])  # model/ of method full, and of rows
def test_whole_weights_end_where_training_did(
    tokens: list[str], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    (asked_file := tmp_path / "mine.jinja").write_text(PLAIN, encoding="utf-8")
    own = {"eos_token": "Z", "tokens": tokens, "chat_template": str(asked_file)}
    asked = settings(
        tiny("llama"), tmp_path, method="milora" if tokens else "full",
        tokenizer=own, training=SHORT, evaluate=NO_TASKS,
    )  # fmt: skip
    run(asked)
    folder = tmp_path / "run" / "model"
    # The template lies in model/: its file may go.
    asked_file.unlink()
    opened = open_run(tmp_path / "run")
    assert opened.tokenizer.chat_template == PLAIN
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [AutoTokenizer.from_pretrained(folder).eos_token_id, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "text", "written"), [("full", False, True), ("milora", True, False)]
)
def test_whole_weights_get_it_and_plain_text_does_not(
    method: str, text: bool, written: bool, untemplated: Path, tmp_path: Path
) -> None:
    if text:
        lines = (json.dumps({"text": f"{i} and {i} more"}) for i in range(24))
        (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run(
        settings(
            untemplated, tmp_path, method=method, data={"max_length": 200}, training=SHORT,
            evaluate=NO_TASKS,
        )
    )  # fmt: skip
    folder = tmp_path / "run" / ("adapter" if text else "model")
    assert (AutoTokenizer.from_pretrained(folder).chat_template == PLAIN_TEMPLATE) is written


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("missing.jinja", "missing.jinja is no file, nor a template"),
        ("User and bot talk. " * 15, "User and bot talk. User .* is no file, nor a template"),
        ("{% for m in messages %}", "chat_template: .*[Uu]nexpected end of template"),
        ("{{ bos_token }}", "leaves out what the user said"),
        ("{{ messages[0].content }}", "leaves out what the assistant said"),
        ("{{ raise_exception('never') }}", "chat_template: .*never"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}>{% endif %}",
            "with add_generation_prompt the question must end where the answer begins",
        ),
    ],
)
def test_templates_that_are_refused(template: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        use_template(make_tokenizer(), template)


def bare(tiny: Path, folder: Path, **special: Any) -> Path:
    """The tiny model with a tokenizer that has only these of its special tokens."""
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(folder)
    tokenizer = make_tokenizer(chat=False)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    written = json.loads(file.read_text())
    for key in ("bos_token", "eos_token", "pad_token"):
        written.pop(key, None)
    file.write_text(json.dumps(written | special))
    return folder


@pytest.mark.slow
def test_without_an_end_or_padding(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = bare(tiny("llama"), tmp_path / "model")
    with pytest.raises(UserError, match=r"no end-of-sequence token.*set tokenizer.eos_token"):
        load_pretrained(str(model))
    with pytest.raises(UserError, match="'<end>' is no token of"):
        load_pretrained(str(model), eos_token="<end>")
    loaded = load_pretrained(str(model), eos_token="</s>")
    assert loaded.notes == (
        "the tokenizer has no padding token: batches are filled with </s>, masked by length",
    )
    record = run(
        settings(model, tmp_path, tokenizer={"eos_token": "</s>"}, data={"max_length": 256})
    )
    assert record["state"] == "done"
    assert open_run(tmp_path / "run").tokenizer.eos_token == "</s>"


def test_padding_beyond_the_embedding(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(tiny("llama")).save_pretrained(model)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(model)
    loaded = load_pretrained(str(model))
    assert loaded.tokenizer.pad_token == "</s>"
    assert "pads with id 258, of 258 rows" in loaded.notes[0]


def test_the_block_in_the_file(tmp_path: Path) -> None:
    from milora.config import load_config

    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump({"model": "m", "output_dir": "o", "data": {"train": "t"}}), encoding="utf-8"
    )
    found = load_config(file, ["tokenizer.tokens=[<tool>]"])
    assert found.tokenizer.tokens == ["<tool>"]
    assert isinstance(found, Config)
    with pytest.raises(UserError, match=r"tokenizer.token, did you mean tokens"):
        load_config(file, ["tokenizer.token=[a]"])
