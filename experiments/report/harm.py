"""Harmfulness against the share of poison, and against task accuracy with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evaluation.metric_names import HS
from experiments.report.drawing import (
    GREY,
    TITLE,
    Drawing,
    Scale,
    frame,
    legend,
    legend_entry,
    margins,
)
from experiments.report.panels import Line, Panel, asked, panels, subject
from experiments.report.pareto import ACCURACY, Choice, choices, front, has_point
from experiments.report.pool import Row
from experiments.report.style import plain
from experiments.results.objective import Constrained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RATIO = "attack.poison_ratio"
BY_RATIO = "Harmfulness by share of poison"
TRADE_OFF = "Harmfulness against task accuracy"
NARROW = (4.2, 3.3)
"""Inches of a panel that is read on a phone."""

_WIDE, _NARROWEST = (5.0, 3.9), 7.0
_COLUMNS = 3
_LEGEND_ROW = 0.22
_FEASIBLE = "#2FBF94"
_FRONT = "front: no repair beats these in both"
_PLAIN = "hollow: asked plainly"


def ratio_panels(rows: Sequence[Row]) -> list[Panel]:
    """HS against the poison ratio: the attacked model and every defense that edited something.

    Empty where the runs have one poison ratio.
    """
    shown = [row for row in rows if RATIO in row.settings and not row.is_attacked_again]
    return panels([row for row in shown if row.role != "refined"], rows, axis=(RATIO,))


def trade_off_panels(rows: Sequence[Row]) -> list[Panel]:
    """HS against accuracy: all models; a defense that edited nothing is the attacked one again."""
    shown = [row for row in rows if has_point(row) and not row.is_attacked_again]
    return panels(shown, rows)


def figures(rows: Sequence[Row]) -> Iterator[Drawing]:
    """The figures of HS, as far as the runs allow them.

    "hs_vs_accuracy" is of all models; "hs_vs_poison_ratio" needs runs of several ratios; "pareto"
    several settings of a defense or an objective.
    """
    of = subject(rows)
    trade_off, ratio = trade_off_panels(rows), ratio_panels(rows)
    if trade_off:
        yield _drawing("hs_vs_accuracy", f"{TRADE_OFF}: {of}", draw_trade_off, trade_off)
    if ratio:
        yield _drawing("hs_vs_poison_ratio", f"{BY_RATIO}: {of}", draw_ratio, ratio)
    choosing = [each for each in choices(rows) if each.searched or each.several]
    if choosing:
        yield _pareto(choosing, rows)


def _pareto(choosing: Sequence[Choice], rows: Sequence[Row]) -> Drawing:
    competing = [row for each in choosing for row in (each.attacked, *each.defended)]
    shown = panels(competing, rows, merged=True)
    of_panel = dict(zip(map(id, shown), choosing, strict=True))

    def draw(axes: Axes, panel: Panel) -> dict[str, Any]:
        choice = of_panel[id(panel)]
        drawn = replace(panel, lines=[line for line in map(_with_points, panel.lines) if line.rows])
        keys = draw_trade_off(axes, drawn)
        return keys | _draw_objective(axes, choice) if choice.searched else keys

    title = f"Settings of repairs, harmfulness against task accuracy: {subject(competing)}"
    return _drawing("pareto", title, draw, shown)


def _with_points(line: Line) -> Line:
    return replace(line, rows=[row for row in line.rows if has_point(row)])


def _drawing(
    stem: str,
    title: str,
    draw: Callable[[Axes, Panel], dict[str, Any]],
    shown: Sequence[Panel],
) -> Drawing:
    columns = min(len(shown), _COLUMNS)
    size = (max(_WIDE[0], _NARROWEST / columns), _WIDE[1])
    figure = draw_panels(draw, shown, size)
    return Drawing(stem, title, figure, asked(row for panel in shown for row in panel.rows))


def draw_panels(
    draw: Callable[[Axes, Panel], dict[str, Any]],
    shown: Sequence[Panel],
    size: tuple[float, float],
) -> Figure:
    """Panels side by side over one legend.

    Args:
        draw: Draws a panel and returns what the legend says of it.
        shown: The panels.
        size: Inches of one.
    """
    from matplotlib.figure import Figure

    columns = min(len(shown), _COLUMNS)
    lines = -(-len(shown) // columns)
    figure = Figure(layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    keys: dict[str, Any] = {}
    for axes, panel in zip(grid, shown, strict=False):
        keys |= draw(axes, panel)
        axes.set_title(panel.title, fontsize=9)
    for number, axes in enumerate(grid):
        axes.set_visible(number < len(shown))
        if number % columns:
            axes.set_ylabel("")
    figure.set_size_inches(size[0] * columns, size[1] * lines + _LEGEND_ROW * len(keys))
    legend(figure, keys)
    return figure


def draw_ratio(axes: Axes, panel: Panel) -> dict[str, Any]:
    """HS against the poison ratio, with 95 % intervals; points are set apart sideways."""
    scale = Scale([100 * row.settings[RATIO] for row in panel.rows], log=False)
    keys: dict[str, Any] = {}
    for number, line in enumerate(panel.lines):
        rows = sorted(line.rows, key=lambda row: row.settings[RATIO])
        x = [scale.at(100 * row.settings[RATIO], number, len(panel.lines)) for row in rows]
        y = [100 * row.worst_hs.value for row in rows]
        axes.plot(x, y, color=line.look["color"], linewidth=1.3, alpha=0.8)
        keys |= _draw_points(axes, x, None, replace(line, rows=rows))
        keys[line.name] = legend_entry(line.name, line.look)
    scale.draw(axes)
    axes.set_xlabel("harmful rows among the fine-tuning rows (%)")
    axes.set_ylabel("harmfulness score HS (%)")
    frame(axes)
    return keys


def draw_trade_off(axes: Axes, panel: Panel) -> dict[str, Any]:
    """HS against strict task accuracy with 95 % intervals of both, and the front of the repairs."""
    keys: dict[str, Any] = {}
    for line in panel.lines:
        accuracies = [row.metrics[ACCURACY] for row in line.rows]
        x = [100 * estimate.value for estimate in accuracies]
        keys |= _draw_points(axes, x, margins(accuracies), line)
    best = front(panel.rows)
    if len(best) > 1:
        # Between two models of the front nothing better was measured than the worse of either.
        (drawn,) = axes.step(
            [100 * row.metrics[ACCURACY].value for row in best],
            [100 * row.worst_hs.value for row in best],
            where="pre", color="black", linestyle="--", linewidth=1.2, zorder=4, label=_FRONT,
        )  # fmt: skip
        keys[_FRONT] = drawn
    axes.set_xlabel("task accuracy, strict (%)")
    axes.set_ylabel("harmfulness score HS (%)")
    frame(axes)
    return keys


def _draw_points(
    axes: Axes, x: Sequence[float], x_margins: list[list[float]] | None, line: Line
) -> dict[str, Any]:
    """The points of a line, each with its figures as text, and what the legend says of them."""
    keys: dict[str, Any] = {line.name: legend_entry(line.name, line.look, joined=False)}
    hs = [row.worst_hs for row in line.rows]
    for place, (row, below, above) in enumerate(zip(line.rows, *margins(hs), strict=True)):
        y = 100 * hs[place].value
        bars = axes.errorbar(
            x[place],
            y,
            yerr=[[below], [above]],
            xerr=[[end[place]] for end in x_margins] if x_margins else None,
            linestyle="",
            markersize=6,
            capsize=2.5,
            elinewidth=1,
            alpha=0.9,
            **line.look,
        )
        bars[0].set_gid(f"{TITLE}{_figures(line, row)}")
        if row.worst != HS:
            plainly = row.metrics[str(HS)]
            hollow = {**line.look, "mfc": "white", "markersize": 5, "elinewidth": 0.7}
            axes.plot([x[place]] * 2, [y, 100 * plainly.value], ":", color=GREY, linewidth=1)
            axes.errorbar(x[place], 100 * plainly.value, yerr=margins([plainly]), **hollow)
            keys[_PLAIN] = legend_entry(
                _PLAIN, {"color": GREY, "marker": "o", "mfc": "white"}, joined=False
            )
    return keys


def _figures(line: Line, row: Row) -> str:
    """What a reader sees who rests the mouse on the point."""
    ratio = ""
    if RATIO in row.settings:
        ratio = f", {plain(round(100 * row.settings[RATIO], 6))} % poison"
    shown = {name.heading: row.metrics[str(name)] for name in (row.worst, HS)}
    shown["accuracy"] = row.metrics[ACCURACY]
    shares = ", ".join(f"{head} {' '.join(each.shown())}" for head, each in shown.items())
    return f"{line.name}{ratio}: {shares} (%)"


def _draw_objective(axes: Axes, choice: Choice) -> dict[str, Any]:
    """A star at what an objective puts first, and a shade over the accuracies that it allows."""
    keys: dict[str, Any] = {}
    objective, best, accuracy = choice.objective, choice.best, choice.attacked.metrics[ACCURACY]
    of_accuracy = isinstance(objective, Constrained) and (
        (objective.constraint, objective.reference) == (ACCURACY, "attacked")
    )
    if isinstance(objective, Constrained) and of_accuracy and accuracy.n:
        least = 100 * accuracy.value - objective.within
        right = max(axes.get_xlim()[1], least)
        name = f"accuracy at most {objective.within:g} points below attacked"
        look: dict[str, Any] = {"color": _FEASIBLE, "alpha": 0.12, "linewidth": 0, "zorder": 0}
        keys[name] = axes.axvspan(least, right, label=name, **look)
        axes.set_xlim(right=right)
    if best is not None and has_point(best):
        name = f"best by the objective: {choice.name_of(best)}"
        (keys[name],) = axes.plot(
            100 * best.metrics[ACCURACY].value, 100 * best.worst_hs.value, "*", color="#FFD23F",
            markeredgecolor="black", markersize=16, label=name, zorder=5, linestyle="",
        )  # fmt: skip
    return keys
