"""The report's figures: two of harmfulness; sweeps; steps and heat maps of defenses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.report import heatmaps, pareto, steps, sweeps
from experiments.report.names import differing_labels
from experiments.report.pool import Collected, Row
from experiments.report.style import is_number, margins, plain, style
from experiments.report.tables import cell, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

RATIO = "attack.poison_ratio"
TITLE = "title:"
"""Starts the gid of an artist that shows one row; the rest is its figures as text."""

_DPI = 160
# With more series, those that differ in numbers only share a name in the trade-off's legend.
_MOST_NAMED = 14
_LEGEND_ROWS = 20
# Share of the smallest step between two ratios over which points of one ratio are set apart.
_SPREAD = 0.25
_ACCURACY, _HS = "accuracy_strict", "hs"


@dataclass(frozen=True)
class Line:
    """What a figure shows in one colour and marker.

    Attributes:
        name: The legend's.
        rows: Its rows, in the order of the x axis.
        look: Colour and marker, as matplotlib's keywords.
        joined: Whether a line goes through the points.
    """

    name: str
    rows: list[Row]
    look: dict[str, Any]
    joined: bool


def write(collected: Collected, folder: Path) -> list[Path]:
    """Writes the figures that the runs allow to `folder`, as PNG.

    `hs_vs_poison_ratio.png` needs runs of at least two poison ratios, `against_SETTING.png` of
    at least three values of a numeric setting, `steps_DEFENSE.png` a defense that goes in steps,
    `map_NAME.png` one that gives heat maps, `pareto.png` several settings of a defense or an
    objective.

    Raises:
        RelockError: A heat map is malformed; all other figures have been written.
    """
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    rows, runs = collected.rows, collected.runs
    note = f"\n({collected.note})" if collected.note else ""
    trade_off = _with_legend(draw_accuracy, accuracy_lines(rows), TRADE_OFF + note)
    main = [("hs_vs_accuracy", trade_off)]
    lines = ratio_lines(rows)
    if lines:
        main.append(("hs_vs_poison_ratio", _with_legend(draw_ratio, lines, BY_RATIO + note)))
    found = pareto.figures(rows, collected.note)
    others = chain(found, sweeps.figures(rows), steps.figures(rows), heatmaps.figures(runs))
    written = []
    for stem, figure in chain(main, others):
        written.append(folder / f"{stem}.png")
        figure.savefig(written[-1], dpi=_DPI)
    return written


BY_RATIO = "Harmfulness after fine-tuning, by share of poison"
TRADE_OFF = "Safety against task accuracy (best: bottom right)"


def ratio_lines(rows: Sequence[Row]) -> list[Line]:
    """HS against the poison ratio: the attacked model and every defense that edited something.

    Empty where the runs have one poison ratio.
    """
    told = differing_labels(rows)
    series: dict[str, list[Row]] = {}
    for row in (row for row in rows if RATIO in row.settings):
        if row.role == "attacked" or (row.role == "defended" and row.cost["parameters_edited"]):
            series.setdefault(_name(row, told), []).append(row)
    for members in series.values():
        members.sort(key=lambda row: row.settings[RATIO])
    return _lines(series, rows, joined=True)


def accuracy_lines(rows: Sequence[Row]) -> list[Line]:
    """HS against accuracy: all models; a defense that edited nothing is the attacked one again."""
    shown = [row for row in rows if row.role != "defended" or row.cost["parameters_edited"]]
    told = differing_labels(shown)
    numbers = len({_name(row, told) for row in shown}) <= _MOST_NAMED
    series: dict[str, list[Row]] = {}
    for row in shown:
        series.setdefault(_name(row, told, numbers), []).append(row)
    if not numbers:
        series = {
            f"{name}, {len(members)} settings" if len(members) > 1 else name: members
            for name, members in series.items()
        }
    return _lines(series, rows, joined=False)


def kinds(rows: Iterable[Row]) -> list[str]:
    """What has a colour of its own in all figures: the attacked model, every defense, the others.

    Returns:
        Labels of rows; the place of one is the index that `drawing.style` takes.
    """
    places = {"attacked": 0, "defended": 1, "refined": 2, "aligned": 3, "base": 4}
    shown = [row for row in rows if row.role != "defended" or row.cost["parameters_edited"]]
    return list(dict.fromkeys(map(label, sorted(shown, key=lambda row: places[row.role]))))


def _lines(series: dict[str, list[Row]], rows: Sequence[Row], joined: bool) -> list[Line]:
    of = {name: label(members[0]) for name, members in series.items()}
    known = kinds(rows)
    # Variants of a single defense have nothing else to tell them apart.
    repaired = [name for name in of.values() if name not in ("base", "aligned", "attacked")]
    single = len(set(repaired)) == 1 < len(repaired)
    ordered = sorted(series, key=lambda name: known.index(of[name]))
    found: list[Line] = []
    variants: dict[str, int] = {}
    for name, members in series.items():
        variant = variants[of[name]] = variants.get(of[name], -1) + 1
        own = style(known.index(of[name]), variant)
        look = style(ordered.index(name)) if single else own
        found.append(Line(name, members, look, joined))
    return found


def draw_ratio(axes: Axes, lines: Sequence[Line]) -> None:
    """HS against the poison ratio, with 95 % intervals; points are set apart sideways."""
    ratios = sorted({100 * row.settings[RATIO] for line in lines for row in line.rows})
    step = min((b - a for a, b in pairwise(ratios)), default=1.0)
    for place, line in enumerate(lines):
        shift = _SPREAD * step * ((place + 0.5) / len(lines) - 0.5)
        x = [100 * row.settings[RATIO] + shift for row in line.rows]
        _draw(axes, x, None, line)
    axes.set_xticks(ratios, [plain(round(ratio, 6)) for ratio in ratios])
    said = "\n(points of one ratio are set apart sideways)" if len(lines) > 1 else ""
    axes.set_xlabel(f"harmful rows among the fine-tuning rows (%){said}")
    _frame(axes)


def draw_accuracy(axes: Axes, lines: Sequence[Line]) -> None:
    """HS against strict task accuracy, with 95 % intervals of both."""
    for line in lines:
        accuracies = [row.metrics[_ACCURACY] for row in line.rows]
        _draw(axes, [100 * a.value for a in accuracies], margins(accuracies), line)
    axes.set_xlabel("task accuracy, strict (%)")
    _frame(axes)


def handle(line: Line) -> Line2D:
    """A line's entry in a legend."""
    from matplotlib.lines import Line2D

    look = {**line.look, "linestyle": "-" if line.joined else ""}
    return Line2D([], [], label=line.name, **look)


