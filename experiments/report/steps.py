"""Repairs in several steps: the models from the attacked to the defended one, as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.metric_names import KINDS
from evaluation.metrics import summarise
from evaluation.statistics import Estimate
from experiments.report.pool import Row, Run, pooled
from experiments.report.table import Cell, Table
from experiments.report.tables import metric_columns
from experiments.results.record import Record

FILE = "steps.csv"
START = "attacked"
SHOWN = {name: KINDS[name].heading for name in ("hs", "asr", "accuracy_strict")}
"""Metrics of the table and of the figure of steps that aren't categories."""


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
