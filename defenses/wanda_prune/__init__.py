"""Weights that safety needs and utility doesn't, by Wanda scores (Wei et al., ICML 2024).

What is computed where: README.md in this folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from data.rows import Prompt
from defenses.base import Calibration, CalibrationAnswers, Defense, Edit, Models, OutputForm
from modeling.checkpoint import Checkpoint, device_name
from settings import DataError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from modeling.capture import TokenRow

SETS = ("safety", "utility")
ROWS, NORMS = "rows.json", "norms.safetensors"


class WandaPrune(Defense):
    """Restores or zeroes the weights that matter for safety but not for utility.

    Attributes:
        q: Share of each matrix that is safety-critical, by its top scores on safety data.
        p: Share of each matrix that is utility-critical and left alone.
        action: "restore" gives the weights the aligned model's values, a repair; "zero" prunes
            them, which the paper does to show that safety breaks.
        scored: Whose weights and activations are scored, the "aligned" model's (the paper) or
            the "attacked" one's.
        positions: Whose inputs count: the tokens of each "answer" (the paper), of each "prompt",
            or "all".
        batch_size: Rows per forward pass.
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

    def check(self, models: Models, attacked: Checkpoint | None) -> None:
        """Refuses an aligned model whose projections can't be read.

        Raises:
            ModelError: It isn't a decoder of plain weights, or its adapter more than LoRA.
        """
        from modeling.deltas import projections

        projections(models.aligned)

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        """Writes the token rows and, where the aligned model is scored, its input norms.

        Raises:
            DataError: There are no prompts of a set, or no safe answer to any.
        """
        from safetensors.torch import save_file

        from modeling.deltas import projections
        from modeling.importance import input_norms

        prompts = (calibration.safety_prompts, calibration.utility_prompts)
        rows = {
            name: self._rows(name, models.aligned, calibration, given)
            for name, given in zip(SETS, prompts, strict=True)
        }
        (out / ROWS).write_text(json.dumps(rows))
        if self.scored == "aligned":
            names = projections(models.aligned)
            norms = {
                f"{name}.{module}": norm
                for name in SETS
                for module, norm in input_norms(
                    models.aligned, rows[name], self.batch_size, self.positions, names
                ).items()
            }
            save_file(norms, out / NORMS)
        return {f"{name}_rows": len(rows[name]) for name in SETS}

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Writes the attacked model as full weights with the masked ones restored or zeroed.

        Raises:
            ModelError: The artefact is incomplete, or the models don't fit each other.
        """
        from defenses.wanda_prune.mask import set_difference
        from modeling.deltas import projections, read_weight, rewrite_weights
        from modeling.headers import count_parameters
        from modeling.importance import wanda_scores

        names, device = projections(models.aligned), device_name()
        norms = self._norms(artefact, attacked, list(names))
        masked: dict[str, int] = {}

        def edit(name: str, weight: Tensor) -> Tensor:
            aligned = read_weight(models.aligned, name).to(device)
            source = aligned if self.scored == "aligned" else weight
            safety, utility = (wanda_scores(source, norms[f"{kind}.{name}"]) for kind in SETS)
            mask = set_difference(safety, utility, self.q, self.p)
            masked[name] = int(mask.sum())
            if self.action == "zero":
                return weight.masked_fill_(mask, 0.0)
            return weight.where(~mask, aligned)

        count = rewrite_weights(attacked, out, edit, names=names)
        total = sum(d_out * d_in for d_out, d_in in names.values())
        return Edit(
            defended=count.defended,
            parameters_edited=count.changed,
            parameters_total=count_parameters(replace(attacked, adapter=None)),
            modules=tuple(name for name in names if masked.get(name)),
            diagnostics={
                "parameters_masked": sum(masked.values()),
                "masked_share": sum(masked.values()) / total,
                "masked": masked,
            },
        )

    def _rows(
        self, name: str, aligned: Checkpoint, calibration: Calibration, prompts: Sequence[Prompt]
    ) -> list[TokenRow]:
        """Prompts with the aligned model's own answers; on safety data only the safe ones."""
        from modeling.checkpoint import load_tokenizer

        if not prompts:
            raise DataError(f"there are no {name} prompts; set sources.{name}_prompts to a source")
        texts = [prompt.text for prompt in prompts]
        if self.positions == "prompt":
            tokenizer = load_tokenizer(aligned)
            return [(calibration.style.encode_prompt(tokenizer, text), []) for text in texts]
        answers = calibration.respond(aligned, texts)
        if name == "safety":
            safe = calibration.is_safe(texts, answers)
            kept = [at for at, ok in enumerate(safe) if ok]
            if not kept:
                raise DataError(
                    "the aligned model answered none of the safety prompts safely; give an aligned "
                    "model that refuses them, or set defense.positions=prompt"
                )
            texts, answers = [texts[at] for at in kept], [answers[at] for at in kept]
        return calibration.encode(aligned, texts, answers)

    def _norms(self, artefact: Path, attacked: Checkpoint, names: list[str]) -> dict[str, Tensor]:
        """{"safety.MODULE" or "utility.MODULE": ||X_j||_2 (d_in,)} of the scored model."""
        from safetensors.torch import load_file

        from modeling.importance import input_norms

        needed = NORMS if self.scored == "aligned" else ROWS
        if not (artefact / needed).is_file():
            raise ModelError(
                f"{str(artefact)!r} is no artefact of defense=wanda_prune with "
                f"defense.scored={self.scored} ({needed} is missing); prepare it again"
            )
        if self.scored == "aligned":
            return load_file(artefact / NORMS)
        rows = json.loads((artefact / ROWS).read_text())
        return {
            f"{kind}.{module}": norm
            for kind in SETS
            for module, norm in input_norms(
                attacked, rows[kind], self.batch_size, self.positions, names
            ).items()
        }
