"""`Step`, one stage of the pipeline with its key, its work and its cost, and `Model`.

A stage's report says by `place` where its models' files are, so that `checkpoint_at` has them again
when the store has moved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defenses.base import Defense, Models
from experiments.pipeline.cost import Sizes, Work
from experiments.store import Stage, StageResult
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.model_files import is_adapter
from modeling.training import LoraSettings
from settings import ModelError, Settings, source, target

if TYPE_CHECKING:
    import pandas as pd

ROWS = "rows.parquet"
MODEL = "model"
_PARTS = ("base", "adapter", "steering")


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the experiment.

    Attributes:
        style: How its prompts are rendered.
        reference: The model that it claims to be an edit of, or None.
    """

    checkpoint: Checkpoint
    key: str
    style: PromptStyle
    reference: Checkpoint | None = None


class Step(ABC):
    """One stage: a frozen dataclass of its inputs, picklable, since it may run in a child process.

    Its key follows from settings and from its inputs' keys, so that it is known before anything
    has run: `experiments.pipeline.runner` runs steps, `experiments.plan` counts them.
    """

    @property
    @abstractmethod
    def stage(self) -> Stage:
        """What identifies its output in the store."""

    @abstractmethod
    def run(self, out: Path) -> dict[str, Any] | None:
        """Fills the folder `out` and returns a report that JSON can hold."""

    @abstractmethod
    def cost(self, sizes: Sizes) -> Work:
        """What it takes, said before it runs."""

    @property
    def own_process(self) -> bool:
        """Whether what is heavy in it runs in a process of its own anyway."""
        return False

    def is_stale(self, result: StageResult) -> bool:
        """Whether a result that the store holds should be made again."""
        return False


class AskingStep(Step):
    """A step that asks a model or a judge, and may do so together with others that ask the same."""

    @abstractmethod
    def ask(self, steps: Sequence[Any]) -> list[list[dict[str, Any]]]:
        """The rows of several such steps, asked in one pass."""

    @abstractmethod
    def report(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The step's report on its rows."""

    def run(self, out: Path) -> dict[str, Any]:
        """Writes the rows, asked alone."""
        return self.write(self.ask([self])[0], out)

    def write(self, rows: Sequence[Mapping[str, Any]], out: Path) -> dict[str, Any]:
        """Writes the rows, and returns the report."""
        write_rows(rows, out)
        return self.report(rows)


class ModelStep(Step):
    """A step that makes one model of another."""

    model: Model

    @property
    def writes_adapter(self) -> bool:
        """Whether it leaves an adapter, and not full weights."""
        return True

    @property
    def fresh_lora(self) -> LoraSettings | None:
        """The LoRA that it begins; None where it goes on training one, or all weights."""
        return None

    def output(self, result: StageResult) -> Model:
        """The model that it has made, or will make, in its folder."""
        before = self.model
        checkpoint = model_in(result.folder, before.checkpoint, adapter=self.writes_adapter)
        return Model(checkpoint, result.key, before.style)


def identity(settings: Settings) -> dict[str, Any]:
    """Class and settings of an object, for the keys of the stages that depend on it."""
    return {"_target_": target(settings), **settings.model_dump(mode="json"), **source(settings)}


def write_rows(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Writes the rows of a stage, for `read_rows`."""
    import pandas as pd

    pd.DataFrame(rows).to_parquet(out / ROWS, index=False)


def read_rows(folder: Path) -> pd.DataFrame:
    """The rows that a generate, likelihood, judge or score stage wrote."""
    import pandas as pd

    return pd.read_parquet(folder / ROWS)


def model_in(folder: Path, parent: Checkpoint, *, adapter: bool) -> Checkpoint:
    """The model in `folder/model` that a step makes of `parent`, whose steering goes on.

    `adapter` is whether it is one, where it isn't there yet to be looked at.
    """
    path = folder / MODEL
    if is_adapter(path) if path.is_dir() else adapter:
        return replace(parent, adapter=str(path))
    return Checkpoint(str(path), dtype=parent.dtype, steering=parent.steering)


def model_after(defense: Defense, attacked: Checkpoint, folder: Path) -> Checkpoint:
    """The model that a defense will write to `folder`, as far as `output_form` tells its form."""
    if defense.is_identity:
        return attacked
    if defense.output_form == "hooks":
        return replace(attacked, steering=str(folder))
    if attacked.adapter is not None and defense.output_form in ("same", "adapter"):
        return replace(attacked, adapter=str(folder))
    return Checkpoint(str(folder), dtype=attacked.dtype, steering=attacked.steering)


def known_models(models: Models, attacked: Checkpoint) -> dict[str, Checkpoint]:
    """The models that a defense gets by name, whose files its results may go on using."""
    return {"attacked": attacked, "aligned": models.aligned, "base": models.base}


def place(
    checkpoint: Checkpoint, folder: Path, known: Mapping[str, Checkpoint]
) -> dict[str, str | None]:
    """Where a checkpoint's files lie, whatever the store's own place is.

    Returns:
        For weights, adapter and steering: None, a path in the stage's folder ("model/steps/1"), or
        that of a known model, which the stage was given by name, that has the same ("attacked:").

    Raises:
        ModelError: It is none of these.
    """
    places: dict[str, str | None] = {}
    for part in _PARTS:
        path = getattr(checkpoint, part)
        owner = next((name for name, model in known.items() if getattr(model, part) == path), None)
        if path is None:
            places[part] = None
        elif Path(path).is_relative_to(folder):
            places[part] = Path(path).relative_to(folder).as_posix()
        elif owner is not None:
            places[part] = f"{owner}:"
        else:
            raise ModelError(
                f"the defense's {part} {path!r} lies neither in its own folder nor with a model "
                "that it was given; write it to the folder that `apply` gets"
            )
    return places


def checkpoint_at(
    places: Mapping[str, str | None], folder: Path, known: Mapping[str, Checkpoint]
) -> Checkpoint:
    """The checkpoint that `place` described, its stage's folder being `folder` now."""
    paths: dict[str, str | None] = {}
    revision = None
    for part, location in places.items():
        owner = known.get(location.removesuffix(":")) if location and location[-1] == ":" else None
        if owner is not None:
            paths[part] = getattr(owner, part)
            revision = owner.revision if part == "base" else revision
        else:
            paths[part] = None if location is None else str(folder / location)
    dtype = known["attacked"].dtype
    return Checkpoint(str(paths["base"]), paths["adapter"], revision, dtype, paths["steering"])
