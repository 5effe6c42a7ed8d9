"""Leakage: rows that train or calibrate and share their text with an evaluation prompt."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from data.rows import Example, PreferencePair, Prompt

T = TypeVar("T", Example, PreferencePair, Prompt)

_STRAIGHT = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"'})


class Screened(NamedTuple, Generic[T]):
    """What is left of a source after the check.

    Attributes:
        rows: The rows that no evaluation prompt repeats, in their order.
        leaked: How many rows were dropped.
    """

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
    """Drops the rows whose prompt is one of the evaluation's (normalised exact match).

    Args:
        rows: Training or calibration rows.
        evaluation_prompts: The texts of every prompt that the evaluation will use.

    Returns:
        The rows that are left and the count of those dropped, which belongs into the record.
    """
    held_out = {normalise(text) for text in evaluation_prompts}
    clean = tuple(row for row in rows if normalise(_prompt(row)) not in held_out)
    return Screened(clean, len(rows) - len(clean))


def _prompt(row: Example | PreferencePair | Prompt) -> str:
    return row.text if isinstance(row, Prompt) else row.prompt
