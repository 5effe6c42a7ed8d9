"""Alignment: supervised refusals, then preference optimisation, on one LoRA over the base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import load_tokenizer
from modeling.preference import Preference, preference_trainer
from modeling.training import LoraSettings, TrainSettings, open_for_training, save, train, train_sft
from settings import Settings


class Alignment(Settings):
    """An alignment recipe.

    Both phases train the same LoRA, so that the base is W_0 and base + adapter is W_a in one
    LoRA coordinate system, as NLSR needs (Yi et al. 2025, section 3).

    Attributes:
        seed: Its own seed: a provider aligns a model once, whatever the attacks' seeds are.
        lora: The adapter.
        sft: The supervised phase, or None to leave it out.
        preference: The preference phase, or None to leave it out.
        n_sft: How many supervised rows to use; None: all of the source.
        n_pairs: How many preference pairs to use; None: all of the source.
    """

    version: ClassVar[int] = 2

    seed: int = Field(0, ge=0)
    lora: LoraSettings = LoraSettings()
    sft: TrainSettings | None = None
    preference: Preference | None = None
    n_sft: int | None = Field(None, ge=1)
    n_pairs: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _has_a_phase(self) -> Alignment:
        if self.sft is None and self.preference is None:
            raise ValueError("align.sft and align.preference are both null; give at least one")
        return self

    def run(
        self,
        base: Checkpoint,
        rows: Sequence[tuple[str, str]],
        pairs: Sequence[tuple[str, str, str]],
        style: PromptStyle,
        out: Path,
        scratch: Path,
    ) -> dict[str, Any]:
        """Aligns `base` and writes the adapter folder to `out`.

        Args:
            base: The model before alignment.
            rows: (prompt, answer) rows of the supervised phase.
            pairs: (prompt, chosen, rejected) rows of the preference phase.
            style: Renders prompts.
            out: Where the adapter goes.
            scratch: A folder the trainer may write to.

        Returns:
            The loss curves and row counts.
        """
        tokenizer = load_tokenizer(base)
        model = open_for_training(base, self.lora, self.seed)
        report: dict[str, Any] = {}
        if self.sft is not None:
            curve = train_sft(model, tokenizer, rows, style, self.sft, self.seed, scratch)
            report["sft"] = {"rows": len(rows), "loss": curve}
        if self.preference is not None:
            trainer = preference_trainer(
                model, tokenizer, pairs, style, self.preference, self.seed, scratch
            )
            report["preference"] = {
                "method": self.preference.method,
                "pairs": len(pairs),
                "loss": train(trainer),
            }
        save(model, tokenizer, out, base.base)
        return report