def _draw(axes: Axes, x: Sequence[float], x_margins: list[list[float]] | None, line: Line) -> None:
    hs = [row.metrics[_HS] for row in line.rows]
    y, y_margins = [100 * estimate.value for estimate in hs], margins(hs)
    if line.joined:
        axes.plot(x, y, color=line.look["color"], linewidth=1.3, alpha=0.8)
    for place, row in enumerate(line.rows):
        bars = axes.errorbar(
            x[place],
            y[place],
            yerr=[[end[place]] for end in y_margins],
            xerr=[[end[place]] for end in x_margins] if x_margins else None,
            linestyle="",
            markersize=5.5,
            capsize=2.5,
            elinewidth=1,
            alpha=0.9,
            **line.look,
        )
        bars[0].set_gid(f"{TITLE}{_told(line, row)}")


def _told(line: Line, row: Row) -> str:
    ratio = (
        f", {plain(round(100 * row.settings[RATIO], 6))} % poison" if RATIO in row.settings else ""
    )
    metrics = (("HS", _HS), ("accuracy", _ACCURACY))
    shares = ", ".join(f"{head} {cell(row.metrics[name], ' ')}" for head, name in metrics)
    return f"{line.name}{ratio}: {shares} (%)"


def _frame(axes: Axes) -> None:
    axes.set_ylabel("harmfulness score HS (%)")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _with_legend(
    draw: Callable[[Axes, Sequence[Line]], None], lines: list[Line], title: str
) -> Figure:
    """A figure with its legend beside it, where it covers nothing."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = max(1, -(-len(lines) // _LEGEND_ROWS))
    # A "$" in a name is a dollar sign.
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(7.2 + 3.0 * columns, 4.6), layout="constrained")
        axes = figure.subplots()
        draw(axes, lines)
        axes.set_title(title)
        figure.legend(
            handles=[handle(line) for line in lines],
            loc="outside right upper",
            ncols=columns,
            frameon=False,
            fontsize=8,
        )
    return figure


def _name(row: Row, told: Sequence[str], numbers: bool = True) -> str:
    """The legend's name of a series: the row's label and what tells it apart but for the ratio."""
    shown = "attacked (no defense)" if row.role == "attacked" else label(row)
    settings = [row.labels[name] for name in told if row.labels.get(name)]
    settings += [
        f"{key.rpartition('.')[2]}={plain(value)}"
        for key, value in row.settings.items()
        if key != RATIO and (numbers or not is_number(value))
    ]
    return f"{shown} ({', '.join(settings)})" if settings else shown
