"""Linear probes: one L2-penalised logistic regression per attention head, scikit-learn's.

SafetyLock (Zhu et al., arXiv 2410.10343) and Inference-Time Intervention (Li et al. 2023) rank
heads by such probes. Each head minimises

    F(w, b) = 1/2 ||w||^2 + c sum_i log(1 + exp(-s_i (w.x_i + b))),   s_i = 1 if safe, else -1,

with the intercept b unpenalised, as far as `LogisticRegression(C=c, max_iter=1000)` does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from settings import DataError

# From how many heads on it pays to start a process per core.
PARALLEL_HEADS = 256


@dataclass(frozen=True, slots=True)
class Probes:
    """One linear probe per head: weights (heads, d), biases (heads,), float64; positive is safe."""

    weights: Tensor
    biases: Tensor

    def decision(self, x: Tensor) -> Tensor:
        """w.x + b, the log-odds of safe, (heads, n) in float64, of x (heads, n, d)."""
        rows = [head.double() @ w for head, w in zip(x, self.weights, strict=True)]
        return torch.stack(rows) + self.biases[:, None]


def fit_probes(x: Tensor, labels: Tensor, c: float = 1.0) -> Probes:
    """Fits every head's logistic regression, on the CPU.

    Args:
        x: Activations (heads, n, d), any scale, fitted in their own precision; float16 in float64.
        labels: (n,), bool, True for safe; shared by all heads.
        c: Inverse strength of the L2 penalty, > 0; scikit-learn's `C`.

    Raises:
        DataError: x holds NaN or infinity, or labels hold one class.
    """
    from joblib import Parallel, delayed
    from sklearn.linear_model import LogisticRegression

    if labels.all() or not labels.any():
        only = "safe" if labels.all() else "unsafe"
        raise DataError(f"all {x.shape[1]} rows are {only}; a probe needs rows of both classes")
    finite = x.isfinite().all(2).all(1)
    if not finite.all():
        head = int((~finite).nonzero()[0])
        raise DataError(f"the activations of head {head} hold NaN or infinity")
    target, jobs = labels.numpy(), torch.get_num_threads() if len(x) >= PARALLEL_HEADS else 1
    fitted = Parallel(jobs)(
        delayed(LogisticRegression(C=c, max_iter=1000).fit)(head.numpy(), target) for head in x
    )
    weights = torch.tensor([probe.coef_[0].tolist() for probe in fitted], dtype=torch.float64)
    biases = torch.tensor([probe.intercept_[0] for probe in fitted], dtype=torch.float64)
    return Probes(weights, biases)


def accuracy(probes: Probes, x: Tensor, labels: Tensor) -> Tensor:
    """Share of rows on the right side of each head's boundary, (heads,); 0 counts as unsafe."""
    return ((probes.decision(x) > 0) == labels).double().mean(1)


def log_loss(probes: Probes, x: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the labels without the penalty, (heads,), nats per row.

    It is finite however wrong a decision is.
    """
    signs = labels.double() * 2 - 1
    return softplus(-signs * probes.decision(x)).mean(1)
