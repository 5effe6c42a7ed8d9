"""The steps of a defense: `Prepare`, once per aligned model, and `Apply`, once per attacked one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from defenses.base import Defense, EditStep, Models, checked_edit
from experiments.pipeline.cost import FLOAT_BYTES, ModelSize, Sizes, Work
from experiments.pipeline.steps.base import (
    MODEL,
    Model,
    Step,
    checkpoint_at,
    identity,
    known_models,
    model_after,
    place,
)
from experiments.pipeline.steps.calibration import StoredCalibration
from experiments.store import Stage, StageResult
from modeling.checkpoint import Checkpoint
from modeling.measure import measured
from modeling.model_files import is_adapter, verify_folder
from settings import ModelError, source, target

# A LoRA whose change was edited needs the factors of before and after the attack.
_EDITED_RANKS = 2
# Of each part of a checkpoint the one that it may be mistaken for, and what that one holds.
_OTHER = {"base": ("adapter", "an adapter"), "adapter": ("base", "full weights")}


def _source(defense: Defense) -> dict[str, str]:
    """The code of a defense and of its parts, where it isn't this project's."""
    return source(defense, *(part for _, part in defense.steps))


@dataclass(frozen=True)
class Prepare(Step):
    """Base and aligned to the defense's artefact."""

    defense: Defense
    base: Model
    aligned: Model
    calibration: StoredCalibration

    @cached_property
    def stage(self) -> Stage:
        settings = {
            "defense": target(self.defense),
            "settings": self.defense.prepare_settings(),
            "calibration": self.calibration.identity(),
            **_source(self.defense),
        }
        inputs = (self.base.key, self.aligned.key)
        return Stage("prepare", self.defense.prepare_version, settings, inputs)

    def run(self, out: Path) -> dict[str, Any]:
        """Makes the artefact in `out`; the report holds its cost and diagnostics.

        Answers that the store already held count with the seconds they took when they were made,
        so that the cost doesn't depend on what ran before.
        """
        models = Models(self.base.checkpoint, self.aligned.checkpoint)
        with measured() as cost:
            diagnostics = self.defense.prepare(models, self.calibration, out)
        seconds = cost.seconds + self.calibration.seconds_reused
        return {
            "cost": {"seconds": seconds, "peak_bytes": cost.peak_bytes},
            "diagnostics": diagnostics,
        }

    def cost(self, sizes: Sizes) -> Work:
        """One pass over what it reads; the artefact is at most as large as the aligned adapter.

        The answers that are generated for it are stages of their own.
        """
        if not self.defense.needs:
            return Work()
        model = sizes.model(self.aligned.checkpoint)
        lengths = self.calibration.lengths(self.aligned.checkpoint, sizes)
        return Work(disk=model.adapter_bytes) + model.forward(lengths)


@dataclass(frozen=True, slots=True)
class DefendedModels:
    """The models that an `apply` stage made.

    Attributes:
        models: Those after each step but the last, by label, then "defended".
        steps: Of each step its name, the label of the model after it, and the scalars it edited.
    """

    models: dict[str, Model]
    steps: list[dict[str, Any]]


