"""`milora verify --server` against a small server that runs the tiny model through transformers."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from test_merge import export, make_adapter, make_base
from transformers import AutoModelForCausalLM

import milora.cli
from milora.errors import UserError
from milora.forms import first_token as next_token
from milora.server import at_scale, judge, verify_server


def body(ids: torch.Tensor, values: torch.Tensor, style: str) -> dict[str, Any]:
    """The log-probabilities of a completion, as vLLM, as llama.cpp or as OpenAI gives them."""
    pairs = list(zip(ids.tolist(), values.tolist(), strict=True))
    if style == "llama.cpp":
        listed = [{"id": i, "token": chr(i), "bytes": [i], "logprob": x} for i, x in pairs]
        return {"choices": [{"text": "", "logprobs": {"content": [{"top_logprobs": listed}]}}]}
    names = {i: f"token_id:{i}" for i, _ in pairs}
    return {
        "choices": [{"text": "", "logprobs": {"top_logprobs": [{names[i]: x for i, x in pairs}]}}]
    }


@contextmanager
def serving(model: Any, names: list[dict[str, Any]], style: str = "vllm") -> Iterator[str]:
    """An OpenAI-compatible server of `model` on a free port: its address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, answer: Any, code: int = 200) -> None:
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.reply(b"<html>" if style == "web page" else {"data": names})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if asked["model"] not in [one["id"] for one in names]:
                self.reply({"error": f"no model {asked['model']}"}, 404)
            elif style == "silent":
                self.reply({"choices": [{"text": "x", "logprobs": None}]})
            elif style == "no numbers":
                self.reply(body(torch.tensor([5]), torch.tensor([torch.nan]), "vllm"))
            elif style == "none listed":
                self.reply({"choices": [{"logprobs": {"content": [{"top_logprobs": []}]}}]})
            else:
                top = next_token(model, asked["prompt"]).topk(asked["logprobs"])
                self.reply(body(top.indices, top.values, style))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("served")
    base = sure(make_base(folder / "base", "llama"))
    return base, make_adapter(folder / "adapter", base, "llama", scale=3.0)


def sure(folder: Path) -> Path:
    """A random model that has preferences, as trained ones do."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    return folder


def load(pair: tuple[Path, Path]) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair[0]), pair[1])


ONE = [{"id": "tiny", "parent": None}]
TWO = [*ONE, {"id": "tuned", "parent": "tiny"}]


@pytest.mark.parametrize("style", ["llama.cpp", pytest.param("vllm", marks=pytest.mark.slow)])
def test_the_tuned_model_passes(style: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(load(pair), TWO, style) as url:
        checks = verify_server(pair[1], f"{url}/v1/")
        assert all(check.holds for check in checks), checks
        assert "model tuned: 30 of 30 log-probabilities" in checks[0].detail
        export(pair[1], tmp_path / "gguf", "gguf")
        assert all(check.holds for check in verify_server(tmp_path / "gguf", url))
    export(pair[1], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with serving(merged, ONE, style) as url:
        assert all(check.holds for check in verify_server(tmp_path / "merged", url))


@pytest.mark.parametrize("key", ["sk-SECRET\r123", "sk-SECRET\n", "sk-SECRETé", "\x7fsk-SECRET"])
def test_the_key_is_never_said(
    key: str, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILORA_SERVER_KEY", key)
    with pytest.raises(UserError) as stopped:
        verify_server(pair[1], "http://127.0.0.1:9", "tuned")
    said = str(stopped.value)
    assert "SECRET" not in said
    assert ("has a character that no HTTP header may have" in said) == (key.strip() != "sk-SECRET")


def test_each_fault_is_named(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Ignored, at double scale, on another base: exit code 3 and what it is."""

    def failed(model: Any, *options: str) -> str:
        with serving(model, TWO) as url:
            words = ["milora", "verify", str(pair[1]), "--server", url, *options]
            monkeypatch.setattr("sys.argv", words)
            with pytest.raises(SystemExit) as stopped:
                milora.cli.main()
        assert stopped.value.code == 3
        said = capsys.readouterr()
        assert "FAIL  served: " in said.out
        last = said.err.strip().splitlines()[-1]
        assert last.startswith(f"milora: {url} does not serve {pair[1]}: ")
        return said.out

    model = load(pair)
    with model.disable_adapter():
        assert "the base without the adapter" in failed(model)
        assert "the base without the adapter" in failed(model, "--tolerance", "50")
    for scale in (0.5, 2.0):
        with rescale_adapter_scale(model, scale):
            assert f"at about {scale:.2g} times its scale" in failed(model)
    torch.manual_seed(5)
    other = type(model.base_model.model)(model.base_model.model.config)
    other.save_pretrained(tmp_path / "other")
    changed = AutoModelForCausalLM.from_pretrained(sure(tmp_path / "other"))
    wrong = PeftModel.from_pretrained(changed, pair[1])
    assert "another base, another adapter or other weights" in failed(wrong)


