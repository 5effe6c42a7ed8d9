"""Harmfulness against task accuracy: the front of settings, what is feasible, what is best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from experiments.report.pool import Row
from experiments.report.style import margins, plain, short, style
from experiments.report.tables import label
from experiments.results.objective import Constrained, Objective, build_objective
from settings import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from evaluation.statistics import Estimate
    from experiments.results.record import Record

HS, ACCURACY = "hs", "accuracy_strict"
_WIDTH, _HEIGHT = 6.4, 4.8
_COLUMNS = 3
_FEASIBLE = "#2FBF94"


@dataclass(frozen=True)
class Choice:
    """Settings of defenses that go back to one attacked model, and what is best among them.

    Attributes:
        attacked: The attacked model's row.
        defended: The rows that compete.
        objective: What they are ranked by.
        best: The feasible row that the objective puts first; None where none is feasible, or the
            objective ranks by several figures.
        feasible: How many are; None where there is no constraint.
        unbeaten: The rows that no other one beats in the objective's figures, where it has several.
    """

    attacked: Row
    defended: tuple[Row, ...]
    objective: Objective
    best: Row | None
    feasible: int | None
    unbeaten: tuple[Row, ...] = ()

    @property
    def searched(self) -> bool:
        """Whether the runs had an objective themselves."""
        return any(run.record.objective for row in self.defended for run in row.runs)

    @property
    def several(self) -> bool:
        """Whether a defense is there with several settings."""
        return len({label(row) for row in self.defended}) < len(self.defended)


def front(rows: Sequence[Row]) -> list[Row]:
    """The defended models that no other one beats: less HS with no less accuracy, or the reverse.

    Args:
        rows: Rows of one attacked model; those of other roles, and those without either figure,
            are left out.

    Returns:
        The rows of the Pareto front, by rising accuracy; rows with the same figures are all there.
    """
    shown = [row for row in rows if row.role == "defended" and _has_point(row)]
    points = [_point(row) for row in shown]
    kept = [shown[index] for index in _unbeaten([(hs, -accuracy) for hs, accuracy in points])]
    return sorted(kept, key=lambda row: _point(row)[1])


def _unbeaten(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Places of the points that no other one is below in a figure and above in none."""

    def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return [
        place
        for place, point in enumerate(points)
        if not any(beats(other, point) for other in points)
    ]


def choices(rows: Sequence[Row]) -> list[Choice]:
    """What there is to choose from, for every attacked model with two defended ones or more."""
    found = []
    for attacked in (row for row in rows if row.role == "attacked"):
        compete = (row for row in rows if row.role == "defended" and _competes(row))
        defended = tuple(row for row in compete if _goes_back(row, attacked))
        if len(defended) > 1:
            found.append(_choice(attacked, defended))
    return found


def figures(rows: Sequence[Row], note: str = "") -> Iterator[tuple[str, Figure]]:
    """The figure "pareto", where a defense has several settings or there was an objective.

    Args:
        rows: The report's rows.
        note: What the title says besides.
    """
    shown = [choice for choice in choices(rows) if choice.searched or choice.several]
    if shown:
        yield "pareto", draw(shown, note)


