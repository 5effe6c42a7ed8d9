"""A plan of all jobs of a sweep."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from attacks.base import Attack
from experiments.config.experiment import Experiment
from experiments.config.jobs import JobConfig
from experiments.pipeline.inputs import Inputs, read_inputs
from experiments.plan.costs import Costs
from experiments.plan.dry_run import Foresight, Ledger
from experiments.plan.effort import Rates
from experiments.plan.forms import Forms
from experiments.plan.models import Library
from experiments.plan.table import Overview, overview


def foresee(jobs: Iterable[JobConfig], library: Library, rates: Rates) -> Overview:
    """Walks every job's pipeline and sums up what there is to do.

    Raises:
        RelockError: What a run would refuse before its heavy work.
    """
    costs, ledger, inputs = Costs(Forms(library), rates), Ledger(), _Inputs()
    count = 0
    for job in jobs:
        base, given = library.find_models(job.experiment.model)
        experiment = _on_this_machine(job.experiment, library)
        Foresight(experiment, inputs(experiment), base, given, costs, ledger).run()
        count += 1
    return overview(count, ledger, library.located.values(), costs.lengths.guessed, rates)


class _Inputs:
    """`read_inputs`, once for jobs that read the same.

    Of attack, defense and seed it isn't the settings that decide what is read, but what they need;
    of all else every setting counts.
    """

    def __init__(self) -> None:
        self._known: dict[str, Inputs] = {}

    def __call__(self, experiment: Experiment) -> Inputs:
        apart = ("attack", "refine", "defense", "seed", "tracker", "store", "runtime")
        rest = {name: value for name, value in experiment.resolved.items() if name not in apart}
        attacks = [_needs(attack) for attack in (experiment.attack, experiment.refine)]
        wanted = json.dumps([rest, attacks, sorted(experiment.defense.needs)], sort_keys=True)
        if wanted not in self._known:
            self._known[wanted] = read_inputs(experiment)
        return self._known[wanted]


def _needs(attack: Attack | None) -> Any:
    if attack is None:
        return None
    trigger = attack.trigger and attack.trigger.model_dump()
    return [attack.task, attack.needs_task, attack.needs_poison, trigger]


def _on_this_machine(experiment: Experiment, library: Library) -> Experiment:
    """The experiment with stand-ins for judges whose weights aren't here."""
    evaluation = experiment.evaluation
    judged = replace(
        evaluation,
        harm_judge=library.judge(evaluation.harm_judge, "evaluation.harm_judge"),
        refusal_judge=library.judge(evaluation.refusal_judge, "evaluation.refusal_judge"),
        judges={
            name: library.judge(judge, f"judges.{name}")
            for name, judge in evaluation.judges.items()
        },
    )
    return replace(experiment, evaluation=judged)
