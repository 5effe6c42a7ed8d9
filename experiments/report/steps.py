"""Repairs in several steps: the models from the attacked to the defended one, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.metric_names import KINDS
from evaluation.metrics import summarise
from evaluation.statistics import Estimate
from experiments.report.heatmaps import file_stem, tell_apart
from experiments.report.pool import Row, Run, pooled
from experiments.report.style import COLOURS, MARKERS, margins
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


_CATEGORY = "hs/"
# Black is the line over all categories.
_CATEGORY_COLOURS = COLOURS[:-1]
_WIDTH, _HEIGHT = 11.0, 4.8
# So many categories make two rows of a legend of four columns.
_MOST_IN_FOUR = 6
# The intervals of more categories would cover each other; `steps.csv` has them all.
_MOST_WITH_INTERVALS = 8
# How many characters of names fit under the wide panel and under the narrow ones.
_ROOM, _NARROW_ROOM = 90, 40
_TITLE_CHARACTERS = 110
_GREY = "#666666"


@dataclass(frozen=True)
class Point:
    """The model after one step, pooled over seeds.

    Attributes:
        name: The step's, or `START` for the model before the first.
        metrics: As in `Row`.
        parameters_edited: Scalars that the step changed and none before it, mean over seeds.
        share: The same as a share of all the model's.
    """

    name: str
    metrics: dict[str, Estimate]
    parameters_edited: float
    share: float


@dataclass(frozen=True)
class Trajectory:
    """A defense's models from the attacked one to the defended one.

    Attributes:
        row: The defended model's row.
        runs: The runs that took these steps.
        points: The attacked model, then one point per step.
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


def table(points: Sequence[Point]) -> Table:
    """The points as a table: shares in %, and in brackets what the step changed."""
    rows = []
    for number, point in enumerate(points):
        before = points[number - 1] if number else None
        cells = [_cell(point, before, metric) for metric in SHOWN]
        edited = f"{100 * point.share:.3f} %" if number else ""
        rows.append([Cell(f"{number}: {point.name}"), Cell(edited), *cells])
    title = "steps: share in %, change by the step in points"
    return Table("steps", title, ["step", "newly edited", *SHOWN.values()], rows)


def _cell(point: Point, before: Point | None, metric: str) -> Cell:
    estimate = point.metrics[metric]
    value = estimate.shown()[0]
    if before is None or not estimate.n:
        return Cell(value)
    return Cell(f"{value} ({100 * (estimate.value - before.metrics[metric].value):+.1f})")


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


def figures(rows: Iterable[Row]) -> Iterator[tuple[str, Figure]]:
    """File stem and figure of every trajectory; settings tell apart those of one defense."""
    by_defense: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories(rows):
        by_defense.setdefault(trajectory.row.labels["defense"], []).append(trajectory)
    for defense, members in by_defense.items():
        names = tell_apart([trajectory.runs for trajectory in members])
        for trajectory, told in zip(members, names, strict=True):
            yield file_stem("steps", defense, told), draw(trajectory, told)


def draw(trajectory: Trajectory, told: str = "") -> Figure:
    """What happened from step to step, with 95 % intervals where they can be told apart.

    Where steps are called like categories of harm: HS of every category, hollow and dashed until
    its own step, and task accuracy; else HS, ASR and task accuracy.  Beside it, the share of
    scalars that each step newly edited.

    Args:
        trajectory: The models.
        told: What tells it apart from others of its defense, for the title.
    """
    from matplotlib.figure import Figure

    categories = _categories(trajectory)
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    grid = figure.add_gridspec(2 if categories else 1, 2, width_ratios=[1.9, 1])
    left, edited = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    _draw_edited(edited, trajectory)
    if categories:
        _draw_categories(left, trajectory, categories)
        _percent(left, "harmfulness score HS (%)")
        accuracy = figure.add_subplot(grid[1, 1], sharex=edited)
        _line(accuracy, trajectory, "accuracy_strict", color=COLOURS[2], marker="D")
        _percent(accuracy, "task accuracy, strict (%)")
    else:
        _draw_overall(left, trajectory)
        _percent(left, "share (%)")
    for axes in figure.axes:
        _frame(axes, trajectory, _ROOM if axes is left else _NARROW_ROOM)
    edited.tick_params(labelbottom=not categories)
    figure.legend(
        handles=_handles(left, bool(categories)),
        loc="outside lower center",
        ncols=4 if len(categories) < _MOST_IN_FOUR else 6,
        frameon=False,
        fontsize=8,
    )
    title = f"{trajectory.row.labels['defense']}, step by step"
    settings = f" ({told.replace(',', ', ')})" if told else ""
    figure.suptitle((title + settings)[:_TITLE_CHARACTERS], fontsize=11)
    return figure


