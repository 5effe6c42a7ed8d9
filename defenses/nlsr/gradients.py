"""Scores from gradients: SNIP and preference-SNIP (paper: Table 5).

Gradients of single rows come from the forward inputs and backward outputs of lora_A and lora_B,
a whole batch at a time, so that a batch costs one backward pass and not one per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from modeling.capture import Batch


@dataclass(slots=True)
class GradientSums:
    """Per weight, the sum over samples of |gradient|, kept in float32.

    Attributes:
        accumulate: The official code's quirk: gradients aren't zeroed between samples, so that
            what is summed is |running sum of the gradients so far|.
        rows_per_sample: 1, or 2 where a sample is a pair of neighbouring rows.
    """

    accumulate: bool
    rows_per_sample: int = 1
    sums: dict[str, Tensor] = field(default_factory=dict)
    running: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, x: Tensor, grad: Tensor) -> None:
        """Adds a batch: W's inputs (rows, length, in) and output gradients (rows, length, out)."""
        samples = x.shape[0] // self.rows_per_sample
        x, grad = (t.float().reshape(samples, -1, t.shape[-1]) for t in (x, grad))
        gradients = grad.mT @ x
        if self.accumulate:
            gradients = gradients.cumsum(0)
            if name in self.running:
                gradients += self.running[name]
            self.running[name] = gradients[-1].clone()
        total = gradients.abs().sum(0)
        self.sums[name] = self.sums[name].add_(total) if name in self.sums else total


def log_likelihoods(model: Any, batch: Batch) -> Tensor:
    """The log-likelihood of each row's answer given its prompt, (rows,)."""
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1].float()
    token = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return (token * batch.answers[:, 1:]).sum(1)


def snip_loss(likelihoods: Tensor, batch: Batch) -> Tensor:
    """The sum over rows of their answers' mean negative log-likelihoods."""
    return -(likelihoods / batch.answers.sum(1)).sum()


def preference_loss(likelihoods: Tensor, reference: Tensor, beta: float) -> Tensor:
    """The sum over pairs of DPO's -log sigmoid(beta (chosen's - rejected's log-ratio)).

    Rows alternate between chosen and rejected; `reference` are those of the DPO reference.
    """
    ratios = (likelihoods - reference).reshape(-1, 2)
    return -logsigmoid(beta * (ratios[:, 0] - ratios[:, 1])).sum()


def sum_gradients(
    model: Any, linears: Mapping[str, nn.Module], losses: Iterable[Tensor], sums: GradientSums
) -> dict[str, Tensor]:
    """Sums |g| over samples, g the gradient of a sample's loss by each of the `linears`.

    Of each it is (out, in); the SNIP score is |W| times this.  The losses are of one batch each,
    summed over its samples, and are computed while this asks for them.
    """
    with (
        torch.enable_grad(),
        _differentiable_inputs(model),
        _captured_gradients(linears, sums.add),
    ):
        for loss in losses:
            loss.backward()
    return sums.sums


@contextmanager
def _differentiable_inputs(model: Any) -> Iterator[None]:
    """Lets gradients flow from the embeddings on, while no weight gets one of its own."""
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _captured_gradients(
    linears: Mapping[str, nn.Module], consume: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def watch(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()
            if output.requires_grad:
                output.register_hook(lambda grad: consume(name, x, grad))

        return watch

    handles = [module.register_forward_hook(hook(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
