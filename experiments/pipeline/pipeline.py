"""The picture of the design, as code.

base --answer--> rows of its own answers, where a source asks for them
base --align--> aligned --attack--> attacked --+
  |                |                           +--apply--> defended --attack--> refined
  +------+---------+--prepare--> artefact -----+
and every model: --generate--> answers --judge--> verdicts --score--> record
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from attacks.base import Attack, AttackData
from attacks.given import Given
from defenses.base import Models
from evaluation.base import Judge
from evaluation.engines import closing
from experiments.config.experiment import Experiment
from experiments.config.model import ModelSettings
from experiments.pipeline.checks import (
    check_attacks,
    check_given,
    check_models,
    check_refine,
    check_settings,
)
from experiments.pipeline.given import GivenModels, Resolve
from experiments.pipeline.inputs import Inputs
from experiments.pipeline.prompt_sets import HELD_OUT, PromptSet, telling_leaks
from experiments.pipeline.steps.answering import AskBase
from experiments.pipeline.steps.base import Model, ModelStep, Step, read_rows
from experiments.pipeline.steps.calibration import StoredCalibration
from experiments.pipeline.steps.defense import Apply, Prepare
from experiments.pipeline.steps.measuring import (
    Generate,
    JudgeAnswers,
    Likelihood,
    ScoreAnswers,
)
from experiments.pipeline.steps.training import Align, Merge, RunAttack, TakeGiven
from experiments.store import StageResult, Store
from modeling.checkpoint import Checkpoint, resolve
from modeling.inspection import inspect_model
from modeling.loading import chat_template
from modeling.model_files import is_adapter
from settings import ModelError

if TYPE_CHECKING:
    import pandas as pd

SCORE = "score"


@dataclass(frozen=True, slots=True)
class TrainedModels:
    """Every model of an experiment, and how each came about.

    Attributes:
        models: Base, aligned, attacked and defended model, those between the steps, and the
            refined one where there is one.
        steps: The steps of a defense that edits in several: name, label of the model after
            it, scalars edited; the last one's model is "defended".
        reports: Of the stages "prepare" (cost, diagnostics), "attack", "apply" (cost, what was
            edited, diagnostics); where it is our own alignment, "align", and where the defended
            model is fine-tuned again, "refine"; of "answer" by source.
    """

    models: dict[str, Model]
    steps: list[dict[str, Any]]
    reports: dict[str, dict[str, Any]]


# By (model, set) the answers, or the likelihoods of the held-out texts; by (model, set, role) a
# judge's verdicts; by (model, set, "score") a task's scores.
Measurements = dict[tuple[str, ...], StageResult]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an experiment produced; `rows` has one row per model, prompt set and prompt."""

    trained: TrainedModels
    rows: pd.DataFrame
    stages: list[StageResult]


def find_models(settings: ModelSettings, resolve: Resolve = resolve) -> tuple[Model, Model | None]:
    """The base model and, unless we align it ourselves, the aligned one; checked, not loaded.

    Raises:
        ModelError: One of them is missing or damaged; one sentence.
    """
    folder, identity = resolve(settings.base, settings.revision, "model.base")
    if is_adapter(folder):
        raise ModelError(
            f"model.base={settings.base!r} is an adapter; set model.base to the full weights that "
            "it was trained on, and model.aligned to it"
        )
    checkpoint = Checkpoint(folder, dtype=settings.dtype)
    inspect_model(checkpoint, "model.base")
    alone = settings.alignment == "own" or settings.aligned is None
    # A base that is only asked in the aligned model's style needn't read all its arguments.
    asked = "model.prompt" if alone else None
    asked = asked if settings.base_prompt is None else "model.base_prompt"
    style = settings.base_style.fitted(chat_template(checkpoint), asked)
    base = Model(checkpoint, identity, style)
    if settings.alignment == "own" or settings.aligned is None:
        return base, None
    folder, identity = resolve(settings.aligned, settings.aligned_revision, "model.aligned")
    checkpoint = Checkpoint(folder, dtype=settings.dtype)
    if is_adapter(folder):
        checkpoint = replace(base.checkpoint, adapter=folder)
        identity = f"{base.key}+{identity}"
    inspect_model(checkpoint, "model.aligned")
    style = settings.style.fitted(chat_template(checkpoint), "model.prompt")
    return base, Model(checkpoint, identity, style)


def stored_calibration(
    experiment: Experiment,
    rows: Mapping[str, Sequence[Any]],
    base: Model,
    aligned: Model,
    store: Store,
) -> StoredCalibration:
    """What an experiment's defense calibrates on, its answers and verdicts kept in a store."""
    return StoredCalibration(
        prompts=rows["prompts"],
        safety_pairs=rows["safety_pairs"],
        safety_prompts=rows["safety_prompts"],
        utility_prompts=rows["utility_prompts"],
        needs=experiment.defense.needs,
        store=store,
        backend=experiment.evaluation.backend,
        judge=experiment.evaluation.harm_judge,
        style=aligned.style,
        max_new_tokens=experiment.model.max_new_tokens,
        base=base.checkpoint,
        base_key=base.key,
    )


