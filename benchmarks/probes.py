"""One probe per head: `python -m benchmarks.probes`.

Fits the logistic regressions of SafetyLock's head scores, a whole Llama-3-8B at once, and against
it the loop over scikit-learn's `LogisticRegression(max_iter=1000)`, both on the same activations.
The default rows are anisotropic, as a transformer's activations are (standard deviations fall as
1 / sqrt(rank) along random axes); `--decay 0` makes them round, where scikit-learn needs fewest
iterations.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from defenses.safetylock.probes import Probes, accuracy, fit_probes, log_loss

TOKENS = 5
WARM_UP = 32
SIZES = {"heads": 32 * 32, "rows": 1000, "dimension": 128}


def main() -> None:
    """Runs both, ours before and after, and prints seconds, their ratio, and the agreement."""
    options = _options()
    x, labels = activations(options.heads, options.rows, options.dimension, options.decay)
    for fit in (fit_probes, fit_by_scikit):
        fit(x[:WARM_UP], labels)  # Threads and linear algebra libraries start up on a first call.
    times = []
    for _ in range(options.repeats):
        seconds, ours = _timed(lambda: fit_probes(x, labels))
        times.append(seconds)
    loop, theirs = _timed(lambda: fit_by_scikit(x, labels))
    for _ in range(options.repeats):
        times.append(_timed(lambda: fit_probes(x, labels))[0])
    console = Console()
    console.print(_seconds(x, times, loop))
    console.print(_agreement(x, labels, ours, theirs))


def activations(heads: int, rows: int, d: int, decay: float = 0.5) -> tuple[Tensor, Tensor]:
    """Activations (heads, rows, d) float32 and labels (rows,), True for safe.

    Answers are rows in fives that share half of their variance, safe and unsafe in turn. The
    distance between a head's class means runs from 0.25 to 4.25 standard deviations (accuracies of
    0.55 to 0.98 on fresh rows), shuffled over heads; every head has a mean and axes of its own.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) // TOKENS % 2 == 0
    signs = labels[:, None].float() - 0.5
    spread = torch.arange(1, d + 1).float() ** -decay
    distances = torch.linspace(0.25, 4.25, heads)[torch.randperm(heads, generator=generator)]
    x = torch.empty(heads, rows, d)
    for head in range(heads):
        token = torch.randn(rows, d, generator=generator)
        answer = torch.randn(-(-rows // TOKENS), d, generator=generator)
        noise = 0.5**0.5 * (token + answer.repeat_interleave(TOKENS, 0)[:rows])
        toward = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
        axes = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
        mean = 0.3 * torch.randn(d, generator=generator)
        x[head] = ((noise + signs * distances[head] * toward) * spread) @ axes + mean
    return x, labels


def fit_by_scikit(x: Tensor, labels: Tensor) -> Probes:
    """One scikit-learn model per head, in a loop."""
    rows, target = x.numpy(), labels.numpy()
    models = [LogisticRegression(max_iter=1000).fit(head, target) for head in rows]
    weights = np.stack([model.coef_[0] for model in models])
    biases = np.stack([model.intercept_[0] for model in models])
    return Probes(torch.from_numpy(weights).float(), torch.from_numpy(biases).float())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.probes")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument(
        "--decay", type=float, default=0.5, help="how fast the spread falls; 0: round; default 0.5"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of ours, twice; default 3")
    return parser.parse_args()


def _timed(work: Callable[[], Probes]) -> tuple[float, Probes]:
    start = time.perf_counter()
    probes = work()
    return time.perf_counter() - start, probes


def _seconds(x: Tensor, times: list[float], loop: float) -> Table:
    heads, rows, d = x.shape
    median = sorted(times)[len(times) // 2]
    title = f"{heads} heads, {rows} rows, dimension {d}, {torch.get_num_threads()} threads"
    table = Table("", "seconds", "ratio", title=title)
    table.add_row("scikit-learn, head by head", f"{loop:.2f}", "1.0")
    table.add_row("this project, median", f"{median:.2f}", f"{loop / median:.1f}")
    table.add_row("this project, best", f"{min(times):.2f}", f"{loop / min(times):.1f}")
    return table


def _agreement(x: Tensor, labels: Tensor, ours: Probes, theirs: Probes) -> Table:
    table = Table("", "this project", "scikit-learn", title="What they found")
    accuracies = [accuracy(probes, x, labels) for probes in (ours, theirs)]
    table.add_row("training accuracy", *(f"{a.min():.3f} to {a.max():.3f}" for a in accuracies))
    a, b = (_objective(probes, x, labels) for probes in (ours, theirs))
    excess = [((f - torch.minimum(a, b)) / torch.minimum(a, b)).max() for f in (a, b)]
    table.add_row("objective above the better one's, worst", *(f"{e:.1e}" for e in excess))
    equal = ((ours.decision(x) > 0) == (theirs.decision(x) > 0)).float().mean()
    table.add_row("equal predictions", f"{100 * equal:.3f} %", "")
    return table


def _objective(probes: Probes, x: Tensor, labels: Tensor) -> Tensor:
    """1/2 ||w||^2 + sum of losses of every head, with C = 1, in float64."""
    losses = [
        log_loss(Probes(w[None], b[None]), rows[None].double(), labels)
        for w, b, rows in zip(probes.weights, probes.biases, x, strict=True)
    ]
    return 0.5 * probes.weights.double().square().sum(1) + len(labels) * torch.cat(losses)


if __name__ == "__main__":
    main()
