"""The logistic regressions behind the probes: L-BFGS batched over heads, Newton's for the rest.

L-BFGS (Liu and Nocedal 1989) with the two-loop recursion and a line search.  The work is memory
traffic over x, so each iteration passes over x twice and no more: once for X d, after which any
step length is tried without x, and once for X^T r.  What it doesn't finish, Newton's method does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from settings import DataError, ModelError

MEMORY = 10
SAMPLE_ROWS = 128
COVARIANCE_ROWS = 4
SLOPE_LEFT = 0.4
LINE_SEARCH_STEPS = 40
NEWTON_STEPS = 50


def rows_times(x: Tensor, w: Tensor) -> Tensor:
    """X w for every head, (heads, n); a row vector from the left is what BLAS does fastest."""
    return torch.bmm(w.contiguous()[:, None], x.mT)[:, 0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


@dataclass
class Fit:
    """The iterates of one group of heads, in terms of F / (c n), the penalised mean loss.

    Features are centred without touching x: with the penalty on w alone, a shift by `mean` moves
    only the intercept. Any shift is exact, so that a sample's mean and variance will do.

    Attributes:
        members: (heads,), the place of each head among all heads.
        target: (n,), 1 for safe, 0 for unsafe; `spread` is its variance.
        mean, variance: (heads, d), of a sample of rows.
        penalty: 1 / (c n).
        theta: (heads, d + 1), weights, then the intercept of the centred features.
        z: (heads, n), log-odds of theta.
        residual: (heads, n), probability less target.
        gradient: (heads, d + 1), of the penalised mean loss.
        uneven: (heads, 1), whether L-BFGS starts from a Hessian of w rather than its diagonal.
        factor: (heads, d, d), that Hessian's Cholesky factor; None where no head needs it.
        pairs: Steps and changes of the gradient, both (heads, d + 1), and the inverse of their
            product (heads, 1), oldest first.
    """

    x: Tensor
    labels: Tensor
    c: float
    tolerance: float
    members: Tensor
    theta: Tensor = field(init=False)
    z: Tensor = field(init=False)
    residual: Tensor = field(init=False)
    gradient: Tensor = field(init=False)
    target: Tensor = field(init=False)
    mean: Tensor = field(init=False)
    variance: Tensor = field(init=False)
    spread: Tensor = field(init=False)
    penalty: float = field(init=False)
    uneven: Tensor = field(init=False)
    factor: Tensor | None = field(init=False, default=None)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        heads, n, d = self.x.shape
        self.target = self.labels.to(self.x)
        self.penalty = 1 / (self.c * n)
        sample = self.x[:, :: max(1, n // SAMPLE_ROWS)]
        self.mean = sample.mean(1)
        self.variance = (sample - self.mean[:, None]).square_().mean(1)
        share = self.target.mean()
        self.spread, prior = share * (1 - share), share.logit()
        self.theta = self.x.new_zeros(heads, d + 1)
        self.theta[:, d] = prior
        self.z = prior.expand(heads, n).contiguous()
        self.evaluate()
        # With theta = 0, every element of x enters the gradient with a weight other than 0.
        finite = self.gradient.isfinite().all(1)
        if not finite.all():
            head = int(self.members[~finite][0])
            raise DataError(f"the activations of head {head} hold NaN, infinity or overflow")
        self.uneven = _uneven(sample[:, ::4] - self.mean[:, None])
        self.factor = self.factorise() if self.uneven.any() else None

    def factorise(self) -> Tensor | None:
        """The Cholesky factor of the Hessian of w at the start, from a few rows per dimension.

        It is only a preconditioner: sampling and later changes of curvature cost iterations, not
        accuracy. None where the rows are too few; a head whose factor rounding spoils gets the
        diagonal's.
        """
        _, n, d = self.x.shape
        sample = self.x[:, :: -(-n // (COVARIANCE_ROWS * d))]
        rows = sample.shape[1]
        if 2 * rows < COVARIANCE_ROWS * d:
            return None
        sample = sample - sample.mean(1, keepdim=True)
        hessian = torch.bmm(sample.mT, sample).mul_(self.spread / rows)
        hessian.diagonal(dim1=1, dim2=2).add_(self.penalty)
        factor, failed = torch.linalg.cholesky_ex(hessian, upper=True)
        self.uneven &= failed[:, None] == 0
        return torch.where(self.uneven[:, :, None], factor, torch.eye(d).to(factor))

    def precondition(self, gradient: Tensor, diagonal: Tensor) -> Tensor:
        """An estimate of the inverse Hessian times `gradient`, (heads, d + 1)."""
        if self.factor is None:
            return gradient / diagonal
        d = self.x.shape[2]
        weights = torch.cholesky_solve(gradient[:, :d, None], self.factor, upper=True)[:, :, 0]
        factored = torch.cat([weights, gradient[:, d:] / self.spread], 1)
        return torch.where(self.uneven, factored, gradient / diagonal)

    def evaluate(self) -> None:
        """The residual and the gradient at theta: one pass over x."""
        n, d = self.x.shape[1:]
        self.residual = self.z.sigmoid() - self.target
        surplus = self.residual.mean(1, keepdim=True)
        weights = self.theta[:, None, :d] * self.penalty
        slope = torch.baddbmm(weights, self.residual[:, None], self.x, alpha=1 / n)[:, 0]
        self.gradient = torch.cat([slope.addcmul_(surplus, self.mean, value=-1), surplus], 1)

    def curvature(self) -> Tensor:
        """p (1 - p), (heads, n): the second derivative of each row's loss by its log-odds."""
        return _curvature(self.residual, self.target)

    def diagonal(self, curvature: Tensor) -> Tensor:
        """An estimate of the Hessian's diagonal, (heads, d + 1); exact for the intercept."""
        # A saturated head's curvature vanishes: without a floor its inverse would overflow.
        average = curvature.mean(1, keepdim=True).clamp(min=1e-12)
        return torch.cat([(average * self.variance).add_(self.penalty), average], 1)

    def converged(self, diagonal: Tensor) -> Tensor:
        """Which heads meet the tolerance, (heads,); mean |r| stands for the smaller of F's bounds.

        -log(1 - |r|) >= |r|, so that the criterion is, if anything, stricter than stated.
        """
        bound = self.tolerance**2 * self.residual.abs().mean(1, keepdim=True)
        return (self.gradient.square() <= bound * diagonal).all(1)

    def along(self, direction: Tensor) -> Tensor:
        """The change of z per unit step, (heads, n): one pass over x."""
        d = self.x.shape[2]
        offset = direction[:, d:] - _dot(direction[:, :d], self.mean)
        return rows_times(self.x, direction[:, :d]).add_(offset)

    def store(self, solution: Tensor) -> None:
        """Writes theta, the intercept moved back to the uncentred features."""
        d = self.x.shape[2]
        intercept = self.theta[:, d:] - _dot(self.theta[:, :d], self.mean)
        solution[self.members] = torch.cat([self.theta[:, :d], intercept], 1).float()

    def keep(self, which: Tensor) -> None:
        """Drops all other heads."""
        for name in ("x", "members", "theta", "z", "residual", "gradient", "mean", "variance"):
            setattr(self, name, getattr(self, name)[which])
        if self.factor is not None:
            self.factor, self.uneven = self.factor[which], self.uneven[which]
        self.pairs = [(s[which], y[which], rho[which]) for s, y, rho in self.pairs]


