"""Invariant 7 on the command itself: one sentence, exit code 2, and nothing written."""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_run import write_rows
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from milora.cli import _print_table, main
from milora.compare_page import Table

Tiny = Callable[[str], Path]


class Command:
    """Runs `milora ...` in this process, in a folder of its own."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.model, self.capsys = folder, model, capsys
        write_rows(folder / "rows.jsonl")

    def config(self, **changes: Any) -> str:
        values: dict[str, Any] = {
            "model": str(self.model),
            "output_dir": "run",
            "data": {"train": "rows.jsonl", "eval": 0.2, "max_length": 64},
            "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
            "training": {"max_steps": 2, "per_device_train_batch_size": 4},
            "evaluate": {"tasks": ["rows.jsonl"], "chunks": 1},
        }
        for key, value in changes.items():
            values[key] = values[key] | value if isinstance(values.get(key), dict) else value
        (self.folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        return "run.yaml"

    def __call__(self, *words: str) -> tuple[int, str, str]:
        sys.argv = ["milora", *words]
        self.capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = self.capsys.readouterr()
        return code, out, err

    def refused(self, *words: str) -> str:
        """The one sentence; nothing but the inputs may be in the folder."""
        before = {p for p in self.folder.rglob("*")}
        code, _, err = self(*words)
        assert code == 2, err
        assert "Traceback" not in err
        last = err.strip().splitlines()[-1]
        assert last.startswith("milora: ")
        assert {p for p in self.folder.rglob("*")} == before
        return last


@pytest.fixture
def command(
    tmp_path: Path,
    tiny: Tiny,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    return Command(tmp_path, tiny("llama"), capsys)


@pytest.mark.slow
def test_a_whole_run_and_what_follows(command: Command) -> None:
    config = command.config()
    code, out, err = command("train", config, "--dry-run")
    assert code == 0
    assert "⟦0</s>⟧" in out
    shown = [line.split() for line in out.splitlines()]
    assert ["q_proj", *["2", "of", "2", "2,048", "of", "2,048", "100.0%"]] in shown
    assert ["k_proj", *["0", "of", "2", "0", "of", "1,024", "0.0%"]] in shown
    assert "never adapted: embed_tokens (8,256)" in out
    assert "19 rows kept, 0 shortened to 64 tokens, 0 refused" in err
    assert not Path("run").exists()
    code, out, err = command("train", config, "training.learning_rate=1e-3")
    assert code == 0
    assert "step 0: adapted and base logits differ by" in err
    assert "training: 2/2" in err
    assert "The result: run/adapter" in out
    assert "KL(base‖tuned)" in out
    assert yaml.safe_load(Path("run/config.yaml").read_text())["training"]["learning_rate"] == 1e-3
    code, out, _ = command("verify", "run/adapter")
    assert code == 0
    assert out.count("ok  ") == 7
    code, out, _ = command("eval", "run", "--limit", "3", "--out", "again.json")
    assert code == 0
    assert "rows: accuracy of 3" in out
    again = json.loads(Path("again.json").read_text())["tasks"]["rows"]
    assert (again["rows"], again["in_training"]) == (3, 2)  # of the third it was held out
    assert "warning: 2 questions of rows also stand in the training rows" in out
    Path("copy.txt").write_bytes(Path("rows.jsonl").read_bytes())
    said = command.refused("eval", "run", "--knowledge", "copy.txt")
    assert "data.train and evaluate.knowledge both have copy.txt (a copy of rows.jsonl)" in said
    before = json.loads(Path("run/evaluation.json").read_text())
    assert command("eval", "run", "--limit", "2")[0] == 0  # a trial
    assert json.loads(Path("run/evaluation.json").read_text()) == before
    Path("other.jsonl").write_text('{"prompt": "9 =", "completion": "9"}\n')
    code, out, _ = command("eval", "run", "--tasks", "other.jsonl")
    assert code == 0
    assert "written: run/evaluation.json" in out
    after = json.loads(Path("run/evaluation.json").read_text())
    assert after["tasks"]["rows"] == before["tasks"]["rows"]
    assert after["tasks"]["other"]["match"] == "exact"
    assert after["knowledge"] == before["knowledge"]
    assert after["settings"]["dtype"] == before["settings"]["dtype"]
    samples = [json.loads(x)["task"] for x in Path("run/samples.jsonl").read_text().splitlines()]
    assert set(samples) == {"rows", "other"}
    assert command("eval", "run", "--tasks", "other.jsonl")[0] == 0  # in place of itself
    assert len(Path("run/samples.jsonl").read_text().splitlines()) == len(samples)
    assert command("gate", "run", "--gate", "other.accuracy >= base - 1")[0] == 0
    code, out, _ = command("export", "run", "--to", "lora", "--rank", "3", "--out", "small")
    assert code == 0
    assert "plain LoRA of rank 3; relative error" in out
    assert "already holds another run" in command.refused("train", config)
    said = command.refused("train", config, "--resume", "evaluate.chunks=2", "lora.r=2")
    assert "changed: lora.r was 4 and is 2; lora.lora_alpha was" in said
    assert "; evaluate.chunks was 1 and is 2" in said
    assert "are of a model" in command.refused("inspect", "run", "--json", "x.json")
    said = command.refused("compare", config, "--methods", "lora")
    assert "output_dir: run holds a run: compare in another" in said
    assert "run is there twice" in command.refused("combine", "run", "run", "--out", "both")
    assert "--resume: new holds no run yet" in command(
        "train", config, "--resume", "output_dir=new"
    )[2]  # fmt: skip
    Path("run/run.json").write_text("{")
    assert "run/run.json is damaged" in command.refused("gate", "run")


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("train", "milora: stopped; `milora train ... --resume` continues"),
        ("eval", "milora: stopped; the same command continues"),
        ("verify", "milora: stopped"),
    ],
)
def test_what_is_said_when_it_is_stopped(
    verb: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("milora.cli.app", stop)
    monkeypatch.setattr(sys, "argv", ["milora", verb])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip() == said


@pytest.mark.slow
def test_a_dry_run_takes_a_step_as_training_does(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    forward = LlamaMLP.forward

    def watched(layer: Any, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor and x.device.type != "meta":  # a step of values, not of shapes
            seen.append(torch.is_autocast_enabled(x.device.type))
        return forward(layer, x)

    monkeypatch.setattr(LlamaMLP, "forward", watched)
    on = ["training.gradient_checkpointing=true", "training.bf16=true"]
    for further, calls in (([], 4), (on, 8)):  # of two layers, in two batches, then each twice
        seen.clear()
        assert command("train", command.config(dtype="float32"), "--dry-run", *further)[0] == 0
        assert seen == [bool(further)] * calls


def test_controls_in_the_data_do_not_reach_the_terminal(command: Command) -> None:
    rows = [{"prompt": f"{i} =", "completion": "\x1b]0;owned\x07\x1b[2J"} for i in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = command("train", command.config(), "--dry-run")
    assert code == 0
    assert "\x1b" not in out
    assert r"\x1b]0;owned\x07\x1b[2J" in out


def test_eval_of_a_plain_model(command: Command) -> None:
    code, out, _ = command("eval", str(command.model), "--tasks", "rows.jsonl", "--limit", "2")
    assert code == 0
    assert "rows: accuracy of 2" in out


@pytest.mark.slow
def test_scores_are_of_the_file_that_the_task_had(command: Command) -> None:
    tasks = [{"file": "rows.jsonl", "match": "number", "max_new_tokens": 8}]
    assert command("train", command.config(evaluate={"tasks": tasks}))[0] == 0
    for folder in ("o", "p"):
        Path(folder).mkdir()
        write_rows(Path(folder) / "rows.jsonl", 3)
    said = command.refused("eval", "run", "--tasks", "o/rows.jsonl, p/rows.jsonl")
    assert "--tasks: two tasks have one name (rows, rows): rename a file" in said
    said = command.refused("eval", "run", "--tasks", "o/rows.jsonl")
    assert "is not the file that the task rows of run/evaluation.json had" in said
    assert "give it another name, or write elsewhere with --out" in said
    code, out, _ = command("eval", "run", "--tasks", "o/rows.jsonl", "--limit", "2")
    assert (code, "not written, since --limit makes it a trial" in out) == (0, True)
    Path("rows.jsonl").rename("as-it-was.jsonl")
    write_rows(Path("rows.jsonl"), 5)
    for also, said in (
        ([], "is not the file that the task rows of"), (["--all-tasks"], "the task rows of run: "),
    ):  # fmt: skip
        assert said in command.refused("eval", "run", *also)
        assert command("eval", "run", *also, "--out", "now.json")[0] == 0
        assert json.loads(Path("now.json").read_text())["tasks"]["rows"]["rows"] == 5
    Path("as-it-was.jsonl").rename("rows.jsonl")
    Path("run/samples.jsonl").unlink()  # which is no reason to lose an evaluation
    Path("o/rows.jsonl").rename("o/more.jsonl")
    code, out, _ = command("eval", "run", "--tasks", "rows.jsonl, o/more.jsonl")
    assert (code, "written: run/evaluation.json" in out) == (0, True)
    tasks = json.loads(Path("run/evaluation.json").read_text())["tasks"]
    assert {name: task["rows"] for name, task in tasks.items()} == {"rows": 24, "more": 3}
    assert [task["match"] for task in tasks.values()] == ["number", "exact"]  # as the run asks it
    assert command("export", "run", "--to", "merged", "--out", "whole")[0] == 0
    code, out, _ = command("eval", "whole", "--tasks", "rows.jsonl", "--limit", "2")  # a model
    assert (code, "rows: accuracy of 2" in out) == (0, True)
    assert "not written, since whole/evaluation.json is not there: name a file" in out
    long = json.dumps({"prompt": "x" * 600, "completion": "4"})
    Path("long.jsonl").write_text(long + "\n")
    said = command.refused("eval", "run", "--tasks", "long.jsonl")
    assert "long.jsonl, line 1: the question and max_new_tokens (64) are" in said
    assert "the model has 512 positions" in said


@pytest.mark.slow
@pytest.mark.parametrize("method", ["milora", "full"])
def test_a_base_that_has_moved(
    method: str, command: Command, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(command.model, "base")
    assert command("train", command.config(model="./base", method=method))[0] == 0
    Path("base").rename("moved")
    said = command.refused("eval", "run")
    assert "base" in said
    there = "--base", "./moved"
    for words in (["--tasks", "rows.jsonl"], ["--all-tasks"]):
        assert command("eval", "run", *there, *words)[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 + 1 =\n\n"))
    code, out, _ = command("chat", "run", "--max-new-tokens", "3", *there)
    assert (code, out.count("tuned: ")) == (0, 1)
    assert "wrong base: " in command.refused("eval", "run", "--base", str(tiny("qwen2")))
    said = command.refused("eval", "./moved", *there)
    assert "--base: moved is a model, with nothing beneath it: leave it out" in said


@pytest.mark.slow
def test_chat_reads_lines(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    command("train", command.config())
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 + 1 =\n\n"))
    code, out, _ = command("chat", "run", "--max-new-tokens", "3")
    assert code == 0
    assert out.count("base: ") == out.count("tuned: ") == 1
    for typed, said in (
        (b"caf\xe9\n", "the question is not UTF-8: convert it first"),
        (b"x" * 600 + b"\n", "tokens, and the model 512 positions"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        assert said in command.refused("chat", "run", "--max-new-tokens", "3")


DATA = [
    ("missing.jsonl", None, "missing.jsonl does not exist"),
    ("empty.jsonl", "", "empty.jsonl holds no rows"),
    (
        "broken.jsonl",
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl\n',
        "broken.jsonl, line 2 is not JSON",
    ),
    (
        "number.jsonl",
        '{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "b"}\n',
        "number.jsonl, line 2: 'prompt' is an integer 3; a string belongs there",
    ),
    (
        "role.jsonl",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}\n',
        "role.jsonl, line 1, message 2: unknown role 'robot'",
    ),
    (
        "long.jsonl",
        json.dumps({"prompt": "word " * 50, "completion": "b"}) + "\n",
        "long.jsonl: only 0 of 1 rows can be used",
    ),
    ("rows.txt", "text", "rows.txt: use a .jsonl, .json, .csv or .parquet file"),
]


@pytest.mark.parametrize(("name", "content", "said"), DATA)
def test_bad_data(name: str, content: str | None, said: str, command: Command) -> None:
    if content is not None:
        (command.folder / name).write_text(content, encoding="utf-8")
        write_rows(command.folder / "rows.jsonl")
    config = command.config(data={"train": name, "eval": "rows.jsonl"})
    assert said in command.refused("train", config)


CONFIGURATIONS = [
    ({"learning_rat": 1e-4}, "unknown key learning_rat"),
    ({"methud": "milora"}, "unknown key methud, did you mean method?"),
    ({"training": {"learning_rat": 1e-4}}, "training.learning_rat is not a field of Training"),
    ({"training": {"output_dir": "x"}}, "training.output_dir is set by milora"),
    ({"training": {"deepspeed": "z3.json"}}, "training.deepspeed is set by milora: use accelerate"),
    ({"training": {"packing": True}}, "training.packing is not a field of TrainingArguments"),
    ({"training": {"report_to": "nobody"}}, "training.report_to: nobody is not installed"),
    ({"data": {"max_lenght": 5}}, "unknown key data.max_lenght, did you mean max_length?"),
    ({"method": "mirola"}, "method is 'mirola'"),
    ({"lora": {"r": 17}}, "v_proj is 16 x 32: at most 16 fits"),
    ({"lora": {"target_modules": ["q_proj", "nothing"]}}, "'nothing' matches no module"),
    ({"lora": {"target_modules": ["nothing"]}}, "'nothing' matches no module"),
    ({"model": "./no/such/folder"}, "./no/such/folder is not a folder, a .gguf file or a hub id"),
    ({"model": "some/model-that-is-not-here"}, "cannot be loaded"),
    ({"model": "weights.gguf"}, "weights.gguf does not exist"),
    ({"evaluate": {"tasks": ["gsm8k.jsonl"]}}, "gsm8k.jsonl does not exist"),
    (
        {"evaluate": {"tasks": ["rows.jsonl", {"file": "rows.jsonl"}]}},
        "evaluate.tasks: two tasks have one name (rows, rows): set name",
    ),
    ({"evaluate": {"knowledge": "no.txt"}}, "evaluate.knowledge: no.txt does not exist"),
    ({"evaluate": {"knowledge": "."}}, "evaluate.knowledge: . is a folder: name a file in it"),
    ({"evaluate": {"knowledge": "empty.txt"}}, "evaluate.knowledge: empty.txt holds no text"),
    ({"data": {"train": "folder.jsonl"}}, "folder.jsonl is a folder: name a file in it"),
    ({"lora": {"lora_dropout": 2}}, "lora.lora_dropout is 2: a number of at least 0"),
    ({"evaluate": {"tasks": [{"file": "rows.jsonl", "match": "json5"}]}}, "match is 'json5'"),
]


@pytest.mark.parametrize(("changes", "said"), CONFIGURATIONS)
def test_bad_configuration(changes: dict[str, Any], said: str, command: Command) -> None:
    Path("empty.txt").write_text(" \n")
    Path("folder.jsonl").mkdir()
    assert said in command.refused("train", command.config(**changes))


def test_the_configuration_file_itself(command: Command) -> None:
    assert "none.yaml does not exist" in command.refused("train", "none.yaml")
    assert ". is a folder: name a configuration file" in command.refused("train", ".")
    assert "give a configuration" in command.refused("train")
    Path("bad.yaml").write_text("model: a\nmodel: b\n")
    assert "line 2: the key 'model' is given twice" in command.refused("train", "bad.yaml")
    assert "write key=value" in command.refused("train", command.config(), "seed")
    code, out, _ = command("train", "--print-default")
    assert code == 0
    assert yaml.safe_load(out)["method"] == "milora"


def test_a_nan_in_a_weight(command: Command, tiny: Tiny) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    model.save_pretrained("damaged")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained("damaged")
    said = command.refused("train", command.config(model="damaged"))
    assert "model.layers.1.self_attn.v_proj.weight holds NaN or infinite values" in said


@pytest.mark.slow
def test_a_wrong_base_for_an_adapter_and_a_damaged_one(command: Command, tiny: Tiny) -> None:
    command("train", command.config())
    for verb in (("verify", "run", "--base"),):
        said = command.refused(*verb, str(tiny("gpt2")))
        assert said.startswith("milora: wrong base: ")
    assert "not a finished run" in command.refused("verify", str(tiny("llama")))
    assert "is not there" in command.refused("chat", "nowhere")
    path = Path("run/adapter/adapter_model.safetensors")
    changed = {name: 3 * tensor for name, tensor in load_file(path).items()}
    save_file(changed, path, {"format": "pt"})
    code, out, err = command("verify", "run")
    assert (code, "FAIL  probes, tuned" in out) == (2, True)
    assert "is not what it was when it was made: do not use it" in err


@pytest.mark.slow
def test_no_room_on_the_disk(command: Command) -> None:
    """The largest file that may be written is smaller than the adapter: the kernel says no."""
    config = command.config()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        code, _, err = command("train", config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert "no room left to write" in err.strip().splitlines()[-1]
    assert not (command.folder / "run" / "adapter").exists()
    assert not list((command.folder / "run").rglob("*.tmp"))
    assert command("train", config, "--resume")[0] == 0


@pytest.mark.parametrize("writer", ["safetensors", "torch", "tokenizers"])
def test_no_room_as_other_libraries_say_it(
    writer: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = torch.zeros(40_000)
    vocabulary = {str(i): i for i in range(9000)}
    write: dict[str, Callable[[], Any]] = {
        "safetensors": lambda: save_file({"big": big}, "big.safetensors"),
        "torch": lambda: torch.save({"big": big}, "big.pt"),
        "tokenizers": lambda: Tokenizer(BPE(vocab=vocabulary, merges=[])).save("big.json"),
    }
    monkeypatch.setattr("milora.cli.app", write[writer])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code, _, err = command("export")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = "milora: no room left to write: free some space, then start it again"
    assert (code, err.strip().splitlines()[-1]) == (2, said)


def test_tables_keep_their_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file as wide as they are, on a narrow terminal folded."""
    names = [f"model.layers.{i}.mlp.experts.gate_up_proj.127" for i in range(2)]
    head = ["weight", *(f"measure-{i}" for i in range(7))]
    table = Table(head, [[name, *["1.23e-04"] * 7] for name in names])
    monkeypatch.setenv("COLUMNS", "80")
    _print_table(table)
    lines = capsys.readouterr().out.splitlines()
    assert all(
        any(name in line and line.count("1.23e-04") == 7 for line in lines) for name in names
    )
    monkeypatch.setenv("FORCE_COLOR", "1")
    _print_table(table)
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    letters = "".join(out.split())
    assert letters.count("04") == 14
    assert "gate" in letters


