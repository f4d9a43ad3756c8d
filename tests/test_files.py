"""A file or folder is whole or absent."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from milora.errors import UserError
from milora.files import (
    new_folder,
    read_json,
    read_lines,
    read_record,
    read_yaml,
    write_bytes,
    write_json,
    write_text,
)

HOST = re.sub(r"\W", "-", platform.node())


def test_a_failing_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    def fail_half_way() -> None:
        with new_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("1")
            assert not (tmp_path / "a").exists()
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert not list(tmp_path.iterdir())
    with subprocess.Popen(["true"]) as ended:
        pass
    (tmp_path / f".a.{HOST}.{ended.pid}.tmp").mkdir()  # of a killed process
    for content in ("1", "2"):
        with new_folder(tmp_path / "a") as folder:
            (folder / "x").write_text(content)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "2"


def test_an_error_leaves_the_folder_that_was_there(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")

    def stop() -> None:
        with new_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "1"


def test_left_overs_of_the_dead_go_and_work_of_the_living_stays(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    living = os.getppid()  # another process that makes the same folder
    dead = f"{HOST}.{gone.pid}.tmp"
    stay = [f".a[1].{HOST}.{living}.tmp", f".a[1].b.{dead}", f".a1.{dead}", ".a[1].b.tmp"]
    stay.append(f".a[1].other-host.{os.getpid()}.tmp")  # on a file system that hosts share
    leave = [f".a[1].{dead}", f".a[1].{HOST}.{os.getpid()}.tmp", f".a[1].{HOST}.{gone.pid}.old"]
    leave.append(".a[1].other-host.7.tmp")
    for name in (*stay, *leave):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / leave[-1], (two_days_ago, two_days_ago))
    with new_folder(tmp_path / "a[1]") as folder:
        (folder / "y").write_text("")
    assert {p.name for p in tmp_path.iterdir()} == {*stay, "a[1]"}
    assert [p.name for p in (tmp_path / "a[1]").iterdir()] == ["y"]


def test_two_hosts_with_one_process_number_write_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_folder(tmp_path / "a") as ours:
        (ours / "x").write_text("ours")
        monkeypatch.setattr("platform.node", lambda: "other-host")
        with new_folder(tmp_path / "a") as theirs:
            (theirs / "x").write_text("theirs")
        monkeypatch.undo()
        assert (tmp_path / "a" / "x").read_text() == "theirs"
    assert (tmp_path / "a" / "x").read_text() == "ours"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_json_is_utf8_and_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"ü": 1})
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "ü": 1\n}\n'
    assert read_json(tmp_path / "x.json") == {"ü": 1}


def test_a_line_ends_at_a_line_end_alone(tmp_path: Path) -> None:
    lines = [{"text": f"a{c}b"} for c in "\u2028\u2029\x85\x1c\x0b\r\n"]
    written = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines)
    write_text(tmp_path / "a.jsonl", written)
    assert read_lines(tmp_path / "a.jsonl") == lines


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "[1]", "a: [", "a: 2026-13-45", "[" * 3000])
def test_a_damaged_file_of_ours_is_named(content: str, tmp_path: Path) -> None:
    for name, read in (("config.yaml", read_yaml), ("run.json", read_record)):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name} is damaged \(.*\): put the file as written"):
            read(tmp_path / name)


def test_a_cut_line_is_named(tmp_path: Path) -> None:
    for cut in (b'{"a"', b'"\xff"'):
        (tmp_path / "metrics.jsonl").write_bytes(b'{"a": 1}\n\n' + cut)
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 3 is damaged \(.*\): put the"):
            read_lines(tmp_path / "metrics.jsonl")
