"""What the report's figures share: palette, intervals in per cent, and how a value is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.statistics import Estimate

# Okabe and Ito's palette, told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def style(index: int) -> dict[str, Any]:
    """Colour and marker of the series number `index`, each pair once among 43 series.

    The first colour, mostly that of what others are compared with, is never used again.
    """
    again, place = divmod(max(0, index - 1), len(COLOURS) - 1)
    colour = min(index, place + 1)
    return {"color": COLOURS[colour], "marker": MARKERS[(colour + again) % len(MARKERS)]}


def margins(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Distances from the values to their intervals' ends in per cent: below, then above."""
    below = [max(0.0, 100 * (e.value - e.low)) for e in estimates]
    above = [max(0.0, 100 * (e.high - e.value)) for e in estimates]
    return [below, above]


def plain(value: Any) -> str:
    """A setting's value as a reader writes it: 0.05, 1e-4, 2000, null."""
    if value is None:
        return "null"
    if not is_number(value):
        return str(value)
    if value and not 1e-2 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_number(value: Any) -> bool:
    """Whether a setting's value is a number; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def short(key: str, keys: Iterable[str]) -> str:
    """The last part of a dotted key, or the whole key where another of `keys` ends alike."""
    last = key.rpartition(".")[2]
    return key if sum(other.rpartition(".")[2] == last for other in set(keys)) > 1 else last
