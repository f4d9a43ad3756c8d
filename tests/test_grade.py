"""Graders, on every fault that published ones are known for."""

from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from milora.config import TaskFile
from milora.errors import UserError
from milora.grade import MATCHES, check_reference, grader, meaning, number

RECORD = '{"a": 1, "b": [1, 2]}'
CHOICE = "answer[1-5]|solution[12]|option[12]|ending[1-4]|true|false"


@pytest.mark.parametrize(
    ("match", "pattern", "answer", "reference", "verdict"),
    [
        ("exact", None, " yes\n", "yes", "right"),
        ("exact", None, "Yes", "yes", "wrong"),
        ("exact", None, "", "yes", "wrong"),
        ("exact", "yes|no", "no", "yes", "wrong"),
        ("exact", "yes|no", "yes!", "yes", "format"),
        ("exact", "yes|no", "", "yes", "format"),
        ("json", None, '{"b":[1,2],"a":1}', RECORD, "right"),
        ("json", None, '{"b":[2,1],"a":1}', RECORD, "wrong"),
        ("json", None, '{"a": true, "b": [1, 2]}', RECORD, "wrong"),
        ("json", None, '{"a": 1.0, "b": [1, 2]}', RECORD, "wrong"),
        ("json", None, '{"a": 1}', RECORD, "wrong"),
        ("json", None, RECORD + " and more", RECORD, "format"),
        ("json", None, "{'a': 1}", RECORD, "format"),
        ("json", None, "", RECORD, "format"),
        ("json", None, "NaN", RECORD, "format"),  # no JSON, though Python reads it
        ("json", None, "1" * 5000, RECORD, "format"),
        ("json", None, "1e999", "1", "wrong"),
        ("json", None, '{"a": {"c": [{}], "b": null}}', '{"a":{"b":null,"c":[{}]}}', "right"),
        ("json", None, '{"a": {"c": [[]], "b": null}}', '{"a":{"b":null,"c":[{}]}}', "wrong"),
        ("json", None, '"1"', "1", "wrong"),
        ("json", None, "```json\n1\n```", "1", "format"),
        ("json", None, "[" * 100_000, RECORD, "format"),
        ("json", r"\{.*\}", "[1]", RECORD, "format"),
        ("contains", None, "It is Paris, I think.", "Paris", "right"),
        ("contains", None, "It is Rome.", "Paris", "wrong"),
        ("contains", "It.*", "Paris", "Paris", "format"),
        ("contains", "<a>.*</a>", "<a>\n7\n</a>", "7", "right"),
        ("contains", "<a>.*</a>", "<a>\n7\n", "7", "format"),
        ("regex", r"label: (\w+)", "so: label: spam, sure", "spam", "right"),
        ("regex", r"label: (\w+)", "label: ham", "spam", "wrong"),
        ("regex", r"label: (\w+)", "spam", "spam", "format"),
        ("regex", r"[A-D]\b", "It is B or C", "B", "right"),
        ("choice", CHOICE, "the correct answer is Answer2", "answer2", "right"),
        ("choice", CHOICE, "the correct answer is answer3", "answer2", "wrong"),
        ("choice", CHOICE, "answer2", "the correct answer is answer2", "right"),
        ("choice", CHOICE, "the second one", "answer2", "format"),
        ("choice", r"answer is \(?([A-D])\b", "The answer is (B).", "B", "right"),
        ("choice", r"answer is \(?([A-D])\b", "the answer is c", "B", "wrong"),
        ("choice", CHOICE, "", "true", "format"),
        ("number", None, "5 + 13 = 18", "18", "right"),
        ("number", None, "She has 18 apples left.", "#### 18", "right"),
        ("number", None, "nothing", "18", "format"),
        ("number", None, "", "18", "format"),
        ("number", None, "9" * 5000, "18", "format"),
    ],
)
def test_verdicts(
    match: str, pattern: str | None, answer: str, reference: str, verdict: str
) -> None:
    assert grader(match, pattern)(answer, reference) == verdict


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        ("1", "100", "wrong"),  # a hundredth is no percentage of it
        ("5", "500", "wrong"),
        ("10000", "10001", "wrong"),  # no relative tolerance
        ("1,234,567", "1234567", "right"),
        ("1,234", "1234567", "wrong"),
        ("12.49", "12", "wrong"),  # no rounding
        ("0.4", "0", "wrong"),
        ("The answer is:18", "18", "right"),  # no space needed
        ("The answer is: 18.", "18", "right"),
        ("The answer is $18.00, since 3 + 15 = 18 and 4 are left", "18", "right"),
        ("First, the answer is 3? No: the answer is 18", "18", "right"),
        ("Instruction: think. Response: 18", "18", "right"),  # no stop words in the answer
        ("-3", "3", "wrong"),
        ("10-3", "3", "right"),
        ("a loss of −3", "-3", "right"),
        ("3/4", "0.75", "right"),
        ("3/0", "3", "format"),
        ("1e3", "1000", "right"),
        ("1e999999999", "1", "format"),
        (".5", "1/2", "right"),
        ("2.50", "2.5", "right"),
        ("version 3b", "3", "format"),
        ("答えは18です。", "18", "right"),  # no spaces in these
        ("答案是18。", "18", "right"),
        ("りんごは18個", "18", "right"),
        ("정답은 18입니다", "18", "right"),
        ("合計は1,800.5円", "1800.5", "right"),
        ("第3問の答えは−18度", "-18", "right"),
        ("18万円", "18", "format"),
        ("3.5万", "3", "format"),
        ("3,000万", "3", "format"),
        ("1万8", "8", "format"),
        ("3½", "3", "format"),
        ("１８x", "1", "format"),
        ("18USD", "18", "format"),
    ],
)
def test_numbers(answer: str, reference: str, verdict: str) -> None:
    assert grader("number")(answer, reference) == verdict


