"""Writing that is whole or absent: a file or a folder appears under its name only when complete."""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from milora.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
A_DAY = 24 * 3600


def cache_folder() -> Path:
    """Where converted models and decompositions live: $MILORA_CACHE, else in the user's cache."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder_of("MILORA_CACHE", user / "milora")


def folder_of(variable: str, default: Path) -> Path:
    """The folder that an environment variable names, else `default`."""
    own = os.environ.get(variable)
    return Path(own).expanduser() if own else default


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step: after a kill the old content or the new is there.

    Folders on the way to it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError for a file that is cut or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error


def read_record(path: Path) -> dict[str, Any]:
    """An object of ours, such as run.json. Raises UserError where the file holds none."""
    if not isinstance(found := read_json(path), dict):
        raise _damaged(path, "it holds no keys")
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a file of ours, such as config.yaml. Raises UserError where it holds none."""
    import yaml  # not before it is needed: --help answers at once

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _damaged(path, why_not_yaml(error)) from error
    if not isinstance(found, dict):
        raise _damaged(path, "it holds no keys")
    return found


def why_not_yaml(error: Exception) -> str:
    """One line, of a YAMLError or of the ValueError that a date or a number ended in."""
    return (
        "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
    )


def read_lines(path: Path) -> list[Any]:
    """The values of a file of ours with one JSON a line. Raises UserError for one that is cut."""
    found = []
    # Not splitlines, which also ends a line at U+2028 and the like, as text of the web has them.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            if line:
                found.append(json.loads(line.decode()))
        except ValueError as error:
            raise _damaged(f"{path}, line {number}", getattr(error, "msg", str(error))) from error
    return found


def _damaged(path: Path | str, why: str) -> UserError:
    return UserError(f"{path} is damaged ({why}): put the file as written back")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a hidden folder beside `path`; it takes the name `path` when the block ends well.

    An existing folder at `path` is replaced, at the last moment. On an error nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for found in path.parent.iterdir():
        if _is_left_over(found, path.name):
            shutil.rmtree(found, ignore_errors=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            old = temporary.with_suffix(".old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """Hidden beside `path`, of this process here: other hosts have the same process numbers."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.tmp")


def _host() -> str:
    return re.sub(r"\W", "-", platform.node())


def _is_left_over(found: Path, name: str) -> bool:
    """Whether a killed process left it: one of this host, or of another where a day has gone."""
    ours = re.fullmatch(rf"\.{re.escape(name)}\.([\w-]*)\.(\d+)\.(tmp|old)", found.name)
    if not ours:
        return False
    if ours[1] == _host():
        return not _runs(ours[2])
    try:
        return time.time() - found.stat().st_mtime > A_DAY
    except FileNotFoundError:
        return False


def _runs(process: str) -> bool:
    if int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)  # signal 0 only asks
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def why_no_file(path: Path) -> str:
    return "is a folder: name a file in it" if path.is_dir() else "does not exist"


@contextmanager
def locked(path: Path, busy: Exception | None = None) -> Iterator[None]:
    """One process at a time is inside, by a lock on the file `path`, which is gone afterwards.

    Where another is inside `busy` is raised, or without it waited. Where there are no locks, or
    nothing can be written, nothing is locked.
    """
    lock = FileLock(path, blocking=busy is None)
    try:
        lock.acquire()
    except Timeout as error:
        assert busy is not None
        raise busy from error
    except (NotImplementedError, OSError):  # of platforms and file systems
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def files_sha256(folder: Path) -> dict[str, str]:
    """The hash of each file of weights in a folder, by its name."""
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def changed_files(folder: Path, stored: Mapping[str, Any]) -> list[str]:
    """The files of weights that are not as `stored`, milora.json of the folder, has their hashes;
    none by older ones, which have no hashes."""
    if "files_sha256" not in stored:
        return []
    wanted, found = stored["files_sha256"], files_sha256(folder)
    return sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))


def check_files(folder: Path) -> None:
    """Raise UserError unless the weights in an adapter's folder are those that were written.

    So that nothing is made of others that would say to be of them. Adapters of other tools have no
    record of that.
    """
    record = folder / "milora.json"
    if record.is_file() and (off := changed_files(folder, read_record(record))):
        file = folder / off[0]
        raise UserError(
            f"{file} {'is not as it was written' if file.exists() else 'is gone'} (its sha256 is "
            f"not the one in {record}): put the file as written back"
        )
