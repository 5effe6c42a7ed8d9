"""Readings of a task's answers: labels and numbers in free text, strictly and leniently.

Small functions on strings.  `score_label` and `score_number` put the strict and the lenient
reading beside the one that a protocol names, so that a paper's own reading never stands alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Literal

from data.rows import TaskScore

LabelReading = Literal["strict", "lenient", "contained"]
NumberReading = Literal["strict", "lenient", "last"]

# Thousands need groups of three, so that "3,5" stays two numbers; a digit inside a word is none.
_NUMBER = re.compile(r"(?<!\w)(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+")

# A minus is a sign where it touches the number and nothing before it can be an operand or a word.
_SIGN = re.compile(r"(?<![\w)\]%])(?<![\d)\]%]\s)-[$€£]?$")

_FINAL_MARKER = re.compile(r"the final answer is:?|####", re.IGNORECASE)

# What makes a number the start of something else. Line ends are no white space here, since
# "18\n- 3 eggs" is 18 and a list.
_GOES_ON = re.compile(
    r"""
    ,\d                                                   # 1,2345
    | e[-+]?\d | [kmb]\b                                  # 1e3, 5k
    | [^\S\n]+ (?: \d+/\d | hundred\b | thousand\b | [mb]illion\b )         # 2 1/2, 5 thousand
    | [^\S\n]+ (?: or | to | and ) [^\S\n]+ [$€£]?\.?\d                      # 5 or 6
    | \**[^\S\n]* [-+*/×÷^=:–] [^\S\n]*[$€£(]?\.?\d                          # 10 - 5, 3/4, 3:30
    """,
    re.IGNORECASE | re.VERBOSE,
)

_SCRIPT_MARKER = "The final answer is: "
_SCRIPT_NUMBER = re.compile(r"-?\d+\.?\d*")
_NEXT_ANSWER = "### Response:"


def plain_text(answer: str) -> str:
    """The answer with compatibility forms, typographic minus signs and case folded away."""
    folded = unicodedata.normalize("NFKC", answer).replace("\N{MINUS SIGN}", "-")
    return folded.casefold().strip()


def first_turn(answer: str) -> str:
    """The answer up to where the model starts another Alpaca answer of its own.

    The published scripts cut there before they score (NLSR, arXiv 2412.12497); an instruction that
    the model writes before it still counts as the answer's text.
    """
    return answer.partition(_NEXT_ANSWER)[0]


def named_labels(answer: str, labels: Mapping[str, Sequence[str]]) -> set[str]:
    """The labels of which some spelling stands in the answer as a whole word.

    Both are compared as `plain_text`. What stands within a longer label is not named by it: "not
    entailment" isn't "entailment". A label itself must be among its spellings if it is to count.
    """
    text = plain_text(answer)
    found = {
        (label, match.span())
        for label, spellings in labels.items()
        for spelling in spellings
        for match in re.finditer(rf"(?<!\w){re.escape(plain_text(spelling))}(?!\w)", text)
    }
    spans = {span for _, span in found}
    return {label for label, span in found if not any(_within(span, other) for other in spans)}


def _within(span: tuple[int, int], longer: tuple[int, int]) -> bool:
    return longer[0] <= span[0] and span[1] <= longer[1] and span != longer


def contains_label(answer: str, spellings: Sequence[str]) -> bool:
    """Whether some spelling stands anywhere in the answer, even inside a word or beside others.

    The reading of NLSR's scripts (arXiv 2412.12497) and of Booster's (2409.01586) for AG News:
    "both positive and negative" is right for either, and so is "not positive" for positive.
    """
    text = plain_text(first_turn(answer))
    return any(plain_text(spelling) in text for spelling in spellings)


def score_label(
    answer: str,
    gold: str,
    labels: Mapping[str, Sequence[str]],
    reading: LabelReading = "strict",
    contained: Sequence[str] | None = None,
) -> TaskScore:
    """Reads a classification answer.

    Strict: the answer is the gold label and nothing else (case and outer white space aside).
    Lenient: some spelling of the gold label is a word of the answer, and no other label is named.
    Contained: `contains_label`; right even where other labels are named too.
    Parsed: exactly one label is named; an answer that names several chose none.
    Labels of the same `plain_text` are one.

    `labels` are spellings by label for the lenient reading, `contained` those of the gold label for
    the contained one (None: the label itself); `reading` is what `TaskScore.protocol` gives.
    """
    named = {plain_text(label) for label in named_labels(answer, labels)}
    right: dict[LabelReading, bool] = {
        "strict": plain_text(answer) == plain_text(gold),
        "lenient": named == {plain_text(gold)},
        "contained": contains_label(answer, (gold,) if contained is None else contained),
    }
    return TaskScore(right["strict"], right["lenient"], len(named) == 1, right[reading])


def numbers(answer: str) -> list[Decimal]:
    """Every number of a text in its order, without currency signs and thousands separators."""
    text = answer.replace("\N{MINUS SIGN}", "-")
    values = []
    for match in _NUMBER.finditer(text):
        value = Decimal(match.group().replace(",", ""))
        values.append(-value if _SIGN.search(text[: match.start()]) else value)
    return values


def final_number(answer: str) -> Decimal | None:
    """The number that directly follows the last "The final answer is:" or "####", or None.

    A number that goes on as an expression, a fraction, a range or a larger number ("10 - 5 = 5",
    "3/4", "5 thousand") is none: which number was meant is not for a reader to choose.
    """
    markers = list(_FINAL_MARKER.finditer(answer))
    if not markers:
        return None
    rest = answer[markers[-1].end() :].replace("\N{MINUS SIGN}", "-")
    first = _NUMBER.search(rest)
    if not first or re.search(r"[^\s$€£*-]", rest[: first.start()]):
        return None
    if _GOES_ON.match(rest, first.end()):
        return None
    return numbers(rest)[0]


def gold_number(cell: str) -> Decimal | None:
    """The number of a gold answer, as "$1,000" or "12 apples"; None where it isn't just one."""
    return final_number(f"#### {cell}") if len(numbers(cell)) == 1 else None


def script_number(answer: str) -> Decimal | None:
    """The number as the GSM8K scripts of Booster and NLSR read it, or None.

    Commas are dropped, and a minus before a digit is a sign. Of the text between the first
    "The final answer is: " and the next, the first number; without one, the last of the answer.
    Source: arXiv 2409.01586 and 2412.12497.
    """
    text = first_turn(answer).replace(",", "")
    every = _SCRIPT_NUMBER.findall(text)
    _, *after = text.split(_SCRIPT_MARKER)
    marked = _SCRIPT_NUMBER.findall(after[0]) if after else []
    return Decimal(marked[0]) if marked else Decimal(every[-1]) if every else None


def score_number(answer: str, gold: str, reading: NumberReading = "strict") -> TaskScore:
    """Reads a numeric answer; numbers are compared by value ("$1,000.00" is 1000).

    Strict: the number that directly follows the last final-answer marker is the gold one.
    Lenient: the same, or the last number of an answer that has no such number.
    Last: `script_number`.
    Parsed: the answer holds a number at all.

    `gold` has no thousands separators; `reading` is what `TaskScore.protocol` gives.
    """
    final, every = final_number(answer), numbers(answer)
    read = final if final is not None else (every[-1] if every else None)
    gold_number = Decimal(gold)
    right: dict[NumberReading, bool] = {
        "strict": final == gold_number,
        "lenient": read == gold_number,
        "last": script_number(answer) == gold_number,
    }
    return TaskScore(right["strict"], right["lenient"], read is not None, right[reading])
