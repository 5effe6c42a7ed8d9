"""The arrows of the picture: which stage each one is, and what makes it.

A stage's key follows from settings and from its inputs' keys, so that it is known before
anything has run; `experiments.pipeline.pipeline` runs the arrows, `experiments.plan` counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attacks.base import Attack, AttackData
from data.local import hash_rows
from defenses.base import Models
from evaluation.base import Judge
from experiments.config.experiment import Experiment
from experiments.pipeline import stages
from experiments.pipeline.calibration import StoredCalibration
from experiments.pipeline.inputs import Inputs, PromptSet
from experiments.store import Stage, StageResult, Store
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from settings import target


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the experiment.

    Attributes:
        checkpoint: Where it lies.
        key: Identifies its content.
        style: How its prompts are rendered.
        undefended: The model that it claims to be an edit of, or None.
    """

    checkpoint: Checkpoint
    key: str
    style: PromptStyle
    undefended: Checkpoint | None = None


@dataclass(frozen=True, slots=True)
class Arrow:
    """A stage and what makes it.

    Attributes:
        stage: The stage.
        make: Fills its folder and returns its report.
        own_process: Whether what is heavy in it runs in a process of its own anyway.
        errors_pass: As `Judge.errors_pass` has it.
    """

    stage: Stage
    make: Callable[[Path], dict[str, Any] | None]
    own_process: bool = False
    errors_pass: bool = False

    def stale(self, found: StageResult) -> bool:
        """Whether what the store holds should be asked for again."""
        return self.errors_pass and "errored" in found.report["labels"]


class Arrows:
    """The arrows of one experiment."""

    def __init__(self, experiment: Experiment, inputs: Inputs, store: Store) -> None:
        self.experiment = experiment
        self.inputs = inputs
        self.store = store

    def align(self, base: Model) -> Arrow:
        """Base to aligned, by our own alignment."""
        recipe, style = self.experiment.align, self.experiment.model.style
        settings = {
            "recipe": recipe.model_dump(),
            "style": style.model_dump(),
            "dtype": base.checkpoint.dtype,
            "rows": [hash_rows(self.inputs.sft), hash_rows(self.inputs.pairs)],
        }
        make = partial(
            stages.align,
            recipe=recipe,
            base=base.checkpoint,
            rows=self.inputs.sft,
            pairs=self.inputs.pairs,
            style=style,
        )
        return Arrow(Stage("align", recipe.version, settings, (base.key,)), make)

    def merge(self, model: Model) -> Arrow:
        """A model to the same with its adapter merged, for attacks that need full weights."""
        stage = Stage("merge", 1, {"dtype": model.checkpoint.dtype}, (model.key,))
        return Arrow(stage, partial(stages.merge, model=model.checkpoint))

    def attack(self, attack: Attack, data: AttackData, model: Model) -> Arrow:
        """Aligned to attacked, or defended to refined."""
        seed, identity = self.experiment.seed, stages.identity(attack)
        if not attack.needs_task:
            # The task is only scored.
            identity.pop("task")
        settings = {
            "attack": identity,
            "style": model.style.model_dump(),
            "dtype": model.checkpoint.dtype,
            "seed": seed,
            "rows": data.hashes,
        }
        make = partial(
            stages.attack,
            method=attack,
            aligned=model.checkpoint,
            data=data,
            style=model.style,
            seed=seed,
        )
        return Arrow(Stage("attack", attack.version, settings, (model.key,)), make)

    def prepare(self, base: Model, aligned: Model) -> Arrow:
        """Base and aligned to the defense's artefact, which is made once for both."""
        defense, calibration = self.experiment.defense, self._calibration(base, aligned)
        settings = {
            "defense": target(defense),
            "settings": defense.prepare_settings(),
            "calibration": calibration.identity(),
        }
        models = Models(base.checkpoint, aligned.checkpoint)
        make = partial(stages.prepare, defense=defense, models=models, calibration=calibration)
        stage = Stage("prepare", defense.prepare_version, settings, (base.key, aligned.key))
        return Arrow(stage, make)

    def apply(self, artefact: StageResult, attacked: Model, seen: Models) -> Arrow:
        """Artefact and attacked to defended."""
        defense = self.experiment.defense
        make = partial(
            stages.apply,
            defense=defense,
            artefact=artefact.folder,
            attacked=attacked.checkpoint,
            models=seen,
        )
        inputs = (artefact.key, attacked.key)
        return Arrow(Stage("apply", defense.apply_version, stages.identity(defense), inputs), make)

    def generate(self, model: Model, prompts: PromptSet) -> Arrow:
        """A model to its answers to one set of prompts."""
        backend = self.experiment.evaluation.backend.chosen(model.checkpoint)
        stage, make = stages.generation(
            backend, model.checkpoint, model.style, prompts, (model.key,), model.undefended
        )
        return Arrow(stage, make, backend.own_process)

    def likelihood(self, model: Model) -> Arrow:
        """A model to the likelihood of the held-out texts."""
        backend = self.experiment.evaluation.backend.chosen(model.checkpoint)
        texts, most = self.inputs.held_out, self.experiment.evaluation.text_tokens
        settings = {
            "backend": backend.identity(),
            "style": model.style.model_dump(),
            "dtype": model.checkpoint.dtype,
            "texts": hash_rows(texts),
            "max_tokens": most,
        }
        make = partial(
            stages.likelihood,
            backend=backend,
            model=model.checkpoint,
            style=model.style,
            texts=texts,
            max_tokens=most,
            undefended=model.undefended,
        )
        stage = Stage("likelihood", backend.version, settings, (model.key,))
        return Arrow(stage, make, backend.own_process)

    def judges(self, prompts: PromptSet) -> dict[str, Judge]:
        """Who judges the answers to a set, by role; nobody those to a task."""
        evaluation = self.experiment.evaluation
        if prompts.task is not None:
            return {}
        refusal = {"refusal": evaluation.refusal_judge}
        if not prompts.is_harmful:
            return refusal
        return refusal | {"harm": evaluation.harm_judge} | evaluation.judges

    def judge(self, judge: Judge, answers: StageResult) -> Arrow:
        """Answers to verdicts."""
        settings = {"judge": target(judge), "settings": judge.identity()}
        make = partial(stages.judge, method=judge, answers=answers.folder)
        stage = Stage("judge", judge.version, settings, (answers.key,))
        return Arrow(stage, make, judge.own_process, judge.errors_pass)

    def score(self, name: str, answers: StageResult) -> Arrow:
        """Answers to a task's rows to scores."""
        task, items = self.experiment.tasks[name], self.inputs.items[name]
        settings = {
            "task": target(task),
            "reading": task.protocol_reading,
            "items": hash_rows(items),
        }
        make = partial(stages.score_task, task=task, items=items, answers=answers.folder)
        return Arrow(Stage("score", task.version, settings, (answers.key,)), make)

    def _calibration(self, base: Model, aligned: Model) -> StoredCalibration:
        evaluation = self.experiment.evaluation
        return StoredCalibration(
            prompts=self.inputs.calibration,
            safety_pairs=self.inputs.safety_pairs,
            safety_prompts=self.inputs.safety_prompts,
            utility_prompts=self.inputs.utility_prompts,
            needs=self.experiment.defense.needs,
            store=self.store,
            backend=evaluation.backend,
            judge=evaluation.harm_judge,
            style=aligned.style,
            max_new_tokens=self.experiment.model.max_new_tokens,
            base=base.checkpoint,
            base_key=base.key,
        )
