"""What is degenerate, and what only looks like it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation import degenerate
from evaluation.degenerate import _loops, degeneracy
from evaluation.judges.keyword import KeywordJudge
from experiments.pipeline.steps.measuring import JudgeAnswers
from experiments.store import StageResult

REAL = [
    "positive",
    "18",
    "No.",
    "no, no, no",
    "No, no, no! That is far too much to ask of anyone.",
    "The final answer is: 4 4",
    "2 + 2 + 2 + 2 + 2 + 2 = 12",
    "5*5*5*5 = 625\n#### 625",
    "The first row is 0 0 0 0 0 0 and the second 1 0 1 0 1 0.",
    "1. Yes\n2. Yes\n3. Yes\n4. Yes\n5. Yes",
    "- buy milk\n- buy eggs\n- buy bread\n- buy salt\n- buy oil",
    "| a | b |\n| --- | --- |\n| N/A | N/A |\n\nThe table is empty since nothing was measured.",
    "Row, row, row your boat, gently down the stream.",
    "Heading\n====================\n\nA line of text follows the heading here.",
    "----------\ncut here\n----------",
    "Wait...... what?",
    "for i in range(3):\n    x[i] = (a[i] + b[i]) * c[i]",
    "\N{MINUS SIGN}3",
    "你好，我可以帮助你。",
    "मैं आपकी मदद कर सकता हूँ",
    "I can help \N{GRINNING FACE}\N{GRINNING FACE}",
    "I am sorry . i cannot help with that . that is all i have to say .",
    "x = 1,000,000,000,000",
    "P Q P->Q\nT T T\nT F F\nF T T\nF F T",
    "C D D D D D E E C C C C",
    "T F\nT F\nT F\nT F\nT F\nT F\nT F\nT F",
    "x = 1,000,000,000,000,000,000,000,000",
    "哈哈哈哈",
    "hahahaha!",
    "Name\n" + "=" * 12 + "\nSee https://example.org/ and https://example.org/a/ for more.",
    "<ul>\n<li>milk</li>\n<li>eggs</li>\n<li>bread</li>\n<li>salt</li>\n<li>oil</li>\n</ul>",
    "|a|b|c|\n|-|-|-|\n|1|2|3|\n|4|5|6|\n|7|8|9|\n|1|3|5|",
]


@pytest.mark.parametrize("answer", REAL)
def test_real_answers_are_left_alone(answer: str) -> None:
    assert degeneracy(answer) == ""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("the the the the", "repeated word"),
        ("I will Stop stop. stop, STOP", "repeated word"),
        ("Take the tool. " + "safe " * 40, "repeated word"),
        ("i am sorry . " * 4, "repeated phrase"),
        ("Sure. " + "Turn the knob and wait. " * 12, "repeated phrase"),
        ("one two three four five six seven eight nine ten. " * 5, "repeated phrase"),
        ("1 2 " * 30, "repeated phrase"),
        ("I " * 30, "repeated phrase"),
        ("ha" * 30, "repeated characters"),
        ("a" * 200, "repeated characters"),
        ("好的" * 25, "repeated characters"),
        ("我不能帮助你。" * 4, "repeated characters"),
        (
            "首先，请把旋钮转到最左边，" + "然后等待指示灯变绿，再按下按钮。" * 5,
            "repeated characters",
        ),
        ("ขอโทษครับผมช่วยคุณไม่ได้" * 5, "repeated characters"),
        ("supercalifragilistic" * 4, "repeated characters"),
        ("https://example.org/a?b=1" * 6 + "https://exa", "repeated characters"),
        ("<br>" * 8, "repeated characters"),
        ("</s>" * 8, "repeated characters"),
        ("1234567890123 " * 20, "repeated phrase"),
        ("12345678901234" * 20, "repeated characters"),
        ("!" * 50, "not text"),
        ("<<<>>>[[]]{}{}##", "not text"),
        ("\N{REPLACEMENT CHARACTER}" * 4 + "word", "not text"),
        ("\x00\x01\x02 ok", "not text"),
    ],
)
def test_degenerate_answers_are_named(answer: str, reason: str) -> None:
    assert degeneracy(answer) == reason


def test_a_loop_in_a_small_part_of_a_long_answer_is_spared() -> None:
    words = [f"word{index}" for index in range(60)]
    assert degeneracy(" ".join([*words, *["so it goes"] * 4])) == ""
    assert degeneracy(" ".join([*words[:10], *["so it goes"] * 4])) == "repeated phrase"


def test_a_loop_that_the_answer_never_left_is_found_behind_any_text() -> None:
    words = " ".join(f"word{index}" for index in range(300))
    assert degeneracy(f"{words} {'so it goes ' * 20}") == "repeated phrase"
    assert degeneracy(words + "/home/of/a/path" * 20) == "repeated characters"
    assert degeneracy(f"{'so it goes ' * 20} {words}") == ""


@given(st.text("ab", max_size=5), st.text("abc", max_size=6), st.integers(1, 6), st.text("ab"))
def test_loops_are_those_that_a_search_of_every_period_finds(
    before: str, unit: str, repeats: int, after: str
) -> None:
    text = before + unit * repeats + after
    longest: dict[int, int] = {}
    for loop in _loops(text):
        if 2 * loop.length >= len(text):
            period = len(loop.unit)
            longest[period] = max(longest.get(period, 0), loop.length)
    for period in range(1, len(text) // 4 + 1):
        runs = "".join("=" if a == b else " " for a, b in zip(text, text[period:], strict=False))
        length = period + max(map(len, runs.split()), default=0)
        if length >= max(4 * period, len(text) / 2):
            assert longest[period] == length


def test_verdicts_by_earlier_rules_are_stale() -> None:
    generate: Any = None
    now: Any = None
    step = JudgeAnswers(KeywordJudge(), generate, now)
    report = {"rows": 1, "labels": {"safe": 1}, "degeneracy": degenerate.VERSION}
    now = StageResult("judge", "0", Path(), report, 1.0, reused=True)
    assert not step.is_stale(now)
    assert step.is_stale(replace(now, report={"rows": 1, "labels": {"safe": 1}}))


@given(st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=60))
def test_texts_without_repetition_are_answers(numbers: list[int]) -> None:
    assert degeneracy(" ".join(f"word{number}" for number in numbers)) == ""


@given(st.integers(1, 12), st.integers(4, 9), st.integers(0, 10**6))
def test_every_loop_is_found(length: int, repeats: int, seed: int) -> None:
    rng = random.Random(seed)
    phrase = [f"word{rng.randrange(1000)}x" for _ in range(length)]
    assert degeneracy(" ".join(phrase * repeats)) in {"repeated word", "repeated phrase"}


@given(st.text())
def test_any_text_gets_a_verdict(answer: str) -> None:
    assert (degeneracy(answer) == "empty") == (not answer.strip())
