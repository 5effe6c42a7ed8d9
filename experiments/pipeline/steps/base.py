"""`Step`, one stage of the pipeline with its key, its work and its cost, and `Model`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.pipeline.cost import Sizes, Work
from experiments.pipeline.placement import model_in
from experiments.store import Stage, StageResult
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.training import LoraSettings
from settings import Settings, target

if TYPE_CHECKING:
    import pandas as pd

ROWS = "rows.parquet"


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the experiment.

    Attributes:
        checkpoint: Where it lies.
        key: Identifies its content.
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


class ModelStep(Step):
    """A step that makes one model of another.

    Attributes:
        model: The model that it starts from.
    """

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
    return {"_target_": target(settings), **settings.model_dump(mode="json")}


def read_rows(folder: Path) -> pd.DataFrame:
    """The rows that a generate, likelihood, judge or score stage wrote."""
    import pandas as pd

    return pd.read_parquet(folder / ROWS)
