"""Heat maps that a defense puts into the diagnostics of its apply stage, under "maps"."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from experiments.report.pool import Run
from experiments.report.style import is_number, plain, short
from settings import RelockError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEXTS = ("name", "title", "rows", "columns", "unit")
_FIELDS = {*_TEXTS, "values", "marked"}
_SECTIONS = ("defense", "attack", "align", "model", "sources", "evaluation", "seed")
_MOST_TICKS = 14
# How many settings may name a map before a number does.
_MOST_NAMED = 3


@dataclass(frozen=True)
class Map:
    """One heat map.

    Attributes:
        name: Names the file; letters, digits, "_", "-".
        title: What the figure is called, and what its marked cells are.
        rows: What a row of `values` is, e.g. "layer".
        columns: What a column is, e.g. "head".
        unit: The unit that `values` are in: "%" or "".
        values: (rows, columns).
        marked: Row and column of the cells to outline.
    """

    name: str
    title: str
    rows: str
    columns: str
    unit: str
    values: list[list[float]]
    marked: list[list[int]]

    @classmethod
    def of(cls, given: Any, where: str) -> Map:
        """A map as the record holds it.

        Args:
            given: What the defense gave.
            where: The run, for the error.

        Raises:
            RelockError: It isn't a map.
        """
        problem = _problem(given)
        if problem:
            raise RelockError(f"the record in {where} holds a heat map that {problem}")
        return cls(**{"marked": [], **given})


def _problem(given: Any) -> str | None:
    """What is wrong with a map, as the end of a sentence."""
    if not isinstance(given, dict):
        return "is no mapping; give name, title, rows, columns, unit, values and marked"
    wrong = sorted(map(str, (given.keys() ^ _FIELDS) - {"marked"}))
    if wrong:
        return f"lacks or shouldn't have {', '.join(wrong)}"
    for field in _TEXTS:
        if not isinstance(given[field], str):
            return f"has no text as its {field}; write a string"
    if not re.fullmatch(r"[\w-]+", given["name"], re.ASCII):
        return f"is named {given['name']!r}; use letters, digits, _ and - only"
    return _problem_of_cells(given)


def _problem_of_cells(given: dict[str, Any]) -> str | None:
    name, values, marked = given["name"], given["values"], given.get("marked", [])
    if not (isinstance(values, list) and values and all(isinstance(row, list) for row in values)):
        return f"({name}) has no values; give a list of rows, each a list of numbers"
    if not values[0] or len({len(row) for row in values}) > 1:
        return f"({name}) has rows of different lengths or empty ones; give a full rectangle"
    if not all(is_number(value) and math.isfinite(value) for row in values for value in row):
        return f"({name}) has a value that is no finite number; give numbers only"
    inside = isinstance(marked, list) and all(
        isinstance(cell, list)
        and len(cell) == 2
        and all(isinstance(index, int) and not isinstance(index, bool) for index in cell)
        and 0 <= cell[0] < len(values)
        and 0 <= cell[1] < len(values[0])
        for cell in marked
    )
    if not inside:
        return f"({name}) marks a cell that isn't there; give [row, column] counted from 0"
    return None


def figures(runs: Sequence[Run]) -> Iterator[tuple[str, Figure]]:
    """File stem and figure of every distinct map among the runs.

    Raises:
        RelockError: A map is malformed; this comes after all the others were given out.
    """
    found, malformed = _find(runs)
    for name, drawings in found.items():
        names = tell_apart([members for _, members in drawings])
        for (drawn, _), told in zip(drawings, names, strict=True):
            yield file_stem("map", name, told), draw(drawn, told)
    if malformed:
        raise malformed[0]


def file_stem(*parts: str) -> str:
    """A file's name of the parts that aren't empty; values may be paths or text."""
    return "_".join(re.sub(r"[^\w.,=+-]+", "-", part) for part in parts if part)


def _find(
    runs: Sequence[Run],
) -> tuple[dict[str, list[tuple[Map, list[Run]]]], list[RelockError]]:
    """By name, every distinct map with the runs that hold it; and what was wrong with others."""
    found: dict[str, dict[str, tuple[Map, list[Run]]]] = {}
    malformed = []
    for run in runs:
        given = run.record.defense["apply"].get("maps", [])
        try:
            if not isinstance(given, list):
                raise RelockError(f"the record in {run.folder} has maps that are no list of maps")
            for entry in given:
                drawn = Map.of(entry, str(run.folder))
                content = json.dumps(entry, sort_keys=True)
                found.setdefault(drawn.name, {}).setdefault(content, (drawn, []))[1].append(run)
        except RelockError as error:
            malformed.append(error)
    return {name: list(contents.values()) for name, contents in found.items()}, malformed


def tell_apart(groups: Sequence[Sequence[Run]]) -> list[str]:
    """What names each group of runs: the fewest settings in which all differ, else a number."""
    if len(groups) == 1:
        return [""]
    known = [[_known(run) for run in group] for group in groups]
    keys = [
        key
        for key in dict.fromkeys(key for group in known for run in group for key in run)
        if all(len({repr(run.get(key)) for run in group}) == 1 for group in known)
        and len({repr(group[0].get(key)) for group in known}) > 1
    ]
    for count in range(1, _MOST_NAMED + 1):
        for chosen in combinations(keys, count):
            names = [
                ",".join(f"{short(key, keys)}={plain(group[0].get(key))}" for key in chosen)
                for group in known
            ]
            if len(set(names)) == len(groups):
                return names
    return [str(number) for number in range(1, len(groups) + 1)]


def _known(run: Run) -> dict[str, Any]:
    """A run's names and settings, those of the defense first."""
    settings = {
        key: run.flat[key]
        for section in _SECTIONS
        for key in run.flat
        if key.partition(".")[0] == section and not key.endswith("_target_")
    }
    names = ("defense", "attack", "task", "model")
    return {name: run.record.labels[name] for name in names} | settings


