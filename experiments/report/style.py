"""What the report's figures share: palette, intervals in per cent, and how a value is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaluation.statistics import Estimate

# Colours on white and, of the same series, on a dark page: at least 3:1 against either. The first
# seven lean on Okabe and Ito's palette; no fourteen are told apart with every colour vision, which
# is why each has a marker of its own too.
PALETTE = (
    ("#0072B2", "#4DA3E0"),
    ("#D55E00", "#F0803C"),
    ("#008F66", "#2FBF94"),
    ("#C0609A", "#E58CC0"),
    ("#9A8200", "#D9C026"),
    ("#2F98DC", "#9AD6FF"),
    ("#000000", "#FFFFFF"),
    ("#5C2E0A", "#B5805A"),
    ("#2A2A9C", "#6F7BFF"),
    ("#7A3FD0", "#B99AFF"),
    ("#7A0F5E", "#FF4FB0"),
    ("#00585A", "#3FE0D8"),
    ("#A5101E", "#FF7088"),
    ("#777777", "#9A9A9A"),
)
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*", "p", "h", "d", "8")
# As many lines as one panel holds.
COLOURS = tuple(light for light, _ in PALETTE[:7])
# Coprime to the number of markers: so many variants of one colour have markers of their own.
_STEP = 5


def style(index: int, variant: int = 0) -> dict[str, Any]:
    """Colour and marker of the series number `index`; the first 14 share neither with another.

    The first colour, mostly that of what others are compared with, is never used again.

    Args:
        index: Number of the series, or of what several series have in common.
        variant: Which of these it is; it has the same colour and another marker.
    """
    again, place = divmod(max(0, index - 1), len(PALETTE) - 1)
    colour = min(index, place + 1)
    marker = MARKERS[(colour + again + _STEP * variant) % len(MARKERS)]
    return {"color": PALETTE[colour][0], "marker": marker}


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
