"""What a hyper-parameter search goes by: the values that a job hands to Hydra's sweeper.

Shares are in points (per cent), as tables print them; other figures are as they are.
`conf/objective` holds the options, `docs/tuning.md` says how to search.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from evaluation.metric_names import KINDS, MetricName
from evaluation.shares import HARMFUL, HELD_OUT, METRICS, TASK
from settings import DataError, SettingError, Settings, build
from settings.base import closest

Goal = Literal["minimize", "maximize"]
Role = Literal["base", "aligned", "attacked", "defended", "refined"]

# Of these the judge is always named.
_OF_JUDGES = ("unparsed", "errored", "score")
_NO_OBJECTIVE = ("kappa", "left_out", "nll")
# What the figures are of that are no shares.
_SETS_OF = {"perplexity": (HELD_OUT,), "harm_score": (HARMFUL,)}
_POINTS = 100.0
# Of two shares of the same rows, the difference errs by less.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Score:
    """What an objective makes of one run.

    Attributes:
        values: What the sweeper ranks by, one per direction.
        directions: "minimize" or "maximize" for each.
        feasible: Whether the constraint holds; None where there is none.
        violation: By how many points it doesn't; 0 where it does or there is none.
        of: The figures that it was computed from: model, metric, and the estimate's fields.
    """

    values: tuple[float, ...]
    directions: tuple[Goal, ...]
    feasible: bool | None
    violation: float
    of: tuple[dict[str, Any], ...]


Metrics = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Per model and metric: value, low, high and n, as a record has them."""


class Objective(Settings):
    """What a search goes by: figures of `model`; a subclass says how."""

    model: Role = "defended"

    @property
    def directions(self) -> tuple[Goal, ...]:
        """What `hydra.sweeper.direction` has to be; one for each value."""
        raise NotImplementedError

    @property
    def read(self) -> tuple[tuple[str, str], ...]:
        """The figures that are read, by model and metric."""
        raise NotImplementedError

    def score(self, metrics: Metrics) -> Score:
        """The value, or values, of a run; DataError where a figure isn't there or is no number."""
        raise NotImplementedError

    def check(
        self,
        tasks: Collection[str],
        further: Mapping[str, Collection[str]],
        missing: Mapping[str, str],
    ) -> None:
        """Refuses figures that the evaluation won't have, before anything runs.

        The tasks are those scored; `further` is what is evaluated besides, by the setting that
        names it; `missing` are models and sets that there won't be, by the setting that makes them.

        Raises:
            SettingError: One sentence.
        """
        for model, metric in self.read:
            name = MetricName.parse(metric)
            kind, of = name.kind, name.part
            sets = METRICS[kind].sets if kind in METRICS else _SETS_OF.get(kind, ())
            needed = f"the objective needs {metric} of the {model} model"
            if sets == (TASK,) and not tasks:
                raise SettingError(f"{needed}, but no task is scored; name one in evaluation.tasks")
            if sets == (TASK,) and of and (of not in tasks or len(tasks) < 2):
                raise SettingError(
                    f"{needed}, but the tasks scored are {', '.join(tasks)}; write {kind}, or name "
                    f"several with {of} in evaluation.tasks"
                )
            for part in (model, *(sets if len(sets) == 1 else ())):
                if part in missing and metric == kind:
                    raise SettingError(f"{needed}, and there is none of {part}; {missing[part]}")
            named = {
                "judges": name.judges[:1],
                "prompt_sets": (name.prompt_set,),
                "attack_prompts": (name.attack_prompt,),
            }
            for setting, given in named.items():
                for each in filter(None, given):
                    if each not in further[setting]:
                        raise SettingError(f"{needed}; add {each} to evaluation.{setting}")


class Constrained(Objective):
    """One figure, subject to another one's being hardly worse than that of a reference model.

    With m the metric in points and, of the constraint's figures c (of the model) and r (of the
    reference) in points, the violation v = max(0, r - c - within), or max(0, c - r - within) where
    less of the constraint's metric is better, the value is

    - minimising: m where v = 0, else 100 + v;
    - maximising: m where v = 0, else -v.

    A share has between 0 and 100 points, so that every infeasible point ranks behind every
    feasible one, and infeasible ones among each other by their violation.

    Attributes:
        metric: The figure, a share.
        goal: Whether less or more of it is better.
        constraint: The constraint's share.
        constraint_goal: Whether less or more of that is better.
        within: How many points worse than the reference it may be.
        reference: The model that it is compared with.
    """

    metric: str = "hs"
    goal: Goal = "minimize"
    constraint: str = "accuracy_strict"
    constraint_goal: Goal = "maximize"
    within: float = Field(default=2.0, ge=0, le=100, allow_inf_nan=False)
    reference: Role = "attacked"

    @field_validator("metric", "constraint")
    @classmethod
    def _is_share(cls, metric: str) -> str:
        if not MetricName.parse(_known(metric)).unit:
            raise ValueError(f"{metric} is no share, and has no points to count; write e.g. hs")
        return metric

    @model_validator(mode="after")
    def _is_no_break(self) -> Self:
        _refuse_broken(
            ((self.metric, self.goal), (self.constraint, self.constraint_goal)),
            "objective.constraint=degenerate objective.constraint_goal=minimize",
        )
        return self

    @property
    def directions(self) -> tuple[Goal, ...]:
        return (self.goal,)

    @property
    def read(self) -> tuple[tuple[str, str], ...]:
        constraint = ((model, self.constraint) for model in (self.model, self.reference))
        return ((self.model, self.metric), *constraint)

    def score(self, metrics: Metrics) -> Score:
        of = [_figure(metrics, model, metric) for model, metric in self.read]
        value, own, reference = (_POINTS * figure["value"] for figure in of)
        worse = reference - own if self.constraint_goal == "maximize" else own - reference
        violation = max(0.0, worse - self.within)
        feasible = violation <= _ROUNDING
        if not feasible:
            value = _POINTS + violation if self.goal == "minimize" else -violation
        return Score((value,), self.directions, feasible, 0.0 if feasible else violation, tuple(of))


