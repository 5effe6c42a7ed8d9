"""The picture of the design, as code.

base --align--> aligned --attack--> attacked --+
  |                |                           +--apply--> defended
  +------+---------+--prepare--> artefact -----+
and every model: --generate--> answers --judge--> verdicts --score--> record
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.local import hash_rows
from defenses.base import Models
from experiments import stages
from experiments.calibration import StoredCalibration
from experiments.configuration import Experiment, ModelSettings
from experiments.inputs import Inputs, PromptSet
from experiments.isolation import in_child
from experiments.store import Stage, StageResult, Store
from modeling.checkpoint import Checkpoint, resolve
from modeling.headers import check_target_modules
from settings import SettingError, target

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint and the key that identifies its content."""

    checkpoint: Checkpoint
    key: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an experiment produced.

    Attributes:
        rows: One row per model, prompt set and prompt, with answers, verdicts and task scores.
        models: Content key of each of the four models and of those between the steps.
        steps: The steps of a repair that was made in several: name, label of the model after
            it, scalars edited; the last one's model is "defended".
        stages: Every stage, in the order in which it was needed.
        attack: The attack's report.
        prepare: The report of `prepare`: cost and diagnostics.
        apply: The report of `apply`: cost, what was edited, diagnostics.
    """

    rows: pd.DataFrame
    models: dict[str, str]
    steps: list[dict[str, Any]]
    stages: list[StageResult]
    attack: dict[str, Any]
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
        given: The same with their keys.
    """
    report = result.report
    if "defended" in report:
        defended = stages.checkpoint_at(report["defended"], result.folder, known)
    elif report["unchanged"]:  # Written before there were steps, as is the next one.
        defended = known["attacked"]
    else:
        defended = stages.checkpoint_in(result.folder, known["attacked"])
    keys = {model.checkpoint: model.key for model in reversed(given)}
    keys.setdefault(defended, result.key)
    models: dict[str, Model] = {}
    steps = []
    for number, step in enumerate(report.get("steps", []), start=1):
        checkpoint = stages.checkpoint_at(step["place"], result.folder, known)
        label = f"step {number}: {step['name']}"
        if number == len(report["steps"]):
            label, checkpoint = "defended", defended
        models[label] = Model(checkpoint, keys.setdefault(checkpoint, f"{result.key}.{number}"))
        edited = step["parameters_edited"]
        steps.append({"name": step["name"], "model": label, "parameters_edited": edited})
    models["defended"] = Model(defended, keys[defended])
    return Applied(models, steps, report)


def find_models(settings: ModelSettings) -> tuple[Model, Model | None]:
    """The base model and, where one is given, the aligned one; checked, not loaded.

    Raises:
        ModelError: One of them is missing or damaged; one sentence.
    """
    folder, identity = resolve(settings.base, settings.revision, "model.base")
    base = Model(Checkpoint(folder, None, None, settings.dtype), identity)
    if settings.aligned is None:
        return base, None
    folder, identity = resolve(settings.aligned, settings.revision, "model.aligned")
    if (Path(folder) / "adapter_config.json").is_file():
        adapter = Checkpoint(base.checkpoint.base, folder, None, settings.dtype)
        return base, Model(adapter, f"{base.key}+{identity}")
    return base, Model(Checkpoint(folder, None, None, settings.dtype), identity)


