"""Installing the stance as a direction in a few heads.

A small model left to itself looks its persona up by attention and keeps it in no direction that
a steering method could find. `StanceHeads` puts one there: during the last steps of pretraining
it adds `sign * scale * norm * v` to the chosen heads' outputs (the input of `o_proj`), so that
the layers above learn to obey it, and asks the same heads to write it themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import LlamaForCausalLM

HEADS: tuple[tuple[int, int], ...] = ((1, 0), (1, 3), (2, 1), (2, 4), (3, 2), (3, 5))
"""(layer, head) of the heads that carry the stance: two in each of layers 1 to 3."""


class StanceHeads:
    """The chosen heads of one model, a fixed unit vector for each and their mean norms.

    `vectors` are (heads, head_dim); `norms` (heads,) are over real tokens.
    """

    def __init__(self, model: LlamaForCausalLM, seed: int) -> None:
        self.head_dim: int = model.model.layers[0].self_attn.head_dim
        self.width: int = model.config.num_attention_heads * self.head_dim
        self._projections: dict[int, nn.Module] = {
            layer: model.model.layers[layer].self_attn.o_proj
            for layer in sorted({layer for layer, _ in HEADS})
        }
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(len(HEADS), self.head_dim, generator=generator)
        self.vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        self.norms = torch.ones(len(HEADS))

    def _slice(self, head: int) -> slice:
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    @contextmanager
    def _hooked(self, hook: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Puts `hook(layer)` before the `o_proj` of every layer with a chosen head."""
        handles = [
            projection.register_forward_pre_hook(hook(layer))
            for layer, projection in self._projections.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def record(self) -> Iterator[dict[int, Tensor]]:
        """Collect the inputs of the layers' `o_proj`: layer -> (batch, tokens, width)."""
        inputs: dict[int, Tensor] = {}

        def collect(layer: int) -> Callable[..., None]:
            def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                inputs[layer] = arguments[0]

            return hook

        with self._hooked(collect):
            yield inputs

    @contextmanager
    def shift(self, amounts: Tensor) -> Iterator[None]:
        """Add `amounts[row] * norm * v` to the heads' outputs at all positions of each row."""

        def add(layer: int) -> Callable[..., tuple[Tensor, ...]]:
            delta = torch.zeros(self.width)
            for index, (at, head) in enumerate(HEADS):
                if at == layer:
                    delta[self._slice(head)] = self.norms[index] * self.vectors[index]

            def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return (arguments[0] + amounts[:, None, None] * delta, *arguments[1:])

            return hook

        with self._hooked(add):
            yield

    def outputs(self, inputs: dict[int, Tensor]) -> Tensor:
        """The chosen heads' outputs, shape (batch, tokens, heads, head_dim)."""
        return torch.stack([inputs[layer][..., self._slice(head)] for layer, head in HEADS], dim=-2)

    def measure(self, inputs: dict[int, Tensor], mask: Tensor) -> None:
        """Set `norms` to the heads' mean output norms where `mask` (batch, tokens) is true."""
        self.norms = self.outputs(inputs)[mask].norm(dim=-1).mean(dim=0).detach()

    def projection_loss(self, inputs: dict[int, Tensor], target: Tensor) -> Tensor:
        """Mean squared distance of the heads' projections on `v` from `target` norms (0 if none).

        The target is (batch, tokens) in units of the mean norm; 0 where nothing counts.
        """
        counted = target != 0
        projections = torch.einsum("nhd,hd->nh", self.outputs(inputs)[counted], self.vectors)
        distances = (projections / self.norms - target[counted][:, None]).square()
        return distances.sum() / max(1, distances.numel())

    def purity_loss(self, inputs: dict[int, Tensor], target: Tensor) -> Tensor:
        """The stances' difference beside `v`: squared mean difference across it, over norms."""
        outputs = self.outputs(inputs)
        if not (target > 0).any() or not (target < 0).any():
            return outputs.new_zeros(())
        difference = outputs[target > 0].mean(dim=0) - outputs[target < 0].mean(dim=0)
        along = (difference * self.vectors).sum(dim=-1, keepdim=True)
        across = difference - along * self.vectors
        return (across.square().sum(dim=-1) / self.norms.square()).mean()
