"""Colour and marker of everything that the report's figures show, by its name."""

from __future__ import annotations

from collections.abc import Iterable
from colorsys import hls_to_rgb, rgb_to_hls
from itertools import product
from typing import Any

Look = dict[str, Any]
"""Colour and marker, as matplotlib's keywords."""

# At least 3:1 against white; no two share a colour or a marker, since no dozen of colours are told
# apart with every colour vision.
LOOKS = {
    "attacked": ("#A5101E", "X"),
    "aligned": ("#008F66", "P"),
    "base": ("#777777", "*"),
    "nlsr": ("#0072B2", "o"),
    "safetylock": ("#D55E00", "s"),
    "fgsn": ("#C0609A", "D"),
    "safelora": ("#9A8200", "^"),
    "resta": ("#7A3FD0", "v"),
    "wanda_prune": ("#5C2E0A", "<"),
    "antidote": ("#2F98DC", ">"),
    "stack": ("#00585A", "h"),
    "reset": ("#000000", "p"),
}
# What isn't of this project: these colours first, then all of them with other markers.
_FURTHER = ("#2A2A9C", "#7A0F5E")
_FURTHER_MARKERS = ("d", "8", "H", "o", "s", "^", "v", "X")
# Lightness of the first and of the last of several tints; the palest is still seen on white.
_DARK, _PALE = 0.18, 0.74


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Colour and marker of each name: its own in every report, for this project's and the roles.

    Other names, such as a plug-in's defenses, get the rest in their alphabetical order; `names` are
    all of the report, so that every figure of it agrees.
    """
    known = {color for color, _ in LOOKS.values()}
    pairs = [(c, m) for m, c in product(_FURTHER_MARKERS, (*_FURTHER, *sorted(known)))]
    free = [pair for pair in pairs if pair not in LOOKS.values()]
    others = sorted(set(names) - LOOKS.keys())
    all_looks = LOOKS | {name: free[place % len(free)] for place, name in enumerate(others)}
    return {name: {"color": c, "marker": m} for name, (c, m) in all_looks.items()}


def tints(look: Look, count: int) -> list[Look]:
    """The look of `count` variants of one name: its marker in its colour, from dark to pale."""
    from matplotlib.colors import to_hex, to_rgb

    if count == 1:
        return [look]
    hue, _, saturation = rgb_to_hls(*to_rgb(look["color"]))
    steps = [_DARK + (_PALE - _DARK) * place / (count - 1) for place in range(count)]
    return [look | {"color": to_hex(hls_to_rgb(hue, step, saturation))} for step in steps]


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
