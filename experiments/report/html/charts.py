"""The page's charts: small enough to be read on a phone, each with its legend as HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from experiments.report import heatmaps, steps, sweeps
from experiments.report.figures import (
    TITLE,
    Line,
    accuracy_lines,
    draw_accuracy,
    draw_ratio,
    kinds,
    ratio_lines,
)
from experiments.report.html.families import Family, apart, families
from experiments.report.html.svg import INK, inline, symbol
from experiments.report.pareto import front
from experiments.report.pool import Collected, Row
from experiments.report.style import PALETTE, style
from experiments.report.tables import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (4.2, 3.3)
_MOST_FAMILIES = 6
_BAR_HEIGHT, _BAR_FRAME = 0.24, 0.66
_LIGHTER = 0.45


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of a legend.

    Attributes:
        name: What it stands for.
        colour: Index into the page's colours of series.
        path: The marker as the `d` of an SVG path within a square of 32.
    """

    name: str
    colour: int
    path: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with what stands around it.

    Attributes:
        name: Names it on the page; letters, digits and "-".
        title: What it shows.
        svg: Markup.
        keys: Its legend; empty where it has one inside or needs none.
        note: What else to know of it.
        wide: Whether it is too wide for a phone and scrolls in its box, on white paper.
    """

    name: str
    title: str
    svg: str
    keys: tuple[Key, ...] = ()
    note: str = ""
    wide: bool = False


def main_charts(rows: Sequence[Row]) -> list[Chart]:
    """HS against the poison ratio, where there are several, and against accuracy.

    Models are set against each other only where they were repaired after the same attack: each
    attacked model has a chart of HS against accuracy, up to six of them.
    """
    charts = []
    lines = ratio_lines(rows)
    if lines:
        charts.append(_lines("ratio", "Harmfulness against the share of poison", draw_ratio, lines))
    found = [family for family in families(rows) if family.attacked.metrics["accuracy_strict"].n]
    told, trade_off = apart(found), accuracy_lines(rows)
    for number, family in enumerate(found[:_MOST_FAMILIES]):
        charts.append(_trade_off(number, family, trade_off, told[number]))
    return charts


def _trade_off(number: int, family: Family, of_all: Sequence[Line], told: str) -> Chart:
    members = {id(row) for row in (family.aligned, family.attacked, *family.repaired)}
    lines = [
        replace(line, rows=[row for row in line.rows if id(row) in members]) for line in of_all
    ]
    best = front(family.repaired)

    def draw(axes: Axes, drawn: Sequence[Line]) -> None:
        draw_accuracy(axes, drawn)
        _draw_front(axes, best)

    note = "Best: bottom right."
    if len(best) > 1:
        note += (
            " Dashed: the Pareto front, the repairs that no other one beats in both, by their point"
            " estimates and not by their intervals."
        )
    title = "Safety against task accuracy" + (f": {told}" if told else "")
    return _lines(f"trade-off-{number}", title, draw, [line for line in lines if line.rows], note)


def _draw_front(axes: Axes, best: Sequence[Row]) -> None:
    if len(best) > 1:
        x = [100 * row.metrics["accuracy_strict"].value for row in best]
        y = [100 * row.metrics["hs"].value for row in best]
        # Between two models of the front nothing better was measured than the worse of either.
        axes.step(x, y, where="pre", color=INK, linestyle="--", linewidth=1.2, zorder=5)


def _lines(
    name: str,
    title: str,
    draw: Callable[[Axes, Sequence[Line]], None],
    lines: Sequence[Line],
    note: str = "",
) -> Chart:
    def figure() -> Figure:
        from matplotlib.figure import Figure

        made = Figure(figsize=_SIZE, layout="constrained")
        draw(made.subplots(), lines)
        return made

    described = f"{title}: {', '.join(line.name for line in lines)}; the tables hold the figures"
    keys = tuple(_key(line.name, line.look["color"], line.look["marker"]) for line in lines)
    return Chart(name, title, inline(name, figure, described), keys, note)


def _key(name: str, colour: str, marker: str) -> Key:
    return Key(name, [light for light, _ in PALETTE].index(colour), symbol(marker))


def cost_charts(rows: Sequence[Row]) -> list[Chart]:
    """Bars of what each defense costs, mean over its rows: seconds, memory, share edited."""
    known = kinds(rows)
    defended: dict[str, list[Row]] = {}
    for row in rows:
        if row.role == "defended" and row.cost["parameters_edited"]:
            defended.setdefault(label(row), []).append(row)
    if not defended:
        return []
    colours = {name: style(known.index(name))["color"] for name in defended}

    def mean(name: str, cost: str) -> float:
        members = defended[name]
        return sum(row.cost[cost] for row in members) / len(members)

    def peak(row: Row) -> float:
        return max(row.cost["prepare_peak_bytes"], row.cost["apply_peak_bytes"])

    prepare, apply, share = (
        [mean(name, cost) for name in defended]
        for cost in ("prepare_seconds", "apply_seconds", "share_edited")
    )
    peaks = [sum(map(peak, members)) / len(members) / 1e6 for members in defended.values()]
    names = list(defended)
    bars = (
        (
            "seconds",
            "Seconds to prepare (pale) and to apply",
            {"prepare ": prepare, "apply ": apply},
            "s",
        ),
        ("memory", "Peak memory", {"": peaks}, "MB"),
        ("edited", "Parameters edited", {"": [100 * each for each in share]}, "%"),
    )
    return [
        _bars(f"cost-{stem}", title, names, list(colours.values()), parts, unit)
        for stem, title, parts, unit in bars
    ]


def _bars(
    name: str,
    title: str,
    names: Sequence[str],
    colours: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    unit: str,
) -> Chart:
    """Horizontal bars; of two parts the first is paler and stands first."""
    totals = [sum(values) for values in zip(*parts.values(), strict=True)]
    written = [f"{total:,.3g} {unit}" for total in totals]

    def figure() -> Figure:
        from matplotlib.figure import Figure

        size = (_SIZE[0], _BAR_FRAME + _BAR_HEIGHT * len(names))
        made = Figure(figsize=size, layout="constrained")
        axes = made.subplots()
        start = [0.0] * len(names)
        places = range(len(names))
        for number, (part, values) in enumerate(parts.items()):
            pale = number < len(parts) - 1
            drawn = axes.barh(
                places,
                values,
                left=start,
                color=colours,
                height=0.72,
                alpha=_LIGHTER if pale else 1,
            )
            for bar, which, value in zip(drawn, names, values, strict=True):
                bar.set_gid(f"{TITLE}{which}: {part}{value:,.3g} {unit}")
            start = [a + b for a, b in zip(start, values, strict=True)]
        axes.bar_label(drawn, written, padding=3, fontsize=9)
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(totals) or 1)
        axes.set_xlabel(
            f"{title.partition(' (')[0].lower() if unit != 's' else 'seconds'} ({unit})"
        )
        axes.grid(axis="x", alpha=0.3, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return made

    described = f"{title}: " + ", ".join(map(": ".join, zip(names, written, strict=True)))
    return Chart(name, title, inline(name, figure, described))


def further_charts(collected: Collected) -> Iterator[Chart]:
    """Sweeps of other settings, steps and heat maps, as the PNG files show them.

    Raises:
        RelockError: A heat map is malformed; this comes after all the others.
    """
    rows, runs = collected.rows, collected.runs
    drawn = chain(sweeps.figures(rows), steps.figures(rows), heatmaps.figures(runs))
    for number, (stem, figure) in enumerate(drawn):
        name, title = f"further-{number}", stem.replace("_", " ")
        yield Chart(name, title, _printed(name, figure, title), wide=True)


def _printed(name: str, figure: Figure, title: str) -> str:
    return inline(name, lambda: figure, f"{title}; see {title.replace(' ', '_')}.png", themed=False)
