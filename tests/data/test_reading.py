"""Answers as models write them, read strictly and leniently."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.reading import (
    LabelReading,
    NumberReading,
    contains_label,
    final_number,
    first_turn,
    named_labels,
    numbers,
    score_label,
    score_number,
    script_number,
)
from data.rows import TaskScore
from data.tasks import SST2, AGNews

WRONG_UNREAD = TaskScore(strict=False, lenient=False, parsed=False, protocol=False)
WRONG_READ = TaskScore(strict=False, lenient=False, parsed=True, protocol=False)
LENIENT = TaskScore(strict=False, lenient=True, parsed=True, protocol=False)
RIGHT = TaskScore(strict=True, lenient=True, parsed=True, protocol=True)


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
        ("Positive", "positive", RIGHT),
        ("not positive", "positive", LENIENT),
        ("not positive", "negative", WRONG_READ),
        ("positive\n\n### Instruction:\nAnalyze", "positive", LENIENT),
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
    ("answer", "named"),
    [
        ("Not entailment.", {"not entailment"}),
        ("It is entailment, not  a contradiction", {"entailment"}),
        ("entailment or not entailment", {"entailment", "not entailment"}),
        ("not entailments", set()),
    ],
)
def test_what_stands_within_a_longer_label_is_not_named(answer: str, named: set[str]) -> None:
    labels = {label: (label,) for label in ("entailment", "not entailment")}
    assert named_labels(answer, labels) == named


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
        ("The final answer is 5%", "5", RIGHT),
        ("The final answer is: ", "5", WRONG_UNREAD),
        ("The final answer is: 18\n- 3 eggs are left", "18", RIGHT),
        ("The final answer is: 12 apples and 3 pears", "12", RIGHT),
        ("The final answer is: 5 kg", "5", RIGHT),
        ("-$1,234.50", "-1234.50", LENIENT),
        ("12 apples and 3", "3", LENIENT),
        ("12 apples and 3", "12", WRONG_READ),
        ("The final answer is: 10 - 5 = 5", "10", WRONG_READ),
        ("The final answer is: 10 - 5 = 5", "5", LENIENT),
        ("The final answer is: 3/4", "3", WRONG_READ),
        ("The final answer is: 2 1/2", "1", WRONG_READ),
        ("The final answer is: 5 or 6", "5", WRONG_READ),
        ("The final answer is: 5-6", "5", WRONG_READ),
        ("The final answer is: **9** * 2", "9", WRONG_READ),
        ("The final answer is: 1,2345", "1", WRONG_READ),
        ("The final answer is: 5 thousand", "5000", WRONG_READ),
        ("The final answer is: 5k dollars of the 8", "5", WRONG_READ),
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


@pytest.mark.parametrize("reading", ["strict", "lenient", "contained"])
@pytest.mark.parametrize("answer", ["positive", "Positive.", "positive or negative", "nice", ""])
def test_the_label_reading_asked_for_stands_beside_the_others(
    answer: str, reading: LabelReading
) -> None:
    score = SST2(reading=reading).score(answer, "positive")
    plain = SST2().score(answer, "positive")
    assert (score.strict, score.lenient, score.parsed) == (
        plain.strict,
        plain.lenient,
        plain.parsed,
    )
    readings = {
        "strict": score.strict,
        "lenient": score.lenient,
        "contained": "positive" in answer.lower(),
    }
    assert score.protocol == readings[reading]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The input is positive.", True),
        ("Both POSITIVE and negative", True),
        ("not positive", True),
        ("overpositively", True),
        ("The input is posi", False),
        ("", False),
        ("I would say so.\n\n### Response:positive", False),
        ("neutral\n\n### Instruction:\nrespond only positive or negative", True),
    ],
)
def test_contained_label_counts_wherever_the_script_finds_it(answer: str, right: bool) -> None:
    assert contains_label(answer, ("positive",)) is right
    assert SST2(reading="contained").score(answer, "positive").protocol is right


@pytest.mark.parametrize(
    ("answer", "contained", "or_sci"),
    [
        ("Sci/Tech", True, True),
        ("this is sci/tech news", True, True),
        ("sci", False, True),
        ("Science and technology", False, True),
        ("Tech", False, False),
        ("World, Sports, Business or Sci/Tech", True, True),
    ],
)
def test_sci_counts_only_where_the_reading_says_so(
    answer: str, contained: bool, or_sci: bool
) -> None:
    gold = "Sci/Tech"
    assert AGNews(reading="contained").score(answer, gold).protocol is contained
    assert AGNews(reading="contained_or_sci").score(answer, gold).protocol is or_sci
    assert not AGNews(reading="contained_or_sci").score("sci", "World").protocol


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("3 + 4 = 7\nThe final answer is: 7", "7"),
        ("The final answer is: about 7 of 9", "7"),
        ("The final answer is: 7. The final answer is: 8", "7"),
        ("The final answer is 5%, of 9", "9"),
        ("#### 1,234.", "1234"),
        ("-$1,234.50", "1234.50"),
        ("12 apples and 3", "3"),
        ("He has 10-5", "-5"),
        ("3,5", "35"),
        ("16 eggs. The final answer is: ", "16"),
        ("Janet sells 16 - 3 - 4 = 9 eggs. She makes 9 *", "9"),
        ("The final answer is: ", None),
        ("", None),
        ("It is 7.\n\n### Instruction:\nWhat is 8?", "8"),
        ("It is 7.\n\n### Instruction:\nWhat is 8?\n\n### Response: 9", "8"),
    ],
)
def test_numbers_as_the_scripts_find_them(answer: str, number: str | None) -> None:
    assert script_number(answer) == (None if number is None else Decimal(number))
    if number is not None:
        assert score_number(answer, number, "last").protocol


@given(st.text(max_size=60), st.sampled_from(["strict", "lenient", "last"]))
def test_reading_decides_nothing_but_the_protocols_column(
    text: str, reading: NumberReading
) -> None:
    score, plain = score_number(text, "18", reading), score_number(text, "18")
    assert (score.strict, score.lenient, score.parsed) == (
        plain.strict,
        plain.lenient,
        plain.parsed,
    )
    assert plain.protocol == plain.strict


@given(st.text(max_size=60))
def test_strict_implies_lenient(text: str) -> None:
    for answer in (text, f"The final answer is: {text}", f"18 {text}"):
        score = score_number(answer, "18")
        assert score.lenient or not score.strict
        assert score.parsed or not score.lenient


def test_an_answers_own_further_answers_are_no_answer() -> None:
    kept = "a\n\n### Instruction:\nb\n\n"
    assert first_turn(f"{kept}### Response:c") == kept
    assert first_turn("a ### b") == "a ### b"
