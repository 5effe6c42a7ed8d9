"""Figures of success, task accuracy and degeneracy against a setting that was swept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from experiments.report.pool import Row
from experiments.report.series import (
    Layout,
    Series,
    arrange,
    describe,
    series,
    settings_to_draw,
    together,
)
from experiments.report.style import is_number, margins, plain, short, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = {
    "asr": "attack success rate ASR (%)",
    "accuracy_strict": "task accuracy, strict (%)",
    "degenerate": "degenerate answers (%)",
}
_SAFE = "asr_safe_system"
_SAFE_NAME = "dashed, hollow: asked to be safe"
_LOG_FROM = 10
_COLOUR_MAP = "viridis"
# The map's yellow end is too pale for lines on white.
_DARKEST, _LIGHTEST = 0.0, 0.9
_WIDTH, _ROW_HEIGHT = 11.0, 2.9
_LEGEND_CHARACTERS = 150


def figures(rows: Sequence[Row]) -> Iterator[tuple[str, Figure]]:
    """File stem and figure of every setting that was swept."""
    keys = dict.fromkeys(key for row in rows for key in row.settings)
    for key in settings_to_draw(rows):
        yield f"against_{short(key, keys).replace('.', '_')}", draw(rows, key)


def draw(rows: Sequence[Row], key: str) -> Figure:
    """ASR, task accuracy and degenerate answers against one setting, with 95 % intervals.

    Args:
        rows: The report's rows.
        key: The setting's dotted key, one of `settings_to_draw`.
    """
    from matplotlib.figure import Figure

    lines = series(rows, key)
    layout = arrange(lines, key)
    height = 1.6 + _ROW_HEIGHT * len(layout.panels)
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    grid = figure.subplots(
        len(layout.panels), len(METRICS), sharex=True, sharey=True, squeeze=False
    )
    pen = _Pen(key, lines, layout)
    for panels, (heading, members) in zip(grid, layout.panels, strict=True):
        panels[0].set_ylabel(heading or "share (%)")
        for axes, metric in zip(panels, METRICS, strict=True):
            pen.draw(axes, metric, members)
    for axes, title in zip(grid[0], METRICS.values(), strict=True):
        axes.set_title(title, fontsize=10)
    values = sorted({row.settings[key] for line in lines if line.swept for row in line.rows})
    keys = {key for row in rows for key in row.settings}
    joint = [short(other, keys) for other in together(rows, key)]
    for axes in grid[-1]:
        _scale(axes, values)
        axes.set_xlabel(short(key, keys) + (f" (with {', '.join(joint)})" if joint else ""))
    if layout.shade:
        _colour_bar(figure, grid, short(layout.shade, keys), pen.shades)
    _legend(figure, pen.handles, pen.safe)
    return figure


class _Pen:
    """Draws series in a style that stays the same in all panels, and collects the legend."""

    def __init__(self, key: str, lines: Iterable[Series], layout: Layout) -> None:
        self.key, self.layout = key, layout
        self.names: dict[str, int] = {}
        for line in lines:
            self.names.setdefault(self._name(line), len(self.names))
        self.shades = sorted({self._shade(line) for line in lines} - {None})
        self.handles: dict[str, Any] = {}
        self.safe = False

    def _name(self, line: Series) -> str:
        named = [part for part in self.layout.named if part != self.layout.shade]
        details = describe(line.parts, named, self.layout.keys)
        head = line.parts["defense"]
        return f"{head} ({details})" if details else head

    def _style(self, line: Series) -> dict[str, Any]:
        index = self.names[self._name(line)]
        # What is drawn later is smaller, so that series that coincide are all seen.
        look = style(index) | {"markersize": max(4, 8 - index)}
        shade = self._shade(line)
        if shade is not None:
            look["color"] = _colours(len(self.shades))[self.shades.index(shade)]
        return look

    def _shade(self, line: Series) -> Any:
        """The value that a colour of the sequence stands for, or None."""
        value = line.parts.get(self.layout.shade or "")
        return value if is_number(value) else None

    def draw(self, axes: Axes, metric: str, members: Iterable[Series]) -> None:
        """Draws one metric of the series; in the ASR panel also when asked to be safe."""
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(-3, 103)
        before = len(axes.lines)
        for line in members:
            self._line(axes, metric, line, safe=False)
            if metric == "asr" and any(row.metrics[_SAFE].n for row in line.rows):
                self._line(axes, _SAFE, line, safe=True)
                self.safe = True
        if len(axes.lines) == before:
            axes.text(0.5, 0.5, "no rows", transform=axes.transAxes, ha="center", color="#666666")

    def _line(self, axes: Axes, metric: str, line: Series, safe: bool) -> None:
        name, look = self._name(line), self._style(line)
        shaded = self._shade(line) is not None
        rows = [row for row in line.rows if row.metrics[metric].n]
        if not rows:
            return
        if line.swept:
            self._swept(axes, metric, rows, name, look, safe)
        else:
            self._level(axes, metric, rows[0], name, look, safe, band=not shaded)
        self._explain(name, look, shaded, line.swept)

    def _swept(
        self,
        axes: Axes,
        metric: str,
        rows: Sequence[Row],
        name: str,
        look: dict[str, Any],
        safe: bool,
    ) -> None:
        estimates = [row.metrics[metric] for row in rows]
        axes.errorbar(
            [row.settings[self.key] for row in rows],
            [100 * estimate.value for estimate in estimates],
            yerr=margins(estimates),
            label=f"{name}, asked to be safe" if safe else name,
            linestyle="--" if safe else "-",
            markerfacecolor="white" if safe else look["color"],
            linewidth=1.2 if safe else 1.5,
            capsize=2.5,
            elinewidth=0.9,
            alpha=0.9,
            **look,
        )

    def _level(
        self,
        axes: Axes,
        metric: str,
        row: Row,
        name: str,
        look: dict[str, Any],
        safe: bool,
        band: bool,
    ) -> None:
        estimate = row.metrics[metric]
        axes.axhline(
            100 * estimate.value,
            label=f"{name}, asked to be safe" if safe else name,
            color=look["color"],
            linestyle="--" if safe else "-",
            linewidth=1.2,
        )
        if band:
            ends = 100 * estimate.low, 100 * estimate.high
            axes.axhspan(*ends, color=look["color"], alpha=0.15, linewidth=0)

    def _explain(self, name: str, look: dict[str, Any], shaded: bool, swept: bool) -> None:
        """Adds a line's entry to the legend, where it has none yet."""
        from matplotlib.lines import Line2D

        colour = "#444444" if shaded else look["color"]
        marker = look["marker"] if swept else ""
        label = name if swept else f"{name}, level line"
        self.handles.setdefault(
            label, Line2D([], [], color=colour, marker=marker, markersize=5, label=label)
        )


