"""FGSN on the tiny models: its prompts, its settings, and how its results are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.rows import Prompt
from defenses.base import Edit, Models
from defenses.fgsn import FGSN
from defenses.fgsn.union import Union, load_union
from modeling.checkpoint import Checkpoint
from modeling.projections import projections, read_weight
from tests.defenses.tiny_lora_models import NumberCalibration, number_prompts

CATEGORIES = ("theft", "fraud", "malware")


@dataclass
class PromptCalibration(NumberCalibration):
    """Harmful prompts of three categories, and benign ones."""

    safety_prompts: Sequence[Prompt] = ()
    utility_prompts: Sequence[Prompt] = ()


def prompt_calibration() -> PromptCalibration:
    prompts = number_prompts(24)
    harmful = [replace(p, category=CATEGORIES[at % 3]) for at, p in enumerate(prompts[:15])]
    return PromptCalibration((), safety_prompts=harmful, utility_prompts=prompts[15:])


def fgsn(**changes: Any) -> FGSN:
    values: dict[str, Any] = {"layers": [1, 2], "n_pairs": 20, "batch_size": 4}
    return FGSN.validated({**values, **changes}, "defense")


def repair(artefact: Path, attacked: Checkpoint, out: Path, models: Models, **changes: Any) -> Edit:
    return fgsn(**changes).apply(artefact, attacked, out, models)


def weights_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: read_weight(checkpoint, name) for name in projections(checkpoint)}


def union_of(edit: Edit, models: Models, granularity: str = "row") -> Union:
    model = edit.defended
    shapes = projections(models.aligned)
    return load_union(str(model.adapter or model.base), None, granularity, shapes)[0]


def same_weights(one: Checkpoint, two: Checkpoint) -> bool:
    left, right = weights_of(one), weights_of(two)
    return all(torch.equal(left[name], right[name]) for name in left)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


def safety_matrix(models: Models, name: str) -> Tensor:
    """C = D D^T / ||D||_F, formed."""
    d = read_weight(models.aligned, name).double() - read_weight(models.base, name).double()
    return d @ d.mT / d.norm()