class Pipeline:
    """Runs one experiment's stages through the store."""

    def __init__(
        self,
        experiment: Experiment,
        inputs: Inputs,
        base: Model,
        given: Model | None,
        notify: Callable[[StageResult], None],
    ) -> None:
        self.experiment = experiment
        self.inputs = inputs
        self.base = base
        self.given = given
        self.store = Store(experiment.store)
        self.style = experiment.model.prompt
        self.done: list[StageResult] = []
        self._notify = notify

    def run(self) -> Outcome:
        """Aligns, prepares, attacks, applies, and measures the four models and the steps' own.

        `prepare` goes first, since what it lacks should be said before an attack is trained.
        """
        base, align = self.base.checkpoint, self.experiment.align
        if self.given is None:
            check_target_modules(align.lora.target_modules, base, "align.lora.target_modules")
        self.experiment.attack.check(base, self.inputs.attack)
        self.experiment.evaluation.harm_judge.check()
        self.experiment.evaluation.refusal_judge.check()
        aligned = self.aligned()
        self.check(aligned)
        artefact = self.prepared(aligned)
        attacked, attack_report = self.attacked(aligned)
        applied = self.applied(artefact, attacked, aligned)
        models = {"base": self.base, "aligned": aligned, "attacked": attacked, **applied.models}
        rows = self.measured(models)
        return Outcome(
            rows=rows,
            models={name: model.key for name, model in models.items()},
            steps=applied.steps,
            stages=self.done,
            attack=attack_report,
            prepare=artefact.report,
            apply=applied.report,
        )

    def aligned(self) -> Model:
        """The aligned model: the one that is given, or the `align` stage's."""
        if self.given is not None:
            return self.given
        base, recipe = self.base, self.experiment.align
        stage = Stage(
            "align",
            recipe.version,
            {
                "recipe": recipe.model_dump(),
                "style": self.style.model_dump(),
                "dtype": self.experiment.model.dtype,
                "rows": [hash_rows(self.inputs.sft), hash_rows(self.inputs.pairs)],
            },
            (base.key,),
        )
        make = partial(
            stages.align,
            recipe=recipe,
            base=base.checkpoint,
            rows=self.inputs.sft,
            pairs=self.inputs.pairs,
            style=self.style,
        )
        result = self._stage(stage, make)
        return Model(stages.checkpoint_in(result.folder, base.checkpoint), result.key)

    def check(self, aligned: Model) -> None:
        """Refuses combinations of model, attack and defense that can't work."""
        attack = self.experiment.attack
        if aligned.checkpoint.adapter is None and not attack.needs_full_weights:
            raise SettingError(
                "attack.adapter=resume needs an aligned model that is an adapter, but "
                "model.aligned is a full model; set attack.adapter=fresh, or model.aligned=null "
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

    def attacked(self, aligned: Model) -> tuple[Model, dict[str, Any]]:
        """The model that the customer's fine-tuning leaves."""
        attack, data = self.experiment.attack, self.inputs.attack
        if attack.needs_full_weights and aligned.checkpoint.adapter is not None:
            aligned = self.merged(aligned)
        stage = Stage(
            "attack",
            attack.version,
            {
                "attack": stages.identity(attack),
                "style": self.style.model_dump(),
                "dtype": self.experiment.model.dtype,
                "seed": self.experiment.seed,
                "rows": [hash_rows(data.task), hash_rows(data.poison)],
            },
            (aligned.key,),
        )
        make = partial(
            stages.attack,
            method=attack,
            aligned=aligned.checkpoint,
            data=data,
            style=self.style,
            seed=self.experiment.seed,
        )
        result = self._stage(stage, make)
        model = Model(stages.checkpoint_in(result.folder, aligned.checkpoint), result.key)
        return model, result.report

    def merged(self, aligned: Model) -> Model:
        """The aligned model with its adapter merged, for attacks that need full weights."""
        stage = Stage("merge", 1, {"dtype": self.experiment.model.dtype}, (aligned.key,))
        result = self._stage(stage, partial(stages.merge, model=aligned.checkpoint))
        return Model(stages.checkpoint_in(result.folder, aligned.checkpoint), result.key)

    def prepared(self, aligned: Model) -> StageResult:
        """The defense's artefact, made once per aligned model."""
        base, evaluation = self.base, self.experiment.evaluation
        defense = self.experiment.defense
        calibration = StoredCalibration(
            prompts=self.inputs.calibration,
            safety_pairs=self.inputs.safety_pairs,
            safety_prompts=self.inputs.safety_prompts,
            utility_prompts=self.inputs.utility_prompts,
            needs=defense.needs,
            store=self.store,
            backend=evaluation.backend,
            judge=evaluation.harm_judge,
            style=self.style,
            max_new_tokens=self.experiment.model.max_new_tokens,
            base=base.checkpoint,
            base_key=base.key,
        )
        stage = Stage(
            "prepare",
            defense.prepare_version,
            {
                "defense": target(defense),
                "settings": defense.prepare_settings(),
                "calibration": calibration.identity(),
            },
            (base.key, aligned.key),
        )
        models = Models(base.checkpoint, aligned.checkpoint)
        make = partial(stages.prepare, defense=defense, models=models, calibration=calibration)
        return self._stage(stage, make)

    def applied(self, artefact: StageResult, attacked: Model, aligned: Model) -> Applied:
        """The repaired model, and the models after each step to it."""
        defense = self.experiment.defense
        stage = Stage(
            "apply", defense.apply_version, stages.identity(defense), (artefact.key, attacked.key)
        )
        seen = Models(self.base.checkpoint, aligned.checkpoint)
        make = partial(
            stages.apply,
            defense=defense,
            artefact=artefact.folder,
            attacked=attacked.checkpoint,
            models=seen,
        )
        result = self._stage(stage, make)
        known = stages.known_models(seen, attacked.checkpoint)
        return applied(result, known, [attacked, aligned, self.base])

    def measured(self, models: dict[str, Model]) -> pd.DataFrame:
        """Answers, verdicts and task scores of every model on every prompt set."""
        import pandas as pd

        answers = {}
        for name, model in models.items():
            for prompts in self.inputs.sets:
                answers[name, prompts.name] = self._answers(model, prompts)
            stages.close_engines()
        frames = [
            self._rows(name, prompts, answers[name, prompts.name])
            for name in models
            for prompts in self.inputs.sets
        ]
        return pd.concat(frames, ignore_index=True)

    def _answers(self, model: Model, prompts: PromptSet) -> StageResult:
        stage, make = stages.generation(
            self.experiment.evaluation.backend,
            model.checkpoint,
            self.style,
            prompts.prompts,
            prompts.max_new_tokens,
            prompts.system,
            (model.key,),
        )
        return self._stage(stage, make)

    def _rows(self, model: str, prompts: PromptSet, answers: StageResult) -> pd.DataFrame:
        """One set's answers of one model, with its verdicts or its task scores beside them."""
        rows = stages.read_rows(answers.folder)
        rows.insert(0, "set", prompts.name)
        rows.insert(0, "model", model)
        kind, _, task = prompts.name.partition(":")
        if task:
            scores = stages.read_rows(self._task_scores(task, answers).folder)
            return rows.merge(scores, on="id", validate="one_to_one")
        judges = {"refusal": self.experiment.evaluation.refusal_judge}
        if kind.startswith("harmful"):
            judges["harm"] = self.experiment.evaluation.harm_judge
        for role, method in judges.items():
            stage = Stage(
                "judge",
                method.version,
                {"judge": target(method), "settings": method.identity()},
                (answers.key,),
            )
            result = self._stage(
                stage, partial(stages.judge, method=method, answers=answers.folder)
            )
            verdicts = stages.read_rows(result.folder).set_index("id").add_prefix(f"{role}_")
            rows = rows.join(verdicts, on="id", validate="one_to_one")
        return rows

    def _task_scores(self, name: str, answers: StageResult) -> StageResult:
        task, items = self.experiment.tasks[name], self.inputs.items[name]
        stage = Stage(
            "score",
            getattr(task, "version", 1),
            {"task": target(task), "items": hash_rows(items)},
            (answers.key,),
        )
        make = partial(stages.score_task, task=task, items=items, answers=answers.folder)
        return self._stage(stage, make)

    def _stage(self, stage: Stage, make: Callable[[Path], dict[str, Any] | None]) -> StageResult:
        if self.experiment.isolate:
            result = self.store.run(stage, lambda out: in_child(partial(make, out), stage.name))
        else:
            result = self.store.run(stage, make)
        self.done.append(result)
        self._notify(result)
        return result
