"""Figures: harmfulness against poison ratio, and harmfulness against task accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.report.collect import Collected, Row
from experiments.report.tables import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from evaluation.statistics import Estimate

# Okabe and Ito's palette, told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_RATIO = "attack.poison_ratio"


def write(collected: Collected, folder: Path) -> list[Path]:
    """Writes the figures that the runs allow to `folder`, as PNG.

    `hs_vs_poison_ratio.png` needs runs of at least two poison ratios.
    """
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = [_hs_vs_accuracy(collected, folder / "hs_vs_accuracy.png")]
    if any(_RATIO in row.settings for row in collected.rows):
        written.append(_hs_vs_ratio(collected, folder / "hs_vs_poison_ratio.png"))
    return written


def _hs_vs_ratio(collected: Collected, path: Path) -> Path:
    figure, axes = _axes()
    series: dict[str, list[Row]] = {}
    for row in collected.rows:
        if row.role == "attacked" or (row.role == "defended" and row.cost["parameters_edited"]):
            series.setdefault(_name(row), []).append(row)
    for index, (name, rows) in enumerate(series.items()):
        rows.sort(key=lambda row: row.settings[_RATIO])
        ratios = [100 * row.settings[_RATIO] for row in rows]
        _errorbar(axes, ratios, None, rows, name, index, line="-")
    axes.set_xlabel("harmful rows among the fine-tuning rows (%)")
    axes.set_ylabel("harmfulness score HS (%)")
    axes.set_ylim(-3, 103)
    axes.set_title("Harmfulness after fine-tuning, by share of poison")
    return _save(figure, axes, path)


def _hs_vs_accuracy(collected: Collected, path: Path) -> Path:
    figure, axes = _axes()
    for index, (name, rows) in enumerate(_series(collected.rows).items()):
        accuracies = [row.metrics["accuracy_strict"] for row in rows]
        _errorbar(axes, [100 * a.value for a in accuracies], accuracies, rows, name, index, line="")
    axes.set_xlabel("task accuracy, strict (%)")
    axes.set_ylabel("harmfulness score HS (%)")
    axes.set_ylim(-3, 103)
    axes.set_title("Safety against task accuracy (best: bottom right)")
    return _save(figure, axes, path)


def _series(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the legend's name; a defense that edited nothing is the attacked model again."""
    series: dict[str, list[Row]] = {}
    for row in rows:
        if row.role != "defended" or row.cost["parameters_edited"]:
            series.setdefault(_name(row), []).append(row)
    return series


def _axes() -> tuple[Any, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _errorbar(
    axes: Axes,
    x: Sequence[float],
    x_estimates: Sequence[Estimate] | None,
    rows: Sequence[Row],
    name: str,
    index: int,
    line: str,
) -> None:
    hs = [row.metrics["hs"] for row in rows]
    axes.errorbar(
        x,
        [100 * estimate.value for estimate in hs],
        yerr=_margins(hs),
        xerr=_margins(x_estimates) if x_estimates else None,
        label=name,
        color=_COLOURS[index % len(_COLOURS)],
        marker=_MARKERS[index % len(_MARKERS)],
        linestyle=line,
        linewidth=1.5,
        markersize=6,
        capsize=3,
        elinewidth=1,
        alpha=0.9,
    )


def _margins(estimates: Sequence[Estimate]) -> list[list[float]]:
    below = [max(0.0, 100 * (e.value - e.low)) for e in estimates]
    above = [max(0.0, 100 * (e.high - e.value)) for e in estimates]
    return [below, above]


def _name(row: Row) -> str:
    """The legend's name of a series: the row's label and its settings other than the ratio."""
    shown = "attacked (no defense)" if row.role == "attacked" else label(row)
    settings = [
        f"{key.rpartition('.')[2]}={value}" for key, value in row.settings.items() if key != _RATIO
    ]
    return f"{shown} ({', '.join(settings)})" if settings else shown


def _save(figure: Any, axes: Axes, path: Path) -> Path:
    axes.legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(path, dpi=160)
    return path
