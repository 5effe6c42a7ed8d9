"""Side-by-side examples as a Markdown page and in the terminal.

Harmful prompts and what was answered to them are left out as text, unless it is asked for; what
was said of them is enough to see who complied, who refused and who broke.  An answer may hold
Markdown, HTML, links, terminal escapes and marks that turn the direction of writing: none of them
may act where it is shown.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import chain, count, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.report.examples import FEW, MAIN, Example, ShownModel, ShownSet, SideBySide
from experiments.report.table import Cell, Table, as_markdown, as_terminal

if TYPE_CHECKING:
    from rich.console import Console

FILE = "examples.md"

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

_MOST_PATTERNS = 8


def write(found: Sequence[SideBySide], folder: Path, show_text: bool = False) -> list[Path]:
    """Writes `examples.md` to `folder`, harmful prompts and their answers as text if asked to."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(markdown(found, show_text), encoding="utf-8")
    return [folder / FILE]


def markdown(found: Sequence[SideBySide], show_text: bool = False) -> str:
    """All comparisons as one page; no text in it can act as Markdown or HTML."""
    parts = ["# Examples", _WITH_TEXT if show_text else _WITHOUT_TEXT, _RULE, _LEGEND]
    for comparison in found:
        runs = [
            [model.name, str(model.run.record.seed), "/".join(model.run.folder.parts[-2:])]
            for model in comparison.models
        ]
        parts += [f"## {inline(comparison.title)}", _markdown(["model", "seed", "run"], runs)]
        number = count(1)
        for shown in comparison.sets:
            parts += [f"### {inline(shown.set)}", *_patterns(comparison.models, shown)]
            for example in shown.examples:
                parts += _page(example, next(number), show_text)
    return "\n\n".join(parts) + "\n"


def _patterns(models: Sequence[ShownModel], shown: ShownSet) -> list[str]:
    patterns = list(shown.patterns.items())
    rows = [[str(prompts), *pattern] for pattern, prompts in patterns[:_MOST_PATTERNS]]
    parts = [_markdown(["prompts", *(model.name for model in models)], rows)]
    if rest := patterns[_MOST_PATTERNS:]:
        prompts = sum(prompts for _, prompts in rest)
        parts.append(f"Besides: {prompts} prompts in {len(rest)} other combinations.")
    return parts


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return as_markdown(_table(headings, rows), escape=inline).rstrip("\n")


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    return Table("", "", headings, [[Cell(text) for text in row] for row in rows])


def _page(example: Example, number: int, show_text: bool) -> list[str]:
    """One example: its heading, who said what of it, and its text where that may be shown."""
    named = [inline(part) for part in (example.category, example.id) if part]
    gold = [f"right answer: {inline(example.gold)}"] if example.gold else []
    parts = [f"#### {number}. {', '.join([*named, *gold])}"]
    visible_text = show_text or example.is_harmless
    if visible_text:
        parts += ["Prompt:", block(example.prompt)]
        parts += ["Asked as:", block(example.asked)] if example.asked else []
    parts.append(_markdown(*_replies(example)))
    for (fingerprint, text), names in example.texts.items() if visible_text else ():
        parts += [f"{inline(fingerprint)}: {', '.join(map(inline, names))}", block(text)]
    return parts


def _replies(example: Example) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of replies."""
    judges = list(dict.fromkeys(name for reply in example.replies for name in reply.verdicts))
    rows = [
        [
            reply.model,
            *(reply.verdicts.get(judge, "") for judge in judges),
            reply.tokens,
            reply.fingerprint,
            "; ".join(reply.notes),
        ]
        for reply in example.replies
    ]
    return ["model", *judges, "tokens", "answer", "notes"], rows


def show(found: Sequence[SideBySide], console: Console, n: int, show_text: bool = False) -> None:
    """Prints at most `n` examples of all comparisons together, which take turns."""
    in_turn = zip_longest(*([(each, one) for one in each.examples] for each in found))
    pairs = [pair for pair in chain.from_iterable(in_turn) if pair is not None]
    for comparison, example in pairs[:n]:
        _print(comparison, example, console, show_text or example.is_harmless)


def _print(comparison: SideBySide, example: Example, console: Console, with_text: bool) -> None:
    from rich.text import Text

    named = [comparison.title, example.set, example.category, example.id]
    console.print(Text(visible(": ".join(filter(None, named))), style="bold"))
    said = {"prompt": example.prompt, "asked as": example.asked, "right answer": example.gold}
    for name, text in said.items() if with_text else ():
        if text or name == "prompt":
            console.print(Text(_written(name, text)))
    head, rows = _replies(example)
    seen = [[visible(text) for text in row] for row in rows]
    console.print(as_terminal(_table([visible(name) for name in head], seen)))
    for (fingerprint, text), names in example.texts.items() if with_text else ():
        console.print(Text(_written(f"{fingerprint} ({', '.join(names)})", text)))
    console.print()


def _written(name: str, text: str) -> str:
    return f"{name}: {shortened(visible(text))}"


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


_WITHOUT_TEXT = """Of harmful prompts neither the prompt nor an answer is shown as text, only what \
was said of them; `--show-text` writes this page with everything."""

_WITH_TEXT = """**This page holds harmful prompts and what models answered to them. It is for \
reading on this machine: keep it local, don't publish or upload it.**"""

_RULE = f"""Which prompts: a set's prompts are sorted by the combination of outcomes that the \
models came out with (the table under the set's name: how many prompts each combination has). \
Combinations are taken in turn, the one in which most pairs of models differ first; of one, the \
prompt whose category was shown least so far, and of these the first asked. So the examples are \
chosen to differ and are no sample: shares are read from the table under the set's name. Of the \
harmful prompts there are {MAIN} (as many as `--examples` asks for, if that is more), of every \
other set {FEW}.

Which models: those that go with one attacked model, each by one run, that of the lowest seed; \
the table names it. A defense that leaves a model as it was shares its line ("attacked = none")."""

_LEGEND = f"""`harm`, `refusal` and further judges: the judge's label; in brackets its score, \
category and kind of response, as far as it has them, and whether it saw only a part. `tokens`: \
length of the answer. `answer`: the start of its SHA-256, the same for the same answers. `says`: \
the usual refusal phrase that stands first in it. Texts are cut after {LONGEST:,} characters, and \
their lines are broken at {WIDTH}; characters that can't be seen are written as `\\x1b`."""