def _categories(trajectory: Trajectory) -> list[str]:
    """Categories of harm, those with a step of their own first; none if no step is called so."""
    known = [
        n.removeprefix(_CATEGORY) for n in trajectory.points[0].metrics if n.startswith(_CATEGORY)
    ]
    own = [point.name for point in trajectory.points[1:] if point.name in known]
    return [*dict.fromkeys(own), *(n for n in known if n not in own)] if own else []


def _draw_categories(axes: Axes, trajectory: Trajectory, categories: Sequence[str]) -> None:
    names = [point.name for point in trajectory.points]
    for index, category in enumerate(categories):
        colour = _CATEGORY_COLOURS[index % len(_CATEGORY_COLOURS)]
        marker = MARKERS[(sum(divmod(index, len(_CATEGORY_COLOURS)))) % len(MARKERS)]
        metrics = [point.metrics[_CATEGORY + category] for point in trajectory.points]
        x = [number + _beside(index, len(categories)) for number in range(len(names))]
        # A category without a step of its own stays unseen.
        came = names.index(category, 1) if category in names[1:] else len(names)
        if len(categories) <= _MOST_WITH_INTERVALS:
            _bars(axes, x, metrics, color=colour, linestyle="none", elinewidth=0.8, alpha=0.55)
        y = [100 * estimate.value for estimate in metrics]
        look: dict[str, Any] = {"color": colour, "linewidth": 1.5, "zorder": 3}
        # The step that a category comes at is where its dashed line ends.
        axes.plot(x[: came + 1], y[: came + 1], linestyle="--", **look)
        axes.plot(x[came:], y[came:], linestyle="-", label=category, marker=marker, **look)
        axes.plot(x[:came], y[:came], linestyle="none", marker=marker, mfc="white", **look)
        if category in names[1:]:
            ring: dict[str, Any] = {"markersize": 14, "mfc": "none", "clip_on": False}
            axes.plot(x[came], y[came], "o", color=colour, **ring)
    overall = [100 * point.metrics["hs"].value for point in trajectory.points]
    axes.plot(overall, color=COLOURS[-1], linewidth=2.4, label="all categories", zorder=2)


def _beside(index: int, count: int) -> float:
    """How far to the side of its step a series is drawn, so that intervals don't cover others."""
    return 0.05 * min(1.0, 8 / count) * (index - (count - 1) / 2)


def _draw_overall(axes: Axes, trajectory: Trajectory) -> None:
    for index, (metric, name) in enumerate(SHOWN.items()):
        look = {"color": COLOURS[index], "marker": MARKERS[index], "label": name}
        _line(axes, trajectory, metric, _beside(index, len(SHOWN)), **look)


def _line(axes: Axes, trajectory: Trajectory, metric: str, shift: float = 0, **look: Any) -> None:
    metrics = [point.metrics[metric] for point in trajectory.points]
    if not all(estimate.n for estimate in metrics):
        axes.text(0.5, 0.5, "no rows", transform=axes.transAxes, ha="center", color=_GREY)
        return
    x = [number + shift for number in range(len(metrics))]
    _bars(axes, x, metrics, linewidth=1.5, markersize=5, elinewidth=1, **look)


def _bars(axes: Axes, x: Sequence[float], metrics: Sequence[Estimate], **look: Any) -> None:
    y = [100 * estimate.value for estimate in metrics]
    axes.errorbar(x, y, yerr=margins(metrics), capsize=2.5, **look)


def _draw_edited(axes: Axes, trajectory: Trajectory) -> None:
    shares = [100 * point.share for point in trajectory.points]
    bars = axes.bar(range(len(shares)), shares, width=0.55, color="#9A9A9A")
    labels = ["", *(f"{share:.2g}" for share in shares[1:])]
    axes.bar_label(bars, labels, fontsize=8, padding=1)
    axes.set_ylim(0, 1.18 * max(shares) or 1)
    # Only steps that are categories know what an earlier one edited.
    axes.set_ylabel("newly edited (%)" if _categories(trajectory) else "edited (%)", fontsize=9)


def _percent(axes: Axes, name: str) -> None:
    axes.set_ylim(-3, 103)
    axes.set_ylabel(name, fontsize=9)


def _frame(axes: Axes, trajectory: Trajectory, room: int) -> None:
    names = [point.name for point in trajectory.points]
    # Every name has as much room as the longest.
    crowded = len(names) * (max(map(len, names)) + 2) > room
    turned: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(names)), names, fontsize=8, **(turned if crowded else {}))
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _handles(axes: Axes, categories: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = axes.get_legend_handles_labels()[0]
    if categories:
        unseen = {"color": _GREY, "linestyle": "--", "marker": "o", "mfc": "white"}
        ring = {"color": _GREY, "linestyle": "none", "marker": "o", "ms": 10, "mfc": "none"}
        handles.append(Line2D([], [], label="unseen until then", **unseen))  # type: ignore[arg-type]
        handles.append(Line2D([], [], label="its own step", **ring))  # type: ignore[arg-type]
    return handles
