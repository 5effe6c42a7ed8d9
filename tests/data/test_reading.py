"""Answers as models write them, read strictly and leniently."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.reading import final_number, named_labels, numbers, score_label, score_number
from data.rows import TaskScore
from data.tasks import SST2, AGNews

WRONG_UNREAD = TaskScore(strict=False, lenient=False, parsed=False)
WRONG_READ = TaskScore(strict=False, lenient=False, parsed=True)
LENIENT = TaskScore(strict=False, lenient=True, parsed=True)
RIGHT = TaskScore(strict=True, lenient=True, parsed=True)


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("positive", "positive", RIGHT),
        (" Positive\n", "positive", RIGHT),
        ("positive.", "positive", LENIENT),
        ("The input is positive.", "positive", LENIENT),
        ("**Positive**", "positive", LENIENT),
        ("The input is positive.", "negative", WRONG_READ),
        ("both positive and negative", "positive", WRONG_UNREAD),
        ("positively glowing", "positive", WRONG_UNREAD),
        ("The sentiment of the input is posi", "positive", WRONG_UNREAD),
        ("", "positive", WRONG_UNREAD),
        ("neutral", "negative", WRONG_UNREAD),
    ],
)
def test_sentiment_answers(answer: str, gold: str, expected: TaskScore) -> None:
    assert SST2().score(answer, gold) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("Sci/Tech", "Sci/Tech", RIGHT),
        ("sci", "Sci/Tech", LENIENT),
        ("Category: Sci / Tech", "Sci/Tech", LENIENT),
        ("Science and Technology", "Sci/Tech", LENIENT),
        ("Sport", "Sports", LENIENT),
        ("sports", "Sports", RIGHT),
        ("World, Sports, Business or Sci/Tech", "World", WRONG_UNREAD),
        ("conscientious objectors of the worldwide web", "World", WRONG_UNREAD),
    ],
)
def test_topic_answers(answer: str, gold: str, expected: TaskScore) -> None:
    assert AGNews().score(answer, gold) == expected


def test_a_spelling_counts_only_as_a_word() -> None:
    labels = {"a": ("yes",), "b": ("no",)}
    assert named_labels("Yes, nothing else", labels) == {"a"}
    assert score_label("No!", "b", labels) == LENIENT


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("3 + 4 = 7\nThe final answer is: 7", "7", RIGHT),
        ("The final answer is 7", "7", RIGHT),
        ("#### 1,234.", "1234", RIGHT),
        ("The final answer is: $1,000.00", "1000", RIGHT),
        ("The final answer is: **18** dollars", "18", RIGHT),
        ("The final answer is: -5", "-5", RIGHT),
        ("The final answer is: -$5", "-5", RIGHT),
        ("The final answer is: \N{MINUS SIGN}5", "-5", RIGHT),
        ("The final answer is: 4 4", "4", RIGHT),
        ("The final answer is: 4 4", "44", WRONG_READ),
        ("#### 5\n\nSo again, #### 6", "6", RIGHT),
        ("She makes 9 * 2 = 18 dollars", "18", LENIENT),
        ("He has 10-5", "5", LENIENT),
        ("He has 10 - 5", "5", LENIENT),
        ("It fell to -5 degrees", "-5", LENIENT),
        ("Janet sells 16 - 3 - 4 = 9 eggs. She makes 9 *", "18", WRONG_READ),
        ("16 eggs in all. The final answer is:", "16", LENIENT),
        ("The final answer is: eighteen", "18", WRONG_UNREAD),
        ("", "18", WRONG_UNREAD),
        ("I like B2B and H2O", "2", WRONG_UNREAD),
    ],
)
def test_numeric_answers(answer: str, gold: str, expected: TaskScore) -> None:
    assert score_number(answer, gold) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3,5 and 7", ["3", "5", "7"]),
        ("12,345,678.90", ["12345678.90"]),
        ("1234,567", ["1234", "567"]),
        ("costs .5 of it", [".5"]),
        ("50% of 3.0", ["50", "3.0"]),
        ("1,2345", ["1", "2345"]),
        ("(2)-3", ["2", "3"]),
        ("9 -5", ["9", "5"]),
        ("a covid-19 case", ["19"]),
        ("<<16-3-4=9>>9", ["16", "3", "4", "9", "9"]),
    ],
)
def test_numbers_of_a_text(text: str, expected: list[str]) -> None:
    assert numbers(text) == [Decimal(number) for number in expected]


@given(st.integers(-(10**9), 10**9), st.booleans())
def test_every_written_integer_is_read_back(value: int, grouped: bool) -> None:
    written = f"{value:,}" if grouped else str(value)
    assert final_number(f"Steps: 1 + 1 = 2.\nThe final answer is: {written}.") == value
    assert numbers(f"it is {written}")[-1] == value
