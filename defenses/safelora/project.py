"""The projection of a fine-tuning onto the alignment, and which modules get it (Safe LoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from defenses.base import Models
from modeling.checkpoint import Checkpoint
from modeling.deltas import alignment, frobenius, safety_times
from modeling.lora import product_cosine
from modeling.projections import Factored, open_pairing
from settings import SettingError

# Rows of a dense difference that are held in float64 at a time.
_ROWS = 1024


@dataclass(frozen=True, slots=True)
class ProjectionFit:
    """How a module's fine-tuning lies to its alignment; None where alignment left the module alone.

    Attributes:
        cosine: Of C Delta and Delta.
        norm_ratio: ||C Delta|| / ||Delta||.
    """

    cosine: float | None
    norm_ratio: float | None


def project(d: Factored | Tensor, delta: Factored | Tensor) -> Factored | Tensor:
    """C Delta with C = D D^T / ||D||_F (Safe LoRA's projection), C never formed.

    D = W_aligned - W_base isn't zero; of a factored Delta = W_attacked - W_aligned only b changes.
    """
    norm = frobenius(d)
    if isinstance(delta, Factored):
        return Factored(delta.a, safety_times(d, delta.b) / norm)
    return safety_times(d, delta) / norm


def cosine(projected: Factored | Tensor, delta: Factored | Tensor) -> float:
    """Cosine of C Delta and Delta as vectors, from thin factors where there are any.

    <C Delta, Delta> = ||D^T Delta||^2 / ||D||, so that it is never below zero.
    """
    if isinstance(delta, Factored) and isinstance(projected, Factored):
        return float(product_cosine(projected.a, projected.b, delta.a, delta.b))
    if isinstance(delta, Tensor) and isinstance(projected, Tensor):
        pairs = zip(projected.split(_ROWS), delta.split(_ROWS), strict=True)
        inner = sum(float((p.double() * q.double()).sum()) for p, q in pairs)
        norms = frobenius(projected) * frobenius(delta)
        return min(max(inner / norms, -1.0), 1.0) if norms else 0.0
    raise TypeError("a projection has the form of what it projects")


def measure(models: Models, attacked: Checkpoint, device: str) -> dict[str, ProjectionFit]:
    """The cosine of every fine-tuned module, in the model's order.

    Raises:
        SettingError: Alignment changed none of them.
    """
    fits: dict[str, ProjectionFit] = {}
    pairing = open_pairing(models.aligned, attacked)
    for name in pairing.touched:
        delta = pairing.delta(name, device)
        size = frobenius(delta)
        if size == 0:
            continue
        d = alignment(models, name, device)
        if frobenius(d) == 0:
            fits[name] = ProjectionFit(None, None)
            continue
        projected = project(d, delta)
        fits[name] = ProjectionFit(cosine(projected, delta), frobenius(projected) / size)
    if fits and all(fit.cosine is None for fit in fits.values()):
        raise SettingError(
            "defense=safelora projects onto what alignment changed, but alignment changed none of "
            "the fine-tuned modules; set model.base to the model before its alignment"
        )
    return fits


def choose(
    cosines: Mapping[str, float | None],
    mode: Literal["threshold", "number"],
    tau: float,
    number: int,
) -> frozenset[str]:
    """The modules to project: cosine <= tau, or the lowest, the first module first among equals."""
    values = {name: value for name, value in cosines.items() if value is not None}
    if mode == "threshold":
        return frozenset(name for name, value in values.items() if value <= tau)
    return frozenset(sorted(values, key=lambda name: values[name])[:number])
