"""The probes are scikit-learn's, head by head, and their figures their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from defenses.safetylock import probes
from defenses.safetylock.probes import Probes, accuracy, fit_probes, log_loss
from settings import DataError


def _data(
    heads: int = 3, n: int = 120, d: int = 8, separation: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Two Gaussian classes per head, in float64, 40 % of the rows safe."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 5 < 2
    x = torch.randn(heads, n, d, generator=generator, dtype=torch.float64)
    direction = torch.randn(heads, 1, d, generator=generator, dtype=torch.float64)
    direction /= direction.norm(dim=2, keepdim=True)
    return x + separation * direction * (labels.double() - 0.5)[None, :, None], labels


@settings(deadline=None, max_examples=25)
@given(
    st.integers(4, 60),
    st.integers(1, 12),
    st.sampled_from([0.2, 1.0, 12.0]),
    st.sampled_from([0.01, 1.0, 100.0]),
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_probes_are_scikit_learns_to_the_bit(
    n: int, d: int, separation: float, c: float, dtype: torch.dtype, seed: int
) -> None:
    x, labels = _data(2, n, d, separation, seed)
    x = x.to(dtype)
    found = fit_probes(x, labels, c)
    right = accuracy(found, x, labels)
    for head in range(2):
        theirs = LogisticRegression(C=c, max_iter=1000).fit(x[head].numpy(), labels.numpy())
        np.testing.assert_array_equal(found.weights[head], theirs.coef_[0])
        np.testing.assert_array_equal(found.biases[head], theirs.intercept_[0])
        away = (found.decision(x)[head].abs() > 1e-6).numpy()
        ours = (found.decision(x)[head] > 0).numpy()
        np.testing.assert_array_equal(ours[away], theirs.predict(x[head].numpy())[away])
        if away.all():
            assert float(right[head]) == theirs.score(x[head].numpy(), labels.numpy())


def test_probes_reach_the_optimum() -> None:
    x, labels = _data(heads=4, n=400, d=32)
    found = fit_probes(x, labels)
    for head in range(4):
        tight = LogisticRegression(tol=1e-10, max_iter=10_000).fit(x[head].numpy(), labels.numpy())
        np.testing.assert_allclose(found.weights[head], tight.coef_[0], atol=5e-3)


@pytest.mark.slow
def test_a_process_per_core_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = _data(heads=6)
    alone = fit_probes(x, labels)
    monkeypatch.setattr(probes, "PARALLEL_HEADS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    together = fit_probes(x, labels)
    assert torch.equal(alone.weights, together.weights)
    assert torch.equal(alone.biases, together.biases)


def test_uninformative_features_leave_the_share_of_safe_rows() -> None:
    labels = torch.tensor([True, False, False, False])
    found = fit_probes(torch.zeros(2, 4, 3), labels)
    assert not found.weights.any()
    torch.testing.assert_close(
        found.biases.sigmoid(), torch.full_like(found.biases, 0.25), atol=1e-3, rtol=0
    )


def test_accuracy_and_log_loss_are_their_definitions() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.0, -2.0]]).double()
    found = Probes(weights, torch.tensor([0.0, 1.0]).double())
    x = torch.tensor([[[2.0, 0.0], [-1.0, 5.0], [3.0, 1.0]]]).repeat(2, 1, 1)
    labels = torch.tensor([True, False, False])
    decision = found.decision(x)
    assert decision.tolist() == [[2.0, -1.0, 3.0], [1.0, -9.0, -1.0]]
    assert accuracy(found, x, labels).tolist() == [2 / 3, 1.0]
    p = decision.sigmoid()
    literal = -torch.where(labels, p.log(), (1 - p).log()).mean(1)
    torch.testing.assert_close(log_loss(found, x, labels), literal)


def test_log_loss_is_finite_however_wrong() -> None:
    found = Probes(torch.ones(1, 1).double(), torch.zeros(1).double())
    x = torch.tensor([[[1e4], [-1e4]]])
    assert log_loss(found, x, torch.tensor([False, True])).tolist() == [1e4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_no_numbers_are_refused(value: float) -> None:
    x, labels = _data()
    x[1, 7, 2] = value
    with pytest.raises(DataError, match=r"head 1 hold NaN"):
        fit_probes(x, labels)


@pytest.mark.parametrize(("safe", "name"), [(True, "safe"), (False, "unsafe")])
def test_rows_of_one_class_are_refused(safe: bool, name: str) -> None:
    x, labels = _data()
    with pytest.raises(DataError, match=f"all 120 rows are {name}; a probe needs rows of both"):
        fit_probes(x, torch.full_like(labels, safe))
