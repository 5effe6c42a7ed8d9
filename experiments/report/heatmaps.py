"""Heat maps that a defense puts into the diagnostics of its apply stage, under "maps"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AllowInfNan, Field, model_validator

from experiments.report.drawing import Drawing, file_stem
from experiments.report.panels import Member, group_names, subject
from experiments.report.pool import Row, Run
from settings import RelockError, Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_TICKS = 14


class Map(Settings):
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

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    title: str
    rows: str
    columns: str
    unit: str
    values: list[list[Annotated[float, AllowInfNan(False)]]]
    marked: list[list[int]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _rectangle(self) -> Self:
        height, width = len(self.values), len(self.values[0]) if self.values else 0
        if not width or any(len(row) != width for row in self.values):
            raise ValueError(
                f"{self.name} has no values or rows of different lengths; give a full rectangle"
            )
        for cell in self.marked:
            if not (len(cell) == 2 and 0 <= cell[0] < height and 0 <= cell[1] < width):
                raise ValueError(
                    f"{self.name} marks a cell that isn't there, {cell}; give [row, column] "
                    "counted from 0"
                )
        return self


def read_maps(run: Run) -> Iterator[Map]:
    """The maps of a run's defense.

    Raises:
        RelockError: The record holds something else under "maps"; after the maps before it.
    """
    given = run.record.defense["apply"].get("maps", [])
    if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
        raise RelockError(f"the record in {run.folder} has maps that are no list of maps")
    for number, entry in enumerate(given):
        try:
            yield Map.validated(entry, f"maps.{number}")
        except RelockError as error:
            message = f"the record in {run.folder} holds a malformed heat map: {error}"
            raise RelockError(message) from None


def figures(rows: Sequence[Row]) -> Iterator[Drawing]:
    """Every distinct map among the runs of the defended models.

    Raises:
        RelockError: A map is malformed; this comes after all the others were given out.
    """
    found: dict[str, dict[str, tuple[Map, list[Member]]]] = {}
    malformed: list[RelockError] = []
    defended = [row for row in rows if row.role == "defended"]
    for member in [(row, run) for row in defended for run in row.runs]:
        try:
            for each in read_maps(member[1]):
                contents = found.setdefault(each.name, {})
                contents.setdefault(each.model_dump_json(), (each, []))[1].append(member)
        except RelockError as error:
            malformed.append(error)
    for name, by_content in found.items():
        groups = [members for _, members in by_content.values()]
        for (each, members), apart in zip(by_content.values(), group_names(groups), strict=True):
            of = ", ".join(filter(None, (subject([row for row, _ in members]), apart)))
            defenses = ", ".join(dict.fromkeys(row.name for row, _ in members))
            title = f"{each.title}: {defenses} on {of}"
            yield Drawing(file_stem("map", name, apart), title, draw(each))
    if malformed:
        raise malformed[0]


def draw(drawn: Map) -> Figure:
    """A heat map with its colour bar; marked cells are outlined."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

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
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(_MOST_TICKS, integer=True, steps=[1, 2, 5, 10]))
    return figure


def _outline(axes: Axes, cells: Sequence[Sequence[int]]) -> None:
    """White on black, which stands out from every colour of the map."""
    from matplotlib.patches import Rectangle

    for colour, thickness in (("black", 2.6), ("white", 1.2)):
        for row, column in cells:
            corner = (column - 0.5, row - 0.5)
            look: dict[str, Any] = {"edgecolor": colour, "linewidth": thickness, "clip_on": False}
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, **look))
