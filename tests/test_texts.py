"""Texts of other scripts stay what they are: masks, previews, tables and pages."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from milora.cli import _print_plan, _print_table
from milora.compare_page import Table
from milora.data import IGNORED, Collator, encode
from milora.preview import marked
from milora.report import _answers, _words
from milora.rows import Row

JAPANESE, ARABIC = "𠮷野家で 検索しました。🌡️", "مرحبا، ٣٤\u200f كتاب (1)"


def sentencepiece() -> PreTrainedTokenizerBase:
    """As Gemma and Llama 2 have it: ▁ for a space, bytes for what is not in the vocabulary."""
    known = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    known += ["▁", *"検索しま。مرحبا٣ abcdefghijklmnopqrstuvwxyz#:,.ABIRW"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(known))}
    inner = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="</s>",
    )  # fmt: skip


TOKENIZERS = {
    "bytes": make_tokenizer(), "bytes, no template": make_tokenizer(chat=False),
    "sentencepiece": sentencepiece(),
}  # fmt: skip
SCRIPTS = st.text(
    st.sampled_from("検索しました。𠮷🌡️مرحبا،٣\u200f\u202eéſﬁ①कि ab\n"), min_size=1, max_size=20
).filter(str.strip)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(question=SCRIPTS, answer=SCRIPTS)
def test_the_loss_covers_the_answer_and_its_end(kind: str, question: str, answer: str) -> None:
    tokenizer = TOKENIZERS[kind]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    found = encode(tokenizer, Row(messages, "here"), 4096)
    assert not isinstance(found, str)
    pieces = marked(tokenizer, found._asdict())
    trained = [text for text, is_trained in pieces if is_trained]
    assert trained == [answer + "</s>"]
    prompt = [text for text, is_trained in pieces if not is_trained]
    assert question in prompt[0]


def test_the_end_is_learned_though_it_is_the_padding() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token == tokenizer.eos_token
    examples = []
    for answer in ("a", ARABIC):
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        found = encode(tokenizer, Row(messages, "here"), 512)
        assert not isinstance(found, str)
        examples.append(found._asdict())

    class Model:
        def forward(self, input_ids: Any) -> None: ...

    batch = Collator(tokenizer, Model())(examples)  # type: ignore[arg-type]
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        labels, mask = batch["labels"][row], batch["attention_mask"][row]
        assert (labels == tokenizer.eos_token_id).sum() == 1
        assert mask.sum() == length
        assert (labels[length:] == IGNORED).all()


def test_the_preview_and_the_tables_of_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = f"{JAPANESE} {ARABIC} [bold]no markup[/bold]"
    _print_plan(
        {
            "samples": [[(text, False), (text, True)]], "coverage": {},
            "parameters": {"trainable": 1}, "estimate": "-", "memory_by_kind": {},
        }
    )  # fmt: skip
    shown = capsys.readouterr().out
    plain = re.sub(r"\s", "", shown)
    assert plain.count(re.sub(r"\s", "", text)) == 2
    assert all(cell_len(line) <= 40 for line in shown.splitlines())
    _print_table(Table(["weight", "task"], [["検索", "1"], ["ab", ARABIC], ["a" * 6, "日本語"]]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    starts = [cell_len(line[: line.index(cell)]) for line, cell in zip(
        lines[2:], ("1", ARABIC[:4], "日本語"), strict=False
    )]  # fmt: skip
    assert len(set(starts)) == 1  # a wide character takes two places


def test_the_page_of_a_run(tiny: Callable[[str], Path]) -> None:
    samples = [
        {
            "prompt": JAPANESE, "reference": ARABIC,
            "base": {"answer": "\u202eturned", "verdict": "wrong"},
            "tuned": {"answer": ARABIC, "verdict": "right"},
        }
    ]  # fmt: skip
    (one,) = _answers(samples, _words("ja"))
    assert (one["question"], one["tuned"]) == (JAPANESE, ARABIC)
    template = Path(__file__).parents[1] / "src" / "milora" / "templates" / "report.html"
    page = template.read_text(encoding="utf-8")
    # Each text has its own direction, which ends with it.
    for key in ("question", "reference", "base", "tuned"):
        assert f"<bdi>{{{{ one.{key} }}}}</bdi>" in page


def test_rows_of_data_keep_their_characters(tmp_path: Path) -> None:
    from milora.rows import read_rows

    file = tmp_path / "日本語.jsonl"
    row = {"prompt": JAPANESE, "completion": ARABIC}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (read,) = read_rows(str(file)).rows
    assert [m["content"] for m in read.messages] == [JAPANESE, ARABIC]
    assert read.place == f"{file}, line 1"
