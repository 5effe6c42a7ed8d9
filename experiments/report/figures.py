"""The report's figures: two of harmfulness; sweeps; steps and heat maps of defenses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.report import maps, steps, sweeps
from experiments.report.collect import Collected, Row
from experiments.report.drawing import is_number, margins, plain, style
from experiments.report.tables import differing_labels, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from evaluation.statistics import Estimate

_RATIO = "attack.poison_ratio"
_DPI = 160
# With more series, those that differ in numbers only share a name in the trade-off's legend.
_MOST_NAMED = 14
_LEGEND_INSIDE = 10


def write(collected: Collected, folder: Path) -> list[Path]:
    """Writes the figures that the runs allow to `folder`, as PNG.

    `hs_vs_poison_ratio.png` needs runs of at least two poison ratios, `against_SETTING.png` of
    at least three values of a numeric setting, `steps_DEFENSE.png` a defense that goes in steps,
    `map_NAME.png` one that gives heat maps.

    Raises:
        RelockError: A heat map is malformed; all other figures have been written.
    """
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = [_hs_vs_accuracy(collected, folder / "hs_vs_accuracy.png")]
    if any(_RATIO in row.settings for row in collected.rows):
        written.append(_hs_vs_ratio(collected, folder / "hs_vs_poison_ratio.png"))
    rows, runs = collected.rows, collected.runs
    for stem, figure in chain(sweeps.figures(rows), steps.figures(rows), maps.figures(runs)):
        written.append(folder / f"{stem}.png")
        figure.savefig(written[-1], dpi=_DPI)
    return written


def _hs_vs_ratio(collected: Collected, path: Path) -> Path:
    figure, axes = _axes()
    series: dict[str, list[Row]] = {}
    told = differing_labels(collected.rows)
    for row in (row for row in collected.rows if _RATIO in row.settings):
        if row.role == "attacked" or (row.role == "defended" and row.cost["parameters_edited"]):
            series.setdefault(_name(row, told), []).append(row)
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
    shown = [row for row in rows if row.role != "defended" or row.cost["parameters_edited"]]
    told = differing_labels(shown)
    numbers = len({_name(row, told) for row in shown}) <= _MOST_NAMED
    series: dict[str, list[Row]] = {}
    for row in shown:
        series.setdefault(_name(row, told, numbers), []).append(row)
    if numbers:
        return series
    return {
        f"{name}, {len(members)} settings" if len(members) > 1 else name: members
        for name, members in series.items()
    }


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
        yerr=margins(hs),
        xerr=margins(x_estimates) if x_estimates else None,
        label=name,
        linestyle=line,
        linewidth=1.5,
        markersize=6,
        capsize=3,
        elinewidth=1,
        alpha=0.9,
        **style(index),
    )


def _name(row: Row, told: Sequence[str], numbers: bool = True) -> str:
    """The legend's name of a series: the row's label and what tells it apart but for the ratio."""
    shown = "attacked (no defense)" if row.role == "attacked" else label(row)
    settings = [row.labels[name] for name in told if row.labels.get(name)]
    settings += [
        f"{key.rpartition('.')[2]}={plain(value)}"
        for key, value in row.settings.items()
        if key != _RATIO and (numbers or not is_number(value))
    ]
    return f"{shown} ({', '.join(settings)})" if settings else shown


def _save(figure: Any, axes: Axes, path: Path) -> Path:
    count = len(axes.get_legend_handles_labels()[0])
    if count <= _LEGEND_INSIDE:
        axes.legend(frameon=False, fontsize=8, loc="best")
    else:
        columns = -(-count // 20)
        figure.set_figwidth(figure.get_figwidth() + 3.2 * columns)
        figure.legend(frameon=False, fontsize=8, loc="outside right upper", ncols=columns)
    figure.savefig(path, dpi=_DPI)
    return path
