"""Tables of the documents: from the benchmarks to between `<!-- table: NAME -->` and the end."""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from milora.files import write_text


def has_place(text: str, name: str) -> bool:
    return f"<!-- table: {name} -->" in text


def fill(page: Path, tables: Mapping[str, Iterable[str]]) -> None:
    """Put the lines of each table in its place; exits where the page has none."""
    text = page.read_text(encoding="utf-8")
    for name, lines in tables.items():
        before, marker, rest = text.partition(f"<!-- table: {name} -->")
        _, end, after = rest.partition("<!-- end -->")
        if not marker or not end:
            sys.exit(f"{page} has no place for the table {name}")
        text = "\n".join([before + marker, *lines, end + after])
    write_text(page, text)
