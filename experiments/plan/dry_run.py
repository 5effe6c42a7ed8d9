"""`DryRun`, which answers a pipeline's steps without running them, and the `Ledger` that it fills.

A step whose result the store holds is taken from there. For any other one is written down what it
would cost, and the model that it will leave is worked out from the settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from experiments.pipeline.cost import Work
from experiments.pipeline.placement import MODEL
from experiments.pipeline.steps.base import ModelStep, Step
from experiments.pipeline.steps.defense import Apply, Prepare
from experiments.pipeline.steps.training import Align
from experiments.plan.placeholder_weights import write_adapter
from experiments.plan.sizes import PlannedSizes
from experiments.store import StageResult, Store


@dataclass(frozen=True)
class Entry:
    """A stage of the plan.

    Attributes:
        name: Of which kind it is.
        work: What it takes, or took by the same formulas.
        reused: Whether the store holds it.
        seconds: How long it took; 0.0 for one to run.
    """

    name: str
    work: Work
    reused: bool
    seconds: float


@dataclass
class Ledger:
    """Every stage of a sweep, once.

    Attributes:
        sizes: What its steps tell their costs by.
        entries: {key: entry}, in the order in which they are needed.
        jobs: How many jobs need them.
    """

    sizes: PlannedSizes
    entries: dict[str, Entry] = field(default_factory=dict)
    jobs: int = 0

    def add(self, result: StageResult, step: Step) -> None:
        """Writes a stage down unless it is there."""
        if result.key not in self.entries:
            work = step.cost(self.sizes)
            self.entries[result.key] = Entry(result.name, work, result.reused, result.seconds)


class DryRun:
    """The runner of a plan: takes the place of `pipeline.runner.Runner` and makes nothing."""

    def __init__(self, store: Store, ledger: Ledger) -> None:
        self._store = store
        self._ledger = ledger
        self._sizes = ledger.sizes

    def __call__(self, step: Step) -> StageResult:
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
        self._ledger.add(result, step)
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
