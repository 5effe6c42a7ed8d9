"""FGSN: fine-grained safety neurons with continual projection (Han et al., arXiv 2508.09190).

A reconstruction, since no official code is public.  What was read, what was inferred, and what is
computed where: README.md in this folder.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from defenses.base import Calibration, CalibrationAnswers, Defense, Edit, Models, OutputForm
from modeling.checkpoint import Checkpoint, identify
from settings import DataError, ModelError, SettingError

if TYPE_CHECKING:
    from defenses.fgsn.continual import Plan
    from defenses.fgsn.union import Union
    from modeling.capture import TokenRow

ROWS, RECORD = "rows.json", "fgsn.json"
ALL = "all"


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
    seed: int = Field(42, ge=0)

    q: float = Field(0.30, ge=0, le=1)
    p: float = Field(0.05, ge=0, le=1)
    target_edited: float | None = Field(None, gt=0, le=1)
    granularity: Literal["row", "weight"] = "row"
    scope: Literal["tensor", "row", "layer"] = "tensor"
    weight: Literal["merged", "aligned", "delta", "random"] = "merged"
    weight_seed: int = Field(42, ge=0)
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
        given = tuple(layers) if isinstance(layers, list | tuple) else ()
        numbers = all(type(layer) is int for layer in given)
        if numbers and given and len(set(given)) == len(given) and min(given) >= 0:
            return given
        fractions = all(type(layer) in (int, float) for layer in given) and len(given) == 2
        if fractions and not numbers and 0 <= given[0] < given[1] <= 1:
            return tuple(float(fraction) for fraction in given)
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
        """Refuses models without a safety direction, layers that aren't there, foreign neurons.

        Raises:
            SettingError: What to set instead.
            ModelError: The models have different shapes, or `continue_from` doesn't fit them.
        """
        from defenses.fgsn.layers import by_layer, given_layers
        from defenses.fgsn.union import load_union
        from modeling.pairing import open_pairing
        from modeling.projections import projections

        base, aligned = models.base, models.aligned
        if (base.base, base.adapter, base.revision) == (
            aligned.base, aligned.adapter, aligned.revision,
        ):  # fmt: skip
            raise SettingError(
                "defense=fgsn projects on what alignment changed, but model.aligned is "
                "model.base itself; set model.base to the model before alignment"
            )
        shapes = projections(aligned)
        if projections(base) != shapes:
            raise SettingError(
                f"defense=fgsn projects on what alignment changed, but the projections of "
                f"model.base={base.base!r} have other shapes than the aligned model's; set "
                "model.base to the model that was aligned"
            )
        if self.layers != "auto":
            given_layers(self.layers, len(by_layer(shapes)))
        if self.continue_from is not None:
            load_union(self.continue_from, None, self.granularity, shapes)
        if attacked is not None:
            open_pairing(aligned, attacked)

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        """Writes the token rows of both kinds of prompts, and the layers' gaps.

        Raises:
            DataError: There are too few prompts.
            SettingError: A dimension isn't among the prompts' categories.
            ModelError: Alignment changed nothing.
        """
        from defenses.fgsn.layers import hidden_states, safety_gap
        from modeling.projections import projections

        harmful, benign = calibration.safety_prompts, calibration.utility_prompts
        if not harmful or len(benign) < 2:
            raise DataError(
                f"defense=fgsn compares {len(harmful)} harmful with {len(benign)} benign prompts; "
                "give at least one in sources.safety_prompts and two in sources.utility_prompts"
            )
        categories = [prompt.category for prompt in harmful]
        self._check_dimensions(categories)
        names = list(projections(models.aligned))
        _require_direction(models, names)
        texts = [prompt.text for prompt in (*benign, *harmful)]
        rows = self._encode(models.aligned, calibration, texts)
        report: dict[str, Any] = {
            "benign": len(benign),
            "harmful": {name: categories.count(name) for name in dict.fromkeys(categories)},
        }
        if self.layers == "auto":
            states = hidden_states(models.aligned, names, rows, self.batch_size)
            parts = states[:, : len(benign)], states[:, len(benign) :]
            report["gaps"] = safety_gap(*parts, self.n_pairs, self.seed)
        content = {"categories": categories, "benign": rows[: len(benign)]}
        (out / ROWS).write_text(json.dumps(content | {"harmful": rows[len(benign) :]}))
        record = {"aligned": identify(models.aligned), **report}
        (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        return report

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Writes the repaired model to `out`, the steps to it and the edited neurons in it.

        Raises:
            ModelError: The artefact is incomplete, or the models or `continue_from` don't fit.
            SettingError: A dimension isn't there, or `target_edited` is out of reach.
        """
        from defenses.fgsn.continual import repair
        from defenses.fgsn.report import report
        from defenses.fgsn.union import FOLDER

        record, prompts = self._open(artefact)
        plan = self.plan(models, attacked, record.get("gaps"))
        known = {models.aligned.base: record["aligned"]["base"]}
        victim = identify(attacked, known)
        start, union, written, earlier = self._continued(record["aligned"], victim, attacked, plan)
        repaired = repair(plan, models, start, prompts, union, written, out)
        edited = earlier + sum(tally.changed for tally in repaired.tallies)
        kept = {
            "aligned": record["aligned"],
            "attacked": victim,
            "projection": self._projection,
            "parameters_edited": edited,
            "dimensions": [step.name for step in repaired.steps],
        }
        repaired.union.save(out / FOLDER, kept)
        return report(plan, repaired, attacked, edited)

    def plan(self, models: Models, attacked: Checkpoint, gaps: list[float] | None) -> Plan:
        """The resolved settings for one attacked model.

        Args:
            models: Base and aligned.
            attacked: The attacked model.
            gaps: What `prepare` found per layer; None unless `layers` is "auto".

        Raises:
            ModelError: The artefact has no gaps, or the models can't be compared.
            SettingError: The fine-tuning left these layers alone.
        """
        from defenses.fgsn.continual import Plan
        from defenses.fgsn.layers import by_layer, given_layers, safety_layers, window_size
        from defenses.fgsn.project import Projection
        from modeling.pairing import open_pairing

        pairing = open_pairing(models.aligned, attacked)
        shapes = pairing.attacked.shapes
        members = by_layer(shapes)
        if self.layers != "auto":
            chosen = given_layers(self.layers, len(members))
        elif gaps is not None:
            chosen = safety_layers(gaps, window_size(self.window, len(gaps)))
        else:
            raise ModelError("the artefact holds no gaps of the layers; prepare defense=fgsn again")
        touched = set(pairing.touched if self.target == "delta" else shapes)
        layers = {at: [name for name in members[at] if name in touched] for at in chosen}
        if not any(layers.values()):
            raise SettingError(
                f"defense.layers: the fine-tuning left layers {chosen} alone, so that there is "
                "nothing to project in them; choose others"
            )
        return Plan(
            layers={at: names for at, names in layers.items() if names},
            shapes=shapes,
            q=None if self.target_edited is not None else self.q,
            p=self.p,
            target_edited=self.target_edited,
            scope=self.scope,
            granularity=self.granularity,
            weight=self.weight,
            weight_seed=self.weight_seed,
            tokens=self.tokens,
            batch_size=self.batch_size,
            target=self.target,
            projection=Projection(self.edit, self.norm, self.blend_weight),
            rescore=self.rescore,
        )

    @property
    def _projection(self) -> dict[str, Any]:
        names = ("edit", "blend_weight", "norm", "target", "rescore")
        return {name: getattr(self, name) for name in names}

    def _encode(
        self, aligned: Checkpoint, calibration: Calibration, texts: list[str]
    ) -> list[TokenRow]:
        if self.tokens == "answer":
            return calibration.encode(aligned, texts, calibration.respond(aligned, texts))
        from modeling.checkpoint import load_tokenizer

        tokenizer = load_tokenizer(aligned)
        return [(calibration.style.encode_prompt(tokenizer, text), []) for text in texts]

    def _check_dimensions(self, categories: list[str]) -> None:
        for name in self.dimensions or ():
            if name not in categories:
                known = sorted(set(categories))
                raise SettingError(
                    f"defense.dimensions: {name!r} is no category of sources.safety_prompts; "
                    f"choose from {', '.join(known)}"
                )

    def _open(self, artefact: Path) -> tuple[dict[str, Any], dict[str, list[TokenRow]]]:
        """The artefact's record, and the token rows of each dimension and the benign prompts."""
        from defenses.fgsn.continual import BENIGN

        if missing := [name for name in (ROWS, RECORD) if not (artefact / name).is_file()]:
            raise ModelError(
                f"{str(artefact)!r} is no artefact of defense=fgsn ({missing[0]} is missing); "
                "prepare it again"
            )
        content = json.loads((artefact / ROWS).read_text())
        categories = content["categories"]
        self._check_dimensions(categories)
        harmful = [(prompt, answer) for prompt, answer in content["harmful"]]
        rows = {
            name: [row for row, found in zip(harmful, categories, strict=True) if found == name]
            for name in self.dimensions or ()
        } or {ALL: harmful}
        rows[BENIGN] = [(prompt, answer) for prompt, answer in content["benign"]]
        return json.loads((artefact / RECORD).read_text()), rows

    def _continued(
        self, aligned: dict[str, Any], victim: dict[str, Any], attacked: Checkpoint, plan: Plan
    ) -> tuple[Checkpoint, Union, Union, int]:
        """Where to start: the model, U, those of U that it still lacks, and scalars edited before.

        A model that isn't the one that the earlier run repaired is taken to hold that edit.
        """
        from defenses.fgsn.union import Union, load_union, union_folder

        empty = Union(self.granularity, plan.shapes)
        if self.continue_from is None:
            return attacked, empty, empty, 0
        union, record = load_union(self.continue_from, aligned, self.granularity, plan.shapes)
        if record["attacked"] != victim:
            return attacked, union, empty, 0
        edited = record["parameters_edited"]
        if self.rescore:
            return (
                _model_in(union_folder(self.continue_from).parent, attacked),
                union,
                empty,
                edited,
            )
        for name, value in self._projection.items():
            if record["projection"][name] != value:
                raise SettingError(
                    f"defense.continue_from={self.continue_from!r} repaired this very model with "
                    f"{name}={record['projection'][name]}; set defense.{name} to that"
                )
        return attacked, union, union, edited


def _require_direction(models: Models, names: list[str]) -> None:
    from modeling.deltas import alignment, frobenius

    if not any(frobenius(alignment(models, name, "cpu")) > 0 for name in names):
        raise ModelError(
            "defense=fgsn projects on what alignment changed, but model.aligned has the very "
            "projections of model.base (D = 0); set model.base to the model before alignment"
        )


def _model_in(folder: Path, attacked: Checkpoint) -> Checkpoint:
    """The model that an earlier run wrote for the same attacked model."""
    if (folder / "adapter_config.json").is_file():
        return replace(attacked, adapter=str(folder))
    if (folder / "config.json").is_file():
        return Checkpoint(str(folder), dtype=attacked.dtype)
    raise ModelError(
        f"defense.rescore=true goes on from the model that was defended, and {str(folder)!r} holds "
        "none; set defense.continue_from to the folder of that model"
    )