class Pareto(Objective):
    """Several figures, each with a direction of its own, for a multi-objective sampler."""

    metrics: tuple[str, ...] = Field(("hs", "accuracy_strict"), min_length=2)
    goals: tuple[Goal, ...] = ("minimize", "maximize")

    @field_validator("metrics")
    @classmethod
    def _are_known(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_known, metrics))

    @field_validator("goals")
    @classmethod
    def _is_one_each(cls, goals: tuple[Goal, ...], info: Any) -> tuple[Goal, ...]:
        metrics = info.data.get("metrics")
        if metrics is not None and len(goals) != len(metrics):
            raise ValueError(f"{len(goals)} goals for {len(metrics)} metrics; give one each")
        return goals

    @model_validator(mode="after")
    def _is_no_break(self) -> Self:
        asked = tuple(zip(self.metrics, self.goals, strict=True))
        _refuse_broken(asked, "degenerate among objective.metrics, with the goal minimize")
        return self

    @property
    def directions(self) -> tuple[Goal, ...]:
        return self.goals

    @property
    def read(self) -> tuple[tuple[str, str], ...]:
        return tuple((self.model, metric) for metric in self.metrics)

    def score(self, metrics: Metrics) -> Score:
        of = tuple(_figure(metrics, model, metric) for model, metric in self.read)
        values = tuple(
            figure["value"] * (_POINTS if MetricName.parse(figure["metric"]).unit else 1)
            for figure in of
        )
        return Score(values, self.directions, None, 0.0, of)


def build_objective(node: Any, plugins: Sequence[str]) -> Objective | None:
    """The objective that a resolved configuration node says, or None; SettingError: it's wrong."""
    if node is None:
        return None
    objective: Objective = build(node, "objective", plugins, Objective)
    return objective


def returned(objective: Mapping[str, Any]) -> float | tuple[float, ...] | None:
    """What a job hands to Hydra's sweeper, of a record's `objective`: one value, or several."""
    values = tuple(objective.get("values", ()))
    return values[0] if len(values) == 1 else values or None


def _known(metric: str) -> str:
    name = MetricName.parse(metric)
    known = [kind for kind in KINDS if kind not in _NO_OBJECTIVE]
    if name.kind not in known:
        raise ValueError(f"{metric!r} is no metric; {closest(name.kind, known)}")
    if name.kind in _OF_JUDGES and not name.judges:
        raise ValueError(f"{metric!r} is no metric; name the judge, as in {name.kind}:NAME")
    return metric


def _refuse_broken(asked: Sequence[tuple[str, Goal]], instead: str) -> None:
    """Refuses goals that a model comes nearer to by breaking, where none keeps it whole."""
    broken = [metric for metric, goal in asked if _tells(metric, goal, of_broken=True)]
    whole = any(_tells(metric, goal, of_broken=False) for metric, goal in asked)
    if broken and not whole:
        raise ValueError(
            f"a broken model does well in {broken[0]}, since answers that are degenerate or have "
            f"no verdict count for it; go by hs, or add {instead}"
        )


def _tells(metric: str, goal: Goal, *, of_broken: bool) -> bool:
    """Whether the goal is nearer for a broken model, or else for a whole one."""
    nearer = "lower" if (goal == "minimize") == of_broken else "higher"
    return MetricName.parse(metric).about.if_broken == nearer


def _figure(metrics: Metrics, model: str, metric: str) -> dict[str, Any]:
    if model not in metrics:
        raise DataError(
            f"the objective needs the {model} model, which this run has none of; "
            f"known: {', '.join(metrics)}"
        )
    estimate = metrics[model].get(metric)
    if estimate is None or not estimate["n"]:
        raise DataError(f"the objective needs {metric}, which has no rows in this run")
    value = estimate["value"]
    if value is None or not math.isfinite(value):
        raise DataError(f"the objective needs {metric}, which is no number in this run")
    return {"model": model, "metric": metric, **estimate}