@dataclass(frozen=True)
class Apply(Step):
    """Artefact and attacked to defended."""

    defense: Defense
    artefact: StageResult
    attacked: Model
    aligned: Model
    base: Model

    @cached_property
    def stage(self) -> Stage:
        inputs = (self.artefact.key, self.attacked.key)
        settings = identity(self.defense) | _source(self.defense)
        return Stage("apply", self.defense.apply_version, settings, inputs)

    def run(self, out: Path) -> dict[str, Any]:
        """Makes the defended model in `out/model`; the report says what was edited, at what cost.

        It also says where the defended model and those of the steps to it lie (`place`).

        Raises:
            ModelError: The defense returned no edit, its last step isn't its result, or a model
                lies outside `out`, isn't there or isn't whole.
        """
        attacked = self.attacked.checkpoint
        with measured() as cost:
            made = self.defense.apply(self.artefact.folder, attacked, out / MODEL, self._models)
        edit = checked_edit(self.defense, made)
        if edit.steps and edit.steps[-1].checkpoint != edit.defended:
            raise ModelError(
                f"the last step of {type(self.defense).__name__} ({edit.steps[-1].name}) isn't "
                "the model that it calls defended; end the steps with that model"
            )
        places = self._places(edit.defended, edit.steps, out)
        for model in (edit.defended, *(step.checkpoint for step in edit.steps)):
            self._verify(model, out)
        seconds = cost.seconds - edit.diagnostic_seconds
        return {
            "cost": {"seconds": seconds, "peak_bytes": cost.peak_bytes},
            "diagnostic_seconds": edit.diagnostic_seconds,
            "unchanged": edit.defended == attacked,
            "parameters_edited": edit.parameters_edited,
            "parameters_total": edit.parameters_total,
            "modules": list(edit.modules),
            "diagnostics": edit.diagnostics,
            **places,
        }

    def expected_report(self, folder: Path) -> dict[str, Any]:
        """What `output` reads of the report, before the stage runs: where the models will lie."""
        before, out, steps = self.attacked.checkpoint, folder / MODEL, list[EditStep]()
        last = len(self.defense.steps)
        for number, (name, part) in enumerate(self.defense.steps, start=1):
            after = out if number == last else out / "steps" / str(number)
            before = model_after(part, before, after)
            steps.append(EditStep(name, before, 0))
        if not steps:
            before = model_after(self.defense, before, out)
        return {"parameters_edited": 0, **self._places(before, steps, folder)}

    def output(self, result: StageResult) -> DefendedModels:
        """The models that the stage made.

        A model that a step left as it was keeps its key, so that it isn't measured again.
        """
        report, attacked = result.report, self.attacked.checkpoint
        defended = checkpoint_at(report["defended"], result.folder, self._known)
        inputs = (self.base, self.aligned, self.attacked)
        keys = {model.checkpoint: model.key for model in inputs}
        keys.setdefault(defended, result.key)
        models: dict[str, Model] = {}
        steps, edited_so_far = [], 0
        for number, step in enumerate(report["steps"], start=1):
            checkpoint = checkpoint_at(step["place"], result.folder, self._known)
            label = f"step {number}: {step['name']}"
            if number == len(report["steps"]):
                label, checkpoint = "defended", defended
            key = keys.setdefault(checkpoint, f"{result.key}.{number}")
            edited = step["parameters_edited"]
            edited_so_far += edited
            reference = attacked if edited_so_far else None
            models[label] = Model(checkpoint, key, self.attacked.style, reference)
            steps.append({"name": step["name"], "model": label, "parameters_edited": edited})
        reference = attacked if report["parameters_edited"] else None
        models["defended"] = Model(defended, keys[defended], self.attacked.style, reference)
        return DefendedModels(models, steps)

    def cost(self, sizes: Sizes) -> Work:
        """The attacked model at most is loaded; what is written of it and of each step."""
        model, work = sizes.model(self.attacked.checkpoint), Work()
        for _, part in self.defense.steps or (("", self.defense),):
            if part.is_identity:
                continue
            work += Work(disk=_written(part, model), memory=model.bytes)
            if part.output_form == "weights":
                model = replace(model, lora_parameters=0)
        return work

    @property
    def _models(self) -> Models:
        return Models(self.base.checkpoint, self.aligned.checkpoint)

    @property
    def _known(self) -> dict[str, Checkpoint]:
        return known_models(self._models, self.attacked.checkpoint)

    def _verify(self, model: Checkpoint, out: Path) -> None:
        """Refuses a model whose files should be in `out` and aren't."""
        called = f"{target(self.defense)}.apply returned an Edit with a model whose "
        for part in _OTHER:
            path = getattr(model, part)
            if path is not None and Path(path).is_relative_to(out):
                verify_folder(path, called + part)
                if is_adapter(path) != (part == "adapter"):
                    other, form = _OTHER[part]
                    raise ModelError(
                        f"{called}{part}={path!r} holds {form}; give it as the checkpoint's {other}"
                    )
        if model.steering is not None and not Path(model.steering).is_dir():
            raise ModelError(
                f"{called}steering={model.steering!r} is not a folder; write it by "
                "modeling.steering.save_steering"
            )

    def _places(
        self, defended: Checkpoint, steps: Sequence[EditStep], folder: Path
    ) -> dict[str, Any]:
        return {
            "defended": place(defended, folder, self._known),
            "steps": [
                {
                    "name": step.name,
                    "parameters_edited": step.parameters_edited,
                    "place": place(step.checkpoint, folder, self._known),
                }
                for step in steps
            ],
        }


def _written(defense: Defense, model: ModelSize) -> int:
    """Bytes of what a defense leaves."""
    if defense.output_form == "hooks":
        return FLOAT_BYTES * model.layers * model.hidden
    if model.adapter_bytes and defense.output_form in ("same", "adapter"):
        return model.adapter_bytes * (_EDITED_RANKS if defense.output_form == "adapter" else 1)
    return model.weight_bytes
