"""A matplotlib figure as SVG that stands inside an HTML page and takes the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from experiments.report.figures import TITLE
from experiments.report.style import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.path import Path

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
INK = "#010203"
"""What is drawn in it takes the colour of the page's text."""

_GRID = "#040506"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    # A "$" in a name is a dollar sign.
    "text.parse_math": False,
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "axes.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
    "grid.color": _GRID,
}


def inline(name: str, draw: Callable[[], Figure], description: str, themed: bool = True) -> str:
    """SVG of the figure that `draw` makes, without fonts, styles or ids that reach the page.

    Artists whose gid starts with `TITLE` get the rest of it as their `<title>`.

    Args:
        name: Tells it apart from other figures of the page; letters, digits and "-".
        draw: Makes the figure.
        description: What it shows, as text; the figures themselves, where they are few.
        themed: Whether it takes the page's colours; else it is drawn for white paper.
    """
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.hashsalt": name,
        **(_SETTINGS if themed else {"svg.fonttype": "none"}),
    }
    text = io.StringIO()
    with matplotlib.rc_context({**settings, "svg.hashsalt": name}):
        draw().savefig(text, format="svg", transparent=themed, metadata={"Date": None})
    root = ElementTree.fromstring(text.getvalue())
    _strip(root)
    for element in root.iter():
        _rename(element, name)
        if themed and "style" in element.attrib:
            element.set("style", _colours(element.attrib["style"]))
    # Without a size of its own it takes its box's width.
    del root.attrib["width"], root.attrib["height"]
    root.set("role", "img")
    root.set("aria-label", description)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def symbol(marker: str) -> str:
    """The `d` of an SVG path of a marker, within a square of 32 around the origin."""
    from matplotlib.markers import MarkerStyle

    style = MarkerStyle(marker)
    path = style.get_path().transformed(style.get_transform())
    return _path(path, 20.0)


def _path(path: Path, scale: float) -> str:
    commands = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}
    # SVG counts downwards.
    return " ".join(
        commands[int(code)]
        + ("" if code == path.CLOSEPOLY else _points(points.reshape(-1, 2) * (scale, -scale)))
        for points, code in path.iter_segments(simplify=False)
    )


def _points(points: Iterable[Iterable[float]]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in points)


def _strip(root: ElementTree.Element) -> None:
    """Takes out what says who made it, and a style sheet that would hold for the whole page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)


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


def _colours(style: str) -> str:
    """A style with the page's colours and font in place of matplotlib's."""
    style = re.sub(r"font-family:[^;]*(;|$)", "", style).replace(INK, "currentColor")
    style = style.replace(_GRID, "var(--faint)")
    for index, (light, _) in enumerate(PALETTE):
        style = style.replace(light.lower(), f"var(--series-{index})")
    return style
