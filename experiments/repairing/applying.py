"""`apply`: a prepared defense on customers' models, each written as a plain folder and verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from defenses.base import Defense, Models
from experiments.pipeline.checks import check_given
from experiments.pipeline.given import GivenModels
from experiments.pipeline.steps.base import MODEL, Model
from experiments.pipeline.steps.defense import Apply
from experiments.pipeline.steps.training import TakeGiven
from experiments.repairing.artefact import Artefact
from experiments.store import StageResult
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint, Dtype, fingerprint_folder
from modeling.stored import copy_file
from settings import SettingError
from settings.places import check_folder

RECORD = "repair.json"


@dataclass(frozen=True)
class Repair:
    """A defense that is ready, and the models that it was prepared with, by what names them."""

    artefact: Artefact
    defense: Defense
    known: Mapping[str, Model]

    def __post_init__(self) -> None:
        if self.defense.output_form == "hooks":
            raise SettingError(
                f"{self.artefact.method} steers this model by hooks while it runs, which no folder "
                "can hold; leave out --set form=hooked and other --set positions than all"
            )

    def open(self, name: str, base: str | None, dtype: str | None) -> Model:
        """A customer's model, checked as far as it can be before anything is loaded.

        Raises:
            RelockError: It isn't one that this defense can repair.
        """
        stand_in = Model(Checkpoint("", dtype="float32"), "", PromptStyle())
        like = [stand_in, *self.known.values()][-1]
        given = GivenModels(like, self.known).open(
            name, "--model", base=base, base_setting="--base-of-adapter"
        )
        kind = dtype or stored_dtype(given.checkpoint)
        given = replace(given, checkpoint=replace(given.checkpoint, dtype=kind))
        if self.known:
            check_given(self.defense, self._models, given.checkpoint, f"--model={name!r}")
        return given

    def write(self, given: Model, called: str, out: Path) -> dict[str, Any]:
        """Repairs one model into a new folder, which appears when it has been verified.

        Returns:
            The report of the "apply" stage, with "verified".

        Raises:
            RelockError: It can't be repaired, or what was written isn't what it should be.
        """
        from modeling.verify import verify_written

        base, aligned = list(self.known.values()) or [given, given]
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            folder = Path(scratch)
            report: dict[str, Any] = {}
            if self.known and self.defense.needs_descent:
                report |= TakeGiven(aligned, given, called, True).run(folder)
            kept = StageResult("prepare", "", self._files(folder), {}, 0.0, reused=True)
            step = Apply(self.defense, kept, given, aligned, base)
            report |= step.run(folder)
            result = StageResult("apply", "", folder, report, 0.0, reused=False)
            defended = step.output(result).models["defended"].checkpoint
            written = _alone(defended, given.checkpoint, folder)
            changed = report["parameters_edited"] > 0
            # A baked lock has been held against the hooked model, which says more.
            report["verified"] = report["diagnostics"].get("export") or verify_written(
                written, given.checkpoint, changed
            )
            place = Path(written.adapter or written.base)
            (place / RECORD).write_text(json.dumps(self._record(given, report), indent=1) + "\n")
            place.rename(out)
        return report

    @property
    def _models(self) -> Models:
        base, aligned = self.known.values()
        return Models(base.checkpoint, aligned.checkpoint)

    def _files(self, scratch: Path) -> Path:
        """The folder that `Defense.apply` reads; of a lock alone, one that holds it."""
        if self.artefact.record:
            return self.artefact.folder
        (scratch / "artefact").mkdir()
        (scratch / "artefact" / "lock").symlink_to(self.artefact.folder.resolve())
        return scratch / "artefact"

    def _record(self, given: Model, report: Mapping[str, Any]) -> dict[str, Any]:
        """What made the folder: the same for the same repair of the same model."""
        return {
            "method": self.artefact.method,
            "settings": self.defense.model_dump(mode="json"),
            "version": self.defense.apply_version,
            "artefact": self.artefact.record.get("key") or fingerprint_folder(self.artefact.folder),
            "models": self.artefact.record.get("inputs"),
            "repaired": given.key,
            "parameters_edited": report["parameters_edited"],
            "modules": report["modules"],
        }


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The precision that a model is stored in, as its config says.

    Raises:
        SettingError: It says none that can be used.
    """
    from modeling.inspection import read_config

    dtype = str(read_config(checkpoint).dtype).removeprefix("torch.")
    if dtype not in get_args(Dtype):
        raise SettingError(
            f"the config of {checkpoint.base!r} says no precision that can be used ({dtype}); "
            "give --dtype"
        )
    return dtype


def _alone(defended: Checkpoint, given: Checkpoint, folder: Path) -> Checkpoint:
    """The repaired model in a folder of its own, `folder/model`, without the steps to it."""
    part = "base" if defended.adapter is None else "adapter"
    place, own = Path(getattr(defended, part)), folder / MODEL
    if not place.is_relative_to(folder):
        # The defense left the model as it was.
        shutil.copytree(place, folder / "copy", copy_function=copy_file)
        place = folder / "copy"
    elif place == own:
        shutil.rmtree(own / "steps", ignore_errors=True)
        return defended
    shutil.rmtree(folder / "alone", ignore_errors=True)
    place.rename(folder / "alone")
    return replace(defended, **{part: str(folder / "alone")})


def outputs(names: Sequence[str], out: Path) -> Iterator[tuple[str, Path]]:
    """Where each model's repair goes: `out`, or a folder in it for each of several.

    Raises:
        SettingError: Two would share a folder, or one exists or can't be made.
    """
    places = [out] if len(names) == 1 else [out / Path(name).name for name in names]
    for name, place in zip(names, places, strict=True):
        if places.count(place) > 1:
            raise SettingError(
                f"two models would be repaired into {str(place)!r}; repair them one after another"
            )
        if place.exists():
            raise SettingError(f"{str(place)!r} exists; give an --out that doesn't")
        check_folder(place, "--out")
        yield name, place
