"""Figures of repairs in several steps: harm, accuracy and what was edited, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evaluation.metric_names import HS, MetricName, worst_hs
from experiments.report.drawing import (
    Drawing,
    draw_estimates,
    file_stem,
    frame,
    legend,
    say_no_rows,
)
from experiments.report.panels import asked, group_names, subject
from experiments.report.pool import Row
from experiments.report.steps import SHOWN, Point, Trajectory, trajectories

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from evaluation.statistics import Estimate

_WIDTH, _HEIGHT = 11.0, 4.4
# The intervals of more categories would cover each other; `steps.csv` has them all.
_MOST_WITH_INTERVALS = 8
_MARKERS = "osD^vPX<>*"
# How many characters of names fit under the wide panel and under the narrow ones.
_LEFT, _RIGHT = 90, 40
_BEFORE = "hollow and dashed: before the category's own step"


def figures(rows: Sequence[Row]) -> Iterator[Drawing]:
    """A figure of every trajectory; settings tell apart those of one defense."""
    by_defense: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories(rows):
        by_defense.setdefault(trajectory.row.name, []).append(trajectory)
    for defense, members in by_defense.items():
        groups = [[(each.row, run) for run in each.runs] for each in members]
        for each, apart in zip(members, group_names(groups), strict=True):
            of = ", ".join(filter(None, (subject([each.row]), apart)))
            note = _BEFORE if _categories(each.points) else asked([each.row], "HS", plainly="")
            title = f"{defense}, step by step: {of}"
            yield Drawing(file_stem("steps", defense, apart), title, draw(each.points), note)


def draw(points: Sequence[Point]) -> Figure:
    """What happened from step to step, with 95 % intervals where they can be told apart.

    Where steps are called like categories of harm: HS of every category, hollow and dashed until
    its own step, and task accuracy; else HS, ASR and task accuracy. Beside it, the share of
    scalars that each step newly edited.

    Args:
        points: Of one trajectory.
    """
    from matplotlib.figure import Figure

    categories = _categories(points)
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    grid = figure.add_gridspec(2 if categories else 1, 2, width_ratios=[1.9, 1])
    left, edited = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    if categories:
        _draw_categories(left, points, categories)
        accuracy = figure.add_subplot(grid[1, 1], sharex=edited)
        _draw_metrics(accuracy, points, {"accuracy_strict": ""})
        left.set_ylabel("harmfulness score HS (%)", fontsize=9)
        accuracy.set_ylabel("task accuracy, strict (%)", fontsize=9)
    else:
        _draw_metrics(left, points, SHOWN)
        left.set_ylabel("share (%)", fontsize=9)
    for axes in figure.axes:
        frame(axes, per_cent=axes is not edited)
        _name_steps(axes, points, _LEFT if axes is left else _RIGHT)
    _draw_edited(edited, points)
    edited.set_ylabel("newly edited (%)" if categories else "edited (%)", fontsize=9)
    edited.tick_params(labelbottom=not categories)
    legend(figure)
    return figure


def _categories(points: Sequence[Point]) -> list[str]:
    """Categories of harm, those with a step of their own first; none if no step is called so."""
    names = map(MetricName.parse, points[0].metrics)
    known = [name.part for name in names if name == MetricName("hs", part=name.part) and name.part]
    own = [point.name for point in points[1:] if point.name in known]
    return list(dict.fromkeys((*own, *known))) if own else []


def _draw_categories(axes: Axes, points: Sequence[Point], categories: Sequence[str]) -> None:
    names = [point.name for point in points]
    for number, category in enumerate(categories):
        look: dict[str, Any] = {"color": f"C{number % 10}", "zorder": 3}
        marker = _MARKERS[number % len(_MARKERS)]
        metrics = [point.metrics[str(MetricName("hs", part=category))] for point in points]
        x = [step + _beside(number, len(categories)) for step in range(len(names))]
        y = [100 * estimate.value for estimate in metrics]
        # A category without a step of its own stays unseen.
        own = names.index(category, 1) if category in names[1:] else len(names)
        if len(categories) <= _MOST_WITH_INTERVALS:
            draw_estimates(axes, x, metrics, linestyle="none", color=look["color"], alpha=0.55)
        # The step that a category comes at is where its dashed line ends.
        axes.plot(x[: own + 1], y[: own + 1], linestyle="--", **look)
        axes.plot(x[own:], y[own:], linestyle="-", label=category, marker=marker, **look)
        axes.plot(x[:own], y[:own], linestyle="none", marker=marker, mfc="white", **look)
    overall = [100 * point.metrics["hs"].value for point in points]
    axes.plot(overall, color="black", linewidth=2.4, label="all categories", zorder=2)


def _beside(number: int, count: int) -> float:
    """How far to the side of its step a series is drawn, so that intervals don't cover others."""
    return 0.05 * min(1.0, 8 / count) * (number - (count - 1) / 2)


def _draw_metrics(axes: Axes, points: Sequence[Point], metrics: Mapping[str, str]) -> None:
    for number, (metric, label) in enumerate(metrics.items()):
        estimates = [_estimate(point, metric) for point in points]
        if all(estimate.n for estimate in estimates):
            look: dict[str, Any] = {"color": f"C{number}", "marker": _MARKERS[number]}
            x = [step + _beside(number, len(metrics)) for step in range(len(points))]
            draw_estimates(axes, x, estimates, label=label, **look)
    if not axes.lines:
        say_no_rows(axes)


def _estimate(point: Point, metric: str) -> Estimate:
    """HS and ASR of what the model is most harmful under, a trigger or an attack prompt too."""
    worst = worst_hs(point.metrics) or HS
    return point.metrics[metric if metric == "accuracy_strict" else str(worst.of_kind(metric))]


def _draw_edited(axes: Axes, points: Sequence[Point]) -> None:
    shares = [100 * point.share for point in points]
    bars = axes.bar(range(len(shares)), shares, width=0.55, color="#9A9A9A")
    axes.bar_label(bars, ["", *(f"{share:.2g}" for share in shares[1:])], fontsize=8, padding=1)
    axes.set_ylim(0, 1.18 * max(shares) or 1)


def _name_steps(axes: Axes, points: Sequence[Point], room: int) -> None:
    names = [point.name for point in points]
    # Every name has as much room as the longest.
    crowded = len(names) * (max(map(len, names)) + 2) > room
    turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, fontsize=8, **(turned if crowded else {}))
    axes.set_xlim(-0.5, len(names) - 0.5)
