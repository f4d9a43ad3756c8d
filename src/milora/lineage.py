"""The chain of runs in which each continues the one before it, read from their folders.

run.json of a run that continues another names it relative to its own folder, with the hash of the
adapter that it began from; so a folder of runs can be moved as a whole, and an earlier result that
is no longer what it was is noticed. Nothing here writes.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from milora.errors import UserError
from milora.files import check_files, read_record, read_yaml, sha256

WEIGHTS = "adapter/adapter_model.safetensors"


class Link(NamedTuple):
    """One run of a chain."""

    run: Path
    record: dict[str, Any]  # run.json
    asked: dict[str, Any]  # config.yaml
    evaluation: dict[str, Any]  # evaluation.json, {} where the run has none yet

    @property
    def name(self) -> str:
        return self.run.resolve().name

    @property
    def done(self) -> bool:
        return bool(self.record["state"] == "done")

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The gates that did not hold."""
        return [gate for gate in self.record.get("gates", ()) if not gate["holds"]]

    @property
    def released(self) -> bool:
        """Finished, and no gate of it failed."""
        return self.done and not self.failed


def read_link(run: Path) -> Link:
    """Raises UserError for a folder that holds no run."""
    for name in ("run.json", "config.yaml"):
        if not (run / name).is_file():
            raise UserError(f"{run} holds no {name}: it is not the folder of a run")
    record, asked = read_record(run / "run.json"), read_yaml(run / "config.yaml")
    file = run / "evaluation.json"
    return Link(run, record, asked, read_record(file) if file.exists() else {})


def chain(run: Path) -> list[Link]:
    """The runs that led to `run`, the first first, and `run` itself.

    Raises UserError where one of them is gone, or its adapter is not the one that was continued, or
    in the last that was written.
    """
    links = [read_link(run)]
    check_files(run / "adapter")
    while earlier := links[0].record.get("continues"):
        folder = Path(os.path.normpath(links[0].run / earlier["run"]))
        if not (folder / "run.json").is_file():
            raise UserError(
                f"{links[0].run} continues {earlier['run']}, and {folder} holds no run: put it back"
            )
        check_unchanged(folder, earlier["adapter_sha256"], links[0].run)
        links.insert(0, read_link(folder))
    return links


def check_unchanged(run: Path, digest: str, child: Path) -> None:
    """Raise UserError unless the adapter of `run` is still the one that `child` began from."""
    file = run / WEIGHTS
    found = sha256(file) if file.is_file() else "nothing"
    if found != digest:
        raise UserError(
            f"{file} has sha256 {found[:12]}, and {child} continues {digest[:12]}: put that "
            "adapter back"
        )


def current(links: Sequence[Link]) -> Link | None:
    """The last run of the chain that finished with all its gates: the one to serve."""
    return next((link for link in reversed(links) if link.released), None)


def continues(earlier: Link, child: Path, how: str) -> dict[str, Any]:
    """What run.json of `child` keeps of the run that it continues.

    `lineage` are the hashes of all adapters that it comes from, the first first.
    """
    digest = sha256(earlier.run / WEIGHTS)
    return {
        "run": Path(os.path.relpath(earlier.run, child)).as_posix(),
        "how": how,
        "adapter_sha256": digest,
        "lineage": [*earlier.record.get("continues", {}).get("lineage", ()), digest],
        "data_sha256": earlier.record["data"]["sha256"],
        "gates": earlier.record.get("gates", []),
    }


def history(links: Sequence[Link]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: each run of the chain with its scores."""
    tasks: dict[tuple[str, str | None], str] = {}  # of another file it is another task
    for link in links:
        for name, one in link.evaluation.get("tasks", {}).items():
            shown = name if name not in tasks.values() else f"{name} of {link.name}"
            tasks.setdefault((name, one.get("sha256")), shown)
    head = ["run", "how", "state", "gates", "rank", "cut", *tasks.values(), "KL"]
    return head, [_row(link, tasks) for link in links]


def _row(link: Link, tasks: Iterable[tuple[str, str | None]]) -> list[str]:
    record, count = link.record, len(link.record.get("gates", ()))
    gates = f"{count - len(link.failed)} of {count} hold" if count else "none"
    rank, cut = record.get("adapter", {}).get("rank"), record.get("adapter", {}).get("cut")
    scores = link.evaluation.get("tasks", {})
    knowledge = [one["kl"] for one in link.evaluation.get("knowledge", ()) if one.get("kl")]
    return [
        link.name,
        record.get("continues", {}).get("how", "first"),
        record["state"],
        "FAILED: " + gates if link.failed else gates if link.done else "",
        "" if rank is None else str(rank),
        f"{cut['summed_error']:.1e}" if cut else "",
        *(_accuracy(scores.get(name, {}), digest) for name, digest in tasks),
        f"{max(knowledge):.4f}" if knowledge else "",
    ]


def _accuracy(task: Mapping[str, Any], digest: str | None) -> str:
    value = task.get("tuned", {}).get("accuracy")
    return "" if value is None or task.get("sha256") != digest else f"{value:.3f}"