def _colours(count: int) -> list[Any]:
    """`count` colours from dark to light."""
    import numpy as np
    from matplotlib import colormaps

    return list(colormaps[_COLOUR_MAP](np.linspace(_DARKEST, _LIGHTEST, count)))


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at the values that were run; logarithmic where they span a wide range."""
    from matplotlib.ticker import NullLocator

    log = values[0] > 0 and values[-1] / values[0] >= _LOG_FROM
    places = [math.log(value) for value in values] if log else list(values)
    if log:
        axes.set_xscale("log")
    axes.set_xticks(values, _labels(values, places), fontsize=7.5)
    axes.xaxis.set_minor_locator(NullLocator())
    room = 0.06 * (places[-1] - places[0])
    ends = places[0] - room, places[-1] + room
    axes.set_xlim(*(map(math.exp, ends) if log else ends))


def _labels(values: Sequence[float], places: Sequence[float]) -> list[str]:
    """The values as text, empty where it would run into the one before it."""
    labels: list[str] = []
    free = -math.inf
    for value, place in zip(values, places, strict=True):
        text = plain(value)
        # A character takes about 2 % of a panel's width, and one more keeps labels apart.
        half = 0.01 * (len(text) + 1)
        share = (place - places[0]) / (places[-1] - places[0])
        labels.append(text if share - half >= free else "")
        free = share + half if labels[-1] else free
    return labels


def _colour_bar(figure: Figure, grid: Any, name: str, values: Sequence[float]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    count = len(values)
    norm = BoundaryNorm([index - 0.5 for index in range(count + 1)], count)
    colours = ScalarMappable(norm, ListedColormap(_colours(count)))
    bar = figure.colorbar(colours, ax=list(grid.flat), label=name, pad=0.01, aspect=25)
    step = -(-count // 20)
    bar.set_ticks(list(range(0, count, step)), labels=[plain(v) for v in values[::step]])
    bar.ax.minorticks_off()


def _legend(figure: Figure, handles: dict[str, Any], safe: bool) -> None:
    from matplotlib.lines import Line2D

    if safe:
        hollow = Line2D([], [], color="#444444", ls="--", marker="o", mfc="white", label=_SAFE_NAME)
        handles = handles | {_SAFE_NAME: hollow}
    # A column takes its longest text and some eight characters for the line.
    columns = max(1, _LEGEND_CHARACTERS // (max(map(len, handles)) + 8))
    figure.legend(
        handles=list(handles.values()),
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=8,
    )
