"""A matplotlib figure as SVG that stands inside an HTML page."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from experiments.report.drawing import TITLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


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
    text = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(text, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(text.getvalue())
    _strip(root)
    for element in root.iter():
        _rename(element, name)
    # Without a size of its own it takes its box's width.
    del root.attrib["width"], root.attrib["height"]
    root.set("role", "img")
    root.set("aria-label", description)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


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
