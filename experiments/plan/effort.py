"""Seconds of the stages, by arithmetic: an estimate with its assumptions named.

A pass over T tokens of rows of lengths t takes the longest of three times:
  arithmetic: 2 N T for the matrices (N the scalars that a token is multiplied with; Kaplan et al.
    2020, arXiv 2001.08361, section 2.1) and 2 L q t^2 for each row's causal attention, over the
    sustained rate. A backward pass costs the same again for the gradient of the activations, and
    once more for that of the weights where these are trained: 6 N T for full weights, 4 N T for a
    LoRA, of whose own scalars all three are needed. Gradient checkpointing adds a forward pass.
  memory: every weight is read once a pass, and the cache of keys and values once a token generated,
    over the bandwidth.
  the host: eager PyTorch starts some twenty kernels a block, and six more for each projection that
    a LoRA adapts; short rows and single tokens wait for that, and not for the GPU.
Loading and writing weights go at the rate of the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.plan.memory import Loaded, cache

TERA = 1e12
# Measured on one CPU core with transformers 5.23 and PEFT 0.21: models of 4 and of 20 blocks,
# 16 wide, so that only starting the operations takes time; the difference of one token generated.
HOST_SECONDS_PER_BLOCK = 0.45e-3
HOST_SECONDS_PER_ADAPTED = 0.09e-3


@dataclass(frozen=True)
class Rates:
    """What the machine sustains.

    Attributes:
        tflops: Arithmetic in the weights' dtype, in TFLOP/s.
        bandwidth: GPU memory, in TB/s.
        disk: Reading and writing weights, in GB/s.
    """

    tflops: float = 300.0
    bandwidth: float = 3.0
    disk: float = 1.0

    def passes(self, model: Loaded, lengths: Sequence[int], batch: int, passes: Passes) -> float:
        """Seconds of passes over rows of these lengths in batches.

        Args:
            model: What runs.
            lengths: Tokens of each row, in the order in which they are batched.
            batch: Rows of a forward pass.
            passes: Which passes are made.
        """
        if not lengths:
            return 0.0
        count = -(-len(lengths) // batch)
        rounds = passes.forward + passes.backward
        return max(
            arithmetic(model, lengths, passes) / (self.tflops * TERA),
            count * rounds * model.bytes / (self.bandwidth * TERA),
            count * rounds * host_seconds(model),
        )

    def decoding(self, model: Loaded, prompts: Sequence[int], answer: int, batch: int) -> float:
        """Seconds of generating `answer` tokens to each prompt, longest prompts first.

        An upper bound: a batch ends when all its rows have ended.
        """
        ordered = sorted(prompts, reverse=True)
        seconds = self.passes(model, ordered, batch, FORWARD)
        for first in range(0, len(ordered), batch):
            rows = ordered[first : first + batch]
            held = cache(model, sum(rows) + len(rows) * answer // 2)
            step = max(
                2 * model.shape.multiplied * len(rows) / (self.tflops * TERA),
                (model.bytes + held) / (self.bandwidth * TERA),
                host_seconds(model),
            )
            seconds += answer * step
        return seconds

    def moving(self, size: int) -> float:
        """Seconds of reading or writing `size` bytes."""
        return size / (self.disk * 1e9)


@dataclass(frozen=True)
class Passes:
    """What is computed for every row.

    Attributes:
        forward: Forward passes.
        backward: Backward passes.
        frozen: Passes' worth of arithmetic on the model's own weights.
        trained: Likewise on the adapter's.
    """

    forward: int
    backward: int
    frozen: float
    trained: float


FORWARD = Passes(1, 0, 1, 1)


def training_passes(*, lora: bool, checkpointing: bool, references: int) -> Passes:
    """The passes of one row of training.

    Args:
        lora: Whether a LoRA is trained, and not all weights.
        checkpointing: Whether activations are computed again.
        references: Further forward passes without gradients, for each of the row's.
    """
    forward = 1 + checkpointing + references
    return Passes(forward, 1, forward + (1 if lora else 2), forward + 2)


def arithmetic(model: Loaded, lengths: Sequence[int], passes: Passes) -> float:
    """Floating-point operations of passes over rows of these lengths; see the module."""
    tokens, squares = sum(lengths), sum(length * length for length in lengths)
    shape = model.shape
    frozen = 2 * shape.multiplied * tokens + 2 * shape.layers * shape.attention * squares
    adapter = 2 * model.lora.parameters * tokens if model.lora else 0
    return passes.frozen * frozen + passes.trained * adapter


def host_seconds(model: Loaded) -> float:
    """Seconds in which the host starts one pass."""
    adapted = len(model.lora.modules) if model.lora else 0
    return model.shape.layers * HOST_SECONDS_PER_BLOCK + adapted * HOST_SECONDS_PER_ADAPTED
