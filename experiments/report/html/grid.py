"""The page's tables: cells with what they are sorted by, built from the report's rows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from evaluation.statistics import Estimate
from experiments.report.columns import (
    LEGEND,
    PAIRED,
    TESTS_LEGEND,
    heading,
    main_columns,
    sections,
)
from experiments.report.pool import Row
from experiments.report.published import HEAD, Comparison, holds, title
from experiments.report.published import table as published_table
from experiments.report.style import is_number
from experiments.report.tables import (
    cell,
    label,
    paired_cell,
    setting,
    setting_names,
)

_CATEGORY = "hs/"
_MAIN_LEGEND = """Δ: difference to the attacked model in points (of a model that was fine-tuned \
again: to the one before), with Holm's p. paper: the paper's figure for just this row; its HS \
counts flagged answers only.
"""
# What papers report in a metric's place.
_PAPERS = {"hs": "hs_flagged"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell.

    Attributes:
        text: What stands out.
        small: What stands under it, line by line.
        by: What its column is sorted by; None comes last.
        heat: A share that colours it, or None.
    """

    text: str
    small: tuple[str, ...] = ()
    by: float | str | None = None
    heat: float | None = None


@dataclass(frozen=True, slots=True)
class Grid:
    """A table.

    Attributes:
        name: Names it on the page; letters, digits and "-".
        caption: What it is of.
        heads: What heads its columns.
        rows: Its rows; the first cell of each heads the row.
        legend: What the heads mean.
        roles: The role of each row's model, where rows are models.
    """

    name: str
    caption: str
    heads: list[str]
    rows: list[list[Cell]]
    legend: str = ""
    roles: list[str] = field(default_factory=list)


def main_grid(rows: Sequence[Row], comparisons: Iterable[Comparison]) -> Grid:
    """The side-by-side table: shares with interval and n, differences, and the papers' figures."""
    names, columns = setting_names(rows), main_columns(rows, wide=True)
    known = list(comparisons)
    body = []
    for row in rows:
        cells = _heads(row, names)
        for metric in columns:
            more = filter(None, (_against(row, metric), _paper(row, metric, known)))
            cells.append(_estimate(row.metrics.get(metric), metric, *more))
        body.append([*cells, _seeds(row)])
    heads = ["model", *names, *columns.values(), "seeds"]
    caption = "Shares in %, under them the 95 % interval and n"
    return Grid("main", caption, heads, body, LEGEND + _MAIN_LEGEND, [row.role for row in rows])


def _against(row: Row, metric: str) -> str:
    """The difference to the attacked or, for a refined one, to the repaired model, and its p."""
    test = row.paired.get(metric)
    if test is None or not test.n or math.isnan(test.p_holm) or metric not in PAIRED:
        return ""
    text, _, rest = paired_cell(test).partition(" ")
    return f"Δ {signed(text)}, {_parts(rest)[1].removesuffix(', Holm')}"


def difference_grids(rows: Sequence[Row]) -> list[Grid]:
    """Repaired against attacked models, refined against repaired ones, with Holm's p."""
    edited = [row for row in rows if row.cost.get("parameters_edited")]
    refined = [row for row in rows if row.role == "refined"]
    groups = (
        ("against-attacked", "Against the attacked model", edited),
        ("against-repaired", "Against the model before it was fine-tuned again", refined),
    )
    return [_differences(name, caption, shown) for name, caption, shown in groups if shown]


def _differences(name: str, caption: str, rows: Sequence[Row]) -> Grid:
    names = setting_names(rows)
    further = dict.fromkeys(m for row in rows for m in row.paired if m.startswith("hs:"))
    columns = PAIRED | {metric: heading(metric) for metric in further}
    body = []
    for row in rows:
        cells = _heads(row, names)
        for metric in columns:
            test = row.paired.get(metric)
            text, _, rest = paired_cell(test).partition(" ")
            small = tuple(part for part in _parts(rest) if part)
            by = None if test is None or not test.n else test.difference
            cells.append(Cell(signed(text), tuple(map(signed, small)), by))
        body.append([*cells, _seeds(row)])
    heads = ["defense", *names, *columns.values(), "seeds"]
    return Grid(name, f"{caption}: points, 95 % interval, p", heads, body, TESTS_LEGEND)


def _parts(rest: str) -> tuple[str, str]:
    """The interval and the p-value of a difference."""
    interval, _, p_value = rest.rpartition("(")
    return interval.strip(), p_value.rstrip(")")


def section_grids(rows: Sequence[Row]) -> list[Grid]:
    """The tables beside the main one: what never counts as safe, further judges, probes."""
    names = setting_names(rows)
    grids = []
    for number, section in enumerate(sections(rows)):
        body = [
            [*_heads(row, names), *(_estimate(row.metrics.get(m), m) for m in section.columns)]
            for row in rows
        ]
        caption = section.title[0].upper() + section.title[1:]
        heads = ["model", *names, *section.columns.values()]
        grids.append(Grid(f"section-{number}", caption, heads, body, section.legend))
    return grids


