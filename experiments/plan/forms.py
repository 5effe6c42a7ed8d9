"""The form of models that no stage has made yet: shape, adapter, and where they will lie."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from defenses.base import Defense
from experiments.plan.memory import Loaded
from experiments.plan.models import Library, Located
from modeling.checkpoint import Checkpoint
from modeling.training import LoraSettings


@dataclass
class Forms:
    """What checkpoints look like, there or not.

    Attributes:
        library: Where base and aligned models are looked up.
        adapters: {adapter folder: its LoRA}.
        roots: {full weights that a stage makes: the checkpoint whose shape they have}.
    """

    library: Library
    adapters: dict[str, LoraSettings] = field(default_factory=dict)
    roots: dict[str, Checkpoint] = field(default_factory=dict)

    def loaded(self, checkpoint: Checkpoint, fresh: LoraSettings | None = None) -> Loaded:
        """A checkpoint as a stage loads it, with a fresh LoRA or its own."""
        shape = self.library.shape(self.located(checkpoint))
        lora = fresh or self._lora(checkpoint.adapter)
        size = None if lora is None else shape.lora(lora.rank, lora.target_modules)
        return Loaded(shape, checkpoint.dtype, size)

    def located(self, checkpoint: Checkpoint) -> Located:
        """The base or aligned model that a checkpoint's full weights came from."""
        while checkpoint.base in self.roots:
            checkpoint = self.roots[checkpoint.base]
        return self.library.of(checkpoint)

    def keep(self, before: Checkpoint, after: Checkpoint) -> None:
        """Remembers of what shape a model is that will be made of another."""
        if after.base not in self.roots and not self.library.holds(after.base):
            self.roots[after.base] = before
        lora = self._lora(before.adapter)
        if after.adapter is not None and after.adapter not in self.adapters and lora is not None:
            self.adapters[after.adapter] = lora

    def _lora(self, adapter: str | None) -> LoraSettings | None:
        if adapter is None or adapter in self.adapters:
            return self.adapters.get(adapter or "")
        config = json.loads((Path(adapter) / "adapter_config.json").read_text())
        self.adapters[adapter] = LoraSettings(
            rank=config["r"], target_modules=tuple(config["target_modules"])
        )
        return self.adapters[adapter]


def left(defense: Defense, attacked: Checkpoint, folder: Path) -> Checkpoint:
    """The model that a defense will leave in `folder`, as far as `leaves` tells its form."""
    if defense.passes_on:
        return attacked
    if defense.leaves == "hooks":
        return replace(attacked, steering=str(folder))
    if attacked.adapter is not None and defense.leaves in ("same", "adapter"):
        return replace(attacked, adapter=str(folder))
    return Checkpoint(str(folder), dtype=attacked.dtype, steering=attacked.steering)
