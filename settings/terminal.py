"""A command's end, and a terminal that isn't UTF-8.

What such a terminal can't show comes out in ASCII, and never as an error.
"""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata
from collections.abc import Callable

from settings.errors import RelockError

_ERRORS = "relock-ascii"
# One character each, so that tables keep their columns.
_ASCII = {"–": "-", "—": "-", "−": "-", "…": "~", "≤": "<", "≥": ">", "×": "x", "Δ": "d"}
_ASCII |= dict.fromkeys("‘’", "'") | dict.fromkeys("“”", '"') | dict.fromkeys("━─", "-")


def print_in_ascii() -> None:
    """Has the standard output and error write characters that they lack as ASCII ones.

    `rich` draws its boxes in ASCII there by itself.
    """
    codecs.register_error(_ERRORS, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def exit_code(command: Callable[[], int]) -> int:
    """Runs a command that starts no jobs; what a user can mend is a sentence, and Ctrl-C too."""
    print_in_ascii()
    try:
        return command()
    except RelockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(map(_closest, lacking)), error.end


def _closest(character: str) -> str:
    """The ASCII character that is read as this one: a letter without its mark, else "?"."""
    plain = _ASCII.get(character) or unicodedata.normalize("NFKD", character)[:1]
    return plain if plain.isascii() else "?"
