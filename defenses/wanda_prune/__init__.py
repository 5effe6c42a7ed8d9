"""Weights that safety needs and utility doesn't, by Wanda scores (Wei et al., ICML 2024).

What is computed where: README.md in this folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from data.rows import Prompt
from defenses.artefacts import ROWS, prompt_rows, require_files
from defenses.base import Calibration, CalibrationAnswers, Edit, Models, OutputForm
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
from modeling.loading import device_name
from settings import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from modeling.capture import TokenRow

SETS = ("safety", "utility")
NORMS = "norms.safetensors"


class WandaPrune(ProjectionDefense):
    """Restores or zeroes the weights that matter for safety but not for utility.

    Attributes:
        q: Share of each matrix that is safety-critical, by its top scores on safety data.
        p: Share of each matrix that is utility-critical and left alone.
        action: "restore" gives the weights the aligned model's values, a defense; "zero" prunes
            them, which the paper does to show that safety breaks.
        scored: Whose weights and activations are scored, the "aligned" model's (the paper) or
            the "attacked" one's.
        positions: Whose inputs count: the tokens of each "answer" (the paper), of each "prompt",
            or "all".
        batch_size: Rows per forward pass.
        variant: Whether shares round as this project's do or as the official code's.
        rounding: Of q and p: "nearest" takes round(share n) of n weights, "down" int(share n);
            None follows `variant`.
    """

    # "prompts" because the aligned model's answers enter, which the backend and judge decide.
    needs: ClassVar[frozenset[str]] = frozenset({"prompts", "safety_prompts", "utility_prompts"})
    output_form: ClassVar[OutputForm] = "weights"

    q: float = Field(0.1, ge=0, le=1)
    p: float = Field(0.1, ge=0, le=1)
    action: Literal["restore", "zero"] = "restore"
    scored: Literal["aligned", "attacked"] = "aligned"
    positions: Literal["prompt", "answer", "all"] = "answer"
    batch_size: int = Field(8, ge=1)
    variant: Variant = VARIANT
    rounding: Rounding | None = LATER

    @property
    def calibration_answers(self) -> tuple[CalibrationAnswers, ...]:
        """Both kinds of prompts by the aligned model, where its answers' tokens are counted."""
        if self.positions == "prompt":
            return ()
        safety = CalibrationAnswers(("safety_prompts",), "aligned")
        return (safety, CalibrationAnswers(("utility_prompts",), "aligned"))

    def prepare_settings(self) -> dict[str, Any]:
        """What rows and norms depend on: neither q, p nor the action."""
        return {name: getattr(self, name) for name in ("scored", "positions", "batch_size")}

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        """Writes the token rows and, where the aligned model is scored, its input norms."""
        from safetensors.torch import save_file

        from modeling.projections import projections

        prompts = (calibration.safety_prompts, calibration.utility_prompts)
        rows = {
            name: self._rows(name, models.aligned, calibration, of_set)
            for name, of_set in zip(SETS, prompts, strict=True)
        }
        (out / ROWS).write_text(json.dumps(rows))
        if self.scored == "aligned":
            names = list(projections(models.aligned))
            save_file(self._input_norms(models.aligned, rows, names), out / NORMS)
        return {f"{name}_rows": len(rows[name]) for name in SETS}

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Writes the attacked model as full weights with the masked ones restored or zeroed.

        Raises:
            ModelError: The artefact is incomplete, or the models don't fit each other.
        """
        from modeling.importance import wanda_scores
        from modeling.projections import projections, read_weight
        from modeling.rewrite import rewrite_weights

        names, device = projections(models.aligned), device_name()
        rounding = resolve_rounding(self.variant, self.rounding)
        norms = self._norms(artefact, attacked, list(names))
        masked: dict[str, int] = {}

        def edit(name: str, weight: Tensor) -> Tensor:
            aligned = read_weight(models.aligned, name).to(device)
            source = aligned if self.scored == "aligned" else weight
            safety, utility = (wanda_scores(source, norms[f"{kind}.{name}"]) for kind in SETS)
            mask = set_difference(safety, utility, self.q, self.p, rounding)
            masked[name] = int(mask.sum())
            if self.action == "zero":
                return weight.masked_fill_(mask, 0.0)
            return weight.where(~mask, aligned)

        count = rewrite_weights(attacked, out, edit, names=names)
        scalars = sum(masked.values())
        diagnostics = {
            "parameters_masked": scalars,
            "masked_share": scalars / count.total,
            "masked": masked,
        }
        modules = tuple(name for name in names if masked.get(name))
        return describe_edit(count, attacked, diagnostics, modules)

    def _rows(
        self, name: str, aligned: Checkpoint, calibration: Calibration, prompts: Sequence[Prompt]
    ) -> list[TokenRow]:
        """Prompts with the aligned model's own answers; on safety data only the safe ones."""
        if not prompts:
            raise DataError(f"there are no {name} prompts; set sources.{name}_prompts to a source")
        texts = [prompt.text for prompt in prompts]
        if self.positions == "prompt":
            return prompt_rows(calibration, aligned, texts)
        answers = calibration.respond(aligned, texts)
        if name == "safety":
            safe = [at for at, ok in enumerate(calibration.is_safe(texts, answers)) if ok]
            if not safe:
                raise DataError(
                    "the aligned model answered none of the safety prompts safely; give an aligned "
                    "model that refuses them, or set defense.positions=prompt"
                )
            texts, answers = [texts[at] for at in safe], [answers[at] for at in safe]
        return calibration.encode(aligned, texts, answers)

    def _norms(self, artefact: Path, attacked: Checkpoint, names: list[str]) -> dict[str, Tensor]:
        """{"safety.MODULE" or "utility.MODULE": ||X_j||_2 (d_in,)} of the scored model."""
        from safetensors.torch import load_file

        defense = f"wanda_prune with defense.scored={self.scored}"
        if self.scored == "aligned":
            require_files(artefact, defense, NORMS)
            return load_file(artefact / NORMS)
        require_files(artefact, defense, ROWS)
        return self._input_norms(attacked, json.loads((artefact / ROWS).read_text()), names)

    def _input_norms(
        self, model: Checkpoint, rows: Mapping[str, Sequence[TokenRow]], names: Sequence[str]
    ) -> dict[str, Tensor]:
        from modeling.importance import input_norms

        return {
            f"{kind}.{module}": norm
            for kind in SETS
            for module, norm in input_norms(
                model, rows[kind], self.batch_size, self.positions, names
            ).items()
        }


def set_difference(
    safety: Tensor, utility: Tensor, q: float, p: float, rounding: Rounding = "nearest"
) -> Tensor:
    """S(p, q) = S^s(q) - S^u(p): top q on safety data minus top p on utility data, per matrix."""
    from modeling.importance import largest

    whole = round if rounding == "nearest" else int
    top_safety, top_utility = (
        largest(scores, whole(share * scores.numel()), "tensor")
        for scores, share in ((safety, q), (utility, p))
    )
    return top_safety & ~top_utility
