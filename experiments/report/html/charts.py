"""The page's charts: of harmfulness and cost, small enough for a phone, and the further figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from experiments.report import harm
from experiments.report.drawing import TITLE, frame, looks
from experiments.report.figures import further
from experiments.report.panels import asked, subject
from experiments.report.pool import Collected, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_ATTACKS = 6
_WIDTH, _BAR, _FRAME = 4.2, 0.24, 0.66
_LIGHTER = 0.45
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart's markup, what names it on the page (letters, digits and "-"), title and note."""

    name: str
    title: str
    svg: str
    note: str = ""


def main_charts(rows: Sequence[Row]) -> list[Chart]:
    """HS against the poison ratio and against accuracy, for up to six attacked models each.

    Models are set against each other only where they were repaired after the same attack.
    """
    note, of = asked(rows), subject(rows)
    charts = []
    for kind, title, draw, shown in (
        ("ratio", harm.BY_RATIO, harm.draw_ratio, harm.ratio_panels(rows)),
        ("trade-off", harm.TRADE_OFF, harm.draw_trade_off, harm.trade_off_panels(rows)),
    ):
        for number, panel in enumerate(shown[:_MOST_ATTACKS]):
            name = f"{kind}-{number}"
            heading = f"{title}: {', '.join(filter(None, (of, panel.title)))}"
            figure = harm.draw_panels(draw, [replace(panel, title="")], harm.NARROW)
            lines = ", ".join(line.name for line in panel.lines)
            described = f"{heading}: {lines}; the tables hold the figures"
            charts.append(Chart(name, heading, inline(name, figure, described), note))
    return charts


def cost_charts(rows: Sequence[Row]) -> list[Chart]:
    """Bars of what each defense costs, mean over its rows: seconds, memory, share edited.

    Memory only where a GPU's allocator counted it: a CPU process's peak depends on its past.
    """
    defended: dict[str, list[Row]] = {}
    for row in rows:
        if row.role == "defended" and row.edited:
            defended.setdefault(row.name, []).append(row)
    if not defended:
        return []
    own = looks(row.name for row in rows)
    colours = {name: own[name]["color"] for name in defended}

    def mean(*costs: str) -> list[float]:
        return [
            sum(max(row.cost[cost] for cost in costs) for row in members) / len(members)
            for members in defended.values()
        ]

    seconds = {"prepare ": mean("prepare_seconds"), "apply ": mean("apply_seconds")}
    charts = [_bars("seconds", "Seconds to prepare (pale) and to apply", colours, seconds, "s")]
    runs = [run for members in defended.values() for row in members for run in row.runs]
    if all(run.record.environment.get("cuda") for run in runs):
        peaks = [peak / 1e6 for peak in mean("prepare_peak_bytes", "apply_peak_bytes")]
        charts.append(_bars("memory", "Peak memory of the GPU", colours, {"": peaks}, "MB"))
    shares = [100 * share for share in mean("share_edited")]
    return [*charts, _bars("edited", "Parameters edited", colours, {"": shares}, "%")]


def _bars(
    stem: str,
    title: str,
    colours: Mapping[str, str],
    parts: Mapping[str, Sequence[float]],
    unit: str,
) -> Chart:
    """Horizontal bars; of two parts the first is paler and stands first."""
    from matplotlib.figure import Figure

    names = list(colours)
    totals = [sum(values) for values in zip(*parts.values(), strict=True)]
    written = [f"{total:,.3g} {unit}" for total in totals]
    figure = Figure(figsize=(_WIDTH, _FRAME + _BAR * len(names)), layout="constrained")
    axes = figure.subplots()
    start = [0.0] * len(names)
    for number, (part, values) in enumerate(parts.items()):
        look: dict[str, Any] = {"height": 0.72, "alpha": _LIGHTER if number < len(parts) - 1 else 1}
        bars = axes.barh(range(len(names)), values, left=start, color=colours.values(), **look)
        for bar, name, value in zip(bars, names, values, strict=True):
            bar.set_gid(f"{TITLE}{name}: {part}{value:,.3g} {unit}")
        start = [a + b for a, b in zip(start, values, strict=True)]
    axes.bar_label(bars, written, padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(totals) or 1)
    axes.set_xlabel(unit)
    frame(axes, per_cent=False)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    described = f"{title}: " + ", ".join(map(": ".join, zip(names, written, strict=True)))
    name = f"cost-{stem}"
    return Chart(name, title, inline(name, figure, described))


def further_charts(collected: Collected) -> Iterator[Chart]:
    """Sweeps of other settings, steps and heat maps, as the PNG files show them.

    Raises:
        RelockError: A heat map is malformed; this comes after all the others.
    """
    for number, drawing in enumerate(further(collected)):
        name = f"further-{number}"
        described = f"{drawing.title}; see {drawing.stem}.png"
        svg = inline(name, drawing.figure, described)
        yield Chart(name, drawing.title, svg, drawing.note)


def inline(name: str, figure: Figure, description: str) -> str:
    """SVG of a figure, without fonts, styles or ids that reach the page.

    Artists whose gid starts with `TITLE` get the rest of it as their `<title>`.

    Args:
        name: Tells it apart from other figures of the page; letters, digits and "-".
        figure: Drawn for white paper.
        description: What it shows, as text; the figures themselves, where they are few.
    """
    import matplotlib

    # A "$" in a name is a dollar sign.
    settings: dict[Any, Any] = {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "text.parse_math": False,
    }
    text = StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(text, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(text.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # What says who made it, and a style sheet that would hold for the whole page.
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        _rename(element, name)
    # Without a size of its own it takes its box's width.
    del root.attrib["width"], root.attrib["height"]
    root.set("role", "img")
    root.set("aria-label", description)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _rename(element: ElementTree.Element, name: str) -> None:
    own = element.attrib.pop("id", "")
    if own.startswith(TITLE):
        title = ElementTree.Element(f"{{{_SVG}}}title")
        title.text = own.removeprefix(TITLE)
        element.insert(0, title)
        element.set("class", "point")
    # Only definitions are referred to.
    elif own and element.tag in {f"{{{_SVG}}}{tag}" for tag in ("path", "clipPath", "image")}:
        element.set("id", f"{name}-{own}")
    for key, value in element.attrib.items():
        if key == f"{{{_XLINK}}}href" and value.startswith("#"):
            element.set(key, f"#{name}-{value[1:]}")
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{name}-"))