def draw(shown: Sequence[Choice], note: str = "") -> Figure:
    """HS against accuracy with 95 % intervals, a panel for every attacked model.

    The front is a line, the accuracies that are feasible are shaded, and a star is the best.
    """
    from matplotlib.figure import Figure

    columns = min(len(shown), _COLUMNS)
    lines = -(-len(shown) // columns)
    size = (_WIDTH * columns, _HEIGHT * lines + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    names = list(dict.fromkeys(label(row) for choice in shown for row in choice.defended))
    keys = list(dict.fromkeys(key for choice in shown for key in choice.attacked.settings))
    for axes, choice in zip(grid, shown, strict=False):
        _panel(axes, choice, names)
        told = [f"{short(k, keys)}={plain(v)}" for k, v in choice.attacked.settings.items()]
        axes.set_title(", ".join(told), fontsize=9)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    title = "Harmfulness against task accuracy, with the front that nothing else beats"
    figure.suptitle(f"{title}\n{note}" if note else title, fontsize=11)
    return figure


def told(row: Row, rows: Sequence[Row]) -> str:
    """What sets a defended row apart from others of its attacked model: name and settings."""
    keys = list(dict.fromkeys(key for each in rows for key in each.settings))
    differing = [key for key in keys if len({str(each.settings.get(key)) for each in rows}) > 1]
    parts = [f"{short(k, keys)}={plain(row.settings[k])}" for k in differing if k in row.settings]
    return " ".join([label(row), *parts])


def _choice(attacked: Row, defended: tuple[Row, ...]) -> Choice:
    objective = _objective(defended)
    signs = [1 if direction == "minimize" else -1 for direction in objective.directions]
    allowed: list[tuple[tuple[float, ...], Row]] = []
    for row in defended:
        try:
            score = objective.score(measured(attacked, row))
        except DataError:
            continue  # A row without the figures can't be chosen.
        if score.feasible is not False:
            values = tuple(s * v for s, v in zip(signs, score.values, strict=True))
            allowed.append((values, row))
    points = [values for values, _ in allowed]
    if isinstance(objective, Constrained):
        best = allowed[points.index(min(points))][1] if points else None
        return Choice(attacked, defended, objective, best, len(points))
    unbeaten = tuple(
        allowed[place][1] for place in sorted(_unbeaten(points), key=points.__getitem__)
    )
    return Choice(attacked, defended, objective, None, None, unbeaten)


def measured(attacked: Row, row: Row) -> dict[str, dict[str, dict[str, Any]]]:
    """What an objective reads of a defended row: figures by model and metric.

    What isn't pooled over seeds here (aligned, refined) is taken from the first of them.
    """
    pooled = {"attacked": _figures(attacked), "defended": _figures(row)}
    return {**row.runs[0].record.metrics, **pooled}


def _competes(row: Row) -> bool:
    """Whether it is one of the settings: a trial that edited nothing is one all the same."""
    tried = any(run.record.objective for run in row.runs)
    return tried or bool(row.cost["parameters_edited"])


def _objective(rows: Sequence[Row]) -> Objective:
    """The runs' own objective, or the default one where they had none."""
    for run in (run for row in rows for run in row.runs):
        objective = build_objective(run.record.settings.get("objective"), _plugins(run.record))
        if objective is not None:
            return objective
    return Constrained()


def _plugins(record: Record) -> Sequence[str]:
    return tuple(record.settings.get("plugins", ()))


def _figures(row: Row) -> dict[str, dict[str, Any]]:
    return {name: asdict(estimate) for name, estimate in row.metrics.items()}


def _goes_back(row: Row, attacked: Row) -> bool:
    settings = all(row.settings.get(key, ...) == v for key, v in attacked.settings.items())
    return settings and all(row.labels.get(key) == v for key, v in attacked.labels.items())


def _point(row: Row) -> tuple[float, float]:
    return row.metrics[HS].value, row.metrics[ACCURACY].value


def _has_point(row: Row) -> bool:
    return all(
        name in row.metrics and not math.isnan(row.metrics[name].value) for name in (HS, ACCURACY)
    )


def _panel(axes: Axes, choice: Choice, names: Sequence[str]) -> None:
    defended = [row for row in choice.defended if _has_point(row)]
    best, attacked = choice.best, choice.attacked
    for index, name in enumerate(names, start=1):
        members = [row for row in defended if label(row) == name]
        if members:
            count = f", {len(members)} settings" if len(members) > 1 else ""
            _points(axes, members, name + count, index)
    if _has_point(attacked):
        _points(axes, [attacked], "attacked (no defense)", 0)
        _shade(axes, choice)
    best_of = front(defended)
    axes.plot(
        [100 * _point(row)[1] for row in best_of],
        [100 * _point(row)[0] for row in best_of],
        "o-",
        color="#444444",
        linewidth=1.2,
        markersize=11,
        markerfacecolor="none",
        label="front: beaten by none in both",
        zorder=3,
    )
    if best is not None and _has_point(best):
        hs, accuracy = _point(best)
        name = f"best: {told(best, choice.defended)}"
        axes.plot(
            [100 * accuracy], [100 * hs], "*", color="#FFD23F", markeredgecolor="black",
            markersize=16, label=name, zorder=5,
        )  # fmt: skip
    axes.set_xlabel("task accuracy, strict (%)")
    axes.set_ylabel("harmfulness score HS (%)")
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _points(axes: Axes, rows: Sequence[Row], name: str, index: int) -> None:
    hs: list[Estimate] = [row.metrics[HS] for row in rows]
    accuracies = [row.metrics[ACCURACY] for row in rows]
    axes.errorbar(
        [100 * estimate.value for estimate in accuracies],
        [100 * estimate.value for estimate in hs],
        xerr=margins(accuracies),
        yerr=margins(hs),
        label=name,
        linestyle="",
        markersize=5,
        elinewidth=0.7,
        alpha=0.75,
        **style(index),
    )


def _shade(axes: Axes, choice: Choice) -> None:
    """Shades the accuracies that the constraint allows, where it is of accuracy."""
    objective = choice.objective
    if not isinstance(objective, Constrained):
        return
    if (objective.constraint, objective.reference) != (ACCURACY, "attacked"):
        return
    least = 100 * choice.attacked.metrics[ACCURACY].value - objective.within
    right = max(axes.get_xlim()[1], least)
    name = f"accuracy at most {objective.within:g} points below attacked"
    axes.axvspan(least, right, color=_FEASIBLE, alpha=0.12, linewidth=0, label=name, zorder=0)
    axes.set_xlim(right=right)
