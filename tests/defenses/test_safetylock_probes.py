"""The batched probes against scikit-learn, one head at a time."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from defenses.safetylock import probes
from defenses.safetylock.probes import Probes, accuracy, fit_probes, log_loss
from settings import DataError, ModelError

TIGHT = 1e-6


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


def _scikit(x: Tensor, labels: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """Weights and biases of scikit-learn's lbfgs, and of its Newton method where that gives up."""
    weights, biases = [], []
    for head in x.double().numpy():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [
                LogisticRegression(C=c, tol=1e-8, max_iter=10000, solver=solver).fit(
                    head, labels.numpy()
                )
                for solver in ("lbfgs", "newton-cholesky")
            ]
        best = min(found, key=lambda model: _objective(head, labels, model, c))
        weights.append(best.coef_[0])
        biases.append(best.intercept_[0])
    return torch.from_numpy(np.stack(weights)), torch.tensor(biases, dtype=torch.float64)


def _objective(x: np.ndarray, labels: Tensor, model: LogisticRegression, c: float) -> float:
    signs = labels.numpy() * 2.0 - 1
    loss = np.logaddexp(0, -signs * model.decision_function(x)).sum()
    return float(0.5 * (model.coef_**2).sum() + c * loss)


def _assert_same(got: Probes, x: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    weights, biases = expected
    error = (got.weights.double() - weights).norm(dim=1) / weights.norm(dim=1)
    assert error.max() < 1e-3
    decision = torch.einsum("hnd,hd->hn", x.double(), weights) + biases[:, None]
    away = decision.abs() > 1e-2
    assert torch.equal((got.decision(x) > 0)[away], (decision > 0)[away])
    torch.testing.assert_close(got.decision(x.double()), decision, rtol=1e-3, atol=1e-3)


def _overlapping() -> tuple[Tensor, Tensor]:
    return _data(separation=0.5)


def _separable() -> tuple[Tensor, Tensor]:
    return _data(separation=12)


def _wide() -> tuple[Tensor, Tensor]:
    return _data(n=30, d=70)


def _badly_scaled() -> tuple[Tensor, Tensor]:
    x, labels = _data(n=200)
    return x * torch.logspace(-2, 2, x.shape[2], dtype=x.dtype), labels


def _small() -> tuple[Tensor, Tensor]:
    x, labels = _data()
    return 0.01 * x, labels


def _large() -> tuple[Tensor, Tensor]:
    x, labels = _data(n=200)
    return 100 * x, labels


def _degenerate() -> tuple[Tensor, Tensor]:
    """A feature twice, a constant one, one of zeros, and one that a single row has."""
    x, labels = _data()
    rare = torch.zeros_like(x[:, :, :1])
    rare[:, 1] = 3
    return torch.cat([x, x[:, :, :1], 0 * rare + 5, 0 * rare, rare, 100 + x[:, :, 1:2]], 2), labels


def _correlated() -> tuple[Tensor, Tensor]:
    x, labels = _data(d=12)
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    return x @ mixing @ torch.diag(torch.logspace(0, -3, 12, dtype=x.dtype)) @ mixing + 2, labels


CASES = [
    _overlapping,
    _separable,
    _wide,
    _badly_scaled,
    _small,
    _large,
    _degenerate,
    _correlated,
]


@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("case", CASES)
def test_probes_are_scikit_learns(case, c: float) -> None:
    x, labels = case()
    expected = _scikit(x, labels, c)
    got = fit_probes(x, labels, c, TIGHT)
    assert (got.weights.dtype, got.biases.dtype) == (torch.float32, torch.float32)
    _assert_same(got, x, expected)


@pytest.mark.parametrize("case", CASES)
def test_float32_reaches_the_same_probes(case) -> None:
    x, labels = case()
    x = x.float()
    _assert_same(fit_probes(x, labels, tolerance=1e-5), x, _scikit(x, labels, 1.0))


@pytest.mark.parametrize("case", CASES)
def test_newtons_method_alone_gives_the_same(case) -> None:
    x, labels = case()
    _assert_same(fit_probes(x, labels, 1.0, TIGHT, 0), x, _scikit(x, labels, 1.0))


@pytest.mark.parametrize("case", CASES)
def test_the_default_tolerance_bounds_the_objective(case) -> None:
    x, labels = case()
    loose, tight = fit_probes(x.float(), labels), fit_probes(x, labels, tolerance=TIGHT)
    n = x.shape[1]
    penalised = [
        0.5 * found.weights.double().square().sum(1) + n * log_loss(found, x, labels)
        for found in (loose, tight)
    ]
    assert ((penalised[0] - penalised[1]) / penalised[1]).max() < 1e-3


def test_heads_left_by_lbfgs_are_finished_by_newtons_method() -> None:
    x, labels = _data(heads=6)
    some = fit_probes(x, labels, 1.0, TIGHT, 4)
    torch.testing.assert_close(some.weights, fit_probes(x, labels, 1.0, TIGHT).weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_is_fitted_alike_alone_and_in_any_group(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    x = torch.cat([_data(4, separation=s)[0] for s in (0.2, 1, 8)])[:11].to(dtype)
    labels = _data()[1]
    together = fit_probes(x, labels)
    monkeypatch.setitem(probes.GROUP_BYTES, "cpu", 4 * x[0].nbytes)
    grouped = fit_probes(x, labels)
    alone = [fit_probes(x[h : h + 1], labels) for h in range(11)]
    weights = torch.cat([a.weights for a in alone])
    biases = torch.cat([a.biases for a in alone])
    for found in (together, grouped):
        torch.testing.assert_close(found.weights, weights, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.biases, biases, rtol=1e-3, atol=1e-3)


def test_fitting_is_deterministic_and_leaves_its_input_alone() -> None:
    x, labels = _data(5)
    x = x.float()
    before = x.clone()
    one, two = fit_probes(x, labels), fit_probes(x, labels)
    assert torch.equal(one.weights, two.weights)
    assert torch.equal(one.biases, two.biases)
    assert torch.equal(x, before)


def test_a_view_with_other_strides_is_the_same_input() -> None:
    x, labels = _data()
    view = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(fit_probes(view, labels).weights, fit_probes(x, labels).weights)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 4),
    st.integers(4, 40),
    st.integers(1, 12),
    st.floats(0, 6),
    st.floats(-2, 2),
    st.integers(0, 2**31),
)
def test_laws_of_the_optimum(
    heads: int, n: int, d: int, separation: float, log_c: float, seed: int
) -> None:
    x, labels = _data(heads, n, d, separation, seed)
    c = 10**log_c
    generator = torch.Generator().manual_seed(seed)
    rows, order, features = (torch.randperm(k, generator=generator) for k in (n, heads, d))
    weights, biases = _fitted(x, labels, c)

    def same(found: tuple[Tensor, Tensor], w: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(found[0], w, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], b, rtol=1e-4, atol=1e-4)

    same(_fitted(x[:, rows], labels[rows], c), weights, biases)
    same(_fitted(x[order], labels, c), weights[order], biases[order])
    same(_fitted(x[:, :, features], labels, c), weights[:, features], biases)
    same(_fitted(x, ~labels, c), -weights, -biases)
    same(_fitted(-x, labels, c), -weights, biases)
    same(_fitted(x + 3, labels, c), weights, biases - 3 * weights.sum(1))
    same(_fitted(torch.cat([x, x], 1), labels.repeat(2), c / 2), weights, biases)


def _fitted(x: Tensor, labels: Tensor, c: float) -> tuple[Tensor, Tensor]:
    found = fit_probes(x, labels, c, 1e-7)
    return found.weights, found.biases


def test_uninformative_features_leave_the_share_of_safe_rows() -> None:
    labels = torch.tensor([True, False, False, False])
    found = fit_probes(torch.zeros(2, 4, 3), labels)
    assert torch.equal(found.weights, torch.zeros(2, 3))
    torch.testing.assert_close(found.biases.sigmoid(), torch.full((2,), 0.25))


def test_accuracy_and_log_loss_are_their_definitions() -> None:
    found = Probes(torch.tensor([[1.0, 0.0], [0.0, -2.0]]), torch.tensor([0.0, 1.0]))
    x = torch.tensor([[[2.0, 0.0], [-1.0, 5.0], [3.0, 1.0]]]).repeat(2, 1, 1)
    labels = torch.tensor([True, False, False])
    torch.testing.assert_close(
        found.decision(x), torch.tensor([[2.0, -1.0, 3.0], [1.0, -9.0, -1.0]])
    )
    torch.testing.assert_close(accuracy(found, x, labels), torch.tensor([2 / 3, 1.0]))
    p = found.decision(x).sigmoid()
    literal = -torch.where(labels, p.log(), (1 - p).log()).mean(1)
    torch.testing.assert_close(log_loss(found, x, labels), literal)


def test_log_loss_is_finite_however_wrong() -> None:
    found = Probes(torch.tensor([[1.0]]), torch.tensor([0.0]))
    x = torch.tensor([[[1e4], [-1e4]]])
    loss = log_loss(found, x, torch.tensor([False, True]))
    torch.testing.assert_close(loss, torch.tensor([1e4]))


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


def test_a_tolerance_below_rounding_is_said_to_be_one() -> None:
    x, labels = _data()
    with pytest.raises(ModelError, match=r"head 0 didn't converge to tolerance=1e-300"):
        fit_probes(x, labels, tolerance=1e-300)
