"""Figures of repairs in several steps: harm, accuracy and what was edited, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from evaluation.metric_names import HS, worst_hs
from experiments.report.drawing import (
    GREY,
    Drawing,
    file_stem,
    frame,
    legend,
    legend_entry,
    margins,
)
from experiments.report.panels import group_names, subject
from experiments.report.pool import Row
from experiments.report.steps import SHOWN, Point, Trajectory, trajectories

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from evaluation.statistics import Estimate

_CATEGORY = "hs/"
_WIDTH, _HEIGHT = 11.0, 4.8
# The intervals of more categories would cover each other; `steps.csv` has them all.
_MOST_WITH_INTERVALS = 8
_MARKERS = "osD^vPX<>*"
# How many characters of names fit under the wide panel and under the narrow ones.
_LEFT, _RIGHT = 90, 40
_ALL = "all categories"
_RING: dict[str, Any] = {"markersize": 14, "mfc": "none", "clip_on": False}


def figures(rows: Sequence[Row]) -> Iterator[Drawing]:
    """A figure of every trajectory; settings tell apart those of one defense."""
    by_defense: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories(rows):
        by_defense.setdefault(trajectory.row.name, []).append(trajectory)
    for defense, members in by_defense.items():
        groups = [[(each.row, run) for run in each.runs] for each in members]
        for each, apart in zip(members, group_names(groups), strict=True):
            of = ", ".join(filter(None, (subject([each.row]), apart)))
            title = f"{defense}, step by step: {of}"
            yield Drawing(file_stem("steps", defense, apart), title, draw(each), _note(each))


def _note(trajectory: Trajectory) -> str:
    """What HS is of, where a trigger or an attack prompt makes it higher than asked plainly."""
    worst = {worst_hs(point.metrics) for point in trajectory.points} - {HS, None}
    prompts = sorted(f"under {name.attack_prompt}" for name in worst if name)
    ways = " or ".join(["asked plainly", *prompts])
    return f"HS is of what each model is most harmful under: {ways}" if prompts else ""


def draw(trajectory: Trajectory) -> Figure:
    """What happened from step to step, with 95 % intervals where they can be told apart.

    Where steps are called like categories of harm: HS of every category, hollow and dashed until
    its own step, and task accuracy; else HS, ASR and task accuracy. Beside it, the share of
    scalars that each step newly edited.
    """
    from matplotlib.figure import Figure

    categories = _categories(trajectory)
    points = trajectory.points
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    grid = figure.add_gridspec(2 if categories else 1, 2, width_ratios=[1.9, 1])
    left, edited = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    _draw_edited(edited, points, "newly edited (%)" if categories else "edited (%)")
    if categories:
        keys = _draw_categories(left, points, categories)
        accuracy = figure.add_subplot(grid[1, 1], sharex=edited)
        _draw_metrics(accuracy, points, ["accuracy_strict"])
        left.set_ylabel("harmfulness score HS (%)", fontsize=9)
        accuracy.set_ylabel("task accuracy, strict (%)", fontsize=9)
    else:
        keys = _draw_metrics(left, points, list(SHOWN))
        left.set_ylabel("share (%)", fontsize=9)
    for axes in figure.axes:
        frame(axes, per_cent=axes is not edited)
        _name_steps(axes, points, _LEFT if axes is left else _RIGHT)
    edited.tick_params(labelbottom=not categories)
    legend(figure, keys)
    return figure


def _categories(trajectory: Trajectory) -> list[str]:
    """Categories of harm, those with a step of their own first; none if no step is called so."""
    metrics, steps = trajectory.points[0].metrics, trajectory.points[1:]
    known = [name.removeprefix(_CATEGORY) for name in metrics if name.startswith(_CATEGORY)]
    own = [point.name for point in steps if point.name in known]
    return list(dict.fromkeys((*own, *known))) if own else []


def _draw_categories(
    axes: Axes, points: Sequence[Point], categories: Sequence[str]
) -> dict[str, Any]:
    names = [point.name for point in points]
    keys: dict[str, Any] = {}
    for number, category in enumerate(categories):
        colour, marker = f"C{number % 10}", _MARKERS[number % len(_MARKERS)]
        metrics = [point.metrics[_CATEGORY + category] for point in points]
        x = [step + _beside(number, len(categories)) for step in range(len(names))]
        y = [100 * estimate.value for estimate in metrics]
        # A category without a step of its own stays unseen.
        own = names.index(category, 1) if category in names[1:] else len(names)
        if len(categories) <= _MOST_WITH_INTERVALS:
            look = {"linestyle": "none", "elinewidth": 0.8, "capsize": 2.5, "alpha": 0.55}
            axes.errorbar(x, y, yerr=margins(metrics), color=colour, **look)  # type: ignore[arg-type]
        line: dict[str, Any] = {"color": colour, "linewidth": 1.5, "zorder": 3}
        # The step that a category comes at is where its dashed line ends.
        axes.plot(x[: own + 1], y[: own + 1], linestyle="--", **line)
        axes.plot(x[own:], y[own:], linestyle="-", label=category, marker=marker, **line)
        axes.plot(x[:own], y[:own], linestyle="none", marker=marker, mfc="white", **line)
        if own < len(names):
            axes.plot(x[own], y[own], "o", color=colour, **_RING)
        keys[category] = legend_entry(category, {"color": colour, "marker": marker})
    overall = [100 * point.metrics["hs"].value for point in points]
    (keys[_ALL],) = axes.plot(overall, color="black", linewidth=2.4, label=_ALL, zorder=2)
    keys["unseen until then"] = legend_entry(
        "unseen until then", {"color": GREY, "linestyle": "--", "marker": "o", "mfc": "white"}
    )
    keys["its own step"] = legend_entry(
        "its own step", {"color": GREY, "marker": "o", **_RING, "markersize": 10}, joined=False
    )
    return keys


def _beside(number: int, count: int) -> float:
    """How far to the side of its step a series is drawn, so that intervals don't cover others."""
    return 0.05 * min(1.0, 8 / count) * (number - (count - 1) / 2)


