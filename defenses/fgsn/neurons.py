"""Which neurons carry safety (paper: fine-grained safety neurons): Wanda scores and masks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from defenses.fgsn.artefact import BENIGN
from defenses.fgsn.plan import EditPlan
from modeling.capture import TokenRow
from modeling.checkpoint import Checkpoint
from modeling.deltas import fine_tuning
from modeling.importance import input_norms, top_share, wanda_scores
from modeling.projections import Factored, read_weight

Scope = Literal["tensor", "row", "layer"]

ROWS = 1024  # Rows whose absolute values are held at a time.


def neuron_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """I_i = sum_j |W_ij| ||X_j||_2: the Wanda scores of an output row, summed.

    Of W (d_out, d_in) and norms on each of k sets of prompts (d_in, k): (d_out, k) float32.
    """
    norms = norms.to(weight)
    return torch.cat([part.abs() @ norms for part in weight.split(ROWS)])


def top(scores: Mapping[str, Tensor], share: float, scope: Scope) -> dict[str, Tensor]:
    """Top_share of the scores of one layer, {projection: (d_out,) or (d_out, d_in)}, as bool masks.

    It is a share of each "tensor", of each "row" of a tensor, or of the "layer" as a whole.
    """
    if scope != "layer":
        return {name: top_share(score, share, scope) for name, score in scores.items()}
    flat = top_share(torch.cat([score.flatten() for score in scores.values()]), share, "tensor")
    parts = flat.split([score.numel() for score in scores.values()])
    return {
        name: part.reshape(score.shape)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def safety_mask(
    harmful: Mapping[str, Tensor], benign: Mapping[str, Tensor], q: float, p: float, scope: Scope
) -> dict[str, Tensor]:
    """Mask_l = TopQ(scores on harmful prompts) minus TopP(scores on benign prompts)."""
    general = top(benign, p, scope)
    return {name: mask & ~general[name] for name, mask in top(harmful, q, scope).items()}


def find_q(share: Callable[[float], float], target: float, tolerance: float = 1e-4) -> float:
    """The q whose realised share is nearest to `target`, by bisection; `share` rises with q."""
    low, high = 0.0, 1.0
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < target else (low, middle)
    return min((high, low), key=lambda q: abs(share(q) - target))


class NeuronScores:
    """The scores of one model's neurons, a layer at a time.

    `scored` is the model whose inputs are counted; `prompts` are token rows by dimension, and of
    the benign prompts (`BENIGN`).
    """

    def __init__(
        self,
        aligned: Checkpoint,
        scored: Checkpoint,
        plan: EditPlan,
        prompts: Mapping[str, Sequence[TokenRow]],
    ) -> None:
        names = [name for members in plan.layers.values() for name in members]
        self._aligned, self._scored, self._plan = aligned, scored, plan
        self._norms = {
            key: input_norms(scored, rows, plan.settings.batch_size, plan.settings.tokens, names)
            for key, rows in prompts.items()
        }
        self._rows: dict[tuple[int, str], dict[str, Tensor]] = {}

    def masks(self, key: str, q: float) -> Iterator[tuple[str, Tensor]]:
        """M_t of one dimension, projection by projection."""
        plan = self._plan
        for layer in plan.layers:
            harmful, benign = (self._layer(layer, each) for each in (key, BENIGN))
            yield from safety_mask(harmful, benign, q, plan.settings.p, plan.settings.scope).items()

    def _layer(self, layer: int, key: str) -> dict[str, Tensor]:
        """Scores of one layer; rows' are few and kept, weights' are computed each time."""
        names = self._plan.layers[layer]
        if self._plan.settings.granularity == "weight":
            norms = self._norms[key]
            return {name: wanda_scores(self._weight(name), norms[name]) for name in names}
        if (layer, key) not in self._rows:
            keys = list(self._norms)
            for each in keys:
                self._rows[layer, each] = {}
            for name in names:
                norms_of_all = torch.stack([self._norms[each][name] for each in keys], 1)
                scores = neuron_scores(self._weight(name), norms_of_all)
                for each, column in zip(keys, scores.unbind(1), strict=True):
                    self._rows[layer, each][name] = column
        return self._rows[layer, key]

    def _weight(self, name: str) -> Tensor:
        settings = self._plan.settings
        if settings.weight == "random":
            seed = settings.weight_seed + zlib.crc32(name.encode())
            generator = torch.Generator().manual_seed(seed)
            return torch.rand(self._plan.shapes[name], generator=generator)
        if settings.weight == "aligned":
            return read_weight(self._aligned, name)
        if settings.weight == "merged":
            return read_weight(self._scored, name)
        delta = fine_tuning(self._aligned, self._scored, name, "cpu")
        return delta.rows(slice(None)) if isinstance(delta, Factored) else delta
