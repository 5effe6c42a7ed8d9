"""Antidote: prune what a fine-tuned model needs for harm (Huang et al., ICML 2025).

What is computed where: README.md in this folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from defenses.artefacts import ROWS, read_rows, require_files, write_rows
from defenses.base import Calibration, Edit, Models, OutputForm
from defenses.projection_edits import (
    LATER,
    VARIANT,
    ProjectionDefense,
    Rounding,
    Variant,
    describe_edit,
    resolve_rounding,
)
from modeling.checkpoint import Checkpoint
from settings import DataError, SettingError

if TYPE_CHECKING:
    from torch import Tensor

    from modeling.capture import TokenRow
    from modeling.importance import TokenPositions


class Antidote(ProjectionDefense):
    """Zeroes the weights of the attacked model that matter most on harmful data.

    Attributes:
        dense_ratio: Share of each row's weights that is zeroed, by the highest Wanda scores.
        prune: Whose rows: those of the "merged" weights (the paper's formula), or those of an
            attacked adapter's "factors" A and B (what the official code leaves; README).
        positions: Whose inputs count: the tokens of each "prompt", of each harmful "answer", or
            "all".
        batch_size: Rows per forward pass.
        variant: Whether it counts as this project does or as the official code.
        rounding: "nearest" zeroes round(d_in dense_ratio) of a row, "down" all but
            int(d_in (1 - dense_ratio)); None follows `variant`.
        count_padding: Whether with positions=all the padding of batches counts as tokens; None
            follows `variant`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"safety_pairs"})
    needs_descent: ClassVar[bool] = False  # It reads the attacked model alone.

    dense_ratio: float = Field(0.2, ge=0, le=1)
    prune: Literal["merged", "factors"] = "merged"
    positions: Literal["prompt", "answer", "all"] = "all"
    batch_size: int = Field(8, ge=1)
    variant: Variant = VARIANT
    rounding: Rounding | None = LATER
    count_padding: bool | None = LATER

    @property
    def output_form(self) -> OutputForm:
        """Full weights, or the adapter with some scalars zeroed."""
        return "weights" if self.prune == "merged" else "same"

    @property
    def resolved(self) -> tuple[Rounding, TokenPositions]:
        """How shares round and which tokens count, by `variant` where they are None."""
        padded = self.variant == "official" if self.count_padding is None else self.count_padding
        positions = "padded" if padded and self.positions == "all" else self.positions
        return resolve_rounding(self.variant, self.rounding), positions

    def prepare_settings(self) -> dict[str, Any]:
        """The rows depend on no setting."""
        return {}

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        """Writes the harmful rows as tokens: each prompt with its unsafe answer.

        Raises:
            DataError: There are none.
        """
        pairs = calibration.safety_pairs
        if not pairs:
            raise DataError("there are no harmful rows; set sources.safety_pairs to a source")
        prompts, answers = [pair.prompt for pair in pairs], [pair.rejected for pair in pairs]
        rows = calibration.encode(models.aligned, prompts, answers)
        write_rows(out, rows)
        return {"rows": len(rows)}

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Writes the attacked model, pruned (Antidote's one-shot pruning).

        Raises:
            ModelError: The artefact is incomplete, or the adapter can't be merged.
            SettingError: There is no adapter whose factors could be pruned.
        """
        require_files(artefact, "antidote", ROWS)
        rows = read_rows(artefact)
        if self.prune == "factors":
            return self._prune_factors(attacked, rows, out)
        return self._prune_merged(attacked, rows, out)

    def _prune_merged(self, attacked: Checkpoint, rows: list[TokenRow], out: Path) -> Edit:
        from defenses.antidote.prune import prune_weight
        from modeling.importance import input_norms
        from modeling.projections import projections
        from modeling.rewrite import rewrite_weights

        names, (rounding, positions) = projections(attacked), self.resolved
        norms = input_norms(attacked, rows, self.batch_size, positions, names)
        masked = 0

        def edit(name: str, weight: Tensor) -> Tensor:
            nonlocal masked
            norm = norms[name].to(weight.device)
            mask, edited = prune_weight(weight, norm, self.dense_ratio, rounding)
            masked += int(mask.sum())
            return edited

        count = rewrite_weights(attacked, out, edit, names=names)
        diagnostics = {"parameters_masked": masked, "masked_share": masked / count.total}
        return describe_edit(count, attacked, diagnostics)

    def _prune_factors(self, attacked: Checkpoint, rows: list[TokenRow], out: Path) -> Edit:
        from defenses.antidote.prune import factor_norms, prune_factors
        from modeling.checkpoint import count_parameters
        from modeling.lora import open_adapter

        if attacked.adapter is None:
            raise SettingError(
                "defense.prune=factors prunes an adapter, but the attack trained full weights; "
                "set defense.prune=merged, or attack.adapter=resume or fresh"
            )
        adapter = open_adapter(attacked.adapter, "the attacked model")
        rounding, positions = self.resolved
        norms = factor_norms(attacked, adapter, rows, self.batch_size, positions)
        masked, changed = prune_factors(adapter, out, norms, self.dense_ratio, rounding)
        total = sum(shape.rank * (shape.d_in + shape.d_out) for shape in adapter.shapes.values())
        return Edit(
            defended=replace(attacked, adapter=str(out)),
            parameters_edited=sum(changed.values()),
            parameters_total=count_parameters(attacked),
            modules=tuple(name for name, count in changed.items() if count),
            diagnostics={"parameters_masked": masked, "masked_share": masked / total},
        )
