"""The pipeline with no stage run: what there is to do, and what is there already.

`Foresight` walks the arrows of `Pipeline` in their order, with their keys. A stage that
the store holds is taken from there; for any other one is written down what it would cost, and the
model that it will leave is worked out from the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from attacks.base import Attack
from data.rows import Prompt
from defenses.base import Answered, Defense
from experiments.config.experiment import Experiment
from experiments.pipeline import stages
from experiments.pipeline.calibration import StoredCalibration
from experiments.pipeline.inputs import Inputs, PromptSet
from experiments.pipeline.pipeline import Applied, Listener, Pipeline
from experiments.pipeline.steps import Arrow, Model
from experiments.plan.costs import Cost, Costs
from experiments.plan.forms import left
from experiments.plan.placeholder_weights import stand_in_adapter
from experiments.store import StageResult
from modeling.checkpoint import Checkpoint

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Entry:
    """A stage of the plan.

    Attributes:
        name: Which arrow it is.
        cost: What it takes, or took by the same arithmetic.
        reused: Whether the store holds it.
        seconds: How long it took; 0.0 for one to run.
    """

    name: str
    cost: Cost
    reused: bool
    seconds: float


@dataclass
class Ledger:
    """Every stage of a sweep, once.

    Attributes:
        entries: {key: entry}, in the order in which they are needed.
    """

    entries: dict[str, Entry] = field(default_factory=dict)

    def add(self, result: StageResult, cost: Callable[[], Cost]) -> None:
        """Writes a stage down unless it is there."""
        if result.key not in self.entries:
            entry = Entry(result.name, cost(), result.reused, result.seconds)
            self.entries[result.key] = entry


class Foresight(Pipeline):
    """One job's part of a plan."""

    def __init__(
        self,
        experiment: Experiment,
        inputs: Inputs,
        base: Model,
        given: Model | None,
        costs: Costs,
        ledger: Ledger,
    ) -> None:
        super().__init__(experiment, inputs, base, given, Listener())
        self.costs = costs
        self.ledger = ledger

    def aligned(self) -> Model:
        """The aligned model: the one that is given, or where the `align` stage's will be."""
        if self.given is not None:
            return self.given
        result = self._stage(self.arrows.align(self.base))
        checkpoint = stages.made(result.folder, self.base.checkpoint, adapter=True)
        self.costs.forms.adapters[str(checkpoint.adapter)] = self.experiment.align.lora
        return Model(checkpoint, result.key, self.experiment.model.style)

    def check(self, aligned: Model) -> None:
        """The run's own checks, on a stand-in for an adapter that isn't made yet."""
        adapter = aligned.checkpoint.adapter
        if adapter is not None and not Path(adapter).is_dir():
            folder = self.costs.forms.library.scratch / f"adapter-{aligned.key}"
            if not folder.exists():
                base, lora = self.base.checkpoint, self.experiment.align.lora
                stand_in_adapter(self.costs.forms.loaded(base).shape, lora, base.base, folder)
            aligned = replace(aligned, checkpoint=replace(aligned.checkpoint, adapter=str(folder)))
        super().check(aligned)

    def applied(self, artefact: StageResult, attacked: Model, aligned: Model) -> Applied:
        """The models that the repair will leave, or has left."""
        applied = super().applied(artefact, attacked, aligned)
        for model in applied.models.values():
            self.costs.forms.keep(attacked.checkpoint, model.checkpoint)
        return applied

    def measured(self, models: dict[str, Model]) -> pd.DataFrame:
        """The stages that measure every model; no rows."""
        import pandas as pd

        self.measurements(models)
        return pd.DataFrame()

    def _left(self, result: StageResult, before: Model, attack: Attack | None = None) -> Model:
        """The model that a merge, or an attack, will make of another one."""
        kind = "full" if attack is None else getattr(attack, "adapter", "resume")
        checkpoint = stages.made(result.folder, before.checkpoint, adapter=kind != "full")
        self.costs.forms.keep(before.checkpoint, checkpoint)
        if kind == "fresh":
            self.costs.forms.adapters[str(checkpoint.adapter)] = attack.lora  # type: ignore[union-attr]
        return Model(checkpoint, result.key, before.style)

    def _stage(self, arrow: Arrow) -> StageResult:
        stage = arrow.stage
        given = cast("partial[Any]", arrow.make).keywords
        folder = self.store.folder(stage)
        result = self.store.find(stage)
        if result is not None and arrow.stale(result):
            result = None
        if stage.name == "prepare":
            self.costs.calibrations[folder] = given["calibration"]
        if result is None:
            result = StageResult(stage.name, stage.key, folder, {}, 0.0, reused=False)
            if stage.name == "apply":
                result = replace(result, report=self._applied_report(result, **given))
            if stage.name == "prepare":
                for answered in given["defense"].answered:
                    self._answered(answered, given["models"].aligned, given["calibration"])
        if stage.name == "generate":
            given = given | {"out": folder}
        self.ledger.add(result, lambda: getattr(self.costs, stage.name)(**given))
        self.done.append(result)
        return result

    def _answered(
        self, answered: Answered, aligned: Checkpoint, calibration: StoredCalibration
    ) -> None:
        """The answers that `prepare` will ask for.

        Those of a reference, or to prompts chosen on the way, depend on what isn't there yet: they
        get a key of their own, under which a plan finds them again.
        """
        texts = self.costs.asked(answered, calibration)
        rows = tuple(Prompt(str(index), text) for index, text in enumerate(texts))
        prompts = PromptSet("calibration", rows, calibration.max_new_tokens)
        model = self.base.checkpoint if answered.model == "base" else aligned
        inputs = self._identity(model) + ((answered.of,) if answered.of else ())
        backend, style = calibration.backend.chosen(model), calibration.style
        self._stage(Arrow(*stages.generation(backend, model, style, prompts, inputs)))

    def _identity(self, model: Checkpoint) -> tuple[str, ...]:
        """What identifies a model to the calibration service, a path where it isn't there yet."""
        if model.adapter is not None:
            return (self.base.key, self.costs.forms.library.fingerprint(model.adapter))
        if model.base == self.base.checkpoint.base:
            return (self.base.key,)
        return (self.costs.forms.library.fingerprint(model.base),)

    def _applied_report(
        self, result: StageResult, defense: Defense, attacked: Checkpoint, **given: Any
    ) -> dict[str, Any]:
        """What of the report of `apply` the pipeline reads: where the models will lie."""
        known = stages.known_models(given["models"], attacked)
        parts = getattr(defense, "parts", None) or [defense] * len(defense.step_names)
        folder = result.folder / stages.MODEL
        before, steps = attacked, []
        for number, (name, part) in enumerate(zip(defense.step_names, parts, strict=True), 1):
            last = number == len(parts)
            after = left(part, before, folder if last else folder / "steps" / str(number))
            before = after
            place = stages.place(after, result.folder, known)
            steps.append({"name": name, "parameters_edited": 0, "place": place})
        if not steps:
            before = left(defense, attacked, folder)
        return {
            "defended": stages.place(before, result.folder, known),
            "parameters_edited": 0,
            "steps": steps,
        }
