"""SafetyLock: steer the heads that carry safety (Zhu et al., arXiv 2410.10343).

What is computed where: README.md in this folder.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from data.rows import PreferencePair
from defenses.artefacts import ROWS, read_rows, write_rows
from defenses.base import Calibration, Defense, Edit, Models, OutputForm
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from settings import Seed, SettingError

if TYPE_CHECKING:
    from torch import Tensor

    from defenses.safetylock.lock import Lock
    from modeling.capture import TokenRow
    from modeling.heads import HeadLayout

# What the two variants differ in, under the names of the settings that override one each.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {
        "answer_end": "content",
        "split": "pairs",
        "score": "validation",
        "precision": "float32",
        "empty_system": False,
    },
    "official": {
        "answer_end": "legacy_slice",
        "split": "tokens",
        "score": "train_validation_mean",
        "precision": "float16",
        "empty_system": True,
    },
}

LOCK = "lock"
# The paper's K = 24 at Llama-3-8B's 32 layers of 32 heads.
PAPER_SHARE = 24 / 1024


class SafetyLock(Defense):
    """Adds the aligned model's safety direction to the output of the heads that carry it.

    A setting whose default is None follows `variant`; giving it a value changes that one
    difference between this project's form and the official code's alone.

    Attributes:
        variant: This project's form of the method, or the official code's (README, "Variants").
        n_pairs: N, how many pairs of a safe and an unsafe answer.
        last_tokens: r, how many tokens of each answer.
        answer_end: Where an answer ends: its last "content" token, or five ids before the end of
            the rendered dialogue ("legacy_slice").
        system: A system line for the pairs, or None for the prompt style's own; "" is an empty
            system turn.
        empty_system: Whether a missing system line is an empty system turn.
        seed: Draws the pairs and splits them.
        split: What the probes' validation split draws: "pairs" or single "tokens".
        validation_share: Of the pairs or tokens that validate.
        score: What chooses the heads: "validation" accuracy, "train_validation_mean" of both
            accuracies, or validation "log_loss".
        probe_c: Inverse strength of the probes' L2 penalty.
        precision: Of head outputs, means, standard deviations and alpha sigma u.
        stability_seeds: Further splits, which tell how stable the choice of heads is.
        batch_size: Rows per forward pass.
        k: K, how many heads.
        k_share: K as a share of all heads, where `k` is None; None: the paper's, 24 of 1,024.
        alpha: Strength in standard deviations; below zero unlocks.
        positions: Which are steered: "all" (the only one that can be baked), the "last_token" of
            each forward step, or the "generated" tokens alone.
        form: "baked" writes a plain model with biases, "hooked" steers while running; None:
            baked where `positions` allows it.
        direction_cosines: Whether `apply` measures how far the attack has turned the directions;
            a `lock` that came without its token rows leaves that out.
        lock: Folder of a lock that is there and takes the place of one made here, prepared or
            published; of a published one all heads count, whatever `k` is. None: one is made.
    """

    prepare_version: ClassVar[int] = 2
    apply_version: ClassVar[int] = 2

    variant: Literal["default", "official"] = "default"

    n_pairs: int = Field(100, ge=2)
    last_tokens: int = Field(5, ge=1)
    answer_end: Literal["content", "legacy_slice"] | None = None
    system: str | None = None
    empty_system: bool | None = None
    seed: Seed = 42

    split: Literal["pairs", "tokens"] | None = None
    validation_share: float = Field(0.4, gt=0, lt=1)
    score: Literal["validation", "train_validation_mean", "log_loss"] | None = None
    probe_c: float = Field(1.0, gt=0)
    precision: Literal["float64", "float32", "float16"] | None = None
    stability_seeds: int = Field(4, ge=0)
    batch_size: int = Field(16, ge=1)

    k: int | None = Field(None, ge=1)
    k_share: float | None = Field(None, gt=0, le=1)
    alpha: float = 6.0
    positions: Literal["all", "last_token", "generated"] = "all"
    form: Literal["baked", "hooked"] | None = None
    direction_cosines: bool = True
    lock: str | None = None

    @model_serializer(mode="wrap")
    def _with_content(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The stage store knows a lock by its content; one that is made here by the settings."""
        settings: dict[str, Any] = written(self)
        if settings.pop("lock", None) is not None:
            settings["lock"] = f"{self.lock}@{self._fingerprint}"
        return settings

    @model_validator(mode="after")
    def _is_consistent(self) -> SafetyLock:
        if self.k is not None and self.k_share is not None:
            raise ValueError("defense.k and defense.k_share say both how many; set one to null")
        if self.form == "baked" and self.positions != "all":
            raise ValueError(
                f"defense.form=baked steers every position, so it can't be had with "
                f"defense.positions={self.positions}; set defense.form=hooked or "
                "defense.positions=all"
            )
        if round(self.validation_share * self.n_pairs) in (0, self.n_pairs):
            raise ValueError(
                f"defense.validation_share={self.validation_share} leaves no pair of "
                f"{self.n_pairs} to fit or to validate on; set it nearer to 0.4"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Pairs, to make a lock of."""
        return frozenset({"safety_pairs"} if self.lock is None else ())

    @property
    def _fingerprint(self) -> str:
        from defenses.safetylock.lock import find_lock
        from modeling.checkpoint import fingerprint_folder

        return fingerprint_folder(find_lock(self.lock or "", "defense.lock"))

    @property
    def resolved(self) -> dict[str, Any]:
        """The effective value of each setting that follows `variant` when it is None."""
        own = {name: getattr(self, name) for name in VARIANTS[self.variant]}
        return VARIANTS[self.variant] | {k: v for k, v in own.items() if v is not None}

    @property
    def baked(self) -> bool:
        """Whether the defended model is written down as a plain model."""
        return self.form == "baked" or (self.form is None and self.positions == "all")

    @property
    def output_form(self) -> OutputForm:
        """Full weights with the lock's biases, or hooks."""
        return "weights" if self.baked else "hooks"

    def prepare_settings(self) -> dict[str, Any]:
        """What the lock depends on: neither K, alpha, positions nor form."""
        if self.lock is not None:
            return {"lock": self._fingerprint}
        names = (
            "n_pairs", "last_tokens", "system", "seed", "validation_share", "probe_c",
            "stability_seeds", "batch_size",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | self.resolved

    def heads(self, layout: HeadLayout) -> int:
        """K for a model of this shape; SettingError where it has fewer heads."""
        total = layout.layers * layout.heads
        k = self.k or max(1, round((self.k_share or PAPER_SHARE) * total))
        if k > total:
            raise SettingError(
                f"defense.k={k} is more than the model's {total} heads; lower it, or set "
                "defense.k=null for the paper's share, 24 of 1,024"
            )
        return k

    def check(self, models: Models, attacked: Checkpoint | None) -> None:
        """Refuses models that lack the usual heads, or `k` of them, or that can't be exported."""
        from modeling.export import check_exportable
        from modeling.heads import head_layout

        if self.lock is None:
            self.heads(head_layout(models.aligned))
        else:
            self._chosen(self._given(models.aligned))
        if self.baked:
            check_exportable(models.aligned, "model.base")

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        """Writes the lock (Meta-SafetyLock), made from the aligned model alone, or a given one."""
        if self.lock is not None:
            lock = self._given(models.aligned)
            lock.save(out / LOCK)
            return {"lock": self.lock, "origin": lock.origin}
        lock, rows, report = self.build(models.aligned, calibration.safety_pairs, calibration.style)
        lock.save(out / LOCK)
        write_rows(out, rows)
        return report

    def _given(self, aligned: Checkpoint) -> Lock:
        from defenses.safetylock.lock import find_lock, load_lock

        lock = load_lock(find_lock(self.lock or "", "defense.lock"), "defense.lock")
        lock.check_origin(aligned, f"defense.lock={self.lock!r}")
        return lock

    def _chosen(self, lock: Lock) -> list[tuple[int, int]]:
        """The K heads; of a published lock, which doesn't rank them, all that it holds."""
        whole = lock.k if lock.accuracy is None else None
        return lock.heads(whole or self.heads(lock.layout))

    def build(
        self, aligned: Checkpoint, pairs: Sequence[PreferencePair], style: PromptStyle
    ) -> tuple[Lock, list[TokenRow], dict[str, Any]]:
        """Takes the lock from the aligned model, K and alpha left open.

        Returns:
            The lock, the token rows that it was taken from, and diagnostics.
        """
        import torch

        from data.local import hash_rows
        from defenses.safetylock.activations import encode_pairs, head_outputs
        from defenses.safetylock.directions import mass_mean, scores, split
        from defenses.safetylock.lock import Lock
        from modeling.checkpoint import identify
        from modeling.heads import head_layout
        from modeling.loading import load_decoder, load_tokenizer

        resolved, layout = self.resolved, head_layout(aligned)
        tokenizer, system = load_tokenizer(aligned), self.system
        if system is None and style.system is None and resolved["empty_system"]:
            system = ""
        encoded = encode_pairs(
            pairs,
            tokenizer,
            style,
            count=self.n_pairs,
            last_tokens=self.last_tokens,
            answer_end=resolved["answer_end"],
            system=system,
            seed=self.seed,
        )
        model = load_decoder(aligned)
        start = time.perf_counter()
        outputs = head_outputs(model, layout, encoded.rows, self.last_tokens, self.batch_size)
        outputs = outputs.to(getattr(torch, resolved["precision"]))
        captured = time.perf_counter()
        del model
        seeds = [self.seed + step for step in range(1 + self.stability_seeds)]
        shape, share = (len(encoded.rows), self.last_tokens), self.validation_share
        splits = [split(*shape, share, resolved["split"], seed) for seed in seeds]
        scored = [scores(outputs, held_out, resolved["score"], self.probe_c) for held_out in splits]
        probed = time.perf_counter()
        lock = Lock(
            directions=mass_mean(outputs, resolved["precision"]),
            scores=torch.stack([score for score, _ in scored]),
            accuracy=scored[0][1],
            layout=layout,
            origin={**identify(aligned), "chat_template": style.template_hash(tokenizer)},
            settings={**self.prepare_settings(), "pairs": hash_rows(encoded.pairs)},
        )
        report = {
            "pairs": len(pairs),
            "pairs_used": len(encoded.pairs),
            "pairs_too_short": encoded.too_short,
            "capture_seconds": captured - start,
            "probe_seconds": probed - captured,
            "probe_accuracy": scored[0][1].tolist(),
        }
        return lock, encoded.rows, report

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        """Writes the locked model to `out`: a plain model folder, or what a hook needs.

        Raises:
            ModelError: The lock is damaged or of another model, or the export isn't the hooked
                model.
        """
        from defenses.safetylock.lock import load_lock, lock_model

        lock = load_lock(artefact / LOCK, "the artefact's lock")
        heads = self._chosen(lock)
        edit = lock_model(lock, attacked, heads, self.alpha, self.positions, self.baked, out)
        start = time.perf_counter()
        stability = lock.stability(len(heads))
        described = lock.describe(heads)
        for entry, frequency in zip(described, stability.pop("frequency"), strict=True):
            entry["frequency"] = frequency
        if self.direction_cosines and (artefact / ROWS).is_file():
            cosines = self._cosines(lock, attacked, read_rows(artefact))
            for entry, value in zip(described, cosines, strict=True):
                entry["cosine"] = value
        diagnostics = {
            **edit.diagnostics,
            "heads": described,
            "stability": stability,
            "maps": [] if lock.accuracy is None else [_accuracy_map(lock.accuracy, heads)],
        }
        seconds = time.perf_counter() - start
        return replace(edit, diagnostics=diagnostics, diagnostic_seconds=seconds)

    def _cosines(self, lock: Lock, attacked: Checkpoint, rows: Sequence[TokenRow]) -> list[float]:
        """Cosine of each chosen head's direction in the aligned and in the attacked model."""
        from defenses.safetylock.activations import head_outputs
        from defenses.safetylock.directions import mass_mean
        from modeling.loading import load_decoder

        model = load_decoder(attacked)
        outputs = head_outputs(model, lock.layout, rows, self.last_tokens, self.batch_size)
        turned = mass_mean(outputs, self.resolved["precision"]).u
        heads = self._chosen(lock)
        return [float(lock.directions.u[head] @ turned[head]) for head in heads]


def _accuracy_map(accuracy: Tensor, heads: Sequence[tuple[int, int]]) -> dict[str, Any]:
    return {
        "name": "probe_accuracy",
        "title": "Validation accuracy of the heads' probes; outlined: the heads of the lock",
        "rows": "layer",
        "columns": "head",
        "unit": "%",
        "values": (100 * accuracy).tolist(),
        "marked": [list(head) for head in heads],
    }