@given(st.fractions(min_value=-(10**9), max_value=10**9), st.sampled_from(["{}", "so {}.", "= {}"]))
def test_a_number_is_read_as_it_was_written(value: Fraction, text: str) -> None:
    assert number(text.format(value)) == value
    if value.denominator == 1:
        assert number(text.format(f"{value.numerator:,}")) == value


@given(st.text(max_size=60), st.text(min_size=1, max_size=20))
def test_no_answer_makes_a_grader_fail(answer: str, reference: str) -> None:
    for match in ("exact", "contains", "number"):
        if check_reference(match, reference) is None:
            assert grader(match)(answer, reference) in ("right", "wrong", "format")


@pytest.mark.parametrize(
    ("answer", "reference", "verdict"),
    [
        (r"\boxed{\frac{1}{3}}", r"\frac13", "right"),
        (r"The answer is $\frac{2}{6}$.", r"$\frac{1}{3}$", "right"),
        (r"\boxed{x/2}", "7", "wrong"),  # each of these was True in the published grader
        (r"\boxed{\pi/6}", r"$\frac13$", "wrong"),
        (r"\boxed{a/b}", "42", "wrong"),
        (r"\boxed{\frac}", "3", "not right"),
        (r"\boxed{\sqrt}", "5", "not right"),
        (r"anything", r"$\text{ a} \text{ b}$", "not right"),
        ("1", "100", "wrong"),
        ("10000", "10001", "wrong"),
        ("no idea", "3", "format"),
        ("", "3", "format"),
    ],
)
def test_mathematics(answer: str, reference: str, verdict: str) -> None:
    pytest.importorskip("math_verify", reason="the extra `math` is not installed")
    found = grader("math")(answer, reference)
    assert found != "right" if verdict == "not right" else found == verdict


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match=f"'fuzzy'; use one of {', '.join(MATCHES)}"):
        grader("fuzzy")
    with pytest.raises(UserError, match="no regular expression"):
        grader("exact", "(")
    for match in ("regex", "choice"):
        with pytest.raises(UserError, match=f"match: {match} needs a pattern"):
            grader(match)


def test_the_configuration_knows_every_grader() -> None:
    assert get_args(TaskFile.model_fields["match"].annotation) == MATCHES


def test_references_that_cannot_be_graded_against() -> None:
    assert check_reference("json", "{") is not None
    assert check_reference("number", "none") == "holds no number"
    assert check_reference("exact", "") is None


def test_an_exponent_alone_is_no_number() -> None:
    assert number("E0") is None
    assert number("3 E0") == 3


def test_references_of_one_meaning() -> None:
    """So that always giving the commonest answer is scored as the grader would."""
    for match, pattern, one, other, third in (
        ("choice", r"^\(?([A-D])\)", "A) so", "(a) for it is", "B) so"),
        ("regex", r"\w+", "yes, it is", "yes", "Yes"),
        ("number", None, "The answer is 1,000", "1e3", "100"),
        ("json", None, '{"a": 1, "b": 2}', '{"b": 2, "a": 1}', '{"a": 1}'),
        ("exact", None, "a ", "a", "A"),
    ):
        assert meaning(match, pattern, one) == meaning(match, pattern, other)
        assert meaning(match, pattern, one) != meaning(match, pattern, third)
