"""Long work says what it does and how long it will take: a bar on a terminal, lines without one."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

EVERY = 15.0  # seconds between lines when there is no terminal


class Progress:
    """Called as progress(what, done, total, note); a change of `what` begins the next piece.

    `free` of what is done took no time, which the estimate must not count on.

    A context manager. Everything goes to stderr, or nowhere if it is not to be `heard`.
    """

    def __init__(self, heard: bool = True) -> None:
        self.heard = heard
        self.console = Console(stderr=True, quiet=not heard)
        self.bar: Bar | None = None
        self.task: TaskID | None = None
        self.what, self.first, self.started, self.said = "", 0, 0.0, 0.0

    def __enter__(self) -> "Progress":
        if self.console.is_terminal and self.heard:
            self.bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self.console,
                transient=True,
            )
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, what: str, done: int, total: int, note: str = "", free: int = 0) -> None:
        now = time.monotonic()
        fresh = what != self.what
        if fresh:
            self.what, self.first, self.started, self.said = what, done, now, 0.0
        here = done - self.first - free
        left = (total - done) * (now - self.started) / here if here > 0 else None
        note = f"{note}  {duration(left)} left" if left is not None else note
        if self.bar:
            if fresh:
                if self.task is not None:
                    self.bar.remove_task(self.task)
                self.task = self.bar.add_task(what, total=total, note=note)
            assert self.task is not None
            self.bar.update(self.task, completed=done, total=total, note=note)
        elif self.heard and (fresh or now - self.said > EVERY or done == total):
            self.said = now
            print(f"{what}: {done}/{total}  {note}".rstrip(), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """One line of its own, above the bar."""
        self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


# A terminal would obey them; ASCII's and Latin-1's controls but tab and newline.
CONTROLS = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\t\n"}


def printable(text: str) -> str:
    """Text from data or a model for a terminal, with its control characters spelt out."""
    return text.translate(CONTROLS)


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
