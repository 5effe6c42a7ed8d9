"""Looks, headings, frames, x axes and legends, which the report's figures have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from colorsys import hls_to_rgb, rgb_to_hls
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

from experiments.report.names import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure

    from evaluation.statistics import Estimate

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

TITLE = "title:"
"""Starts the gid of an artist that shows one row; the rest is its figures as text."""

GREY = "#666666"
# Share of the smallest step between two values over which points of one value are set apart.
_SPREAD = 0.25
_LOG_FROM = 10
# Of the figure's width in inches that a character of a legend takes.
_CHARACTER, _KEY = 0.08, 0.6
_LEGEND_ROW = 0.22


@dataclass(frozen=True)
class Drawing:
    """A figure without a title of its own, what names its file, and what stands over it."""

    stem: str
    title: str
    figure: Figure
    note: str = ""


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


def file_stem(*parts: str) -> str:
    """A file's name of the parts that aren't empty; values may be paths or text."""
    return "_".join(re.sub(r"[^\w.,=+-]+", "-", p.replace(", ", ",")) for p in parts if p)


class Scale:
    """An x axis of a setting's values, on which the points of several lines stand side by side."""

    def __init__(self, values: Sequence[float], log: bool | None = None) -> None:
        """Places the ticks at what was run; logarithmic by default where values span far."""
        self.values = sorted(set(values))
        wide = self.values[0] > 0 and self.values[-1] / self.values[0] >= _LOG_FROM
        self.log = wide if log is None else log
        self.places = [self._place(value) for value in self.values]
        self._step = min((b - a for a, b in pairwise(self.places)), default=1.0)

    def _place(self, value: float) -> float:
        return math.log(value) if self.log else value

    def _value(self, place: float) -> float:
        return math.exp(place) if self.log else place

    def at(self, value: float, number: int, count: int) -> float:
        """Where the point of the line with that number, of so many, stands."""
        aside = _SPREAD * self._step * ((number + 0.5) / count - 0.5)
        return self._value(self._place(value) + aside)

    def draw(self, axes: Axes) -> None:
        """Ticks at the values that were run."""
        from matplotlib.ticker import NullLocator

        if self.log:
            axes.set_xscale("log")
        names = [plain(round(value, 9)) for value in self.values]
        # A character takes about 2.5 % of a panel's width.
        width = 0.025 * (max(map(len, names)) + 1) * (self.places[-1] - self.places[0])
        axes.set_xticks(self.values, names, rotation=90 if width > self._step else 0)
        axes.xaxis.set_minor_locator(NullLocator())
        room = 0.06 * (self.places[-1] - self.places[0]) + 0.2 * self._step
        axes.set_xlim(self._value(self.places[0] - room), self._value(self.places[-1] + room))


def margins(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Distances from the values to their intervals' ends in per cent: below, then above."""
    below = [max(0.0, 100 * (e.value - e.low)) for e in estimates]
    above = [max(0.0, 100 * (e.high - e.value)) for e in estimates]
    return [below, above]


def frame(axes: Axes, per_cent: bool = True) -> None:
    """A faint grid behind the points; shares from 0 to 100 %."""
    if per_cent:
        axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_estimates(
    axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], **look: Any
) -> ErrorbarContainer:
    """Shares in per cent with their intervals: points and, if not `linestyle=""`, a line."""
    usual: dict[str, Any] = {"markersize": 5, "capsize": 2.5, "elinewidth": 0.9, "alpha": 0.9}
    y = [100 * estimate.value for estimate in estimates]
    return axes.errorbar(x, y, yerr=margins(estimates), **(usual | look))


def say_no_rows(axes: Axes) -> None:
    """What stands in a panel for which nothing was measured."""
    axes.text(0.5, 0.5, "no rows", transform=axes.transAxes, ha="center", color=GREY)


def legend(figure: Figure) -> None:
    """Everything labelled, once, under the panels; the figure grows by its rows."""
    from matplotlib.container import ErrorbarContainer

    keys: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        keys |= dict(zip(labels, handles, strict=True))
    # What was measured comes before what is said of it.
    names = sorted(keys, key=lambda name: not isinstance(keys[name], ErrorbarContainer))
    width = _CHARACTER * max(map(len, names), default=1) + _KEY
    rows = -(-len(names) // max(1, int(figure.get_figwidth() // width)))
    figure.set_figheight(figure.get_figheight() + rows * _LEGEND_ROW)
    place: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9.5}
    columns = -(-len(names) // max(1, rows))
    # Bars would cover the marker.
    points = [keys[name] for name in names]
    points = [point[0] if isinstance(point, ErrorbarContainer) else point for point in points]
    figure.legend(points, names, ncols=columns, **place)