@pytest.mark.slow
def test_a_server_that_cannot_be_asked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def refused(said: str, url: str, model: str | None = None) -> None:
        with pytest.raises(UserError, match=said):
            verify_server(pair[1], url, model)

    refused("give an address such as", "file:///etc/passwd")
    refused("cannot be asked", "http://127.0.0.1:1")
    model = load(pair)
    for style in ("silent", "no numbers", "none listed"):
        with serving(model, ONE, style) as url:
            refused("no log-probabilities of completions", url)
    refused("cannot be asked", "http://local host:80")
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        answer = threading.Thread(target=lambda: other.accept()[0].sendall(b"SSH-2.0-x\r\n"))
        answer.start()
        refused("cannot be asked", f"http://127.0.0.1:{other.getsockname()[1]}")
        answer.join()
    with serving(model, ONE, "web page") as url:
        refused("cannot be asked .*is the server up", url)
    with serving(model, ONE) as url:
        refused("answers 404: .*no model other", url, "other")
    with serving(model, [{"id": "a"}, {"id": "b"}]) as url:
        refused("serves a, b: choose with --model", url)
    about = json.loads((pair[1] / "milora.json").read_text())
    for probe in about["probes"]:
        del probe["scaled"]
    (tmp_path / "milora.json").write_text(json.dumps(about))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="no probes for servers: write it anew"):
        verify_server(tmp_path, "http://127.0.0.1:1")


Values = st.lists(st.floats(-9, 0), min_size=12, max_size=12)


@given(Values, Values, st.floats(0.001, 3))
def test_the_scale_is_found(base: list[float], tuned: list[float], scale: float) -> None:
    """Where log-probabilities are linear in the scale, it is read off them."""
    curve = {
        s: [b + s * (t - b) for b, t in zip(base, tuned, strict=True)] for s in (0, 0.5, 1, 2, 4)
    }
    found = at_scale(curve, scale)
    effect = sum(abs(t - b) for b, t in zip(base, tuned, strict=True)) / len(base)
    check = judge(curve, found, 0.1)
    off = abs(scale - 1) * effect
    if off > 0.1 or abs(scale - 1) > 0.26:
        assert not check.holds or effect == 0
    elif abs(scale - 1) < 0.24 and off < 0.09:
        assert check.holds
    if effect > 0.01 and abs(scale - 1) > 0.3 and scale > 0.2:
        assert f"about {scale:.1g}"[:7] in check.detail or "times its scale" in check.detail


def test_an_adapter_that_moves_next_to_nothing_cannot_be_told() -> None:
    curve = {0.0: [-1.0] * 9, 1.0: [-1.001] * 9, 4.0: [-1.004] * 9}
    assert "cannot be told from the base" in judge(curve, [-1.05] * 9, 0.1).detail
    assert not judge(curve, [-1.05] * 9, 0.1).holds
    assert judge(curve, [-1.001] * 9, 0.1).holds
    assert not judge(curve, [-1.0] * 9, 0.1).holds
