"""NLSR: neuron-level safety realignment (Yi et al., AAAI 2025, arXiv 2412.12497).

What is computed where: README.md in this folder.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from defenses.artefacts import require_files
from defenses.base import Calibration, CalibrationAnswers, Defense, Edit, Models, OutputForm
from modeling.checkpoint import Checkpoint
from modeling.loading import device_name
from settings import DataError, Seed, SettingError
from settings.memory import streaming

if TYPE_CHECKING:
    from modeling.capture import TokenRow
    from modeling.lora import LoraAdapter

# What the two variants differ in, under the names of the settings that override one each.
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {
        "amplification": "delta",
        "rank_rule": "kept",
        "topk": "row",
        "rounding": "nearest",
        "sequential": False,
        "accumulate_gradients": False,
        "selection_order": "least_similar",
        "probability_rule": "linear",
        "draw_order": "name",
        "draw_precision": "float64",
    },
    "official": {
        "amplification": "factors",
        "rank_rule": "dropped",
        "topk": "tensor",
        "rounding": "down",
        "sequential": True,
        "accumulate_gradients": True,
        "selection_order": "most_similar",
        "probability_rule": "min_max",
        "draw_order": "model",
        "draw_precision": "float32",
    },
}
# Settings that stage keys hold only where they change a result: the first keys were without them.
LATER = ("rounding", "draw_order", "draw_precision")

REFERENCE, MASKS, RECORD = "reference", "masks.safetensors", "nlsr.json"


class NLSR(Defense):
    """Transplants safety-critical neurons from an amplified reference into a fine-tuned LoRA.

    A setting whose default is None follows `variant`; giving it a value changes that one
    difference between paper and official code alone.

    Attributes:
        variant: The paper's method or the official code's, which differ (README, "Variants").
        amplification: How the reference is made: "delta" scales B by 1 + beta, "factors" scales
            A and B by 2 alpha each.
        beta: Of "delta".
        alpha: Of "factors".
        method: How neurons are scored.
        sparsity: P_SR, the share of neurons that isn't safety-critical.
        rank_rule: Rank of the projection: "kept" is r (1 - P_SR), "dropped" is
            int(min(W.shape) P_SR).
        topk: Cut per "row" or once per "tensor"; None: per tensor only for the official
            low-rank score.
        rounding: Of "row": "nearest" keeps round(columns (1 - P_SR)), "down" all but
            int(columns P_SR).
        sequential: Whether scores go block by block, later blocks seeing the earlier ones
            projected, or masked where the score isn't the low-rank one; None: the low-rank score
            in both variants, the others in the official one alone.
        accumulate_gradients: Whether SNIP sums |running sum of gradients|, the official code's
            quirk.
        dpo_beta: Of preference-SNIP's loss.
        mask_seed: Of random scores and of draws among tied zeros.
        calibration_rows: How many safe answers of the reference enter the statistics.
        take_available: Whether fewer than `calibration_rows` are accepted.
        calibration_seed: Shuffles the safe answers.
        batch_size: Rows per forward pass.
        selection: Which modules are patched: "adaptive" draws by rank of similarity,
            "threshold" takes S < tau.
        prune_rate: Of "adaptive": the middle of the probabilities to be patched.
        delta: Of "adaptive": their range (2 eps in the official code).
        selection_order: Of "adaptive": which modules are the likeliest to be patched.
        probability_rule: Of "adaptive": "linear" is P_L + delta rank / N, "min_max" the official
            clip.
        draw_order: Of "adaptive": modules are drawn by "name", or as they stand in the "model".
        draw_precision: Of "adaptive": of the probabilities and of the random numbers.
        selection_seed: Of the draw.
        tau: Of "threshold".
    """

    needs_resumed_adapter: ClassVar[bool] = True
    output_form: ClassVar[OutputForm] = "same"

    variant: Literal["paper", "official"] = "paper"

    amplification: Literal["delta", "factors"] | None = None
    beta: float = Field(0.9, ge=0)
    alpha: float = Field(0.9, gt=0)

    method: Literal["low_rank", "wanda", "snip", "preference_snip", "random"] = "low_rank"
    sparsity: float = Field(0.8, ge=0, le=1)
    rank_rule: Literal["kept", "dropped"] | None = None
    topk: Literal["row", "tensor"] | None = None
    rounding: Literal["nearest", "down"] | None = None
    sequential: bool | None = None
    accumulate_gradients: bool | None = None
    dpo_beta: float = Field(0.1, gt=0)
    mask_seed: Seed = 42

    calibration_rows: int = Field(2000, ge=1)
    take_available: bool = False
    calibration_seed: Seed = 42
    batch_size: int = Field(8, ge=1)

    selection: Literal["adaptive", "threshold", "all", "none"] = "adaptive"
    prune_rate: float = Field(0.5, ge=0, le=1)
    delta: float = Field(0.4, ge=0, le=1)
    selection_order: Literal["least_similar", "most_similar"] | None = None
    probability_rule: Literal["linear", "min_max"] | None = None
    draw_order: Literal["name", "model"] | None = None
    draw_precision: Literal["float64", "float32"] | None = None
    selection_seed: Seed = 42
    tau: float = Field(0.6, ge=-1, le=1)

    @property
    def resolved(self) -> dict[str, Any]:
        """The effective value of each setting that follows `variant` when it is None."""
        values = dict(VARIANTS[self.variant])
        if self.method == "low_rank":
            values["sequential"] = True
        else:
            values["topk"] = "row"
        own = {name: getattr(self, name) for name in values}
        return values | {name: value for name, value in own.items() if value is not None}

    @model_serializer(mode="wrap")
    def _in_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The settings as stage keys hold them."""
        values: dict[str, Any] = dump(self)
        values["sequential"] = self.sequential is not False
        for name in LATER:
            del values[name]
            if self.resolved[name] != VARIANTS["paper"][name]:
                values[name] = self.resolved[name]
        return values

    @property
    def scales(self) -> tuple[float, float]:
        """What the reference multiplies lora_A and lora_B by."""
        if self.resolved["amplification"] == "delta":
            return 1.0, 1 + self.beta
        return 2 * self.alpha, 2 * self.alpha

    @property
    def calibration_answers(self) -> tuple[CalibrationAnswers, ...]:
        """The reference answers all prompts; for preference-SNIP the base those that are used."""
        if self.method == "random":
            return ()
        reference = CalibrationAnswers(("prompts",), "reference", f"scales {self.scales}")
        if self.method != "preference_snip":
            return (reference,)
        used = f"{self.scales}, {self.calibration_seed}, {self.take_available}"
        return (reference, CalibrationAnswers(("prompts",), "base", used))

    @property
    def by_gradient(self) -> bool:
        """Whether the score needs gradients, and not forward passes alone."""
        return self.method in ("snip", "preference_snip")

    def prepare_settings(self) -> dict[str, Any]:
        """What the reference and the masks depend on, and nothing that only `apply` reads."""
        settings: dict[str, Any] = {
            "scales": list(self.scales),
            "method": self.method,
            "sparsity": self.sparsity,
            "topk": self.resolved["topk"],
            "mask_seed": self.mask_seed,
        }
        if settings["topk"] == "row" and self.resolved["rounding"] == "down":
            settings["rounding"] = "down"
        if self.method == "random":
            return settings
        names = ["calibration_rows", "take_available", "calibration_seed", "batch_size"]
        settings |= {name: getattr(self, name) for name in names}
        sequential = self.resolved["sequential"]
        if self.method == "low_rank":
            settings |= {"rank_rule": self.resolved["rank_rule"], "sequential": sequential}
        elif sequential:
            settings["sequential"] = sequential
        if self.by_gradient:
            settings["accumulate_gradients"] = self.resolved["accumulate_gradients"]
        if self.method == "preference_snip":
            settings["dpo_beta"] = self.dpo_beta
        return settings

    def check(self, models: Models, attacked: Checkpoint | None) -> None:
        """Refuses models without adapters, attacks that didn't resume it, gradients streamed."""
        aligned = _aligned_adapter(models)
        if attacked is None and self.by_gradient and streaming():
            raise SettingError(
                f"defense.method={self.method} takes gradients, for which all weights must be in "
                "memory; set runtime.stream_weights=false, or defense.method=low_rank or wanda"
            )
        if attacked is not None:
            from defenses.nlsr.reference import check_coordinates

            check_coordinates(aligned, _attacked_adapter(attacked))

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        """Writes the reference adapter, the masks and their record (paper: steps 1 and 2).

        Raises:
            SettingError: The aligned model has no adapter.
            DataError: There are too few safe answers.
        """
        from defenses.nlsr.identify import identify
        from defenses.nlsr.masks import save_masks
        from defenses.nlsr.reference import amplify
        from modeling.loading import load_decoder, load_model

        aligned = _aligned_adapter(models)
        reference = amplify(aligned, out / REFERENCE, *self.scales)
        rows: list[TokenRow] = []
        counts: dict[str, Any] = {}
        model = None
        if self.method != "random":
            checkpoint = replace(models.aligned, adapter=str(reference.folder))
            rows, counts = self._calibrate(checkpoint, calibration)
            model = load_model(checkpoint) if self.by_gradient else load_decoder(checkpoint)
        start = time.perf_counter()
        masks = identify(model, reference, rows, self)
        seconds = time.perf_counter() - start
        save_masks(masks, out / MASKS)
        selected = sum(int(a.sum() + b.sum()) for a, b in masks.values())
        total = sum(a.numel() + b.numel() for a, b in masks.values())
        diagnostics = {
            **counts,
            "modules": len(masks),
            "safety_neurons": selected,
            "density": selected / total,
        }
        record = {
            "settings": self.prepare_settings(),
            "aligned": aligned.fingerprint(),
            "diagnostics": diagnostics,
        }
        (out / RECORD).write_text(json.dumps(record, indent=1))
        return {**diagnostics, "identify_seconds": seconds}

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Writes the patched adapter to `out` (paper: step 3).

        Raises:
            ModelError: The artefact is incomplete.
            SettingError: The attacked adapter isn't the aligned one trained on.
        """
        from defenses.nlsr.patch import similarities, splice
        from defenses.nlsr.reference import check_coordinates
        from modeling.checkpoint import count_parameters
        from modeling.inspection import inspect_model

        reference, masks = _open_artefact(artefact), artefact / MASKS
        victim = _attacked_adapter(attacked)
        cosines = check_coordinates(reference, victim)
        similar = similarities(reference, victim, masks, device_name())
        if self.resolved["draw_order"] == "model":
            model = inspect_model(replace(attacked, adapter=None)).model
            order = [name for name, _ in model.named_modules()]
            similar = {name: similar[name] for name in sorted(similar, key=order.index)}
        probabilities, patched = self._select(list(similar.values()))
        modules = tuple(name for name, take in zip(similar, patched, strict=True) if take)
        count = splice(reference, victim, masks, modules, out)
        defended = replace(attacked, adapter=str(out))
        diagnostics = {
            "parameters_masked": count.masked,
            "coordinate_cosine": cosines,
            "similarity": similar,
            "probability": dict(zip(similar, probabilities, strict=True)),
            "selected": list(modules),
        }
        return Edit(defended, count.changed, count_parameters(attacked), modules, diagnostics)

    def _calibrate(
        self, reference: Checkpoint, calibration: Calibration
    ) -> tuple[list[TokenRow], dict[str, Any]]:
        """Safe greedy answers of the reference, as tokens (README, "Calibration")."""
        prompts = list(calibration.prompts)
        texts = [prompt.text for prompt in prompts]
        answers = calibration.respond(reference, texts)
        safe = calibration.is_safe(texts, answers)
        rated = zip(prompts, answers, safe, strict=True)
        pairs = [(prompt, answer) for prompt, answer, ok in rated if ok]
        random.Random(self.calibration_seed).shuffle(pairs)
        self._require_enough(len(pairs), len(prompts))
        pairs = pairs[: self.calibration_rows]
        texts = [prompt.text for prompt, _ in pairs]
        rows = calibration.encode(reference, texts, [answer for _, answer in pairs])
        if self.method == "preference_snip":
            rows = _with_rejected(rows, reference, calibration, texts)
        used = [prompt.id for prompt, _ in pairs]
        return rows, {"prompts": len(prompts), "safe": sum(safe), "used": used}

    def _require_enough(self, safe: int, prompts: int) -> None:
        if safe >= self.calibration_rows or (safe and self.take_available):
            return
        advice = "or set defense.take_available=true" if safe else "or set defense.method=random"
        raise DataError(
            f"defense.calibration_rows={self.calibration_rows}, but only {safe} of {prompts} "
            f"calibration prompts got a safe answer; give more calibration prompts, {advice}"
        )

    def _select(self, similar: Sequence[float]) -> tuple[list[float], list[bool]]:
        """The probability of each module to be patched, and whether it is."""
        from defenses.nlsr.patch import below, draw, patch_probabilities

        if self.selection == "adaptive":
            names = ("selection_order", "probability_rule", "draw_precision")
            how = (self.resolved[name] for name in names)
            chances = patch_probabilities(similar, self.prune_rate, self.delta, *how)
            return chances.tolist(), draw(chances, self.selection_seed)
        if self.selection == "threshold":
            patched = below(similar, self.tau)
        else:
            patched = [self.selection == "all"] * len(similar)
        return [float(take) for take in patched], patched


def _aligned_adapter(models: Models) -> LoraAdapter:
    from modeling.lora import open_adapter

    if models.aligned.adapter is None:
        raise SettingError(
            "defense=nlsr needs the alignment as a LoRA adapter on the base model, but "
            "model.aligned is a full model; set model.alignment=own to let the align stage train "
            "the adapter, or to a folder that holds one"
        )
    return open_adapter(models.aligned.adapter, "model.aligned")


def _attacked_adapter(attacked: Checkpoint) -> LoraAdapter:
    from modeling.lora import open_adapter

    if attacked.adapter is None:
        raise SettingError(
            "defense=nlsr repairs the aligned model's own adapter as the attack trained it on, "
            "but this attack doesn't resume it; set attack.adapter=resume"
        )
    return open_adapter(attacked.adapter, "the attacked model")


def _open_artefact(artefact: Path) -> LoraAdapter:
    from modeling.lora import open_adapter

    require_files(artefact, "nlsr", REFERENCE, MASKS, RECORD)
    return open_adapter(artefact / REFERENCE, "the reference adapter")


def _with_rejected(
    safe: Sequence[TokenRow],
    reference: Checkpoint,
    calibration: Calibration,
    prompts: Sequence[str],
) -> list[TokenRow]:
    """Follows each safe row with W_0's own answer to that prompt, as the rejected one."""
    base = replace(reference, adapter=None)
    answers = calibration.respond(base, prompts)
    rejected = calibration.encode(reference, prompts, answers)
    return [row for pair in zip(safe, rejected, strict=True) for row in pair]