def _uneven(sample: Tensor) -> Tensor:
    """Which heads' centred samples (heads, rows, d) spread over few of their directions.

    tr(S)^2 / tr(S^2) of the covariance S is d for a sphere; products of different rows estimate
    it. Far below d, the diagonal alone makes L-BFGS slow, and a covariance is worth its price.
    """
    rows, d = sample.shape[1:]
    products = torch.bmm(sample, sample.mT).square_()
    total = sample.square().sum((1, 2)) / rows
    own = products.diagonal(dim1=1, dim2=2).sum(1)
    across = (products.sum((1, 2)) - own) / max(1, rows * (rows - 1))
    return (across * d > 2 * total.square())[:, None]


def _curvature(residual: Tensor, target: Tensor) -> Tensor:
    magnitude = residual.abs()
    return magnitude - magnitude.square()


def descend(fit: Fit, max_iterations: int, solution: Tensor) -> list[int]:
    """Runs L-BFGS on a group until its heads have converged; returns the heads that haven't."""
    for iteration in range(max_iterations + 1):
        curvature = fit.curvature()
        diagonal = fit.diagonal(curvature)
        done = fit.converged(diagonal)
        active = len(done) - int(done.sum())
        if active == 0 or iteration == max_iterations:
            break
        if 2 * active <= len(done):
            fit.store(solution)
            going = ~done
            fit.keep(going)
            curvature, diagonal, done = curvature[going], diagonal[going], done[going]
        direction = _two_loop(fit, diagonal)
        # Rounding can spoil the memory; the diagonal's own direction always descends.
        uphill = _dot(direction, fit.gradient) >= 0
        direction = torch.where(uphill, -fit.gradient / diagonal, direction)
        _advance(fit, direction.masked_fill_(done[:, None], 0.0), curvature, done)
    fit.store(solution)
    return fit.members[~done].tolist()


