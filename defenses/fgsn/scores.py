"""Wanda scores of FGSN's neurons on each set of prompts, and the masks cut from them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from defenses.fgsn.artefact import BENIGN
from defenses.fgsn.neurons import neuron_scores, safety_mask
from defenses.fgsn.plan import EditPlan
from modeling.capture import TokenRow
from modeling.checkpoint import Checkpoint
from modeling.deltas import fine_tuning
from modeling.importance import input_norms, wanda_scores
from modeling.pairing import Factored
from modeling.projections import read_weight


class NeuronScores:
    """The scores of one model's neurons, a layer at a time.

    Args:
        aligned: The aligned model.
        scored: The model whose inputs are counted.
        plan: What is scored, and where.
        prompts: Token rows by dimension, and of the benign prompts (`BENIGN`).
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
