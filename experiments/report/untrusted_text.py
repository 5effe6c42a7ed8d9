"""Text that a model or a data set wrote, shown so that it is nothing but text.

An answer may hold Markdown, HTML, links, terminal escapes and marks that turn the direction of
writing. None of them may act where the answer is shown.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata

LONGEST, WIDTH = 1500, 100
"""After so many characters a text is cut, and after so many of them a line is broken."""

# Controls, format marks (those of direction and hidden ones), private and broken characters, and
# separators that some programs take for line ends.
_ACTIVE = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}
# Line ends; joiners, without which emoji and some scripts fall apart.
_KEPT = {"\n", "\N{ZERO WIDTH NON-JOINER}", "\N{ZERO WIDTH JOINER}"}

# A point or a dash makes neither a link nor emphasis nor a list where it stands inside of a word.
_INERT = re.compile(
    r"""(?:[A-Za-z0-9 ,;:()='"]|(?<=\d)\.(?=\d)|(?<=[A-Za-z0-9])[_-](?=[A-Za-z0-9]))*"""
)


def visible(text: str) -> str:
    """The text with characters that act in place of being seen written out (as "\\x1b").

    Line ends become "\\n" and tabs four spaces.
    """
    plain = re.sub(r"\r\n?", "\n", text).replace("\t", "    ")
    return "".join(
        character
        if character in _KEPT or unicodedata.category(character) not in _ACTIVE
        else character.encode("unicode_escape").decode("ascii")
        for character in plain
    )


def shortened(text: str, longest: int = LONGEST) -> str:
    """The first `longest` characters; what was cut off is counted behind them."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]} [... {len(text) - longest} characters more]"


def inline(text: str, longest: int = 160) -> str:
    """One line of a text for a heading or a table's cell: as it is, or as a Markdown code span.

    What isn't plainly words and numbers becomes a code span. Its pipes become broken bars, since
    Markdown's dialects differ in how a cell escapes one.
    """
    line = " ".join(shortened(visible(text), longest).split()).replace("|", "\N{BROKEN BAR}")
    if _INERT.fullmatch(line):
        return line
    fence = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def block(text: str) -> str:
    """A text as a fenced Markdown code block, which nothing inside can end."""
    lines = [
        part
        for line in shortened(visible(text)).split("\n")
        for part in textwrap.wrap(line, WIDTH) or [""]
    ]
    fence = "`" * max(3, _longest_run(text) + 1)
    return "\n".join([f"{fence}text", *lines, fence])


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
