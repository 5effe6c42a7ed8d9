"""The contract of a defense: what a provider prepares once, and what is done to each fine-tune."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args

from pydantic import model_validator

from data.rows import PreferencePair, Prompt
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from settings import ModelError, Settings, require_method, target
from settings.base import closest


@dataclass(frozen=True, slots=True)
class Models:
    """What `prepare` may see; the attacked model is never among it.

    Attributes:
        base: The model before alignment (W_0).
        aligned: The aligned model (W_a): an adapter on `base`, or full weights.
    """

    base: Checkpoint
    aligned: Checkpoint


class Calibration(Protocol):
    """Calibration data and the two services that a method may need to build its own.

    `experiments` implements it, so that defenses need not know how answers are generated or
    judged.
    """

    @property
    def prompts(self) -> Sequence[Prompt]:
        """Calibration prompts; none of them is used in the evaluation."""
        ...

    @property
    def safety_pairs(self) -> Sequence[PreferencePair]:
        """Prompts with a safe (chosen) and an unsafe (rejected) answer; as for `prompts`.

        Empty unless the defense `needs` "safety_pairs".
        """
        ...

    @property
    def safety_prompts(self) -> Sequence[Prompt]:
        """Harmful prompts, their category the kind of harm; empty unless `needs` says so."""
        ...

    @property
    def utility_prompts(self) -> Sequence[Prompt]:
        """Benign prompts; empty unless `needs` says so."""
        ...

    @property
    def style(self) -> PromptStyle:
        """How the experiment's prompts are rendered."""
        ...

    def respond(self, model: Checkpoint, prompts: Sequence[str]) -> list[str]:
        """Greedy answers of `model`, in order."""
        ...

    def is_safe(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Whether the moderation judge leaves each answer unflagged (degenerate: not safe)."""
        ...

    def encode(
        self, model: Checkpoint, prompts: Sequence[str], answers: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Token ids of each (prompt as the model sees it, answer with its end token)."""
        ...


@dataclass(frozen=True, slots=True)
class EditStep:
    """The model after one step of a defense that edits in several, measured like the others.

    Attributes:
        name: What the step did, e.g. the danger that came or the defense that was applied.
        checkpoint: The model after it; its files lie in the folder given to `apply`.
        parameters_edited: How many scalars this step changed that no step before had.
    """

    name: str
    checkpoint: Checkpoint
    parameters_edited: int


@dataclass(frozen=True, slots=True)
class Edit:
    """What `apply` did to the attacked model.

    Attributes:
        defended: The defended checkpoint; its files lie in the folder given to `apply`.
        parameters_edited: How many scalars differ from the attacked model's by the edit.
        parameters_total: How many scalars the edited weights belong to (the whole model).
        modules: Names of the modules touched.
        diagnostics: Method-specific, JSON-serialisable figures. Under "maps" there may be heat
            maps for the report: a list of {name, title, rows, columns, unit, values, marked}.
        steps: The models on the way to `defended`, in order, the last one being its equal; empty
            for a repair in one step.
        diagnostic_seconds: How much of `apply` went into diagnostics that the repair itself
            doesn't need; it is no part of the repair's cost.
    """

    defended: Checkpoint
    parameters_edited: int
    parameters_total: int
    modules: tuple[str, ...] = ()
    diagnostics: dict[str, Any] = field(default_factory=dict)
    diagnostic_seconds: float = 0.0
    steps: tuple[EditStep, ...] = ()


OutputForm = Literal["same", "adapter", "weights", "hooks"]
CalibrationRows = Literal["prompts", "safety_prompts", "utility_prompts"]
NEEDS = (*get_args(CalibrationRows), "safety_pairs")
"""What a defense may need of its calibration."""


@dataclass(frozen=True, slots=True)
class CalibrationAnswers:
    """Answers that `prepare` has a model give; known before it runs.

    Attributes:
        prompts: Which of the calibration's prompts, in the order in which they are asked.
        model: "base", "aligned", or a "reference" that `prepare` makes of the aligned model.
        of: What the answers depend on besides model and prompts: it tells references, and choices
            among the prompts, apart.
    """

    prompts: tuple[CalibrationRows, ...]
    model: Literal["base", "aligned", "reference"]
    of: str = ""


# Without a default, and what to write.
_REQUIRED = {
    "prepare": "write one, or inherit from defenses.projection_edits.DataFreeDefense",
    "apply": "write one that repairs the attacked model and returns a defenses.base.Edit",
}


class Defense(Settings):
    """A repair that acts after fine-tuning.

    Subclasses are their own settings: every field enters the stage keys.  `prepare_version` and
    `apply_version` are raised when the code changes what those stages produce.  What is a
    property here may be a class variable where it is the same for all settings.  `steps` and
    `calibration_answers` say beforehand which stages a run will have.
    """

    prepare_version: ClassVar[int] = 1
    apply_version: ClassVar[int] = 1

    @model_validator(mode="after")
    def _keeps_the_contract(self) -> Defense:
        """Refuses a class that couldn't run to its end, before anything is trained."""
        name, needs = target(self), self.needs
        for method, instead in _REQUIRED.items():
            require_method(self, Defense, method, instead)
        if not isinstance(needs, Set):
            raise ValueError(
                f"{name}.needs is {needs!r}; write a set of names, such as frozenset({{'prompts'}})"
            )
        for need in sorted(map(str, needs - set(NEEDS))):
            raise ValueError(f"{name}.needs names {need!r}; {closest(need, list(NEEDS))}")
        return self

    @property
    def needs(self) -> frozenset[str]:
        """What `prepare` reads of its calibration.

        "prompts" (with their answers and the judge's opinion), "safety_pairs", "safety_prompts",
        "utility_prompts".
        """
        return frozenset({"prompts"})

    @property
    def needs_resumed_adapter(self) -> bool:
        """Whether the attack must have gone on training the aligned adapter."""
        return False

    @property
    def needs_descent(self) -> bool:
        """Whether the attacked model must have been fine-tuned from the aligned one."""
        return not self.is_identity

    @property
    def is_identity(self) -> bool:
        """Whether the defended model is the attacked one itself."""
        return False

    @property
    def steps(self) -> tuple[tuple[str, Defense], ...]:
        """Of each of the `Edit.steps` its name and the defense that makes it; () for one step."""
        return ()

    @property
    def calibration_answers(self) -> tuple[CalibrationAnswers, ...]:
        """What `prepare` has models answer, at most."""
        return ()

    @property
    def output_form(self) -> OutputForm | None:
        """The form of the model that `apply` makes; None where that isn't known before.

        "same": the model in the form that it had, an adapter with the A and B that the attack
        trained, some of their scalars changed. "adapter": an adapter in other coordinates.
        "weights": full weights. "hooks": a model that is steered while it runs.
        """
        return None

    def check(self, models: Models, attacked: Checkpoint | None) -> None:
        """Refuses, before heavy work, what this method can't run on.

        Args:
            models: Base and aligned checkpoints.
            attacked: The attacked checkpoint, or None while it is still to be trained.

        Raises:
            SettingError: One sentence that says what to set instead.
        """

    def prepare_settings(self) -> dict[str, Any]:
        """The settings that `prepare` depends on; `apply` depends on all."""
        return self.model_dump()

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        """Makes what is needed once per aligned model and writes it to `out`.

        Returns:
            JSON-serialisable diagnostics for the record.
        """
        raise NotImplementedError

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Repairs an attacked model.

        Args:
            artefact: What `prepare` wrote.
            attacked: The attacked model.
            out: The folder for the defended model: plain weights, an adapter, or what a hook
                needs.
            models: What `prepare` saw, for methods that edit towards the aligned weights.
        """
        raise NotImplementedError


def checked_edit(defense: Defense, edit: Any) -> Edit:
    """What a defense's `apply` returned, once its type is certain.

    Raises:
        ModelError: It is no `Edit` of checkpoints; one sentence.
    """
    called = f"{target(defense)}.apply"
    if not isinstance(edit, Edit):
        raise ModelError(f"{called} returned {edit!r}; return a defenses.base.Edit")
    for model in (edit.defended, *(step.checkpoint for step in edit.steps)):
        if not isinstance(model, Checkpoint):
            raise ModelError(
                f"{called} returned an Edit of {model!r}; give a modeling.checkpoint.Checkpoint"
            )
    return edit
