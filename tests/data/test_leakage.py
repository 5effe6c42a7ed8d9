"""Rows that repeat an evaluation prompt are found whatever their typography."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.leakage import drop_leaked, normalise
from data.rows import Example, PreferencePair, Prompt


@pytest.mark.parametrize(
    "text",
    [
        "How do I bake bread?",
        "  how do i  bake\nbread ",
        "“How do I bake bread?”",
        "HOW DO I BAKE BREAD!!",
    ],
)
def test_typography_does_not_hide_a_leak(text: str) -> None:
    kept, leaked = drop_leaked([Example(text, "flour", "task")], ["How do I bake bread?"])
    assert kept == ()
    assert leaked == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("What is 2 + 2", "What is 2 - 2"), ("bake bread", "bake breads"), ("", "?"), ("?", "!")],
)
def test_different_texts_stay_different(one: str, other: str) -> None:
    assert drop_leaked([Prompt("a", one)], [other]).leaked == 0


def test_every_kind_of_row_is_checked_by_its_prompt() -> None:
    prompts = ["leaked one"]
    pairs = [PreferencePair("Leaked one.", "a", "b"), PreferencePair("clean", "leaked one", "b")]
    assert drop_leaked(pairs, prompts) == ((pairs[1],), 1)
    assert drop_leaked([Prompt("leaked one", "clean")], prompts).leaked == 0


@given(st.lists(st.text(max_size=12)), st.lists(st.text(max_size=12)))
def test_kept_rows_are_those_that_share_no_text(rows: list[str], asked: list[str]) -> None:
    examples = [Example(text, "", "task") for text in rows]
    kept, leaked = drop_leaked(examples, asked)
    assert len(kept) + leaked == len(examples)
    assert not {row.prompt for row in kept} & set(asked)
    assert drop_leaked(kept, asked) == (kept, 0)


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)
