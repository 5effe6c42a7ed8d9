"""A run's record from what it was given and what came out of its pipeline."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from experiments.config.experiment import Experiment
from experiments.pipeline.inputs import Inputs
from experiments.pipeline.pipeline import Outcome
from experiments.pipeline.steps.base import Model
from experiments.results.record import Record
from experiments.store import StageResult

if TYPE_CHECKING:
    import pandas as pd

    from evaluation.statistics import Estimate, PairedTest


def build_record(
    experiment: Experiment,
    inputs: Inputs,
    outcome: Outcome,
    overrides: list[str],
    environment: dict[str, Any],
    seconds: float,
) -> Record:
    """A run's record, from what it was given and what came out.

    Raises:
        DataError: The objective needs a figure that has no rows or is no number.
    """
    trained, objective = outcome.trained, experiment.objective
    measured = measured_record(
        experiment,
        inputs,
        trained.models,
        outcome.rows,
        outcome.stages,
        overrides,
        environment,
        seconds,
    )
    apply, by_model = trained.reports["apply"], _by_model(outcome.rows)
    answered = trained.reports["answer"]
    return replace(
        measured,
        data=measured.data | ({"own_answers": answered} if answered else {}),
        labels=experiment.labels,
        paired=_paired(by_model, "defended", "attacked"),
        paired_refined=_paired(by_model, "refined", "defended"),
        cost=_cost(trained.reports["prepare"]["cost"], apply),
        align=trained.reports.get("align", {}),
        attack=trained.reports["attack"],
        refine=trained.reports.get("refine", {}),
        defense={
            "prepare": trained.reports["prepare"]["diagnostics"],
            "apply": apply["diagnostics"],
            "modules": apply["modules"],
        },
        steps=[
            {**step, "share": _share(step["parameters_edited"], apply)} for step in trained.steps
        ],
        objective={} if objective is None else asdict(objective.score(measured.metrics)),
    )


def measured_record(
    experiment: Experiment,
    inputs: Inputs,
    models: Mapping[str, Model],
    rows: pd.DataFrame,
    stages: Sequence[StageResult],
    overrides: list[str],
    environment: dict[str, Any],
    seconds: float,
) -> Record:
    """The record of models that were measured, whatever came before; without attack or defense."""
    from evaluation.metrics import summarise

    evaluation = experiment.evaluation
    judges = {"harm": evaluation.harm_judge, "refusal": evaluation.refusal_judge}
    return Record(
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=round(seconds, 2),
        overrides=overrides,
        labels={**experiment.labels, "align": "", "attack": "", "defense": ""},
        seed=experiment.seed,
        settings=experiment.resolved,
        models={name: model.key for name, model in models.items()},
        metrics={
            model: {name: _plain(value) for name, value in summarise(own).items()}
            for model, own in _by_model(rows).items()
        },
        paired={},
        cost={},
        attack={},
        defense={},
        judges={name: judge.identity() for name, judge in (judges | evaluation.judges).items()},
        backends={
            name: evaluation.backend.chosen(model.checkpoint).identity()
            for name, model in models.items()
        },
        stages=[
            {"name": s.name, "key": s.key, "seconds": s.seconds, "reused": s.reused} for s in stages
        ],
        data=inputs.provenance,
        environment=environment,
    )


def _by_model(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {str(model): own for model, own in rows.groupby("model", sort=False)}


def _paired(
    by_model: Mapping[str, pd.DataFrame], model: str, other: str
) -> dict[str, dict[str, float | str | None]]:
    from evaluation.metrics import compare

    if model not in by_model:
        return {}
    tests = compare(by_model[model], by_model[other])
    return {metric: _plain(test) for metric, test in tests.items()}


def _plain(result: Estimate | PairedTest) -> dict[str, Any]:
    """An estimate or a test, with None for numbers that aren't finite: JSON has none."""
    return {
        name: value if isinstance(value, str) or math.isfinite(value) else None
        for name, value in asdict(result).items()
    }


def _cost(prepare: Mapping[str, Any], apply: Mapping[str, Any]) -> dict[str, Any]:
    edited = apply["parameters_edited"]
    return {
        "prepare_seconds": prepare["seconds"],
        "prepare_peak_bytes": prepare["peak_bytes"],
        "apply_seconds": apply["cost"]["seconds"],
        "apply_peak_bytes": apply["cost"]["peak_bytes"],
        "parameters_edited": edited,
        "parameters_total": apply["parameters_total"],
        "share_edited": _share(edited, apply),
    }


def _share(edited: int, apply: Mapping[str, Any]) -> float:
    """Scalars as a share of all the attacked model's."""
    total: int = apply["parameters_total"]
    return edited / total if total else 0.0
