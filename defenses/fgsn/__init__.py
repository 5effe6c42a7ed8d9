"""FGSN: fine-grained safety neurons with continual projection (Han et al., arXiv 2508.09190).

A reconstruction, since no official code is public.  What was read, what was inferred, and what is
computed where: README.md in this folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from defenses.base import Calibration, CalibrationAnswers, Defense, Edit, Models, OutputForm
from defenses.projection_edits import require_unaligned_base
from modeling.checkpoint import Checkpoint, identify
from settings import Seed, SettingError


class FGSN(Defense):
    """Projects the neurons that carry safety, and little else, onto the safety direction.

    Attributes:
        layers: "auto" finds the window of layers in which harmful and benign prompts part;
            otherwise layer numbers, or two fractions of the depth, [0.3125, 0.5] being layers 10
            to 15 of 32.
        window: Of "auto": how many layers, or which share of the depth.
        n_pairs: Of "auto": pairs of prompts whose cosine is averaged.
        seed: Of "auto": draws the pairs.
        q: Share of neurons taken by their scores on harmful prompts.
        p: Share of neurons left out by their scores on benign prompts.
        target_edited: Share of the scalars of all projections to be edited; `q` is searched for
            it. None: `q` counts.
        granularity: A neuron is an output "row" or a single "weight".
        scope: What q and p are shares of: each "tensor", each "row" of it (single weights
            only), or all projections of a "layer".
        weight: Which weights are scored: "merged" (the attacked model's), "aligned" or "delta";
            "random" numbers choose by chance, as a control.
        weight_seed: Of "random".
        tokens: Whose inputs are counted: the "prompt"'s, or those of the aligned model's "answer".
        batch_size: Rows per forward pass.
        edit: What becomes of a neuron: "project", "zero", or "blend" of it and its projection.
        blend_weight: Of "blend": the projection's share.
        norm: Dim of Eq. 6: ||D||_F ("fro"), d_in, d_out, or their product ("numel").
        target: What is projected: what fine-tuning added ("delta"), or "merged" weights.
        dimensions: Categories of the harmful prompts that are dealt with one after another; None:
            all harmful prompts at once.
        rescore: Whether each dimension's scores are those of the model edited so far.
        continue_from: Folder of a model that was defended before, or of its edited neurons, which
            aren't edited again.
    """

    layers: Literal["auto"] | tuple[int, ...] | tuple[float, ...] = "auto"
    window: int | float = 0.1875
    n_pairs: int = Field(500, ge=1)
    seed: Seed = 42

    q: float = Field(0.30, ge=0, le=1)
    p: float = Field(0.05, ge=0, le=1)
    target_edited: float | None = Field(None, gt=0, le=1)
    granularity: Literal["row", "weight"] = "row"
    scope: Literal["tensor", "row", "layer"] = "tensor"
    weight: Literal["merged", "aligned", "delta", "random"] = "merged"
    weight_seed: Seed = 42
    tokens: Literal["prompt", "answer"] = "prompt"
    batch_size: int = Field(8, ge=1)

    edit: Literal["project", "zero", "blend"] = "project"
    blend_weight: float = Field(0.5, ge=0, le=1)
    norm: Literal["fro", "in", "out", "numel"] = "fro"
    target: Literal["delta", "merged"] = "delta"

    dimensions: tuple[str, ...] | None = None
    rescore: bool = False
    continue_from: str | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _names_layers(cls, layers: Any) -> Any:
        """Says in one sentence what a union of three types would say in three."""
        if layers == "auto":
            return layers
        values = tuple(layers) if isinstance(layers, list | tuple) else ()
        numbers = all(type(value) is int for value in values)
        if numbers and values and len(set(values)) == len(values) and min(values) >= 0:
            return values
        fractions = all(type(value) in (int, float) for value in values) and len(values) == 2
        if fractions and not numbers and 0 <= values[0] < values[1] <= 1:
            return tuple(float(value) for value in values)
        raise ValueError(
            f"{layers!r} is neither a list of layer numbers from 0 nor two fractions of the depth; "
            "set auto, [10,11,12] or [0.3125,0.5]"
        )

    @model_validator(mode="after")
    def _is_consistent(self) -> FGSN:
        if self.window < 2 if isinstance(self.window, int) else not 0 < self.window <= 1:
            raise ValueError(
                f"defense.window={self.window} is neither a number of layers from 2 nor a share "
                "of the depth; set 6, or 0.1875 for 6 of 32"
            )
        if self.granularity == "row" and self.scope == "row":
            raise ValueError(
                "defense.scope=row takes the top weights of each row, but with "
                "defense.granularity=row a neuron is a whole row; set defense.scope=tensor or "
                "defense.granularity=weight"
            )
        if self.rescore and self.target_edited is not None:
            raise ValueError(
                "defense.target_edited searches q on fixed scores, which defense.rescore=true "
                "replaces at each step; set defense.rescore=false, or defense.q by hand"
            )
        if self.dimensions is not None and (
            not self.dimensions
            or not all(self.dimensions)
            or len(set(self.dimensions)) < len(self.dimensions)
        ):
            raise ValueError(
                f"defense.dimensions={list(self.dimensions)} names none, or one twice; name each "
                "category once, or set null for all harmful prompts at once"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Harmful and benign prompts, and their answers where these are counted."""
        prompts = frozenset({"safety_prompts", "utility_prompts"})
        return prompts | {"prompts"} if self.tokens == "answer" else prompts

    @property
    def output_form(self) -> OutputForm:
        """An adapter while whole rows of what fine-tuning added are edited, else full weights."""
        return "adapter" if self.target == "delta" and self.granularity == "row" else "weights"

    @property
    def steps(self) -> tuple[tuple[str, Defense], ...]:
        """One step for each dimension, where there are several."""
        dimensions = self.dimensions or ()
        return tuple((name, self) for name in dimensions) if len(dimensions) > 1 else ()

    @property
    def calibration_answers(self) -> tuple[CalibrationAnswers, ...]:
        """All prompts by the aligned model, where its answers' tokens are counted."""
        if self.tokens == "prompt":
            return ()
        return (CalibrationAnswers(("utility_prompts", "safety_prompts"), "aligned"),)

    @field_serializer("continue_from")
    def _with_content(self, folder: str | None) -> str | None:
        """The stage store knows a folder by its content and not by its place alone."""
        if folder is None:
            return None
        from defenses.fgsn.union import union_folder
        from modeling.checkpoint import fingerprint_folder

        return f"{folder}@{fingerprint_folder(union_folder(folder))}"

    def prepare_settings(self) -> dict[str, Any]:
        """What the layers' gaps and the token rows depend on; windows and masks are `apply`'s."""
        settings: dict[str, Any] = {"tokens": self.tokens}
        if self.layers == "auto":
            names = ("n_pairs", "seed", "batch_size")
            settings |= {name: getattr(self, name) for name in names}
        return settings

    def check(self, models: Models, attacked: Checkpoint | None) -> None:
        """Refuses models without a safety direction, layers that aren't there, others' neurons."""
        from defenses.fgsn.layers import by_layer, named_layers
        from defenses.fgsn.union import load_union
        from modeling.projections import open_pairing, projections

        require_unaligned_base(models, "defense=fgsn projects on what alignment changed")
        base, aligned = models.base, models.aligned
        shapes = projections(aligned)
        if projections(base) != shapes:
            raise SettingError(
                f"defense=fgsn projects on what alignment changed, but the projections of "
                f"model.base={base.base!r} have other shapes than the aligned model's; set "
                "model.base to the model that was aligned"
            )
        if self.layers != "auto":
            named_layers(self.layers, len(by_layer(shapes)))
        if self.continue_from is not None:
            load_union(self.continue_from, None, self.granularity, shapes)
        if attacked is not None:
            open_pairing(aligned, attacked)

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        """Writes the token rows of both kinds of prompts, and the layers' gaps."""
        from defenses.fgsn.artefact import write_artefact

        return write_artefact(self, models, calibration, out)

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Writes the defended model to `out`, the steps to it and the edited neurons in it.

        Raises:
            ModelError: The artefact is incomplete, or the models or `continue_from` don't fit.
            SettingError: A dimension isn't there, or `target_edited` is out of reach.
        """
        from defenses.fgsn.artefact import read_artefact
        from defenses.fgsn.continual import describe, project_dimensions
        from defenses.fgsn.plan import plan_edit
        from defenses.fgsn.union import FOLDER, find_start, projection_settings

        artefact_record, prompts = read_artefact(self, artefact)
        aligned = artefact_record["aligned"]
        plan = plan_edit(self, models, attacked, artefact_record.get("gaps"))
        identity = identify(attacked, {models.aligned.base: aligned["base"]})
        start = find_start(plan, attacked, identity, aligned)
        result = project_dimensions(plan, models, start, prompts, out)
        edited = start.edited + sum(tally.changed for tally in result.tallies)
        record = {
            "aligned": aligned,
            "attacked": identity,
            "projection": projection_settings(self),
            "parameters_edited": edited,
            "dimensions": [step.name for step in result.steps],
        }
        result.union.save(out / FOLDER, record)
        return describe(plan, result, attacked, edited)
