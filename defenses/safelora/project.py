"""The projection of a fine-tuning onto the alignment, and which modules get it (Safe LoRA)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from torch import Tensor

from defenses.base import Models
from modeling.deltas import alignment, frobenius, inner, safety_times
from modeling.projections import Factored, Pairing
from settings import SettingError


@dataclass(frozen=True, slots=True)
class ProjectionFit:
    """How a module's fine-tuning lies to its alignment; None where alignment left the module alone.

    Attributes:
        cosine: Of C Delta and Delta.
        norm_ratio: ||C Delta|| / ||Delta||.
    """

    cosine: float | None
    norm_ratio: float | None


def project(d: Factored | Tensor, delta: Factored | Tensor, norm: float) -> Factored | Tensor:
    """C Delta with C = D D^T / ||D||_F (Safe LoRA's projection), C never formed.

    D = W_aligned - W_base has that norm; of a factored Delta = W_attacked - W_aligned only b
    changes.
    """
    if isinstance(delta, Factored):
        return Factored(delta.a, safety_times(d, delta.b).div_(norm))
    return safety_times(d, delta).div_(norm)


def compare(projected: Factored | Tensor, delta: Factored | Tensor, size: float) -> ProjectionFit:
    """How C Delta lies to Delta, whose norm `size` isn't zero, in float64.

    <C Delta, Delta> = ||D^T Delta||^2 / ||D||, so that the cosine is never below zero.
    """
    if isinstance(delta, Factored) and isinstance(projected, Factored):
        a, p, b = delta.a.double(), projected.b.double(), delta.b.double()
        outer = a @ a.mT
        product, square = (float(((p.mT @ side) * outer).sum()) for side in (b, p))
    elif isinstance(delta, Tensor) and isinstance(projected, Tensor):
        product, square = inner(projected, delta), inner(projected, projected)
    else:
        raise TypeError("a projection has the form of what it projects")
    norm = math.sqrt(max(square, 0.0))
    cosine = min(max(product / (norm * size), -1.0), 1.0) if norm else 0.0
    return ProjectionFit(cosine, norm / size)


def fit_projection(
    models: Models, name: str, delta: Factored | Tensor, device: str
) -> tuple[ProjectionFit | None, Factored | Tensor | None]:
    """How C Delta of a module lies to Delta, and C Delta; None where there is no such thing."""
    size = frobenius(delta)
    if size == 0:
        return None, None
    d = alignment(models, name, device)
    norm = frobenius(d)
    if norm == 0:
        return ProjectionFit(None, None), None
    projected = project(d, delta, norm)
    return compare(projected, delta, size), projected


def measure(models: Models, pairing: Pairing, device: str) -> dict[str, ProjectionFit]:
    """The fit of every fine-tuned module, in the model's order."""
    fits = (
        (name, fit_projection(models, name, pairing.delta(name, device), device)[0])
        for name in pairing.touched
    )
    return {name: fit for name, fit in fits if fit is not None}


def require_alignment(models: Models, pairing: Pairing, device: str) -> None:
    """Refuses, with a SettingError, an alignment that changed no fine-tuned module."""
    tuned = (name for name in pairing.touched if frobenius(pairing.delta(name, device)) > 0)
    first = next(tuned, None)
    if first is not None and not any(
        frobenius(alignment(models, name, device)) for name in chain([first], tuned)
    ):
        raise SettingError(
            "defense=safelora projects onto what alignment changed, but alignment changed none of "
            "the fine-tuned modules; set model.base to the model before its alignment"
        )


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
