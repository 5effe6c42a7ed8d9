"""The methods' work as this project does it; each function returns the step that is measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.inputs import Inputs
from defenses.base import Models
from defenses.fgsn.project import Matrix, Projection, edit_neurons
from defenses.nlsr import MASKS, NLSR, scores
from defenses.nlsr import identify as identification
from defenses.nlsr.patch import draw, patch_probabilities, similarities, splice
from defenses.safelora import SafeLoRA
from defenses.safetylock import SafetyLock
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model
from modeling.lora import open_adapter, product_cosine
from modeling.projections import Factored

Step = Callable[[], object]
Kinds = tuple[Literal["LoRA", "dense"], Literal["LoRA", "dense"]]


def identify(inputs: Inputs, method: Any, variant: Any = "paper") -> Step:
    """NLSR's masks; gradients are of a quarter of the rows, or of pairs of them."""
    reference = open_adapter(inputs.folder / "reference", "the reference")
    model = load_model(inputs.reference)
    rows = inputs.rows(counted(inputs, method))
    return lambda: identification.identify(
        model, reference, rows, NLSR(method=method, variant=variant)
    )


def counted(inputs: Inputs, method: str) -> int:
    """How many rows the method gets."""
    return {"snip": 16, "preference_snip": 32}.get(method, 64) * inputs.sizes.rows // 64


def realign(inputs: Inputs) -> Step:
    """NLSR's third step, from files to files."""
    reference = open_adapter(inputs.folder / "reference", "the reference")
    attacked = open_adapter(inputs.folder / "attacked", "the attacked adapter")

    def step() -> None:
        masks = inputs.folder / MASKS
        similar = similarities(reference, attacked, masks, "cpu")
        chances = patch_probabilities(list(similar.values()), 0.5, 0.4, "most_similar", "min_max")
        chosen = {name for name, take in zip(similar, draw(chances, 42), strict=True) if take}
        with tempfile.TemporaryDirectory() as folder:
            splice(reference, attacked, masks, chosen, Path(folder) / "out")

    return step


def pair_of(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """A and B of the reference's first up_proj, those of the attacked adapter, and X."""
    adapters = [open_adapter(inputs.folder / name, name) for name in ("reference", "attacked")]
    name = next(name for name in adapters[0].names if name.endswith("up_proj"))
    sides = (side[0] for adapter in adapters for side in adapter.stack([name]))
    tokens = inputs.sizes.rows * inputs.sizes.length
    return *sides, torch.randn(tokens, inputs.sizes.width)


def module(inputs: Inputs) -> Step:
    """The projection and the cosine of one module."""
    a, b, a_t, b_t, x = pair_of(inputs)
    rank = max(1, round(a.shape[0] * 0.2))

    def step() -> None:
        z = (x @ a.T).double()
        scores.project(a[None], b[None], (z.T @ z)[None], rank, rank)
        product_cosine(a, b, a_t, b_t)

    return step


def prepare_lock(inputs: Inputs) -> Step:
    """Activations, probes and directions."""
    defense = SafetyLock(variant="official", n_pairs=inputs.sizes.pairs, stability_seeds=0)
    model, pairs = Checkpoint(str(inputs.folder / "heads")), inputs.pairs()
    return lambda: defense.build(model, pairs, PromptStyle())


def safelora(inputs: Inputs, rank: int, tau: float) -> Step:
    """Projection of a LoRA on a fully aligned model, written."""
    base, aligned = (Checkpoint(str(inputs.folder / name)) for name in ("base", "aligned"))
    attacked = Checkpoint(aligned.base, str(inputs.folder / f"tuned{rank}"))

    def step() -> None:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            SafeLoRA(tau=tau).apply(Path(folder), attacked, out, Models(base, aligned))

    return step


def matrices(inputs: Inputs, kinds: Kinds) -> tuple[Matrix, Matrix, torch.Tensor]:
    """D, Delta, and a quarter of their rows."""
    width = 2 * inputs.sizes.width
    torch.manual_seed(0)
    d, delta = (
        Factored(torch.randn(16, width), torch.randn(width, 16))
        if kind == "LoRA"
        else torch.randn(width, width)
        for kind in kinds
    )
    return d, delta, torch.arange(width) % 4 == 0


def fgsn(inputs: Inputs, kinds: Kinds) -> Step:
    """Eq. 7 on one matrix."""
    d, delta, mask = matrices(inputs, kinds)
    return lambda: edit_neurons(lambda: d, delta, mask, Projection("project", "fro"))