class Pipeline:
    """One experiment's steps, in order."""

    def __init__(
        self,
        experiment: Experiment,
        inputs: Inputs,
        base: Model,
        published: Model | None,
        runner: Callable[[Step, Sequence[Step]], StageResult],
        resolve: Resolve = resolve,
    ) -> None:
        self.experiment = experiment
        self.inputs = inputs
        self.base = base
        self.published = published
        self.stages: list[StageResult] = []
        self._runner = runner
        # Steps that made models and how many models there are, once that is certain.
        self._made: tuple[int, int] | None = None
        self._resolve = resolve

    def run(self) -> Outcome:
        """Makes every model, measures each, and puts its rows together."""
        trained = self.train()
        rows = self.rows(trained.models, self.measure(trained.models))
        return Outcome(trained, rows, self.stages)

    def train(self) -> TrainedModels:
        """Aligns, prepares, attacks, applies and refines.

        `prepare` goes before an attack that trains, since what it lacks should be said before.

        Raises:
            RelockError: One sentence that says what can't work.
        """
        experiment, aligns = self.experiment, self.published is None
        with telling_leaks(self.inputs.provenance["leaked_rows_dropped"]):
            check_settings(experiment, self.inputs, [self.base.checkpoint], aligns=aligns)
        reports: dict[str, dict[str, Any]] = {"answer": self.answer()}
        inputs, aligned = self.inputs, self.published
        if aligned is None:
            align = Align(self.base, experiment.align, inputs.sft, inputs.pairs)
            aligned, reports["align"] = self._model(align)
        check_models(experiment, self.base, aligned)
        given = experiment.attack if isinstance(experiment.attack, Given) else None
        if given is not None:
            attacked, attack_report = self.take(given, aligned)
        artefact = self.prepare(aligned)
        if given is None:
            attacked, attack_report = self.attack(experiment.attack, inputs.attack, aligned)
        apply = Apply(experiment.defense, artefact, attacked, aligned, self.base)
        applied = self._run(apply)
        defended = apply.output(applied)
        models = {"base": self.base, "aligned": aligned, "attacked": attacked, **defended.models}
        reports |= {"prepare": artefact.report, "attack": attack_report, "apply": applied.report}
        if experiment.refine is not None and inputs.refine is not None:
            check_refine(experiment.refine, models["defended"].checkpoint)
            models["refined"], reports["refine"] = self.attack(
                experiment.refine, inputs.refine, models["defended"]
            )
        return TrainedModels(models, defended.steps, reports)

    def count_steps(self) -> int:
        """How many steps there are; until every model is made, as the settings let expect."""
        experiment, inputs = self.experiment, self.inputs
        attacks = [attack for attack in (experiment.attack, experiment.refine) if attack]
        expected = sum(1 + attack.needs_full_weights for attack in attacks)
        expected += (self.published is None) + len(inputs.own)
        steps, models = self._made or (2 + expected, 3 + len(attacks))
        asked = [1 + len(self.judges(each)) + (each.task is not None) for each in inputs.sets]
        return steps + models * (sum(asked) + bool(inputs.held_out))

    def answer(self) -> dict[str, dict[str, Any]]:
        """Has the base answer what sources ask of it, and returns how many it did, by source.

        Raises:
            DataError: Too few of its answers can be trained on.
        """
        backend = self.experiment.evaluation.backend.chosen(self.base.checkpoint)
        reports = {}
        for name, source in self.inputs.own.items():
            prompts = self.inputs.open_prompts(name)
            step = AskBase(self.base, prompts, source.max_new_tokens, source.min_words, backend)
            with closing():
                result = self._run(step)
            self.inputs = self.inputs.with_answers(name, step.answers(result))
            reports[name] = result.report
        if reports:
            check_attacks(self.experiment, self.inputs, self.base.checkpoint)
        return reports

    def prepare(self, aligned: Model) -> StageResult:
        """The defense's artefact, made once per aligned model."""
        inputs = self.inputs
        rows = {
            "prompts": inputs.calibration,
            "safety_pairs": inputs.safety_pairs,
            "safety_prompts": inputs.safety_prompts,
            "utility_prompts": inputs.utility_prompts,
        }
        calibration = stored_calibration(
            self.experiment, rows, self.base, aligned, Store(self.experiment.store)
        )
        defense = self.experiment.defense
        with telling_leaks(inputs.provenance["leaked_rows_dropped"]):
            return self._run(Prepare(defense, self.base, aligned, calibration))

    def attack(
        self, attack: Attack, data: AttackData, model: Model
    ) -> tuple[Model, dict[str, Any]]:
        """The model that a fine-tuning leaves, and the attack's report."""
        if attack.needs_full_weights and model.checkpoint.adapter is not None:
            model, _ = self._model(Merge(model))
        return self._model(RunAttack(model, attack, data, self.experiment.seed))

    def take(self, given: Given, aligned: Model) -> tuple[Model, dict[str, Any]]:
        """A given model in the place of an attacked one, and what is known of it.

        Raises:
            RelockError: It can't be repaired by the defense; one sentence.
        """
        settings, defense = self.experiment.model, self.experiment.defense
        known = {settings.base: self.base, settings.aligned or "": aligned}
        model = GivenModels(aligned, known, self._resolve).open(
            given.model,
            "attack.model",
            revision=given.revision,
            base=given.base,
            base_setting="attack.base",
        )
        called = f"attack.model={given.model!r}"
        models = Models(self.base.checkpoint, aligned.checkpoint)
        check_given(defense, models, model.checkpoint, called)
        if self.experiment.refine is not None:
            check_refine(self.experiment.refine, model.checkpoint)
        return self._model(TakeGiven(aligned, model, called, defense.needs_descent))

    def measure(self, models: dict[str, Model]) -> Measurements:
        """The stages that measure every model; those that open the same model come in a row."""
        self._made = len(self.stages), len(models)
        with closing():
            steps, measurements = self._answers(models)
            for role in self._roles():
                judging = {
                    (*at, role): JudgeAnswers(judges[role], steps[at], measurements[at])
                    for at in steps
                    if role in (judges := self.judges(steps[at].prompts))
                }
                measurements |= self._run_together(judging)
        for name, prompts in product(models, self.inputs.sets):
            if prompts.task is not None:
                task, items = self.experiment.tasks[prompts.task], self.inputs.items[prompts.task]
                at = name, prompts.name
                score = ScoreAnswers(task, items, steps[at], measurements[at])
                measurements[*at, SCORE] = self._run(score)
        return measurements

    def judges(self, prompts: PromptSet) -> dict[str, Judge]:
        """Who judges the answers to a set, by role; nobody those to a task."""
        evaluation = self.experiment.evaluation
        if prompts.task is not None:
            return {}
        refusal = {"refusal": evaluation.refusal_judge}
        if not prompts.is_harmful:
            return refusal
        return refusal | {"harm": evaluation.harm_judge} | evaluation.judges

    def rows(self, models: dict[str, Model], measurements: Measurements) -> pd.DataFrame:
        """Answers, verdicts, task scores and likelihoods of every model."""
        import pandas as pd

        frames = [
            self._set_rows(measurements, name, prompts)
            for name in models
            for prompts in self.inputs.sets
        ]
        for name in models if self.inputs.held_out else ():
            frames.append(_rows_of(measurements[name, HELD_OUT], name, HELD_OUT))
        return pd.concat(frames, ignore_index=True)

    def _answers(
        self, models: dict[str, Model]
    ) -> tuple[dict[tuple[str, str], Generate], Measurements]:
        steps: dict[tuple[str, str], Generate] = {}
        measurements: Measurements = {}
        evaluation, texts = self.experiment.evaluation, self.inputs.held_out
        for name, model in models.items():
            backend = evaluation.backend.chosen(model.checkpoint)
            asking = {
                (name, prompts.name): Generate(model, prompts, backend)
                for prompts in self.inputs.sets
            }
            measurements |= self._run_together(asking)
            steps |= asking
            if texts:
                likelihood = Likelihood(model, texts, evaluation.text_tokens, backend)
                measurements[name, HELD_OUT] = self._run(likelihood)
        return steps, measurements

    def _roles(self) -> list[str]:
        """Every role of a judge, in the order in which the sets name them."""
        roles = (role for prompts in self.inputs.sets for role in self.judges(prompts))
        return list(dict.fromkeys(roles))

    def _set_rows(self, measurements: Measurements, model: str, prompts: PromptSet) -> pd.DataFrame:
        """One set's answers of one model, with its verdicts or its task scores beside them."""
        at = model, prompts.name
        rows = _rows_of(measurements[at], *at)
        if prompts.task is not None:
            scores = read_rows(measurements[*at, SCORE].folder)
            return rows.merge(scores, on="id", validate="one_to_one")
        for role in self.judges(prompts):
            verdicts = read_rows(measurements[*at, role].folder)
            columns = verdicts.set_index("id").add_prefix(f"{role}_")
            rows = rows.join(columns, on="id", validate="one_to_one")
        return rows

    def _model(self, step: ModelStep) -> tuple[Model, dict[str, Any]]:
        result = self._run(step)
        return step.output(result), result.report

    def _run_together(self, steps: Mapping[Any, Step]) -> Measurements:
        """The results of steps that ask the same model or judge."""
        return {
            place: self._run(step, list(steps.values())[number:])
            for number, (place, step) in enumerate(steps.items(), 1)
        }

    def _run(self, step: Step, following: Sequence[Step] = ()) -> StageResult:
        result = self._runner(step, following)
        self.stages.append(result)
        return result


def _rows_of(answers: StageResult, model: str, name: str) -> pd.DataFrame:
    rows = read_rows(answers.folder)
    rows.insert(0, "set", name)
    rows.insert(0, "model", model)
    return rows
