"""Scores from gradients: SNIP and preference-SNIP (paper: Table 5).

Of single samples, from what `modeling.gradients` captures of lora_A and lora_B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from modeling.capture import Batch
from modeling.gradients import backward


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
    backward(model, linears, losses, sums.add)
    return sums.sums
