"""The steps that train, merge or take a model: `Align`, `Merge`, `RunAttack` and `TakeGiven`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from attacks.base import Attack, AttackData
from data.local import hash_rows
from data.rows import Example, PreferencePair
from experiments.pipeline.cost import Sizes, Work
from experiments.pipeline.steps.base import MODEL, Model, ModelStep, identity
from experiments.store import Stage, StageResult
from modeling.alignment import Alignment
from modeling.model_files import verify_folder
from modeling.training import LoraSettings
from settings import ModelError, target

# Forward passes through the reference: DPO's of each row; KTO's, and both of its models on
# mismatched answers.
_REFERENCE_PASSES = {"dpo": 1, "kto": 3}


@dataclass(frozen=True)
class Align(ModelStep):
    """Base to aligned, by our own alignment; the base is rendered in the aligned model's style."""

    model: Model
    recipe: Alignment
    rows: Sequence[Example]
    pairs: Sequence[PreferencePair]

    @cached_property
    def stage(self) -> Stage:
        settings = {
            "recipe": self.recipe.model_dump(),
            "style": self.model.style.identity(),
            "dtype": self.model.checkpoint.dtype,
            "rows": [hash_rows(self.rows), hash_rows(self.pairs)],
        }
        return Stage("align", self.recipe.version, settings, (self.model.key,))

    @property
    def fresh_lora(self) -> LoraSettings:
        return self.recipe.lora

    def run(self, out: Path) -> dict[str, Any]:
        """Makes the aligned adapter in `out/model`."""
        with tempfile.TemporaryDirectory() as scratch:
            return self.recipe.run(
                self.model.checkpoint,
                [row.turns for row in self.rows],
                [(pair.prompt, pair.chosen, pair.rejected) for pair in self.pairs],
                self.model.style,
                out / MODEL,
                Path(scratch),
            )

    def cost(self, sizes: Sizes) -> Work:
        """Both phases on one LoRA; the hungrier one gives the memory."""
        checkpoint, style = self.model.checkpoint, self.model.style
        model = sizes.model(checkpoint, self.recipe.lora)
        work = Work(disk=model.adapter_bytes)
        if self.recipe.sft is not None:
            rows = [_texts(row) for row in self.rows]
            lengths = sizes.tokens(checkpoint, style, rows, training=True)
            work += model.training(lengths, self.recipe.sft)
        if self.recipe.preference is not None:
            method = self.recipe.preference.method
            rows = [(p.prompt, answer) for p in self.pairs for answer in (p.chosen, p.rejected)]
            phase = model.training(
                sizes.tokens(checkpoint, style, rows, training=True),
                self.recipe.preference.train,
                answers=1 if method == "kto" else 2,
                copies=_REFERENCE_PASSES.get(method, 0),
            )
            work += replace(phase, rows=len(self.pairs))
        return work


@dataclass(frozen=True)
class Merge(ModelStep):
    """A model to the same with its adapter merged, for attacks that need full weights."""

    model: Model

    @cached_property
    def stage(self) -> Stage:
        return Stage("merge", 1, {"dtype": self.model.checkpoint.dtype}, (self.model.key,))

    @property
    def writes_adapter(self) -> bool:
        return False

    def run(self, out: Path) -> None:
        """Writes the model with its adapter merged to `out/model`."""
        from modeling.training import write_merged

        write_merged(self.model.checkpoint, out / MODEL)

    def cost(self, sizes: Sizes) -> Work:
        """The model is loaded, and its weights are written."""
        model = sizes.model(self.model.checkpoint)
        return Work(disk=model.weight_bytes, memory=model.bytes)


@dataclass(frozen=True)
class RunAttack(ModelStep):
    """Aligned to attacked, or defended to refined."""

    model: Model
    attack: Attack
    data: AttackData
    seed: int

    @cached_property
    def stage(self) -> Stage:
        settings = identity(self.attack)
        if not self.attack.needs_task:
            # The task is only scored.
            settings.pop("task")
        return Stage(
            "attack",
            self.attack.version,
            {
                "attack": settings,
                "style": self.model.style.identity(),
                "dtype": self.model.checkpoint.dtype,
                "seed": self.seed,
                "rows": self.data.hashes,
            },
            (self.model.key,),
        )

    @property
    def writes_adapter(self) -> bool:
        return not self.attack.writes_full_weights

    @property
    def fresh_lora(self) -> LoraSettings | None:
        return self.attack.fresh_lora

    def run(self, out: Path) -> dict[str, Any]:
        """Makes the attacked model in `out/model`."""
        model = self.model
        with tempfile.TemporaryDirectory() as scratch:
            report = self.attack.run(
                model.checkpoint, self.data, model.style, self.seed, out / MODEL, Path(scratch)
            )
        called = f"{target(self.attack)}.run"
        verify_folder(str(out / MODEL), f"what {called} was to write, out")
        if not isinstance(report, dict):
            raise ModelError(f"{called} returned {report!r}; return a dictionary, its report")
        return report

    def cost(self, sizes: Sizes) -> Work:
        """The rows that the attack draws; nothing where it can't say how it trains."""
        training, style = self.attack.training, self.model.style
        if training is None:
            return Work()
        if self.attack.system is not None:
            style = style.model_copy(update={"system": self.attack.system})
        rows = [_texts(row) for row in self.attack.rows(self.data, self.seed)]
        checkpoint = self.model.checkpoint
        model = sizes.model(checkpoint, self.fresh_lora)
        lengths = sizes.tokens(checkpoint, style, rows, training=True)
        return Work(disk=model.adapter_bytes or model.bytes) + model.training(lengths, training)


@dataclass(frozen=True)
class TakeGiven(ModelStep):
    """Aligned to a given model, looked at and left where it is.

    Attributes:
        called: What messages call it.
        descends: Whether it is refused where it can't come from the aligned model.
    """

    model: Model
    given: Model
    called: str
    descends: bool

    @cached_property
    def stage(self) -> Stage:
        settings = {"dtype": self.given.checkpoint.dtype, "descends": self.descends}
        return Stage("attack", 1, {"given": settings}, (self.model.key, self.given.key))

    @property
    def writes_adapter(self) -> bool:
        return self.given.checkpoint.adapter is not None

    def run(self, out: Path) -> dict[str, Any]:
        """The report says what is known of the model, and that leakage isn't."""
        from modeling.descent import check_descent

        report = {"given": self.given.key, "leaked_rows_dropped": None}
        if not self.descends:
            return report
        aligned, given = self.model.checkpoint, self.given.checkpoint
        return {**report, "descent": check_descent(aligned, given, self.called).as_json()}

    def output(self, result: StageResult) -> Model:
        """The given model, under its own key, so that it is measured once wherever it is given."""
        return self.given

    def cost(self, sizes: Sizes) -> Work:
        """A few rows of each matrix are read."""
        return Work()


def _texts(row: Example) -> tuple[str, str]:
    """All that stands before a row's last answer, and that answer."""
    *before, answer = (turn.text for turn in row.turns)
    return "\n".join(before), answer
