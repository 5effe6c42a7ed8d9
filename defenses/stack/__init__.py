"""Stack: several defenses one after another, each on the model that the one before it left.

What may follow what, and where the parts' settings stand: README.md in this folder.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import field_serializer, model_validator

from defenses.base import (
    Calibration,
    CalibrationAnswers,
    Defense,
    Edit,
    EditStep,
    Models,
    OutputForm,
    checked_edit,
)
from modeling.checkpoint import Checkpoint
from settings import SettingError, target

# Where `apply` keeps the models on the way; a part may use a folder of this name for its own.
STEPS = "steps"


class Stack(Defense):
    """Applies defenses in `order`, their names, the first one first; its settings are theirs."""

    order: tuple[str, ...]
    parts: tuple[Defense, ...]

    @model_validator(mode="after")
    def _goes_together(self) -> Stack:
        if not self.order:
            raise ValueError(
                "defense.order is empty; name at least one defense, e.g. "
                "defense.order=[nlsr,safetylock]"
            )
        if len(self.order) != len(self.parts):
            raise ValueError(
                f"defense.order names {len(self.order)} defenses and defense.parts holds "
                f"{len(self.parts)}; give one for each name"
            )
        if any(isinstance(part, Stack) for part in self.parts):
            raise ValueError(
                "defense.order can't hold a stack; write that stack's own defenses in its place"
            )
        for first in range(len(self.parts)):
            for second in range(first + 1, len(self.parts)):
                self._require_order(first, second)
        return self

    def _require_order(self, first: int, second: int) -> None:
        """Refuses a part that can't work on what an earlier one is known to leave."""
        leaves, names = self.parts[first].output_form, list(self.order)
        if leaves == "hooks":
            names.append(names.pop(first))
            raise ValueError(
                f"defense.order: {self.order[first]} leaves a model that hooks steer, which "
                f"{self.order[second]} can't edit any further; write "
                f"defense.order=[{','.join(names)}], or let {self.order[first]} write weights"
            )
        if leaves in ("adapter", "weights") and self.parts[second].needs_resumed_adapter:
            names.insert(first, names.pop(second))
            what = "full weights" if leaves == "weights" else "an adapter in other coordinates"
            raise ValueError(
                f"defense.order: {self.order[second]} edits the adapter that the attack trained, "
                f"but {self.order[first]} before it leaves {what}; write "
                f"defense.order=[{','.join(names)}]"
            )

    @field_serializer("parts")
    def _with_classes(self, parts: Sequence[Defense]) -> list[dict[str, Any]]:
        """Class, version and settings of each part: what the key of `apply` holds of it."""
        return [
            {
                "_target_": target(part),
                "version": part.apply_version,
                **part.model_dump(mode="json"),
            }
            for part in parts
        ]

    @property
    def needs(self) -> frozenset[str]:
        """What any of the parts needs."""
        return frozenset().union(*(part.needs for part in self.parts))

    @property
    def needs_resumed_adapter(self) -> bool:
        """Whether any of the parts does."""
        return any(part.needs_resumed_adapter for part in self.parts)

    @property
    def needs_descent(self) -> bool:
        """Whether any of the parts does."""
        return any(part.needs_descent for part in self.parts)

    @property
    def output_form(self) -> OutputForm | None:
        """What the last part that changes the model's form leaves."""
        forms = [part.output_form for part in self.parts if part.output_form != "same"]
        return forms[-1] if forms else "same"

    @property
    def is_identity(self) -> bool:
        """Whether all parts do."""
        return all(part.is_identity for part in self.parts)

    @property
    def steps(self) -> tuple[tuple[str, Defense], ...]:
        """One step for each part."""
        return tuple(zip(self.order, self.parts, strict=True))

    @property
    def calibration_answers(self) -> tuple[CalibrationAnswers, ...]:
        """What each part has answered."""
        return tuple(each for part in self.parts for each in part.calibration_answers)

    def prepare_settings(self) -> dict[str, Any]:
        """Class, version and prepare settings of each part, so that only these prepare again."""
        parts = [
            {
                "_target_": target(part),
                "version": part.prepare_version,
                "settings": part.prepare_settings(),
            }
            for part in self.parts
        ]
        return {"order": list(self.order), "parts": parts}

    def check(self, models: Models, attacked: Checkpoint | None) -> None:
        """Refuses what any part can't run on; the attacked model is the first part's alone."""
        for index, part in enumerate(self.parts):
            part.check(models, attacked if index == 0 else None)

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        """Lets every part prepare into a folder of its own."""
        reports = []
        for index, (name, part) in enumerate(zip(self.order, self.parts, strict=True)):
            folder = out / self._folder(index)
            folder.mkdir(parents=True)
            start = time.perf_counter()
            diagnostics = part.prepare(models, calibration, folder)
            seconds = time.perf_counter() - start
            reports.append({"name": name, "seconds": seconds, "diagnostics": diagnostics})
        return {"parts": reports}

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Applies the parts, each to the model that the one before it left.

        A scalar that two parts change counts twice among the edited ones.

        Raises:
            SettingError: A part can't work on what the one before it left.
        """
        (out / STEPS).mkdir(parents=True)
        edits: list[Edit] = []
        reports: list[dict[str, Any]] = []
        model = attacked
        for index, (name, part) in enumerate(zip(self.order, self.parts, strict=True)):
            folder = out / STEPS / self._folder(index)
            start = time.perf_counter()
            if index:
                self._check(index, model, models)
            edit = checked_edit(
                part, part.apply(artefact / self._folder(index), model, folder, models)
            )
            seconds = time.perf_counter() - start - edit.diagnostic_seconds
            edit = _without_own_steps(edit, folder)
            reports.append(_report(name, edit, seconds))
            edits.append(edit)
            model = edit.defended
        edits[-1] = replace(edits[-1], defended=_moved(model, folder, out))
        total = edits[0].parameters_total
        maps = [
            {**shown, "name": f"{self._folder(index)}_{shown['name']}"}
            for index, edit in enumerate(edits)
            for shown in edit.diagnostics.get("maps", [])
        ]
        return Edit(
            defended=edits[-1].defended,
            parameters_edited=min(total, sum(edit.parameters_edited for edit in edits)),
            parameters_total=total,
            modules=tuple(dict.fromkeys(module for edit in edits for module in edit.modules)),
            diagnostics={"parts": reports, **({"maps": maps} if maps else {})},
            diagnostic_seconds=sum(edit.diagnostic_seconds for edit in edits),
            steps=tuple(
                EditStep(name, edit.defended, edit.parameters_edited)
                for name, edit in zip(self.order, edits, strict=True)
            ),
        )

    def _check(self, index: int, model: Checkpoint, models: Models) -> None:
        name, before = self.order[index], self.order[index - 1]
        try:
            self.parts[index].check(models, model)
        except SettingError as error:
            raise SettingError(
                f"defense.order: {name} can't work on what {before} leaves ({error}); put {name} "
                f"before {before}"
            ) from error

    def _folder(self, index: int) -> str:
        return f"{index + 1}-{self.order[index]}"


def _report(name: str, edit: Edit, seconds: float) -> dict[str, Any]:
    """What the record holds of one part; its heat maps stand with the other parts'."""
    diagnostics = {key: value for key, value in edit.diagnostics.items() if key != "maps"}
    return {
        "name": name,
        "seconds": seconds,
        "parameters_edited": edit.parameters_edited,
        "modules": list(edit.modules),
        "diagnostics": diagnostics,
    }


def _without_own_steps(edit: Edit, folder: Path) -> Edit:
    """A part's own steps aren't measured in a stack, so their models needn't be kept."""
    inner = folder / STEPS
    places = (edit.defended.base, edit.defended.adapter, edit.defended.steering)
    if not any(path is not None and Path(path).is_relative_to(inner) for path in places):
        shutil.rmtree(inner, ignore_errors=True)
    return replace(edit, steps=())


def _moved(model: Checkpoint, folder: Path, out: Path) -> Checkpoint:
    """Moves the last part's files up to where a defense's result is looked for."""
    if not folder.is_dir():
        return model
    for path in [path for path in folder.iterdir() if path.name != STEPS]:
        path.rename(out / path.name)
    if not any(folder.iterdir()):
        folder.rmdir()
    moved = {str(folder): str(out)}
    return replace(
        model,
        base=moved.get(model.base, model.base),
        adapter=moved.get(model.adapter or "", model.adapter),
        steering=moved.get(model.steering or "", model.steering),
    )
