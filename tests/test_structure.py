"""Imports go one way, the public names are a list, and the papers of the project agree."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import milora
import milora.cli

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "milora"

# Each module may import those of earlier lines only.
LAYERS = (
    {
        "errors",
        "files",
        "svd",
        "spectra",
        "progress",
        "pages",
        "quantised",
        "matrices",
        "anchored",
        "vision",
        "costs",
        "processes",
        "allocator",
        "recommended",
        "logits",
    },
    {"anchored_layers", "fingerprints", "rows", "targeting"},
    {"grade", "adapter", "data", "pretrained", "config", "card", "gates", "lineage"},
    {
        "choices",
        "harness",
        "answers",
        "protect",
        "ranks",
        "keep",
        "tokens",
        "checkpoint",
        "classification",
    },
    {"forms", "arguments", "training_state"},
    {"generation", "knowledge"},
    {"export", "evaluate", "loop", "verify", "preview", "chat"},
    {"store", "merge", "server", "result", "approximation", "continual", "transfer", "callbacks"},
    {"material"},
    {"ggufs", "ready", "smaller"},
    {"artefacts", "begin", "inspection"},
    {"train"},
    {"compare_page", "fronts", "estimate", "combine", "compress"},
    {"inspect_page"},
    {"report"},
    {"compare"},
    {"cli"},
    {"__main__", "__init__"},
)
SAME_LAYER = {
    ("config", "grade"), ("config", "gates"),
    ("gates", "card"), ("matrices", "svd"), ("matrices", "quantised"), ("quantised", "errors"),
    ("vision", "errors"), ("vision", "matrices"), ("costs", "errors"), ("costs", "svd"),
    ("processes", "errors"), ("verify", "export"), ("continual", "approximation"),
    ("recommended", "progress"), ("recommended", "errors"), ("recommended", "files"),
    ("files", "errors"),
}  # fmt: skip


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("milora"):
            rest = (node.module or "").partition(".")[2]
            found |= {rest} if rest else {alias.name for alias in node.names}
    return found


def test_imports_go_one_way() -> None:
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    assert set(level) == {path.stem for path in SOURCE.glob("*.py")}
    for path in SOURCE.glob("*.py"):
        for name in imported(path):
            allowed = level[name] < level[path.stem] or (path.stem, name) in SAME_LAYER
            assert allowed, f"{path.stem} imports {name}"


def test_no_catch_all_names() -> None:
    assert not {p.stem for p in SOURCE.rglob("*")} & {"utils", "common", "base", "core", "registry"}


def test_public_names() -> None:
    assert milora.__all__ == sorted(milora.__all__)
    for name in milora.__all__:
        assert getattr(milora, name).__doc__, name


def test_import_milora_is_light() -> None:
    script = "import sys, milora; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_version_and_changelog_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == milora.__version__
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first
    assert first[1] == milora.__version__


def test_links_in_the_documents_resolve() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_documents_name_every_configuration_key() -> None:
    from milora.config import (
        Config,
        Continue,
        Data,
        Evaluate,
        Interference,
        KeepText,
        Milora,
        TaskFile,
        Tasks,
        Tokenizer,
    )

    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for model in (
        Config, Continue, Data, Evaluate, Interference, KeepText, Milora, TaskFile, Tasks,
        Tokenizer,
    ):  # fmt: skip
        for name, field in model.model_fields.items():
            key = field.alias or name
            assert f"`{key}`" in page, key


def test_the_documents_name_every_verb() -> None:
    verbs = {
        command.name or command.callback.__name__ for command in milora.cli.app.registered_commands
    }
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in verbs:
        assert f"milora {verb}" in page, verb