def draw(drawn: Map, told: str = "") -> Figure:
    """A heat map with its colour bar; marked cells are outlined.

    Args:
        drawn: The map.
        told: What tells it apart from others of its name, for the title.
    """
    from matplotlib.figure import Figure

    height, width = len(drawn.values), len(drawn.values[0])
    size = (min(11.0, max(5.2, 2.4 + 0.13 * width)), min(11.0, max(3.6, 1.6 + 0.13 * height)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(drawn.values, cmap="viridis", aspect="auto", interpolation="nearest")
    named = drawn.name.replace("_", " ")
    scale = f"{named} ({drawn.unit})" if drawn.unit else named
    figure.colorbar(image, ax=axes, label=scale, aspect=30, pad=0.02)
    _outline(axes, drawn.marked)
    axes.set_xlabel(drawn.columns)
    axes.set_ylabel(drawn.rows)
    axes.set_xticks(_ticks(width))
    axes.set_yticks(_ticks(height))
    # Eleven characters of the title's size fit into an inch.
    lines = [*textwrap.wrap(drawn.title, int(11 * size[0])), told.replace(",", ", ")]
    axes.set_title("\n".join(filter(None, lines)), fontsize=10)
    return figure


def _outline(axes: Axes, cells: Sequence[Sequence[int]]) -> None:
    """White on black, which stands out from every colour of the map."""
    from matplotlib.patches import Rectangle

    for colour, thickness in (("black", 2.6), ("white", 1.2)):
        for row, column in cells:
            corner = (column - 0.5, row - 0.5)
            look: dict[str, Any] = {"edgecolor": colour, "linewidth": thickness, "clip_on": False}
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, **look))


def _ticks(count: int) -> list[int]:
    """Round indices below `count`, few enough to read."""
    step = next(
        unit * power
        for power in (10**exponent for exponent in range(9))
        for unit in (1, 2, 5)
        if count <= _MOST_TICKS * unit * power
    )
    return list(range(0, count, step))
