"""Harmfulness against the share of poison, and against task accuracy with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from evaluation.metric_names import HS
from experiments.report.drawing import (
    GREY,
    TITLE,
    Drawing,
    Scale,
    draw_estimates,
    frame,
    legend,
    margins,
)
from experiments.report.names import plain
from experiments.report.panels import Line, Panel, asked, panels, subject
from experiments.report.pareto import ACCURACY, Choice, choices, front, has_point
from experiments.report.pool import Row
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
_FEASIBLE = "#2FBF94"

Draw = Callable[["Axes", Panel], None]


def ratio_panels(rows: Sequence[Row]) -> list[Panel]:
    """HS against the poison ratio, where there are several: attacked models, editing defenses."""
    shown = [row for row in rows if RATIO in row.settings and not row.is_attacked_again]
    return panels([row for row in shown if row.role != "refined"], rows, axis=(RATIO,))


def trade_off_panels(rows: Sequence[Row]) -> list[Panel]:
    """HS against accuracy: all models; a defense that edited nothing is the attacked one again."""
    shown = [row for row in rows if has_point(row) and not row.is_attacked_again]
    return panels(shown, rows)


def figures(rows: Sequence[Row]) -> Iterator[Drawing]:
    """HS against accuracy and, as far as the runs allow them, poison ratios and a choice."""
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
    measured = [row for row in competing if has_point(row)]
    choice_of = {choice.attacked.family: choice for choice in choosing}

    def draw(axes: Axes, panel: Panel) -> None:
        draw_trade_off(axes, panel)
        choice = choice_of[panel.rows[0].family]
        if choice.searched:
            _draw_objective(axes, choice)

    title = f"Settings of defenses, harmfulness against task accuracy: {subject(competing)}"
    return _drawing("pareto", title, draw, panels(measured, rows, merged=True))


def _drawing(stem: str, title: str, draw: Draw, shown: Sequence[Panel]) -> Drawing:
    size = (max(_WIDE[0], _NARROWEST / min(len(shown), _COLUMNS)), _WIDE[1])
    note = asked(row for panel in shown for row in panel.rows)
    return Drawing(stem, title, draw_panels(draw, shown, size), note)


def draw_panels(draw: Draw, shown: Sequence[Panel], size: tuple[float, float]) -> Figure:
    """Panels of a size in inches side by side over one legend."""
    from matplotlib.figure import Figure

    columns = min(len(shown), _COLUMNS)
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for number, axes in enumerate(grid):
        axes.set_visible(number < len(shown))
        if number < len(shown):
            draw(axes, shown[number])
            axes.set_title(shown[number].title, fontsize=9)
            axes.set_ylabel("" if number % columns else "harmfulness score HS (%)")
            frame(axes)
    legend(figure)
    return figure


def draw_ratio(axes: Axes, panel: Panel) -> None:
    """HS against the poison ratio, with 95 % intervals; points are set apart sideways."""
    scale = Scale([100 * row.settings[RATIO] for row in panel.rows], log=False)
    for number, line in enumerate(panel.lines):
        line.rows.sort(key=lambda row: row.settings[RATIO])
        x = [scale.at(100 * row.settings[RATIO], number, len(panel.lines)) for row in line.rows]
        y = [100 * row.worst_hs.value for row in line.rows]
        axes.plot(x, y, color=line.look["color"], linewidth=1.3, alpha=0.8)
        _draw_points(axes, x, line)
    scale.draw(axes)
    axes.set_xlabel("harmful rows among the fine-tuning rows (%)")


def draw_trade_off(axes: Axes, panel: Panel) -> None:
    """HS against strict task accuracy, with 95 % intervals of both and the defenses' front."""
    for line in panel.lines:
        accuracies = [row.metrics[ACCURACY] for row in line.rows]
        x = [100 * estimate.value for estimate in accuracies]
        _draw_points(axes, x, line, margins(accuracies))
    best = front(panel.rows)
    if len(best) > 1:
        # Between two models of the front nothing better was measured than the worse of either.
        x = [100 * row.metrics[ACCURACY].value for row in best]
        y = [100 * row.worst_hs.value for row in best]
        look: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2, "zorder": 4}
        axes.step(x, y, where="pre", label="Pareto front", **look)
    axes.set_xlabel("task accuracy, strict (%)")


def _draw_points(
    axes: Axes, x: Sequence[float], line: Line, x_margins: list[list[float]] | None = None
) -> None:
    """The points of a line, each with its figures as text."""
    for place, row in enumerate(line.rows):
        at = [x[place]]
        look: dict[str, Any] = {**line.look, "linestyle": "", "markersize": 6}
        look["xerr"] = [[end[place]] for end in x_margins] if x_margins else None
        look["label"] = "" if place else line.name
        draw_estimates(axes, at, [row.worst_hs], **look)[0].set_gid(f"{TITLE}{_figures(line, row)}")
        if row.broken:
            cross: dict[str, Any] = {"color": "black", "markersize": 11, "zorder": 5}
            axes.plot(at, [100 * row.worst_hs.value], "x", label="broken by its repair", **cross)
        if row.worst != HS:
            plainly = row.metrics[str(HS)]
            ends = [100 * row.worst_hs.value, 100 * plainly.value]
            axes.plot(at * 2, ends, ":", color=GREY, linewidth=1)
            draw_estimates(axes, at, [plainly], **line.look, mfc="white")


def _figures(line: Line, row: Row) -> str:
    """What a reader sees who rests the mouse on the point."""
    ratio = ""
    if RATIO in row.settings:
        ratio = f", {plain(round(100 * row.settings[RATIO], 6))} % poison"
    shown = {name.heading: row.metrics[str(name)] for name in (row.worst, HS)}
    shown["accuracy"] = row.metrics[ACCURACY]
    shares = ", ".join(f"{head} {' '.join(each.shown())}" for head, each in shown.items())
    mark = row.broken and f"; broken: {row.broken}"
    return f"{line.name}{ratio}: {shares} (%){mark}"


def _draw_objective(axes: Axes, choice: Choice) -> None:
    """A star at what an objective puts first, and a shade over the accuracies that it allows."""
    objective, best, accuracy = choice.objective, choice.best, choice.attacked.metrics[ACCURACY]
    if (
        isinstance(objective, Constrained)
        and (objective.constraint, objective.reference) == (ACCURACY, "attacked")
        and accuracy.n
    ):
        least = 100 * accuracy.value - objective.within
        right = max(axes.get_xlim()[1], least)
        name = f"accuracy at most {objective.within:g} points below attacked"
        axes.axvspan(least, right, label=name, color=_FEASIBLE, alpha=0.12, linewidth=0, zorder=0)
        axes.set_xlim(right=right)
    if best is not None and has_point(best):
        x, y = 100 * best.metrics[ACCURACY].value, 100 * best.worst_hs.value
        name = f"best by the objective: {choice.name_of(best)}"
        look: dict[str, Any] = {"color": "#FFD23F", "markeredgecolor": "black", "markersize": 16}
        axes.plot(x, y, "*", label=name, zorder=5, **look)
