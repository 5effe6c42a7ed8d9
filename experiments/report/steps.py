"""Defenses in several steps: tables and figures of the models from attacked to defended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.metric_names import HS, KINDS, MetricName, worst_hs
from evaluation.metrics import summarise
from evaluation.statistics import Estimate
from experiments.report.columns import once
from experiments.report.drawing import (
    Drawing,
    draw_estimates,
    file_stem,
    frame,
    legend,
    say_no_rows,
)
from experiments.report.panels import asked, group_names, subject
from experiments.report.pool import Row, Run, pooled
from experiments.report.table import Cell, Table
from experiments.report.tables import metric_columns
from experiments.results.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE = "steps.csv"
START = "attacked"
SHOWN = {name: KINDS[name].heading for name in ("hs", "asr", "accuracy_strict")}
"""Metrics of the table and of the figure of steps that aren't categories."""

_WIDTH, _HEIGHT = 11.0, 4.4
# The intervals of more categories would cover each other; `steps.csv` has them all.
_MOST_WITH_INTERVALS = 8
_MARKERS = "osD^vPX<>*"
# How many characters of names fit under the wide panel and under the narrow ones.
_LEFT, _RIGHT = 90, 40
_UNSEEN = "hollow and dashed: before the category's own step"


@dataclass(frozen=True)
class Point:
    """The model after one step, or `START` before the first, pooled over seeds.

    The scalars that the step changed and none before it, and their share of all the model's, are
    means over seeds.
    """

    name: str
    metrics: dict[str, Estimate]
    parameters_edited: float
    share: float


@dataclass(frozen=True)
class Trajectory:
    """A defense's models from the attacked one to the defended one: one point for each.

    `row` is the defended model's, `runs` are those of its runs that took these steps.
    """

    row: Row
    runs: tuple[Run, ...]
    points: list[Point]


def trajectories(rows: Iterable[Row]) -> list[Trajectory]:
    """One per row of a defense that went in steps; seeds pool where their steps agree."""
    found = []
    for row in rows:
        groups: dict[tuple[str, ...], list[Run]] = {}
        for run in row.runs if row.role == "defended" else ():
            if run.record.steps:
                names = tuple(step["name"] for step in run.record.steps)
                groups.setdefault(names, []).append(run)
        found += [Trajectory(row, tuple(runs), _points(runs)) for runs in groups.values()]
    return found


def _points(runs: Sequence[Run]) -> list[Point]:
    points = [Point(START, summarise(pooled(runs, START)), 0, 0)]
    for index, step in enumerate(runs[0].record.steps):
        taken = [run.record.steps[index] for run in runs]
        edited, share = (
            sum(entry[name] for entry in taken) / len(taken)
            for name in ("parameters_edited", "share")
        )
        points.append(Point(step["name"], summarise(pooled(runs, step["model"])), edited, share))
    return points


def recorded_points(record: Record) -> list[Point]:
    """The points of a single run, as its record has them."""
    taken = [
        Point(s["name"], record.estimates(s["model"]), s["parameters_edited"], s["share"])
        for s in record.steps
    ]
    return [Point(START, record.estimates(START), 0, 0), *taken]


def table(points: Sequence[Point], shown: Mapping[str, str] = SHOWN) -> Table:
    """The points as a table: shares in %, and in brackets what the step changed."""
    rows = []
    for number, point in enumerate(points):
        cells = []
        for metric in shown:
            estimate, changed = point.metrics[metric], ""
            if number and estimate.n:
                before = points[number - 1].metrics[metric].value
                changed = f" ({100 * (estimate.value - before):+.1f})"
            cells.append(Cell(estimate.shown()[0] + changed))
        edited = f"{100 * point.share:.3f} %" if number else ""
        rows.append([Cell(f"{number}: {point.name}"), Cell(edited), *cells])
    title = "steps: share in %, change by the step in points"
    return Table("steps", title, ["step", "newly edited", *shown.values()], rows)


def write(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Writes `steps.csv`, one line per step and model, where a defense went in steps."""
    import pandas as pd

    records = [
        {
            **trajectory.row.labels,
            **trajectory.row.settings,
            "seeds": " ".join(str(run.record.seed) for run in trajectory.runs),
            "step": number,
            "name": point.name,
            "parameters_edited": point.parameters_edited,
            "share": point.share,
            **metric_columns(point.metrics),
        }
        for trajectory in trajectories(rows)
        for number, point in enumerate(trajectory.points)
    ]
    if not records:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(records).to_csv(folder / FILE, index=False)
    return [folder / FILE]


def figures(rows: Sequence[Row]) -> Iterator[Drawing]:
    """A figure of every trajectory; settings tell apart those of one defense."""
    by_defense: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories(rows):
        by_defense.setdefault(trajectory.row.name, []).append(trajectory)
    for defense, members in by_defense.items():
        groups = [[(each.row, run) for run in each.runs] for each in members]
        for each, apart in zip(members, group_names(groups), strict=True):
            of = ", ".join(filter(None, (subject([each.row]), apart)))
            shown = once(SHOWN, each.row.one_judge)
            note = _UNSEEN if _categories(each.points) else asked([each.row], "HS", plainly="")
            title = f"{defense}, step by step: {of}"
            yield Drawing(file_stem("steps", defense, apart), title, draw(each.points, shown), note)


def draw(points: Sequence[Point], shown: Mapping[str, str] = SHOWN) -> Figure:
    """Shares from step to step with 95 % intervals, and the share of scalars newly edited.

    Where steps are called like categories of harm: HS of every category, hollow and dashed until
    its own step, and task accuracy; else HS, ASR and task accuracy.
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
        _draw_metrics(left, points, shown)
        left.set_ylabel("share (%)", fontsize=9)
    for axes in figure.axes:
        frame(axes, per_cent=axes is not edited)
        _name_steps(axes, points, _LEFT if axes is left else _RIGHT)
    shares = [100 * point.share for point in points]
    bars = edited.bar(range(len(shares)), shares, width=0.55, color="#9A9A9A")
    edited.bar_label(bars, ["", *(f"{share:.2g}" for share in shares[1:])], fontsize=8, padding=1)
    edited.set_ylim(0, 1.18 * max(shares) or 1)
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


def _name_steps(axes: Axes, points: Sequence[Point], room: int) -> None:
    names = [point.name for point in points]
    # Every name has as much room as the longest.
    crowded = len(names) * (max(map(len, names)) + 2) > room
    turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, fontsize=8, **(turned if crowded else {}))
    axes.set_xlim(-0.5, len(names) - 0.5)
