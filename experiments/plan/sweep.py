"""`walk`, a dry run of all jobs of a sweep."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from attacks.base import Attack
from experiments.config.experiment import Experiment
from experiments.config.jobs import JobConfig
from experiments.pipeline.inputs import Inputs, read_inputs
from experiments.pipeline.pipeline import Pipeline
from experiments.plan.dry_run import DryRun, Ledger
from experiments.plan.judges import with_placeholders
from experiments.plan.models import Library
from experiments.plan.sizes import PlannedSizes
from experiments.store import Store


def walk(jobs: Iterable[JobConfig], library: Library) -> Ledger:
    """Every stage of all jobs, from a dry run of each job's pipeline.

    Raises:
        RelockError: What a run would refuse before its heavy work.
    """
    ledger, inputs = Ledger(PlannedSizes(library)), _SharedInputs()
    for job in jobs:
        base, published = library.find_models(job.experiment.model)
        experiment = with_placeholders(job.experiment, library)
        dry_run = DryRun(Store(experiment.store), ledger)
        pipeline = Pipeline(experiment, inputs(experiment), base, published, dry_run)
        pipeline.measure(pipeline.train().models)
        ledger.jobs += 1
    return ledger


class _SharedInputs:
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
        key = json.dumps([rest, attacks, sorted(experiment.defense.needs)], sort_keys=True)
        if key not in self._known:
            self._known[key] = read_inputs(experiment)
        return self._known[key]


def _needs(attack: Attack | None) -> Any:
    if attack is None:
        return None
    trigger = attack.trigger and attack.trigger.model_dump()
    return [attack.task, attack.needs_task, attack.needs_poison, trigger]