def category_grid(rows: Sequence[Row]) -> Grid | None:
    """HS of every category of harm as a heat map; None where there are no categories."""
    found = sorted({name for row in rows for name in row.metrics if name.startswith(_CATEGORY)})
    if not found:
        return None
    names = setting_names(rows)
    body = []
    # A defense that edited nothing is the attacked model again.
    for row in (row for row in rows if row.role != "defended" or row.cost["parameters_edited"]):
        cells = _heads(row, names)
        for metric in ("hs", *found):
            estimate = row.metrics.get(metric)
            shown = _estimate(estimate, metric)
            known = estimate is not None and estimate.n and not math.isnan(estimate.value)
            heat = estimate.value if known and estimate else None
            cells.append(Cell(shown.text, shown.small, shown.by, heat))
        body.append(cells)
    heads = ["model", *names, "all", *(name.removeprefix(_CATEGORY) for name in found)]
    legend = (
        "HS of each category of harmful prompts in %, with the 95 % interval and n. As everywhere, "
        "degenerate, unparsed and errored answers are not safe. The colour goes from 0 to 100 %."
    )
    return Grid("categories", "HS by category of harm", heads, body, legend)


def published_grid(comparison: Comparison, number: int) -> Grid:
    """The papers' figures with ours beside them, as `experiments.report.published` has them."""
    body = published_table(comparison)
    rows = [[Cell(signed(text), by=_sorted_by(text)) for text in line] for line in body]
    return Grid(f"published-{number}", title(comparison), list(HEAD), rows)


def cost_grid(rows: Sequence[Row]) -> Grid | None:
    """What every defense cost; None where no defense edited anything."""
    shown = [row for row in rows if row.role == "defended" and row.cost["parameters_edited"]]
    if not shown:
        return None
    names = setting_names(shown)
    columns = {"prepare_peak_bytes": "peak, prepare", "apply_peak_bytes": "peak, apply"}
    body = []
    for row in shown:
        cells = _heads(row, names)
        cells += [_number(row.cost[name], " s", 2) for name in ("prepare_seconds", "apply_seconds")]
        cells += [_number(row.cost[name] / 1e6, " MB", 0) for name in columns]
        cells.append(_number(100 * row.cost["share_edited"], " %", 2))
        cells.append(_number(row.cost["parameters_edited"], "", 0))
        body.append([*cells, _seeds(row)])
    heads = [
        "defense",
        *names,
        "prepare",
        "apply",
        *columns.values(),
        "edited",
        "parameters edited",
    ]
    legend = (
        "prepare: made once per aligned model. apply: made for each fine-tuned one. Peaks are of "
        "memory above that at the stage's start. All are means over the row's runs."
    )
    return Grid("cost", "Cost of every repair", [*heads, "seeds"], body, legend)


def _heads(row: Row, names: Mapping[str, str]) -> list[Cell]:
    """A row's name and what tells it apart."""
    cells = [Cell(label(row), by=label(row))]
    for key in names.values():
        value = row.labels.get(key, row.settings.get(key))
        text = setting(row, key)
        cells.append(Cell(text, by=value if is_number(value) else text or None))
    return cells


def _seeds(row: Row) -> Cell:
    return Cell(str(len(row.seeds)), by=len(row.seeds))


def _number(value: float, unit: str, digits: int) -> Cell:
    return Cell(f"{value:,.{digits}f}{unit}", by=value)


def _estimate(estimate: Estimate | None, metric: str, *more: str) -> Cell:
    if estimate is None or not estimate.n:
        return Cell("–")
    text, *small = cell(estimate, "\n", metric).split("\n")
    if math.isnan(estimate.value):
        return Cell("–", (*small, *more))
    return Cell(signed(text), (signed(", ".join(small)), *more), estimate.value)


def signed(text: str) -> str:
    """The text with minus signs in place of the hyphens before numbers."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def _paper(row: Row, metric: str, comparisons: Iterable[Comparison]) -> str:
    """The paper's figure of the row's metric, where the paper gives one for just this row."""
    if row.role not in ("attacked", "defended") or row.runs[0].validates:
        return ""
    defense = "none" if row.role == "attacked" else row.labels["defense"]
    for comparison in comparisons:
        for figure in (line.figure for line in comparison.lines if line.ours):
            single = all(len(values) == 1 for values in figure.where.values())
            same = figure.metric in (metric, _PAPERS.get(metric)) and figure.defense == defense
            if single and same and holds(row.runs[0], figure.where):
                return f"paper {figure.value}"
    return ""


def _sorted_by(text: str) -> float | str | None:
    """What a cell that holds a figure with a unit, or a name, is sorted by."""
    try:
        return float(text.split()[0]) if text.split() else None
    except ValueError:
        return None if text == "-" else text