@pytest.mark.parametrize(
    "words",
    [
        ("export", "run", "--to", "merged"), ("combine", "run", "run"),
        ("compress", "MODEL", "--bits", "4"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_folder_to_make_is_looked_at_before_the_work(
    words: tuple[str, ...], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = command.refused(*words, "--out", "rows.jsonl/new")
    assert "rows.jsonl/new cannot be written" in said
    (command.folder / "home" / "there").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(command.folder / "home"))
    if words[0] == "export":  # where an existing folder is refused first
        assert f"{command.folder}/home/there exists already" in command.refused(
            *words, "--out=~/there"
        )


def test_options_of_a_server_alone(command: Command) -> None:
    for option in ("--model", "--tolerance"):
        said = command.refused("verify", "run", option, "5")
        assert "add --server, or leave it out" in said


def test_a_folder_that_cannot_be_written(command: Command) -> None:
    Path("file").write_text("")
    said = command.refused("train", command.config(output_dir="file/run"))
    assert "file/run cannot be written: " in said
    assert said.endswith("file is no folder that takes files")


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "MODEL", "--json"), ("inspect", "MODEL", "--html"), ("eval", "MODEL", "--out"),
        ("report", "run", "--out"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_file_to_write_is_looked_at_before_the_work(
    words: tuple[str, ...], command: Command
) -> None:
    words = tuple(str(command.model) if word == "MODEL" else word for word in words)
    (command.folder / "folder").mkdir()
    assert "folder is a folder: name a file in it" in command.refused(*words, "folder")
    said = command.refused(*words, "rows.jsonl/page")
    assert "rows.jsonl/page cannot be written" in said
    if words[0] == "inspect":
        assert command(*words, "new/folder/page")[0] == 0
        assert (command.folder / "new" / "folder" / "page").exists()


def test_help_is_quick_and_imports_no_torch() -> None:
    script = (
        "import sys, milora.cli\nsys.argv = ['milora', '--help']\n"
        "try: milora.cli.main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("train", "eval", "export", "verify", "chat"):
        assert verb in done.stdout


@pytest.mark.parametrize("verb", ["train", "eval", "export", "verify", "chat"])
def test_every_verb_has_help_with_an_example(verb: str, command: Command) -> None:
    code, out, _ = command(verb, "--help")
    assert code == 0
    assert "Example: milora" in out


def test_the_command_is_installed() -> None:
    path = Path(sys.executable).parent / "milora"
    done = subprocess.run([path, "train", "none.yaml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("milora: none.yaml does not exist")
    assert os.access(path, os.X_OK)
