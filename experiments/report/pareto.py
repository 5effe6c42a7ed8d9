"""Pareto fronts of defenses, and what an objective or a search chooses among settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluation.metric_names import MetricName
from evaluation.statistics import Estimate
from experiments.report.names import names
from experiments.report.pool import Collected, Row
from experiments.results.command_line import command_line
from experiments.results.objective import Constrained, Objective, build_objective
from settings import DataError

ACCURACY = "accuracy_strict"

# What the run of the chosen settings has in place of the search's.
_TEST_SPLIT = "evaluation.split=test"


@dataclass(frozen=True)
class Choice:
    """Settings of defenses that go back to one attacked model, and what is best among them.

    Attributes:
        attacked: The attacked model's row.
        defended: The rows that compete.
        objective: What they are ranked by.
        best: The feasible row that the objective puts first; None where none is feasible, or the
            objective ranks by several figures.
        feasible: How many are, broken ones never; None where there is no constraint.
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
        return len({row.name for row in self.defended}) < len(self.defended)

    def name_of(self, row: Row) -> str:
        """What a defended row is called among those that compete: name and settings."""
        places = {id(each): place for place, each in enumerate(self.defended)}
        return names(self.defended)[places[id(row)]]


def front(rows: Sequence[Row]) -> list[Row]:
    """The defended models that no other one beats: less HS with no less accuracy, or the reverse.

    Of one attacked model's rows, by rising accuracy; rows with the same figures are all there, and
    none of a model that its repair broke. HS is each model's worst, under a trigger or an attack
    prompt too.
    """
    shown = [r for r in rows if r.role == "defended" and has_point(r) and not r.broken]
    points = [(row.worst_hs.value, -row.metrics[ACCURACY].value) for row in shown]
    kept = [shown[place] for place in _unbeaten(points)]
    return sorted(kept, key=lambda row: row.metrics[ACCURACY].value)


def _unbeaten(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Places of the points that no other one is below in a figure and above in none."""

    def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return [
        place
        for place, point in enumerate(points)
        if not any(beats(other, point) for other in points)
    ]


def has_point(row: Row) -> bool:
    """Whether both HS and accuracy were measured."""
    estimates = (row.worst_hs, row.metrics.get(ACCURACY))
    return all(each is not None and each.n and not math.isnan(each.value) for each in estimates)


def choices(rows: Sequence[Row]) -> list[Choice]:
    """What there is to choose from, for every attacked model with two defended ones or more."""
    found = []
    # A trial that edited nothing is one of the settings all the same.
    competing = [
        row
        for row in rows
        if row.role == "defended" and (row.edited or any(run.record.objective for run in row.runs))
    ]
    for attacked in (row for row in rows if row.role == "attacked"):
        defended = tuple(row for row in competing if row.family == attacked.family)
        if len(defended) > 1:
            found.append(_choice(attacked, defended))
    return found


def _choice(attacked: Row, defended: tuple[Row, ...]) -> Choice:
    objective = _objective(defended)
    signs = [1 if direction == "minimize" else -1 for direction in objective.directions]
    allowed: list[tuple[tuple[float, ...], Row]] = []
    for row in (row for row in defended if not row.broken):
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


def _objective(rows: Sequence[Row]) -> Objective:
    """The runs' own objective, or the default one where they had none."""
    for record in (run.record for row in rows for run in row.runs):
        plugins = tuple(record.settings.get("plugins", ()))
        objective = build_objective(record.settings.get("objective"), plugins)
        if objective is not None:
            return objective
    return Constrained()


def measured(attacked: Row, row: Row) -> dict[str, dict[str, dict[str, Any]]]:
    """What an objective reads of a defended row: figures by model and metric.

    What isn't pooled over seeds here (aligned, refined) is taken from the first of them.
    """
    pooled = {
        each.role: {name: asdict(estimate) for name, estimate in each.metrics.items()}
        for each in (attacked, row)
    }
    return {**row.runs[0].record.metrics, **pooled}


def sentences(collected: Collected) -> list[str]:
    """What a reader has to know of a split or of given models, and what was best of a search.

    For every attacked model whose defenses had an objective: the best settings, or the front, and
    the command that tests them.
    """
    said = [f"note: {collected.note}; no paper's figures stand beside"] if collected.note else []
    said += collected.unknown
    for choice in choices(collected.rows):
        count, best = len(choice.defended), choice.best
        if not choice.searched:
            continue
        if choice.feasible is None:
            found = len(choice.unbeaten)
            said.append(
                f"front of {count} settings: {found} that none beats in all of these figures"
            )
            for row in choice.unbeaten:
                said += [f"- {choice.name_of(row)}: {_figures(choice, row)}", _how_to_test(row)]
        elif best is None:
            said.append(
                f"best: none of {count} settings is feasible; allow more (objective.within)"
            )
        else:
            head = f"best of {count} settings ({choice.feasible} feasible)"
            said.append(f"{head}: {choice.name_of(best)}: {_figures(choice, best)}")
            said.append(_how_to_test(best))
    return said


def _figures(choice: Choice, row: Row) -> str:
    metrics = measured(choice.attacked, row)
    shown = []
    for model, metric in dict.fromkeys(choice.objective.read):
        figures = metrics[model].get(metric)
        unit = MetricName.parse(metric).unit
        text = " ".join(filter(None, Estimate.of(figures).shown(unit))) if figures else "-"
        shown.append(f"{metric} of {model} {text}")
    return ", ".join(shown)


def _how_to_test(row: Row) -> str:
    run = row.runs[0]
    if not run.validates:
        return "chosen on the test split, so that these figures flatter it"
    return f"test it once: {command_line(run.record.overrides, _TEST_SPLIT, folder=run.folder)}"