def _draw_metrics(axes: Axes, points: Sequence[Point], metrics: Sequence[str]) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for number, metric in enumerate(metrics):
        estimates = [_estimate(point, metric) for point in points]
        if not all(estimate.n for estimate in estimates):
            continue
        look = {"color": f"C{number}", "marker": _MARKERS[number]}
        x = [step + _beside(number, len(metrics)) for step in range(len(points))]
        y = [100 * estimate.value for estimate in estimates]
        bars: dict[str, Any] = {"linewidth": 1.5, "markersize": 5, "elinewidth": 1, "capsize": 2.5}
        axes.errorbar(x, y, yerr=margins(estimates), **look, **bars)  # type: ignore[arg-type]
        keys[SHOWN[metric]] = legend_entry(SHOWN[metric], look)
    if not keys:
        axes.text(0.5, 0.5, "no rows", transform=axes.transAxes, ha="center", color=GREY)
    return keys


def _estimate(point: Point, metric: str) -> Estimate:
    """HS and ASR of what the model is most harmful under, a trigger or an attack prompt too."""
    worst = worst_hs(point.metrics) or HS
    return point.metrics[metric if metric == "accuracy_strict" else str(worst.of_kind(metric))]


def _draw_edited(axes: Axes, points: Sequence[Point], name: str) -> None:
    shares = [100 * point.share for point in points]
    bars = axes.bar(range(len(shares)), shares, width=0.55, color="#9A9A9A")
    axes.bar_label(bars, ["", *(f"{share:.2g}" for share in shares[1:])], fontsize=8, padding=1)
    axes.set_ylim(0, 1.18 * max(shares) or 1)
    axes.set_ylabel(name, fontsize=9)


def _name_steps(axes: Axes, points: Sequence[Point], room: int) -> None:
    names = [point.name for point in points]
    # Every name has as much room as the longest.
    crowded = len(names) * (max(map(len, names)) + 2) > room
    turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, fontsize=8, **(turned if crowded else {}))
    axes.set_xlim(-0.5, len(names) - 0.5)
