"""The picture of the design, as code.

base --align--> aligned --attack--> attacked --+
  |                |                           +--apply--> defended --attack--> refined
  +------+---------+--prepare--> artefact -----+
and every model: --generate--> answers --judge--> verdicts --score--> record
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attacks.base import Attack, AttackData
from defenses.base import Models
from evaluation.engines import closing
from experiments.config.experiment import Experiment
from experiments.config.model import ModelSettings
from experiments.pipeline import stages
from experiments.pipeline.inputs import HELD_OUT, Inputs, PromptSet
from experiments.pipeline.isolation import in_child
from experiments.pipeline.steps import Arrow, Arrows, Model
from experiments.store import Stage, StageResult, Store
from modeling.checkpoint import Checkpoint, resolve
from modeling.headers import check_target_modules
from modeling.model_files import is_adapter
from settings import SettingError

if TYPE_CHECKING:
    import pandas as pd

SCORE = "score"

Taken = dict[tuple[str, ...], StageResult]


class Listener:
    """Is told how the stages of a run go on; this one does nothing about it."""

    def waiting(self, stage: Stage) -> None:
        """Another process is making the stage."""

    def making(self, stage: Stage) -> None:
        """The stage is about to be made."""

    def finished(self, result: StageResult) -> None:
        """The stage was made, or found."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an experiment produced.

    Attributes:
        rows: One row per model, prompt set and prompt, with answers, verdicts and task scores.
        models: Content key of base, aligned, attacked and defended model, of those between the
            steps, and of the refined one where there is one.
        backends: What ran each of them, as `Backend.identity` says it.
        steps: The steps of a repair that was made in several: name, label of the model after
            it, scalars edited; the last one's model is "defended".
        stages: Every stage, in the order in which it was needed.
        attack: The attack's report.
        refine: The report of the fine-tuning of the defended model; None without one.
        prepare: The report of `prepare`: cost and diagnostics.
        apply: The report of `apply`: cost, what was edited, diagnostics.
    """

    rows: pd.DataFrame
    models: dict[str, str]
    backends: dict[str, dict[str, Any]]
    steps: list[dict[str, Any]]
    stages: list[StageResult]
    attack: dict[str, Any]
    refine: dict[str, Any] | None
    prepare: dict[str, Any]
    apply: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Applied:
    """What the `apply` stage left.

    Attributes:
        models: The models after each step but the last, by label, then "defended".
        steps: As in `Outcome`.
        report: The stage's report.
    """

    models: dict[str, Model]
    steps: list[dict[str, Any]]
    report: dict[str, Any]


def applied(
    result: StageResult, known: Mapping[str, Checkpoint], given: Sequence[Model]
) -> Applied:
    """Finds the models that an `apply` stage left.

    A model that a step left as it was keeps its key, so that it isn't measured again.

    Args:
        result: The stage.
        known: The checkpoints that it was given, by name.
        given: The same with their keys; the first is the attacked one.
    """
    report = result.report
    defended = stages.checkpoint_at(report["defended"], result.folder, known)
    keys = {model.checkpoint: model.key for model in reversed(given)}
    keys.setdefault(defended, result.key)
    style = given[0].style
    attacked = given[0].checkpoint
    models: dict[str, Model] = {}
    steps, edited_so_far = [], 0
    for number, step in enumerate(report["steps"], start=1):
        checkpoint = stages.checkpoint_at(step["place"], result.folder, known)
        label = f"step {number}: {step['name']}"
        if number == len(report["steps"]):
            label, checkpoint = "defended", defended
        key = keys.setdefault(checkpoint, f"{result.key}.{number}")
        edited = step["parameters_edited"]
        edited_so_far += edited
        models[label] = Model(checkpoint, key, style, attacked if edited_so_far else None)
        steps.append({"name": step["name"], "model": label, "parameters_edited": edited})
    claimed = attacked if report["parameters_edited"] else None
    models["defended"] = Model(defended, keys[defended], style, claimed)
    return Applied(models, steps, report)


def find_models(settings: ModelSettings) -> tuple[Model, Model | None]:
    """The base model and, unless we align it ourselves, the aligned one; checked, not loaded.

    Raises:
        ModelError: One of them is missing or damaged; one sentence.
    """
    folder, identity = resolve(settings.base, settings.revision, "model.base")
    base = Model(Checkpoint(folder, dtype=settings.dtype), identity, settings.base_style)
    if settings.alignment == "own" or settings.aligned is None:
        return base, None
    folder, identity = resolve(settings.aligned, settings.aligned_revision, "model.aligned")
    if is_adapter(folder):
        adapter = replace(base.checkpoint, adapter=folder)
        return base, Model(adapter, f"{base.key}+{identity}", settings.style)
    return base, Model(Checkpoint(folder, dtype=settings.dtype), identity, settings.style)


class Pipeline:
    """Runs one experiment's stages through the store."""

    def __init__(
        self,
        experiment: Experiment,
        inputs: Inputs,
        base: Model,
        given: Model | None,
        listener: Listener,
    ) -> None:
        self.experiment = experiment
        self.inputs = inputs
        self.base = base
        self.given = given
        self.store = Store(experiment.store)
        self.arrows = Arrows(experiment, inputs, self.store)
        self.done: list[StageResult] = []
        self._listener = listener

    def run(self) -> Outcome:
        """Aligns, prepares, attacks, applies, refines, and measures every model on the way.

        `prepare` goes first, since what it lacks should be said before an attack is trained.
        """
        self.check_settings()
        aligned = self.aligned()
        self.check(aligned)
        artefact = self.prepared(aligned)
        attack, data = self.experiment.attack, self.inputs.attack
        attacked, attack_report = self.trained(attack, data, aligned)
        applied = self.applied(artefact, attacked, aligned)
        models = {"base": self.base, "aligned": aligned, "attacked": attacked, **applied.models}
        refined, refine_report = self.refined(applied.models["defended"])
        if refined is not None:
            models["refined"] = refined
        rows = self.measured(models)
        backend = self.experiment.evaluation.backend
        return Outcome(
            rows=rows,
            models={name: model.key for name, model in models.items()},
            backends={
                name: backend.chosen(model.checkpoint).identity() for name, model in models.items()
            },
            steps=applied.steps,
            stages=self.done,
            attack=attack_report,
            refine=refine_report,
            prepare=artefact.report,
            apply=applied.report,
        )

    def check_settings(self) -> None:
        """Refuses what can be seen to fail before the first stage."""
        base, evaluation = self.base.checkpoint, self.experiment.evaluation
        if self.given is None:
            modules = self.experiment.align.lora.target_modules
            check_target_modules(modules, base, "align.lora.target_modules")
        self.experiment.attack.check(base, self.inputs.attack, "attack")
        if self.experiment.refine is not None and self.inputs.refine is not None:
            self.experiment.refine.check(base, self.inputs.refine, "refine")
        evaluation.backend.chosen(base).check(base)
        evaluation.harm_judge.check("evaluation.harm_judge")
        evaluation.refusal_judge.check("evaluation.refusal_judge")
        for name, judge in evaluation.judges.items():
            judge.check(f"judges.{name}")

    def aligned(self) -> Model:
        """The aligned model: the one that is given, or the `align` stage's."""
        if self.given is not None:
            return self.given
        result = self._stage(self.arrows.align(self.base))
        checkpoint = stages.checkpoint_in(result.folder, self.base.checkpoint)
        return Model(checkpoint, result.key, self.experiment.model.style)

    def check(self, aligned: Model) -> None:
        """Refuses combinations of model, attack and defense that can't work."""
        attack = self.experiment.attack
        if aligned.checkpoint.adapter is None and not attack.needs_full_weights:
            raise SettingError(
                "attack.adapter=resume needs an aligned model that is an adapter, but "
                "model.aligned is a full model; set attack.adapter=fresh, or model.alignment=own "
                "to align the base by the align stage"
            )
        if self.experiment.defense.needs_resumed_adapter and attack.needs_full_weights:
            raise SettingError(
                f"defense={self.experiment.labels['defense']} repairs the alignment adapter that "
                "the attack went on training, and this attack trains other weights; "
                "set attack.adapter=resume"
            )
        models = Models(self.base.checkpoint, aligned.checkpoint)
        self.experiment.defense.check(models, None)
        if self.experiment.defense.leaves == "hooks":
            hooked = replace(self.base.checkpoint, steering="hooks")
            self.experiment.evaluation.backend.chosen(hooked).check(hooked)

    def prepared(self, aligned: Model) -> StageResult:
        """The defense's artefact, made once per aligned model."""
        return self._stage(self.arrows.prepare(self.base, aligned))

    def trained(
        self, attack: Attack, data: AttackData, model: Model
    ) -> tuple[Model, dict[str, Any]]:
        """The model that a fine-tuning leaves, and the attack's report."""
        if attack.needs_full_weights and model.checkpoint.adapter is not None:
            model = self._left(self._stage(self.arrows.merge(model)), model)
        result = self._stage(self.arrows.attack(attack, data, model))
        return self._left(result, model, attack), result.report

    def applied(self, artefact: StageResult, attacked: Model, aligned: Model) -> Applied:
        """The repaired model, and the models after each step to it."""
        seen = Models(self.base.checkpoint, aligned.checkpoint)
        result = self._stage(self.arrows.apply(artefact, attacked, seen))
        known = stages.known_models(seen, attacked.checkpoint)
        return applied(result, known, [attacked, aligned, self.base])

    def refined(self, defended: Model) -> tuple[Model | None, dict[str, Any] | None]:
        """The defended model after it was fine-tuned again, where that was asked for."""
        refine, data = self.experiment.refine, self.inputs.refine
        if refine is None or data is None:
            return None, None
        if defended.checkpoint.adapter is None and not refine.needs_full_weights:
            raise SettingError(
                "refine.adapter=resume goes on training an adapter, and the defended model is "
                "none; set refine.adapter=fresh"
            )
        return self.trained(refine, data, defended)

    def measured(self, models: dict[str, Model]) -> pd.DataFrame:
        """Answers, verdicts, task scores and likelihoods of every model."""
        import pandas as pd

        taken = self.measurements(models)
        frames = [
            self._rows(taken, name, prompts) for name in models for prompts in self.inputs.sets
        ]
        for name in models if self.inputs.held_out else ():
            frames.append(_labelled(taken[name, HELD_OUT], name, HELD_OUT))
        return pd.concat(frames, ignore_index=True)

    def measurements(self, models: dict[str, Model]) -> Taken:
        """The stages that measure every model; those that open the same model come in a row.

        Returns:
            By (model, set) the answers, or the likelihoods of the held-out texts; by (model, set,
            role) a judge's verdicts; by (model, set, "score") a task's scores.
        """
        with closing():
            taken = self._answers(models)
            taken |= self._verdicts(models, taken)
        for name, prompts in product(models, self.inputs.sets):
            if prompts.task is not None:
                arrow = self.arrows.score(prompts.task, taken[name, prompts.name])
                taken[name, prompts.name, SCORE] = self._stage(arrow)
        return taken

    def _answers(self, models: dict[str, Model]) -> Taken:
        taken: Taken = {}
        for name, model in models.items():
            for prompts in self.inputs.sets:
                taken[name, prompts.name] = self._stage(self.arrows.generate(model, prompts))
            if self.inputs.held_out:
                taken[name, HELD_OUT] = self._stage(self.arrows.likelihood(model))
        return taken

    def _verdicts(self, models: dict[str, Model], answers: Taken) -> Taken:
        taken: Taken = {}
        judged = {prompts.name: self.arrows.judges(prompts) for prompts in self.inputs.sets}
        for role in dict.fromkeys(role for judges in judged.values() for role in judges):
            for name, prompts in product(models, self.inputs.sets):
                judge = judged[prompts.name].get(role)
                if judge is not None:
                    arrow = self.arrows.judge(judge, answers[name, prompts.name])
                    taken[name, prompts.name, role] = self._stage(arrow)
        return taken

    def _rows(self, taken: Taken, model: str, prompts: PromptSet) -> pd.DataFrame:
        """One set's answers of one model, with its verdicts or its task scores beside them."""
        rows = _labelled(taken[model, prompts.name], model, prompts.name)
        if prompts.task is not None:
            scores = stages.read_rows(taken[model, prompts.name, SCORE].folder)
            return rows.merge(scores, on="id", validate="one_to_one")
        for role in self.arrows.judges(prompts):
            verdicts = stages.read_rows(taken[model, prompts.name, role].folder)
            columns = verdicts.set_index("id").add_prefix(f"{role}_")
            rows = rows.join(columns, on="id", validate="one_to_one")
        return rows

    def _left(self, result: StageResult, before: Model, attack: Attack | None = None) -> Model:
        """The model that a merge, or an attack, made of another one."""
        checkpoint = stages.checkpoint_in(result.folder, before.checkpoint)
        return Model(checkpoint, result.key, before.style)

    def _stage(self, arrow: Arrow) -> StageResult:
        name = arrow.stage.name

        def stale(found: StageResult) -> bool:
            # Nobody is asked twice in one run.
            return arrow.stale(found) and all(found.key != done.key for done in self.done)

        def make(out: Path) -> dict[str, Any] | None:
            self._listener.making(arrow.stage)
            if self.experiment.runtime.isolate and not arrow.own_process:
                report: dict[str, Any] | None = in_child(partial(arrow.make, out), name)
                return report
            return arrow.make(out)

        def waiting() -> None:
            self._listener.waiting(arrow.stage)

        result = self.store.run(arrow.stage, make, stale, waiting)
        self.done.append(result)
        self._listener.finished(result)
        return result


def _labelled(taken: StageResult, model: str, name: str) -> pd.DataFrame:
    rows = stages.read_rows(taken.folder)
    rows.insert(0, "set", name)
    rows.insert(0, "model", model)
    return rows
