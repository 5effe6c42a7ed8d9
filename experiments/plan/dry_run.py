"""`walk`, a dry run of all jobs of a sweep: `DryRun` answers their steps, a `Ledger` keeps them.

A step whose result the store holds is taken from there. For any other one is written down what it
would cost, and the model that it will leave is worked out from the settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from attacks.base import Attack
from experiments.config.experiment import Experiment
from experiments.pipeline.cost import Work
from experiments.pipeline.inputs import Inputs, read_inputs
from experiments.pipeline.pipeline import Pipeline
from experiments.pipeline.steps.base import MODEL, ModelStep, Step
from experiments.pipeline.steps.defense import Apply, Prepare
from experiments.pipeline.steps.training import Align
from experiments.plan.models import Library
from experiments.plan.shapes import write_adapter
from experiments.plan.sizes import PlannedSizes, with_placeholders
from experiments.store import StageResult, Store


@dataclass(frozen=True)
class Entry:
    """A stage of the plan, with what it takes, and how long it took where the store holds it."""

    name: str
    work: Work
    reused: bool
    seconds: float


@dataclass
class Ledger:
    """Every stage of a sweep once, by key, in the order in which its jobs need them."""

    sizes: PlannedSizes
    entries: dict[str, Entry] = field(default_factory=dict)
    jobs: int = 0


class DryRun:
    """The runner of a plan: takes the place of `pipeline.runner.Runner` and makes nothing."""

    def __init__(self, store: Store, ledger: Ledger) -> None:
        self._store = store
        self._ledger = ledger
        self._sizes = ledger.sizes

    def __call__(self, step: Step, following: Sequence[Step] = ()) -> StageResult:
        """The result that the store holds, or what is known of it before it is made."""
        result = self._store.find(step.stage)
        if result is None or step.is_stale(result):
            result = self._expected(step)
        if isinstance(step, ModelStep):
            model = step.output(result).checkpoint
            self._sizes.keep(step.model.checkpoint, model, step.fresh_lora)
        if isinstance(step, Apply):
            for defended in step.output(result).models.values():
                self._sizes.keep(step.attacked.checkpoint, defended.checkpoint)
        if result.key not in self._ledger.entries:
            entry = Entry(result.name, step.cost(self._sizes), result.reused, result.seconds)
            self._ledger.entries[result.key] = entry
        return result

    def _expected(self, step: Step) -> StageResult:
        stage, library = step.stage, self._sizes.library
        folder = self._store.folder(stage)
        result = StageResult(stage.name, stage.key, folder, {}, 0.0, reused=False)
        if isinstance(step, Align):
            # The checks of a run read the aligned adapter.
            result = replace(result, folder=library.scratch / stage.key)
            if not result.folder.exists():
                base = step.model.checkpoint
                shape, adapter = self._sizes.shape(base), result.folder / MODEL
                write_adapter(shape, step.recipe.lora, base.base, adapter)
        if isinstance(step, Prepare):
            for answers in step.defense.calibration_answers:
                aligned = step.aligned.checkpoint
                self(step.calibration.expected_step(answers, aligned, library.fingerprint))
        if isinstance(step, Apply):
            result = replace(result, report=step.expected_report(folder))
        return result


def walk(jobs: Iterable[Experiment], library: Library) -> Ledger:
    """Every stage of all jobs, from a dry run of each job's pipeline.

    Raises:
        RelockError: What a run would refuse before its heavy work.
    """
    ledger, inputs = Ledger(PlannedSizes(library)), _SharedInputs()
    for job in jobs:
        base, published = library.find_models(job.model)
        experiment = with_placeholders(job, library)
        dry_run = DryRun(Store(experiment.store), ledger)
        resolve = library.resolver(job.model)
        pipeline = Pipeline(experiment, inputs(experiment), base, published, dry_run, resolve)
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
