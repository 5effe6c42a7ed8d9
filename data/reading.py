"""How a task's answer is read: labels and numbers in free text, strictly and leniently.

Small functions on strings, so that a protocol can combine them in its own way.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal

from data.rows import TaskScore

# Thousands need groups of three, so that "3,5" stays two numbers; a digit inside a word is none.
_NUMBER = re.compile(r"(?<!\w)(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+")

# A minus is a sign where it touches the number and nothing before it can be an operand or a word.
_SIGN = re.compile(r"(?<![\w)\]%])(?<![\d)\]%]\s)-[$€£]?$")

_FINAL_MARKER = re.compile(r"the final answer is:?|####", re.IGNORECASE)


def plain_text(answer: str) -> str:
    """The answer with compatibility forms, typographic minus signs and case folded away."""
    folded = unicodedata.normalize("NFKC", answer).replace("\N{MINUS SIGN}", "-")
    return folded.casefold().strip()


def named_labels(answer: str, labels: Mapping[str, Sequence[str]]) -> set[str]:
    """The labels of which some spelling stands in the answer as a whole word.

    Args:
        answer: Free text.
        labels: Spellings by label; the label itself must be among them if it is to count.
    """
    text = plain_text(answer)
    return {
        label
        for label, spellings in labels.items()
        if any(
            re.search(rf"(?<!\w){re.escape(spelling.casefold())}(?!\w)", text)
            for spelling in spellings
        )
    }


def score_label(answer: str, gold: str, labels: Mapping[str, Sequence[str]]) -> TaskScore:
    """Reads a classification answer.

    Strict: the answer is the gold label and nothing else (case and outer white space aside).
    Lenient: some spelling of the gold label is a word of the answer, and no other label is named.
    Parsed: exactly one label is named; an answer that names several chose none.
    """
    named = named_labels(answer, labels)
    return TaskScore(
        strict=plain_text(answer) == plain_text(gold),
        lenient=named == {gold},
        parsed=len(named) == 1,
    )


def numbers(answer: str) -> list[Decimal]:
    """Every number of a text in its order, without currency signs and thousands separators."""
    text = answer.replace("\N{MINUS SIGN}", "-")
    found = []
    for match in _NUMBER.finditer(text):
        value = Decimal(match.group().replace(",", ""))
        found.append(-value if _SIGN.search(text[: match.start()]) else value)
    return found


def final_number(answer: str) -> Decimal | None:
    """The number that directly follows the last "The final answer is:" or "####", or None."""
    markers = list(_FINAL_MARKER.finditer(answer))
    if not markers:
        return None
    rest = answer[markers[-1].end() :].replace("\N{MINUS SIGN}", "-")
    if not re.match(r"[\s$€£*-]*\.?\d", rest):
        return None
    return numbers(rest)[0]


def score_number(answer: str, gold: str) -> TaskScore:
    """Reads a numeric answer; numbers are compared by value ("$1,000.00" is 1000).

    Strict: the number that directly follows the last final-answer marker is the gold one.
    Lenient: the same, or the last number of an answer that has no such number.
    Parsed: the answer holds a number at all.
    """
    final, every = final_number(answer), numbers(answer)
    read = final if final is not None else (every[-1] if every else None)
    right = Decimal(gold)
    return TaskScore(strict=final == right, lenient=read == right, parsed=read is not None)
