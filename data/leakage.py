"""Leakage: rows that train or calibrate and share their text with an evaluation prompt."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from data.rows import Example, PreferencePair, Prompt

T = TypeVar("T", Example, PreferencePair, Prompt)

_STRAIGHT = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"'})


class Screened(NamedTuple, Generic[T]):
    """The rows that no evaluation prompt repeats, in their order, and how many were dropped."""

    rows: tuple[T, ...]
    leaked: int


def normalise(text: str) -> str:
    """The form in which two texts are compared.

    Case, compatibility forms, typographic quotes, white space and punctuation around the text
    are folded away; punctuation inside stays, since in arithmetic it is the content.
    """
    folded = unicodedata.normalize("NFKC", text.translate(_STRAIGHT)).casefold()
    joined = " ".join(folded.split())
    stripped = joined.strip(" .,;:!?\"'`*_")
    return stripped or joined


def drop_leaked(rows: Sequence[T], evaluation_prompts: Iterable[str]) -> Screened[T]:
    """Drops the rows that ask one of the evaluation's prompts, in any of their turns.

    Texts are compared in their normalised form.
    """
    held_out = {normalise(text) for text in evaluation_prompts}
    clean = tuple(row for row in rows if held_out.isdisjoint(map(normalise, _asked(row))))
    return Screened(clean, len(rows) - len(clean))


def _asked(row: Example | PreferencePair | Prompt) -> list[str]:
    if isinstance(row, Example):
        return [turn.text for turn in row.turns if turn.role == "user"]
    return [row.text if isinstance(row, Prompt) else row.prompt]
