"""Graders: what an answer is worth, from its text and the reference alone.

A verdict is right, wrong, or format: the answer does not have the form that could be either. What
cannot be read is never right (the published graders of mathematics return True when parsing fails),
and format failures are counted apart, since they tell of the prompt and not of knowledge.
"""

import json
import re
from collections.abc import Callable, Hashable
from fractions import Fraction
from typing import Literal, get_args

from milora.errors import UserError

Verdict = Literal["right", "wrong", "format"]
Grader = Callable[[str, str], Verdict]  # (answer, reference)

Match = Literal["exact", "json", "contains", "regex", "number", "math", "choice", "none"]
MATCHES = get_args(Match)

# Kana, Han and Hangul stand beside a number without a space. Some multiply it: 3万 is not 3.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_MULTIPLY = "十百千万萬亿億兆십백천만억조"
# The last one of a text is taken; thousands may have commas. 3/4 is one number.
_NUMBER = re.compile(
    rf"(?<![^\W{_UNSPACED}])(?<![.{_MULTIPLY}])"
    r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:(?<=\d)\.\d+|(?<!\d)\.\d+)?"
    r"(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?"
    rf"(?![^\W{_UNSPACED}])(?![\d.,]{{0,20}}[{_MULTIPLY}])"
)
_MARKER = re.compile(r"answer\s+is\s*:?", re.IGNORECASE)


def grader(match: str, pattern: str | None = None) -> Grader | None:
    """The grader called `match`; both texts are stripped first.

    exact     the text equals the reference
    json      the parsed values are equal (1, 1.0 and true are three); not JSON: format
    contains  the reference stands in the answer
    regex     the first group of `pattern` (or all of its first match) equals that of the reference
    number    the number after the last "answer is", else the last number, equals the reference's
              last one, exactly; no number: format
    math      equal as mathematics by the math-verify package; unreadable: format
    choice    regex, case aside; for both, no match in the answer: format
    none      no verdict (None is returned): the answers are written down for a judge

    With exact, json, contains, number and math, `pattern` is the form of a whole answer, and what
    does not match it is a format failure.
    """
    if match not in MATCHES:
        raise UserError(f"evaluate.tasks: match is {match!r}; use one of {', '.join(MATCHES)}")
    if match == "none":
        return None
    if match in ("regex", "choice") and not pattern:
        raise UserError(f"evaluate.tasks: match: {match} needs a pattern")
    try:
        form = re.compile(pattern, re.DOTALL) if pattern else None
    except re.error as error:
        raise UserError(
            f"evaluate.tasks: pattern {pattern!r} is no regular expression: {error}"
        ) from error
    compare: Grader = {
        "exact": _exact, "json": _json, "contains": _contains, "number": _number, "math": _math,
    }.get(match, _exact)  # fmt: skip

    def grade(answer: str, reference: str) -> Verdict:
        answer, reference = answer.strip(), reference.strip()
        if form and match in ("regex", "choice"):
            aside = match == "choice"
            taken = _first(form, answer, aside)
            if taken is None:
                return "format"
            plain = reference.casefold() if aside else reference
            return "right" if taken == (_first(form, reference, aside) or plain) else "wrong"
        if form and not form.fullmatch(answer):
            return "format"
        return compare(answer, reference)

    return grade


def meaning(match: str, pattern: str | None, reference: str) -> Hashable:
    """What an answer must come to, to be right by that reference: equal for those that are one."""
    reference = reference.strip()
    if match in ("regex", "choice") and pattern:
        aside = match == "choice"
        plain = reference.casefold() if aside else reference
        return _first(re.compile(pattern, re.DOTALL), reference, aside) or plain
    if match == "number":
        return number(reference)
    return canonical_json(reference) if match == "json" else reference


def check_reference(match: str, reference: str) -> str | None:
    """What is wrong with a reference that cannot be graded against, else None."""
    if match == "json":
        try:
            canonical_json(reference)
        except (ValueError, RecursionError) as error:
            return f"is not JSON: {error}"
    if match == "contains" and not reference.strip():
        return "is empty, which every answer contains"
    if match == "number" and number(reference) is None:
        return "holds no number"
    if match == "math" and not _gold(reference):
        return "cannot be read by math-verify"
    return None


def _exact(answer: str, reference: str) -> Verdict:
    return "right" if answer == reference else "wrong"


def _contains(answer: str, reference: str) -> Verdict:
    return "right" if reference in answer else "wrong"


def _json(answer: str, reference: str) -> Verdict:
    try:
        value = canonical_json(answer)
    except (ValueError, RecursionError):
        return "format"
    return "right" if value == canonical_json(reference) else "wrong"


def canonical_json(text: str) -> str:
    """JSON with its keys in order, as text, so that 1, 1.0 and true are three values."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")  # though Python's parser takes it

    return json.dumps(json.loads(text, parse_constant=refuse), sort_keys=True)


def _number(answer: str, reference: str) -> Verdict:
    value = number(answer)
    if value is None:
        return "format"
    return "right" if value == number(reference) else "wrong"


def number(text: str) -> Fraction | None:
    """The first number after the last "answer is", else the last number of the text, exactly."""
    marks = list(_MARKER.finditer(text))
    after = _numbers(text[marks[-1].end() :]) if marks else []
    if after:
        return after[0]
    anywhere = _numbers(text)
    return anywhere[-1] if anywhere else None


def _numbers(text: str) -> list[Fraction]:
    found = []
    for match in _NUMBER.finditer(text):
        plain = re.sub(r"[,\s]", "", match[0]).replace("−", "-")
        above, slash, below = plain.partition("/")
        # Longer exponents would take the memory of the machine, and Python reads no longer digits.
        mantissa = re.split("[eE]", above)[0]  # "E0" is no number
        if not re.search(r"\d", mantissa) or re.search(r"[eE][-+]?\d{4}|\d{4000}", plain):
            continue
        if slash and int(below) == 0:
            continue
        found.append(Fraction(above) / (int(below) if slash else 1))
    return found


def _math(answer: str, reference: str) -> Verdict:
    from math_verify import verify

    found = _parsed(answer)
    if not found:
        return "format"
    try:
        return "right" if verify(_gold(reference), found) else "wrong"
    except Exception:  # of many kinds, from a timeout to sympy's own: none is a pass
        return "wrong"


def _gold(reference: str) -> list[object]:
    # The answers of MATH are bare LaTeX, which is read as such only between dollars.
    marked = "$" in reference or "\\boxed" in reference
    return _parsed(reference if marked else f"${reference}$")


def _parsed(text: str) -> list[object]:
    try:
        from math_verify import parse
    except ImportError as error:
        raise UserError(
            "match: math needs the math-verify package: pip install 'milora[math]'"
        ) from error
    try:
        return list(parse(text, fallback_mode="no_fallback"))
    except Exception:  # what cannot be read has no value
        return []


def _first(form: re.Pattern[str], text: str, any_case: bool) -> str | None:
    """The first group that took part in the first match, or all of the match."""
    if any_case:
        form = re.compile(form.pattern, form.flags | re.IGNORECASE)
    found = form.search(text)
    if not found:
        return None
    taken: str = next((g for g in found.groups() if g is not None), found[0]).strip()
    return taken.casefold() if any_case else taken
