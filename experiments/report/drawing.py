"""Headings, frames, x axes and legends, which the report's figures have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from experiments.report.style import Look, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from evaluation.statistics import Estimate

TITLE = "title:"
"""Starts the gid of an artist that shows one row; the rest is its figures as text."""

PER_CENT = (-3, 103)
GREY = "#666666"
# Share of the smallest step between two values over which points of one value are set apart.
_SPREAD = 0.25
_LOG_FROM = 10
# Of the figure's width in inches that a character of a legend takes.
_CHARACTER, _KEY = 0.075, 0.6


@dataclass(frozen=True)
class Drawing:
    """A figure and what stands over it.

    Attributes:
        stem: Names its file.
        title: What it shows, and of which models.
        figure: Without a title of its own.
        note: What else to know of it; "" for nothing.
    """

    stem: str
    title: str
    figure: Figure
    note: str = ""


def file_stem(*parts: str) -> str:
    """A file's name of the parts that aren't empty; values may be paths or text."""
    return "_".join(re.sub(r"[^\w.,=+-]+", "-", p.replace(", ", ",")) for p in parts if p)


class Scale:
    """An x axis of a setting's values, on which the points of several lines stand side by side."""

    def __init__(self, values: Sequence[float], log: bool | None = None) -> None:
        """Places the ticks.

        Args:
            values: What was run.
            log: Whether it is logarithmic; by default where the values span a wide range.
        """
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
        axes.set_xticks(self.values, self._labels(), fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        room = 0.06 * (self.places[-1] - self.places[0]) + 0.2 * self._step
        axes.set_xlim(self._value(self.places[0] - room), self._value(self.places[-1] + room))

    def _labels(self) -> list[str]:
        """The values as text, empty where it would run into the one before it."""
        labels: list[str] = []
        free = -math.inf
        width = self.places[-1] - self.places[0] or 1.0
        for value, place in zip(self.values, self.places, strict=True):
            text = plain(round(value, 9))
            # A character takes about 2 % of a panel's width, and one more keeps labels apart.
            half = 0.01 * (len(text) + 1)
            share = (place - self.places[0]) / width
            labels.append(text if share - half >= free else "")
            free = share + half if labels[-1] else free
        return labels


def margins(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Distances from the values to their intervals' ends in per cent: below, then above."""
    below = [max(0.0, 100 * (e.value - e.low)) for e in estimates]
    above = [max(0.0, 100 * (e.high - e.value)) for e in estimates]
    return [below, above]


def frame(axes: Axes, per_cent: bool = True) -> None:
    """A faint grid behind the points; shares from 0 to 100 %."""
    if per_cent:
        axes.set_ylim(*PER_CENT)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_entry(name: str, look: Look, joined: bool = True) -> Line2D:
    """An entry of a legend."""
    from matplotlib.lines import Line2D

    whole = {"markersize": 6, "linestyle": "-" if joined else "", **look}
    return Line2D([], [], label=name, **whole)


def legend(figure: Figure, keys: Mapping[str, Any]) -> None:
    """The legend under the panels, in as many columns as fit."""
    width = _CHARACTER * max(map(len, keys), default=1) + _KEY
    rows = -(-len(keys) // max(1, int(figure.get_figwidth() // width)))
    columns = -(-len(keys) // max(1, rows))
    place: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
    figure.legend(handles=list(keys.values()), ncols=columns, **place)