def _two_loop(fit: Fit, diagonal: Tensor) -> Tensor:
    """The L-BFGS direction (Nocedal and Wright, algorithm 7.4), the diagonal its first guess."""
    direction = -fit.gradient
    parts = []
    for s, y, rho in reversed(fit.pairs):
        part = _dot(s, direction) * rho
        direction.addcmul_(part, y, value=-1)
        parts.append(part)
    direction = fit.precondition(direction, diagonal)
    if fit.pairs:
        _, y, rho = fit.pairs[-1]
        scale = 1 / (rho * _dot(y, fit.precondition(y, diagonal)))
        direction *= torch.where(rho > 0, scale, 1.0)
    for (s, y, rho), part in zip(fit.pairs, reversed(parts), strict=True):
        direction.addcmul_(part - _dot(y, direction) * rho, s)
    return direction


def _advance(fit: Fit, direction: Tensor, curvature: Tensor, done: Tensor) -> None:
    """Moves every head that isn't done along its direction and remembers the step."""
    slope = fit.along(direction)
    length = _line_search(fit, direction, slope, curvature, done)
    step, before = length * direction, fit.gradient
    fit.theta = fit.theta + step
    fit.z.addcmul_(length, slope)
    fit.evaluate()
    change = fit.gradient - before
    product = _dot(step, change)
    fit.pairs.append((step, change, torch.where(product > 0, 1 / product, 0.0)))
    del fit.pairs[:-MEMORY]


def _line_search(
    fit: Fit, direction: Tensor, slope: Tensor, curvature: Tensor, done: Tensor
) -> Tensor:
    """The step lengths, (heads, 1), that leave at most `SLOPE_LEFT` of the objective's slope.

    In one dimension the objective is convex, so that its derivative crosses zero once: Newton
    steps from 0, kept within the bracket by bisection, find it without looking at values.
    """
    n, d = fit.x.shape[1:]
    weights, ahead = fit.theta[:, :d], direction[:, :d]
    quadratic = fit.penalty * _dot(ahead, ahead)
    linear = fit.penalty * _dot(weights, ahead)
    first = _dot(fit.gradient, direction)
    squared = slope.square()
    length = -first / (_dot(curvature, squared) / n + quadratic)
    length.masked_fill_(done[:, None], 0.0)
    low, high = torch.zeros_like(length), torch.full_like(length, torch.inf)
    for _ in range(LINE_SEARCH_STEPS):
        residual = torch.addcmul(fit.z, length, slope).sigmoid_().sub_(fit.target)
        now = _dot(residual, slope) / n + linear + length * quadratic
        steep = now.abs() > SLOPE_LEFT * first.abs()
        if not steep.any():
            break
        low, high = torch.where(now < 0, length, low), torch.where(now > 0, length, high)
        second = _dot(_curvature(residual, fit.target), squared) / n + quadratic
        newton = length - now / second
        middle = torch.where(high.isinf(), 2 * low, (low + high) / 2)
        inside = (newton > low) & (newton < high)
        length = torch.where(steep, torch.where(inside, newton, middle), length)
    return length


def newton(
    x: Tensor, labels: Tensor, c: float, tolerance: float, head: int, solution: Tensor
) -> None:
    """Fits one head, x (1, n, d) in float64, by Newton's method with the exact Hessian.

    Raises:
        ModelError: The tolerance isn't met after `NEWTON_STEPS` steps.
    """
    fit = Fit(x, labels, c, tolerance, torch.tensor([head], device=x.device))
    n, d = x.shape[1:]
    centred = torch.cat([x[0] - fit.mean, x.new_ones(n, 1)], 1)
    penalty = torch.full((d + 1,), fit.penalty, dtype=x.dtype, device=x.device)
    penalty[d] = 0
    for _ in range(NEWTON_STEPS):
        curvature = fit.curvature()
        done = fit.converged(fit.diagonal(curvature))
        if done.all():
            fit.store(solution)
            return
        hessian = (centred.mT * (curvature / n)) @ centred + penalty.diag()
        scale = hessian.diagonal().rsqrt()
        factor, _ = torch.linalg.cholesky_ex(scale[:, None] * hessian * scale)
        scaled = torch.cholesky_solve(-(scale * fit.gradient).mT, factor)
        _advance(fit, scale * scaled.mT, curvature, done)
    raise ModelError(
        f"the probe of head {head} didn't converge to tolerance={tolerance}; "
        "allow more, or give the activations in float64"
    )
