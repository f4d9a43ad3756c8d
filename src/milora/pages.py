"""HTML pages that need nothing but themselves: templates, and plots as SVG within them."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jinja2
from markupsafe import Markup, escape

INK = "#010203"  # stands for the colour of the text, which the page decides


def render(template: str, **values: Any) -> str:
    """A page from a template in templates/. Text is escaped, and a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("milora", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


@contextmanager
def inked() -> Iterator[None]:
    """Within it matplotlib draws in INK on nothing, and writes text as text.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    empty = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    settings: Any = dict.fromkeys(inks, INK) | dict.fromkeys(empty, "none")
    settings |= {"svg.fonttype": "none", "svg.hashsalt": "milora", "font.family": "sans-serif",
                 "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    with matplotlib.rc_context(settings):
        yield


def svg(figure: Any) -> str:
    """A matplotlib figure, drawn within `inked`, as SVG; equal figures give equal bytes."""
    drawn = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(drawn, format="svg", metadata=nothing)
    return drawn.getvalue()


def standalone(drawing: str) -> str:
    """SVG of `svg` for a file of its own: on white, whatever stands around it."""
    return drawing.replace("<svg ", '<svg style="background: #fff" ', 1)


def inline(drawing: str, label: str) -> Markup:
    """SVG of `svg` for within a page, in the colour of the text around it, with a spoken label."""
    body = drawing[drawing.find("<svg") :] if drawing else ""
    named = f'<svg role="img" aria-label="{escape(label)}" '
    return Markup(body.replace(INK, "currentColor").replace("<svg ", named, 1))
