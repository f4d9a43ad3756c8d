"""Classifiers: labels, what they are given, their scores, their head from training to artefacts."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score
from tiny_run import run, settings

from milora import get_milora_model
from milora.adapter import add_adapter, head_of
from milora.artefacts import export_run
from milora.card import all_scores
from milora.chat import replies
from milora.classification import class_scores, label_names, moved, tokens
from milora.cli import main
from milora.errors import UserError
from milora.files import read_json
from milora.fingerprints import base_sha256
from milora.forms import encoder_for
from milora.pretrained import load_pretrained, positions
from milora.report import report
from milora.rows import read_rows
from milora.server import verify_server
from milora.smaller import Smaller
from milora.targeting import lora_config
from milora.verify import open_adapter, open_run, verify

CONFIG: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 512, "pad_token_id": 1,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LORA = {"r": 2, "target_modules": ["query", "value"], "lora_dropout": 0.0}
SHORT = {"max_steps": 4, "save_steps": 2, "eval_steps": 2}


def rows(path: Path, labels: tuple[Any, Any] = ("down", "up"), count: int = 12) -> str:
    lines = [
        json.dumps({"text": f"{word} {i}", "label": label})
        for word, label in zip(("south", "north"), labels, strict=True)
        for i in range(count)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    hf.BertModel(hf.BertConfig(**CONFIG)).save_pretrained(folder)
    make_tokenizer(chat=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("t5")
    config = hf.T5Config(
        vocab_size=258, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=1, dropout_rate=0.0,
    )  # fmt: skip
    hf.T5ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer(chat=False).save_pretrained(folder)
    return folder


def asked(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    if not (folder / "rows.jsonl").exists():
        rows(folder / "rows.jsonl")
    own = {"lora": LORA, "training": SHORT, "evaluate": {"tasks": [str(folder / "rows.jsonl")]}}
    return settings(model, folder, **(own | changes))


@given(
    st.integers(2, 5).flatmap(
        lambda classes: st.tuples(
            st.just(classes),
            st.lists(
                st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1
            ),
        )
    )
)
def test_f1_is_that_of_scikit_learn(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    classes, pairs = drawn
    wanted, picked = zip(*pairs, strict=True)
    found = class_scores(picked, wanted, classes)
    average = "binary" if classes == 2 else "macro"
    assert found["f1"] == pytest.approx(
        f1_score(wanted, picked, average=average, zero_division=0), abs=1e-6
    )
    low, high = found["f1_interval"]
    assert 0 <= low <= high <= 1
    assert found == class_scores(picked, wanted, classes)


def test_the_interval_of_f1_covers_and_no_class_is_wrong() -> None:
    found = class_scores([0, 1] * 50, [0, 1] * 40 + [1, 0] * 10, 2)
    low, high = found["f1_interval"]
    assert low < found["f1"] == 0.8 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.04, abs=0.03)
    assert class_scores([None, 1], [0, 1], 2)["f1"] == 1.0
    assert class_scores([0, None], [0, 1], 2)["f1"] == 0.0


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        ({"sentence": "a"}, ["a"]),
        ({"text": "a"}, ["a"]),
        ({"question": "a"}, ["a"]),
        ({"sentence1": "a", "sentence2": "b"}, ["a", "b"]),
        ({"premise": "a", "hypothesis": "b"}, ["a", "b"]),
        ({"question": "a", "sentence": "b"}, ["a", "b"]),
        ({"text_pair": "b", "text": "a"}, ["a", "b"]),
    ],
)
def test_columns_of_glue(columns: dict[str, str], texts: list[str], tmp_path: Path) -> None:
    for suffix in ("jsonl", "csv"):
        path = tmp_path / f"rows.{suffix}"
        row = columns | {"label": 1, "idx": 7}
        if suffix == "jsonl":
            path.write_text(json.dumps(row))
        else:
            path.write_text(",".join(row) + "\n" + ",".join(map(str, row.values())))
        found = read_rows(str(path))
        assert found.format == "classification"
        assert found.unused == ["idx"]
        assert [m["content"] for m in found.rows[0].messages] == [*texts, "1"]


def test_labels_are_learnt(tmp_path: Path) -> None:
    def names(*labels: Any) -> list[str]:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps({"text": "a", "label": one}) for one in labels))
        return label_names(read_rows(str(path)).rows)

    assert names(10, 9, 2.0, "2") == ["2", "9", "10"]
    assert names("b", "a", "10") == ["10", "a", "b"]
    assert names(True, False) == ["false", "true"]
    for labels, said in (
        ((1, -1), r"line 2: 'label' is -1, which GLUE writes where there is none"),
        ((1, 0.5), r"line 2: 'label' is a number 0\.5; the name or the number of a class"),
        ((1, None), r"line 2: 'label' is null"),
        ((1, 1), r"line 1: all rows have the label '1'"),
    ):
        with pytest.raises(UserError, match=said):
            names(*labels)
    (tmp_path / "bad.jsonl").write_text('{"title": "a", "label": 1}')
    with pytest.raises(UserError, match=r"beside 'label' one of sentence1 \+ sentence2, premise"):
        read_rows(str(tmp_path / "bad.jsonl"), format="classification")
    renamed = read_rows(str(tmp_path / "bad.jsonl"), columns={"text": "title"})
    assert renamed.format == "classification"
    rows(tmp_path / "text.jsonl")
    assert read_rows(str(tmp_path / "text.jsonl"), format="text").unused == ["label"]


def test_two_texts_are_told_apart(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = hf.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    (tmp_path / "rows.jsonl").write_text('{"premise": "a a a", "hypothesis": "b", "label": "x"}')
    (row,) = read_rows(str(tmp_path / "rows.jsonl")).rows
    found = tokens(tokenizer, row, 50)
    assert found.input_ids == [2, 5, 5, 5, 3, 6, 3]
    assert found.token_type_ids == [0, 0, 0, 0, 0, 1, 1]
    assert not found.shortened
    cut = tokens(tokenizer, row, 5)
    assert cut.shortened
    assert cut.input_ids == [2, 5, 3, 6, 3]


def test_two_texts_have_no_correlation_of_similarities() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(3, 8, generator=generator) for _ in "ba")
    figures = moved(before, after)
    assert all(value is not None for value in figures.values())
    assert moved(before[:2], after[:2])["similarities"] is None  # of NaN no JSON can be made
    assert moved(before[:2], after[:2])["moved"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["milora", "full"])
def test_a_run_and_its_commands(
    method: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The base has no head: it is scored by the commonest label. Three classes, by number."""
    lines = [{"sentence1": f"{i}", "sentence2": "b" * i, "label": i % 3} for i in range(24)]
    lines += [{"sentence1": "more", "sentence2": "x", "label": 2}] * 2
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    gates = ["rows.accuracy >= base - 1", "rows.f1 <= 1", "knowledge.moved <= 2"]
    record = run(asked(bert, tmp_path, method=method, gates=gates))
    home = tmp_path / "run"
    assert record["labels"] == ["0", "1", "2"]
    assert all(gate["holds"] for gate in record["gates"])
    evaluation = read_json(home / "evaluation.json")
    task = evaluation["tasks"]["rows"]
    assert task["labels"] == {"0": 8, "1": 8, "2": 10}
    assert task["duplicates"] == 1
    assert task["headless"]
    assert task["base"]["accuracy"] == 10 / 26
    assert task["base"]["f1"] == pytest.approx(2 * (10 / 26) / (1 + 10 / 26) / 3)
    assert "loss" not in task["base"]
    (kept,) = evaluation["knowledge"]
    assert 0 < kept["moved"] < 2
    assert kept["similarities"] < 1
    shown = [label for label, _, _ in all_scores(evaluation, "{:.3f} {:.3f} {:.3f}")]
    assert any("the base has no such head" in label for label in shown)
    assert "F1, mean over the classes" in report(home)
    assert "クラス平均" in report(home, "ja")
    if method == "full":
        merged = load_pretrained(str(home / "model"))
        assert (merged.in_full, merged.headless) == (("classifier",), False)
        return
    card = (home / "adapter" / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "trained in full (classifier)" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace("path/of/the/base", str(bert)).replace("this/folder", str(home / "adapter"))
    space: dict[str, Any] = {}
    exec(code, space)  # what the card tells a user to write
    ids = torch.randint(2, 258, (2, 9))
    with torch.no_grad():
        wanted = open_adapter(home).model(input_ids=ids).logits
        assert wanted.shape == (2, 3)
        assert torch.equal(space["model"](input_ids=ids).logits, wanted)
        export_run(home, tmp_path / "merged", "merged")
        merged = load_pretrained(str(tmp_path / "merged"))
        torch.testing.assert_close(merged.model(input_ids=ids).logits, wanted, atol=1e-5, rtol=0)
    assert all(check.holds for check in verify(tmp_path / "merged"))
    about = read_json(tmp_path / "merged" / "milora.json")
    assert about["rounding"]["all"] < 1e-5
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "names 0, 1, 2." in card
    assert "serve" not in card
    assert hf.AutoConfig.from_pretrained(tmp_path / "merged").id2label == {0: "0", 1: "1", 2: "2"}
    export_run(home, tmp_path / "small", "lora", Smaller(1))
    whole, cut = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (home / "adapter", tmp_path / "small")
    )
    head = [name for name in whole if "classifier" in name]
    assert len(head) == 2
    assert all(torch.equal(whole[name], cut[name]) for name in head)

    def command(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["milora", *words])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, " ".join("".join(capsys.readouterr()).split())

    (tmp_path / "other.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0}')
    code_, out = command("eval", str(home), "--tasks", str(tmp_path / "other.jsonl"))
    assert code_ == 0
    assert "other: accuracy of 2" in out
    assert set(read_json(home / "evaluation.json")["tasks"]) == {"rows", "other"}
    code_, out = command("eval", str(tmp_path / "merged"), "--tasks", str(path))
    assert code_ == 0
    (tmp_path / "third.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 7}')
    code_, out = command("eval", str(home), "--tasks", str(tmp_path / "third.jsonl"))
    assert code_ == 2
    assert (
        "third.jsonl, line 2: the label '7' is none of those in the training file: 0, 1, 2" in out
    )
    with pytest.raises(UserError, match=r"--to gguf: llama\.cpp reads no head of a classifier"):
        export_run(home, tmp_path / "gguf", "gguf")
    with pytest.raises(UserError, match="servers of text give no classes"):
        verify_server(home, "http://localhost:1")
    with pytest.raises(UserError, match="names classes and cannot talk"):
        next(replies(open_run(home).pair, make_tokenizer(), ["hello"]))
    checks = {check.name: check for check in verify(home)}
    assert all(check.holds for check in checks.values())
    assert "classifier.weight" in checks["head"].detail

    tensors = load_file(home / "adapter" / "adapter_model.safetensors")
    tensors[head[0]][0] += 1e-6
    save_file(tensors, home / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    assert {check.name for check in verify(home) if not check.holds} == {"file", "head"}


def test_a_head_that_the_base_has(bert: Path, tmp_path: Path) -> None:
    """Its order of the labels holds, it is asked as the base, and it stays as it was."""
    torch.manual_seed(1)
    config = hf.BertConfig(**CONFIG, id2label={0: "up", 1: "down"}, label2id={"up": 0, "down": 1})
    hf.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    make_tokenizer(chat=False).save_pretrained(tmp_path / "model")
    before = base_sha256(hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model"))
    record = run(asked(tmp_path / "model", tmp_path))
    assert record["labels"] == ["up", "down"]
    assert record["base"]["sha256"] == before
    assert record["base"]["unchanged"]
    task = read_json(tmp_path / "run" / "evaluation.json")["tasks"]["rows"]
    assert not task["headless"]
    assert task["f1_of"] == "down"
    assert 0 < task["base"]["loss"] != task["tuned"]["loss"]
    assert task["base"]["accuracy"] != task["majority"] or task["base"]["f1"] not in (0, 2 / 3)

    for labels, found, headless in (
        (("up", "down"), ["up", "down"], False),
        (("left", "right"), ["left", "right"], True),
        (("a", "b", "c"), ["a", "b", "c"], True),
    ):
        loaded = load_pretrained(str(tmp_path / "model"), labels=labels)
        assert list(loaded.model.config.id2label.values()) == found
        assert loaded.headless == headless
        assert loaded.fresh == (("classifier",) if len(labels) == 3 else ())
    numbered = hf.BertForSequenceClassification(hf.BertConfig(**CONFIG))
    numbered.save_pretrained(tmp_path / "numbered")
    make_tokenizer(chat=False).save_pretrained(tmp_path / "numbered")
    assert not load_pretrained(str(tmp_path / "numbered"), labels=["0", "1"]).headless
    assert load_pretrained(str(tmp_path / "numbered"), labels=["no", "yes"]).headless


def test_a_new_head_is_that_of_the_seed(bert: Path, tmp_path: Path) -> None:
    """Whatever the process has drawn before."""
    found = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        torch.manual_seed(len(found))
        short = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
        run(asked(bert, tmp_path / place, training=short, evaluate={"tasks": []}))
        found.append(load_file(tmp_path / place / "run/adapter/adapter_model.safetensors"))
    one, other = found
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_all_linear_leaves_heads_of_several_layers(bert: Path, tmp_path: Path) -> None:
    """DistilBERT's has two, which PEFT counted among the linear layers for the anchor."""
    config = hf.DistilBertConfig(
        vocab_size=258, dim=32, hidden_dim=64, n_layers=2, n_heads=4, pad_token_id=1
    )
    hf.DistilBertForMaskedLM(config).save_pretrained(tmp_path)
    make_tokenizer(chat=False).save_pretrained(tmp_path)
    base = load_pretrained(str(tmp_path), labels=["a", "b"])
    assert base.in_full == ("classifier", "pre_classifier")
    asked = lora_config({"r": 2, "target_modules": "all-linear"}, "SEQ_CLS", base.in_full)
    model, start = add_adapter(base.model, asked, "milora")
    assert {name.rpartition(".")[2] for name in start.factors} == {
        "q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2",
    }  # fmt: skip
    assert set(head_of(model)) == {"classifier", "pre_classifier"}


@pytest.mark.slow
def test_in_16_bit_the_head_trains_in_32(bert: Path, tmp_path: Path) -> None:
    record = run(asked(bert, tmp_path, dtype="bfloat16"))
    assert record["step0"] == {"difference": 0.0, "bound": 0.0}
    assert record["base"]["unchanged"]
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    head = tensors["base_model.model.classifier.weight"]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())
    assert all(check.holds for check in verify(tmp_path / "run"))
    said = export_run(tmp_path / "run", tmp_path / "merged", "merged").said
    assert "merged weights with the head, bfloat16, of the update " in said
    assert 1e-3 < read_json(tmp_path / "merged" / "milora.json")["rounding"]["all"] < 1
    assert all(check.holds for check in verify(tmp_path / "merged"))
    assert load_file(tmp_path / "merged" / "model.safetensors")["classifier.weight"].equal(head)
    base = hf.AutoModelForSequenceClassification.from_pretrained(bert, dtype=torch.bfloat16)
    ids = torch.randint(2, 258, (2, 9))
    with torch.no_grad():
        stock = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")(input_ids=ids).logits
        ours = open_adapter(tmp_path / "run").model(input_ids=ids).logits
    torch.testing.assert_close(stock.float(), ours, atol=0.05 * float(ours.abs().max()), rtol=0)


def test_a_model_of_another_kind_is_refused(
    bert: Path, t5: Path, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    labelled = rows(tmp_path / "labels.jsonl")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    pairs = str(tmp_path / "pairs.jsonl")
    lone = tmp_path / "lone.jsonl"
    lone.write_text('{"text": "a", "label": "up"}\n{"text": "b", "label": "sideways"}')
    data = {"train": labelled, "eval": 0.2, "max_length": 64}
    classifier = tmp_path / "classifier"
    hf.BertForSequenceClassification(hf.BertConfig(**CONFIG)).save_pretrained(classifier)
    make_tokenizer(chat=False).save_pretrained(classifier)
    question = {"question": "a", "choices": ["b", "c"], "answer": "b"}
    (tmp_path / "choice.jsonl").write_text(json.dumps(question))
    likelihood = {"file": str(tmp_path / "choice.jsonl"), "protocol": "likelihood"}
    for model, train, tasks, said in (
        (bert, pairs, [], "is an encoder (bert), which writes no text: give it rows with a label"),
        (classifier, pairs, [], "is a classifier, and .* holds no labels but prompt-completion"),
        (t5, labelled, [], "encoder-decoder, which learns text from text"),
        (t5, pairs, [likelihood], "choice: of an encoder-decoder answers are scored"),
        (
            tiny("llama"),
            pairs,
            [labelled],
            "labels: the model writes text, for which rows need a q",
        ),
        (bert, labelled, [pairs], "pairs: the model is a classifier, for which rows need a label"),
        (bert, labelled, [{"file": labelled, "match": "contains"}], "labels: match has no effect"),
        (bert, labelled, [str(lone)], "lone.jsonl, line 2: the label 'sideways' is none of those"),
    ):
        config = asked(model, tmp_path, data=data | {"train": train}, evaluate={"tasks": tasks})
        with pytest.raises(UserError, match=said if "*" in said else re.escape(said)):
            run(config)
    with pytest.raises(UserError, match=r"lone\.jsonl, line 2: the label 'sideways'"):
        run(asked(bert, tmp_path, data=data | {"eval": str(lone)}))
    for targets in (["classifier"], ["query", "classifier"]):
        with pytest.raises(
            UserError, match="'classifier' is in the head, which is trained in full"
        ):
            run(asked(bert, tmp_path, data=data, lora=LORA | {"target_modules": targets}))
    text_to_text = {"data": data | {"train": pairs}, "evaluate": {"tasks": []}}
    (tmp_path / "general.txt").write_text("some text " * 99)
    keep = {"keep": {"every": 2}, "text": str(tmp_path / "general.txt")}
    embedding = LORA | {"modules_to_save": ["word_embeddings"]}
    for model, changes, said in (
        (bert, {"data": data, "tokenizer": {"tokens": ["<new>"]}}, "tokens is not for a class"),
        (bert, {"data": data, "tokenizer": {"chat_template": "{{ 1 }}"}}, "template is not for a"),
        (
            bert,
            {"data": data, "quantization": "nf4"},
            "is no causal model; such a base must be",
        ),
        (bert, {"data": data, "lora": embedding}, "modules_to_save is for causal models"),
        (bert, {"data": data, "milora": keep}, "milora.keep: it has a causal model predict"),
        (t5, text_to_text | {"tokenizer": {"tokens": ["<new>"]}}, "tokens is not for an encoder-d"),
    ):
        with pytest.raises(UserError, match=said):
            run(asked(model, tmp_path, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_accumulated_steps_are_those_of_whole_batches(
    name: str, bert: Path, t5: Path, tmp_path: Path
) -> None:
    """Plain gradient descent, in which a loss of another size would show."""
    found, rate = [], 30.0 if name == "bert" else 0.1
    for size, times in ((8, 1), (2, 4)):
        home = tmp_path / str(size)
        home.mkdir()
        training = SHORT | {
            "max_steps": 2, "per_device_train_batch_size": size, "optim": "sgd",
            "gradient_accumulation_steps": times, "learning_rate": rate, "max_grad_norm": 0.0,
        }  # fmt: skip
        lora = LORA | ({} if name == "bert" else {"target_modules": ["q", "v"]})
        if name == "t5":
            (home / "rows.jsonl").write_text(
                "\n".join(
                    json.dumps({"instruction": str(i), "input": "b", "output": "c" * (i % 5 + 1)})
                    for i in range(24)
                )
            )
        run(asked(bert if name == "bert" else t5, home, lora=lora, training=training))
        found.append(load_file(home / "run" / "checkpoints" / "trained.safetensors"))
    starts = load_file(tmp_path / "8" / "run" / "init" / "factors.safetensors")
    furthest = 0.0
    for key, tensor in found[0].items():
        torch.testing.assert_close(found[1][key], tensor, atol=2e-6, rtol=1e-4)
        plain = key.removeprefix("base_model.model.").replace(
            ".lora_A.default.weight", ".initial_A"
        )
        if plain in starts:
            furthest = max(furthest, float((tensor - starts[plain]).abs().max()))
    assert furthest > 1e-4


def test_positions_of_roberta_begin_behind_the_padding() -> None:
    config = hf.RobertaConfig(**CONFIG | {"max_position_embeddings": 34})
    model = hf.RobertaForSequenceClassification(config).eval()
    assert positions(model) == 32
    with torch.no_grad():
        model(input_ids=torch.full((1, 32), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 33), 5))


def test_from_python(bert: Path, tmp_path: Path) -> None:
    base = hf.AutoModelForSequenceClassification.from_pretrained(bert)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_milora_model(base, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    ids, labels = torch.randint(2, 258, (4, 9)), torch.tensor([0, 1, 0, 1])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model.train()
    for _ in range(3):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(tmp_path)
    fresh = hf.AutoModelForSequenceClassification.from_pretrained(bert)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        found = PeftModel.from_pretrained(fresh, tmp_path)(input_ids=ids).logits
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
        with model.disable_adapter():
            base_said = model(input_ids=ids).logits
        assert not torch.equal(base_said, wanted)
    for name, tensor in before.items():
        kept = model.base_model.model.state_dict()
        (own,) = [
            k for k in kept if k.replace(".base_layer", "").replace(".original_module", "") == name
        ]
        assert torch.equal(kept[own], tensor), name


@pytest.mark.slow
def test_an_encoder_decoder_answers(t5: Path, tmp_path: Path) -> None:
    """It learns one answer by heart, in alpaca rows, and generation gives it."""
    lines = [{"instruction": f"say {i}", "input": "", "output": "ok"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lora = {"r": 4, "target_modules": ["q", "k", "v", "o", "wi", "wo"], "lora_dropout": 0.0}
    tasks = [{"file": str(tmp_path / "rows.jsonl"), "max_new_tokens": 5}]
    training = {"max_steps": 60, "save_steps": 60, "eval_steps": 60, "learning_rate": 5e-2}
    run(asked(t5, tmp_path, lora=lora, training=training, evaluate={"tasks": tasks}))
    evaluation = read_json(tmp_path / "run" / "evaluation.json")
    task = evaluation["tasks"]["rows"]
    assert task["base"]["accuracy"] == 0
    assert task["tuned"]["accuracy"] == 1
    assert task["tuned"]["unended"] == 0
    (kept,) = evaluation["knowledge"]
    assert kept["tokens"] == 256
    assert kept["kl"] > 0
    assert all(check.holds for check in verify(tmp_path / "run"))
    said = next(replies(open_run(tmp_path / "run").pair, make_tokenizer(False), ["say 3"]))
    assert said[1] == "ok"
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def test_a_bart_is_an_encoder_decoder(tmp_path: Path) -> None:
    """The library lists it among those that fill in masks, as it does encoders."""
    config = hf.BartConfig(
        vocab_size=258, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=1,
    )  # fmt: skip
    hf.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    make_tokenizer(chat=False).save_pretrained(tmp_path)
    assert isinstance(load_pretrained(str(tmp_path)).model, hf.BartForConditionalGeneration)


def test_rows_of_an_encoder_decoder(t5: Path, tmp_path: Path) -> None:
    tokenizer, encode = make_tokenizer(False), encoder_for(load_pretrained(str(t5)).model)

    def encoded(*messages: tuple[str, str], length: int = 50) -> Any:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in messages]}))
        return encode(tokenizer, read_rows(str(path)).rows[0], length)

    found = encoded(("system", "a"), ("user", "b"), ("assistant", "cd"))
    assert tokenizer.decode(found.input_ids) == "a\n\nb"
    assert tokenizer.decode(found.labels) == "cd</s>"
    cut = encoded(("user", "b" * 9), ("assistant", "cdef"), length=4)
    assert cut.shortened
    assert (tokenizer.decode(cut.input_ids), tokenizer.decode(cut.labels)) == ("bbbb", "cdef")
    several = encoded(("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e"))
    assert "one answer a row" in several
    assert encoded(("user", "b"), ("assistant", " ")) == "empty answer"
    assert "special token </s>" in encoded(("user", "b</s>"), ("assistant", "c"))
