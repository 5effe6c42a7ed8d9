"""Linear probes: one L2-penalised logistic regression per attention head, all heads at once.

SafetyLock (Zhu et al., arXiv 2410.10343) and Inference-Time Intervention (Li et al. 2023) rank
heads by such probes. Each head minimises what scikit-learn's `LogisticRegression(C=c)` minimises,

    F(w, b) = 1/2 ||w||^2 + c sum_i log(1 + exp(-s_i (w.x_i + b))),   s_i = 1 if safe, else -1,

with the intercept b unpenalised.  How: `logistic.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from defenses.safetylock.logistic import Fit, descend, newton, rows_times
from settings import DataError

# Bytes of x that are fitted together: on a CPU as much as a last-level cache keeps.
GROUP_BYTES = {"cpu": 16 * 2**20, "cuda": 2 * 2**30}


@dataclass(frozen=True, slots=True)
class Probes:
    """One linear probe per head: weights (heads, d), biases (heads,), float32; positive is safe."""

    weights: Tensor
    biases: Tensor

    def decision(self, x: Tensor) -> Tensor:
        """w.x + b, the log-odds of safe, (heads, n) in the dtype of x (heads, n, d)."""
        return rows_times(x, self.weights.to(x)) + self.biases.to(x)[:, None]


def fit_probes(
    x: Tensor,
    labels: Tensor,
    c: float = 1.0,
    tolerance: float = 4e-3,
    max_iterations: int = 100,
) -> Probes:
    """Fits every head's logistic regression, on the device and in the precision of x.

    Deterministic, and each head's result is its own: a head that has converged stays as it is
    while others go on. Features need no scaling or centring.

    Args:
        x: Activations (heads, n, d), float32 or float64, any scale; read, never copied whole.
        labels: (n,), bool, True for safe; shared by all heads.
        c: Inverse strength of the L2 penalty, > 0; scikit-learn's `C`.
        tolerance: A head has converged when no single coordinate's Newton step would lower F by
            more than about tolerance^2 / 2 of F: max_j g_j^2 / H_jj <= tolerance^2 F, which no
            scale of features or of c changes. The default reaches the objective about as closely
            as scikit-learn's own; 1e-5 in float64 gives weights to about 5 digits.
        max_iterations: L-BFGS iterations after which Newton's method in float64 takes over the
            heads that are left; 0 for Newton's method alone.

    Returns:
        The probes, float32, on x's device.

    Raises:
        DataError: x holds NaN or infinity, or labels hold one class.
        ModelError: Some head didn't converge: the tolerance is finer than rounding allows.
    """
    if labels.all() or not labels.any():
        only = "safe" if labels.all() else "unsafe"
        raise DataError(f"all {x.shape[1]} rows are {only}; a probe needs rows of both classes")
    labels = labels.to(x.device)
    heads, _, d = x.shape
    solution = x.new_empty(heads, d + 1, dtype=torch.float32)
    size = max(1, GROUP_BYTES["cpu" if x.device.type == "cpu" else "cuda"] // (x[0].nbytes or 1))
    starts = range(0, heads, size)

    def fit_group(start: int) -> list[int]:
        with torch.no_grad():
            members = torch.arange(start, min(start + size, heads), device=x.device)
            fit = Fit(x[start : start + size].contiguous(), labels, c, tolerance, members)
            return descend(fit, max_iterations, solution)

    unfinished = [head for group in _each(fit_group, starts, x.device) for head in group]
    with torch.no_grad():
        for head in unfinished:
            newton(x[head : head + 1].double(), labels, c, tolerance, head, solution)
    return Probes(solution[:, :d].contiguous(), solution[:, d].contiguous())


def _each(
    work: Callable[[int], list[int]], starts: Sequence[int], device: torch.device
) -> list[list[int]]:
    """`work` of each group: on a CPU with a group per core at a time, each on one thread.

    A group's many small steps don't divide well among threads, and groups are independent.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(starts) == 1:
        return [work(start) for start in starts]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, starts))
    finally:
        torch.set_num_threads(threads)  # The workers' 1 is also what later threads start with.


def accuracy(probes: Probes, x: Tensor, labels: Tensor) -> Tensor:
    """Share of rows on the right side of each head's boundary, (heads,); 0 counts as unsafe."""
    return ((probes.decision(x) > 0) == labels.to(x.device)).float().mean(1)


def log_loss(probes: Probes, x: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the labels without the penalty, (heads,), nats per row.

    It is finite however wrong a decision is.
    """
    signs = labels.to(x) * 2 - 1
    return softplus(-signs * probes.decision(x)).mean(1)
