"""The report: all of it there, text stays text, and it stands up in a browser."""

import json
import os
import re
import shutil
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_compare import outcome
from tiny_run import run, settings

import milora
from milora import compare_page, inspect_page
from milora.cli import main
from milora.compare import summary
from milora.errors import UserError
from milora.inspection import inspect_model
from milora.progress import Progress
from milora.report import _answers, _words, report
from milora.store import Store

Tiny = Callable[[str], Path]
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=alert(1)>"
SECTIONS = (
    "summary", "gates", "scores", "kept", "interference", "spectra", "loss", "answers", "data",
    "asked", "cost", "load", "reproduce",
)  # fmt: skip
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import make_model, make_tokenizer

    home = tmp_path_factory.mktemp("report")
    base = home / "model"
    make_model("llama").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    rows = [{"prompt": f"{HOSTILE} {i}", "completion": f"{HOSTILE} {i}"} for i in range(24)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choices = [{"question": HOSTILE, "choices": [HOSTILE, "b"], "answer": 0} for _ in range(4)]
    (home / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    tasks = [
        {"file": str(home / "rows.jsonl"), "name": HOSTILE, "max_new_tokens": 3, "limit": 8},
        {"file": str(home / "choices.jsonl"), "protocol": "likelihood"},
    ]
    values = settings(
        base, home, data={"max_length": 128}, milora={"protect": {"q_proj": 4}},
        training={"run_name": HOSTILE}, evaluate={"tasks": tasks},
        gates=["choices.accuracy >= base - 1", "knowledge.kl <= 1e-12"],
    )  # fmt: skip
    run(values)
    return home / "run"


@pytest.mark.slow
def test_everything_is_on_it(finished: Path) -> None:
    page = report(finished)
    assert re.findall(r'<h2 id="(\w+)"', page) == list(SECTIONS)
    assert page.count("<svg") == 2
    assert page.count('role="img"') == 2
    assert ">fails<" in page
    assert ">holds<" in page
    assert "14 weights were protected" in page
    record = json.loads((finished / "run.json").read_text())
    assert record["base"]["sha256"] in page
    assert f"Made by milora {milora.__version__}" in page
    for digest in record["data"]["sha256"].values():
        assert digest[:16] in page


def test_the_figures_in_short(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    found = json.loads((copy / "evaluation.json").read_text())
    for state, accuracy in (("base", 0.25), ("tuned", 0.75)):
        found["tasks"]["choices"][state]["accuracy"] = accuracy
    (copy / "evaluation.json").write_text(json.dumps(found))
    page = report(copy)
    assert "0.250 → 0.750" in page
    assert "1 / 2" in page  # gates that hold
    assert "continue.rank" not in page
    record = json.loads((copy / "run.json").read_text())
    for error, said in ((0.0123, "which took at most 1.2e-02 of the update"), (0.0, "")):
        cut = record["adapter"] | {"cut": {"summed_error": error}}
        (copy / "run.json").write_text(json.dumps(record | {"adapter": cut}))
        assert said in report(copy)
        assert ("was cut" in report(copy)) == bool(error)


def test_what_changed_for_the_better_comes_first() -> None:
    samples = [
        {"prompt": f"{base} {tuned}", "reference": "r",
         "base": {"answer": "a", "verdict": base}, "tuned": {"answer": "a", "verdict": tuned}}
        for base, tuned in (("right", "right"), ("right", "wrong"), ("format", "right"))
    ]  # fmt: skip
    said = [one["question"] for one in _answers(samples, _words("en"))]
    assert said == ["format right", "right wrong", "right right"]


def test_text_stays_text(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    samples = [json.loads(line) for line in (copy / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        if "verdict" in sample["tuned"]:
            sample["tuned"]["answer"] = HOSTILE
    (copy / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    for lang in ("en", "ja"):
        page = report(copy, lang)
        assert "document.title" in page
        assert "<script" not in page
        assert "<img" not in page
        assert not re.search(r'(?:src|href)="(?!#)', page)
        assert "://" not in page.replace("http://www.w3.org/", "")


@pytest.mark.slow
def test_what_cannot_be_loaded_by_its_name(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    record = json.loads((finished / "run.json").read_text())
    assert record["base"]["type"] == "llama"
    record["base"] |= {"model": "smollm2-135m", "name": "smollm2-135m", "type": "gpt2"}
    record["adapter"]["rank"] = 1024
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    page = report(tmp_path / "run")
    assert "from_pretrained(&#34;path/of/the/base&#34;)" in page
    assert "vllm serve path/of/the/base --enable-lora --max-lora-rank 512" in page
    assert "milora export adapter --rank 512 --out small" in page
    assert "bundled copy of SmolLM2" in page
    assert "--to gguf" not in page


def test_in_japanese(finished: Path) -> None:
    page = report(finished, "ja")
    assert '<html lang="ja">' in page
    assert "学習レポート" in page
    assert "学習データにも含まれるもの: 7 件、検証データにも含まれるもの: 1 件" in page
    assert re.findall(r'<h2 id="(\w+)"', page) == list(SECTIONS)
    heads = re.findall(r"<h2[^>]*>([^<]+)</h2>", page)
    assert all(re.search(r"[ぁ-んァ-ン一-龥]", head) for head in heads), heads
    with pytest.raises(UserError, match="--lang de: use one of en, ja"):
        report(finished, "de")


def test_both_languages_say_the_same() -> None:
    file = Path(milora.__file__).parent / "templates" / "report.yaml"
    template = (file.parent / "report.html").read_text(encoding="utf-8")
    source = template + (file.parents[1] / "report.py").read_text(encoding="utf-8")
    source += (file.parents[1] / "card.py").read_text(encoding="utf-8")
    for key, by_language in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        fields = [
            sorted(field for _, field, _, _ in string.Formatter().parse(text) if field)
            for text in by_language.values()
        ]
        assert set(by_language) == {"en", "ja"}, key
        assert fields[0] == fields[1], key
        used = re.search(rf't\.{key}\b|\["{key}"\]|"{key}"', source)
        assert used or key in ("training", "export", "evaluation", "right", "wrong"), key


@pytest.mark.slow
def test_the_command_and_every_run(
    finished: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["milora", *words])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    out = tmp_path / "ja.html"
    assert command("report", str(finished), "--lang", "ja", "--out", str(out)) == 0
    assert out.read_text(encoding="utf-8") == report(finished, "ja")
    assert command("report", str(tmp_path)) == 2
    assert "is not the folder of a finished run" in capsys.readouterr().err
    values = settings(tiny("tied"), tmp_path, method="full", evaluate={"tasks": []})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert command("train", str(tmp_path / "run.yaml")) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Full fine-tuning of" in page
    assert 'id="load"' not in page
    assert 'id="interference"' not in page


def test_without_matplotlib(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report(finished)
    assert "<svg" not in page
    assert page.count("pip install &#39;milora[plot]&#39;") == 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        pytest.skip("no Chromium here: install it, or set CHROMIUM to its path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


def comparison() -> str:
    arms = ("lora", "milora", "lora:training.weight_decay=3")
    outcomes = {
        (arm, rate, seed): outcome(rate, right="0110", kl=100 * rate, name=HOSTILE)
        for arm in arms for rate in (1e-3, 3e-3) for seed in (0, 1)
    }  # fmt: skip
    result = summary(outcomes, [0, 1])
    return compare_page.page(result, compare_page.plot(result))


@pytest.fixture(scope="module")
def pages(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    store = Store(tmp_path_factory.mktemp("store"))
    inspected = inspect_model(str(finished.parent / "model"), 4, store, Progress())
    return {
        "report": report(finished),
        "report in Japanese": report(finished, "ja"),
        "comparison": comparison(),
        "inspection": inspect_page.page(inspected | {"model": HOSTILE}),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report", "report in Japanese", "comparison", "inspection"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(
    width: int, scheme: Any, name: str, browser: Any, pages: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "page.html"
    file.write_text(pages[name], encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    assert errors == []
    assert requests == [file.as_uri()]
    assert page.title() != "taken"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.scripts.length") == 0
    assert page.query_selector_all("svg")
    for drawing in page.query_selector_all("svg"):
        box = drawing.bounding_box()
        assert box
        assert box["width"] > 200
        assert box["height"] > 50
        assert drawing.get_attribute("aria-label")
    style = "getComputedStyle(document.body)"
    ink, paper = (
        sum(map(int, re.findall(r"\d+", page.evaluate(f"{style}.{key}"))))
        for key in ("color", "backgroundColor")
    )
    assert (ink < paper) == (scheme == "light")
    page.close()
