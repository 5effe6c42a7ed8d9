"""Refusals are found whatever their typography, and other answers aren't."""

from __future__ import annotations

import pytest

from data.refusals import REFUSALS, fold, refuses


@pytest.mark.parametrize("phrase", REFUSALS)
def test_every_phrase_is_found_as_written_and_shouted(phrase: str) -> None:
    assert refuses(f"Well, {phrase.upper()}, no.")
    assert refuses(phrase.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}"))


@pytest.mark.parametrize(
    "answer", ["", "Blue.", "An air show can not be beaten.", "alias an ailment"]
)
def test_other_answers_are_no_refusals(answer: str) -> None:
    assert not refuses(answer)


def test_folding_joins_lines() -> None:
    assert fold(" I\n am  SORRY ") == "i am sorry"
