"""The report's tables of models: side by side, tests, categories, costs; CSV and Markdown files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.metric_names import MetricName
from evaluation.statistics import Estimate, PairedTest
from experiments.report.columns import (
    COLUMNS,
    TESTS_LEGEND,
    Section,
    legend,
    main_columns,
    paired_columns,
    sections,
)
from experiments.report.cut_rows import cut_rows
from experiments.report.names import differing_labels, distinguishing_labels, is_number, short
from experiments.report.pool import MEASURED, Collected, Row
from experiments.report.table import Cell, Table, as_markdown, as_terminal

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

COST = {
    "prepare_seconds": "prepare",
    "apply_seconds": "apply",
    "peak": "peak memory",
    "share_edited": "edited",
}
_PAGE_COST = {
    "prepare_seconds": "prepare",
    "apply_seconds": "apply",
    "prepare_peak_bytes": "peak, prepare",
    "apply_peak_bytes": "peak, apply",
    "share_edited": "edited",
    "parameters_edited": "parameters edited",
}
_UNBOUNDED = 10_000
_SIGNIFICANT = 0.05
_CATEGORY_LEGEND = (
    "HS of each category of harmful prompts in %, with the 95 % interval and n. As everywhere, "
    "degenerate, unparsed and errored answers are not safe. The colour goes from 0 to 100 %."
)
_COST_LEGEND = (
    "prepare: made once per aligned model. apply: made for each fine-tuned one. Peaks are of "
    "memory above that at the stage's start. All are means over the row's runs."
)


def model_table(
    rows: Sequence[Row],
    columns: Mapping[str, str],
    name: str = "main",
    title: str = "",
    legend: str = "",
    costs: bool = False,
    seeds: bool = True,
    settings_last: bool = False,
    notes: Callable[[Row, str], tuple[str, ...]] = lambda row, metric: (),
) -> Table:
    """Models side by side: of each metric value, interval and n.

    Args:
        rows: The models.
        columns: Metric names and their headings.
        name: The table's.
        title: What it is of.
        legend: What the headings mean.
        costs: Whether what the defense cost stands behind the metrics.
        seeds: Whether the last column says how many seeds are pooled.
        settings_last: Whether settings stand behind the figures, so that a phone shows HS at once.
        notes: What else the page says of a row's metric.
    """
    cells = [[_metric_cell(row, metric, notes(row, metric)) for metric in columns] for row in rows]
    headings = list(columns.values())
    if costs:
        cells = [
            [*line, *(cost_cell(row, cost) for cost in COST)]
            for row, line in zip(rows, cells, strict=True)
        ]
        headings += COST.values()
    return _table(
        rows, headings, cells, name, title, legend, seeds=seeds, settings_last=settings_last
    )


def _table(
    rows: Sequence[Row],
    headings: Sequence[str],
    cells: Sequence[Sequence[Cell]],
    name: str,
    title: str,
    legend: str,
    head: str = "model",
    seeds: bool = True,
    settings_last: bool = False,
) -> Table:
    """A table of models: each one's name and settings, then the given cells."""
    settings = setting_names(rows)
    apart = distinguishing_labels(rows)
    body = []
    for row, what, line in zip(rows, apart, cells, strict=True):
        called = f"{row.name} (broken)" if row.broken else row.name
        named = Cell(called, notes=(what,) if what else (), sort=row.name)
        parts = [[_setting(row, key) for key in settings.values()], list(line)]
        count = [Cell(str(len(row.seeds)), sort=len(row.seeds))] if seeds else []
        body.append([named, *parts[settings_last], *parts[not settings_last], *count])
    groups = [list(settings), list(headings)]
    shown = [head, *groups[settings_last], *groups[not settings_last], *["seeds"][:seeds]]
    return Table(name, title, shown, body, legend, [row.role for row in rows])


def section_table(
    rows: Sequence[Row], section: Section, name: str = "", seeds: bool = True
) -> Table:
    """The table of a section beside the main one."""
    title = (
        section.title[0].upper() + section.title[1:]
        if seeds
        else _title(section.columns, section.title)
    )
    return model_table(rows, section.columns, name, title, section.legend, seeds=seeds)


def difference_tables(rows: Sequence[Row]) -> list[Table]:
    """Defended against attacked, refined against defended, measured against first; Holm's p."""
    firsts = dict.fromkeys(run.names[0] for row in rows for run in row.runs if run.names)
    groups = (
        ("against-attacked", "Against the attacked model", "defended"),
        ("against-defended", "Against the model before it was fine-tuned again", "refined"),
        ("against-first", f"Against {' or '.join(firsts)}", MEASURED),
    )
    tables = []
    for name, title, role in groups:
        shown = [row for row in rows if row.role == role and row.paired]
        columns = paired_columns(shown)
        cells = [[paired_cell(row.paired.get(metric)) for metric in columns] for row in shown]
        if shown:
            headings = list(columns.values())
            head = "model" if role == MEASURED else "defense"
            tables.append(_table(shown, headings, cells, name, title, TESTS_LEGEND, head))
    return tables


def category_table(rows: Sequence[Row]) -> Table | None:
    """HS of every category of harm as a heat map; None where there are no categories."""
    names = sorted({name for row in rows for name in row.metrics if name.startswith("hs/")})
    if not names:
        return None
    shown = [row for row in rows if not row.is_attacked_again]
    columns = {"hs": "all", **{name: MetricName.parse(name).part for name in names}}
    cells = [[_metric_cell(row, metric, hot=True) for metric in columns] for row in shown]
    title = "HS by category of harm"
    return _table(
        shown, list(columns.values()), cells, "categories", title, _CATEGORY_LEGEND, seeds=False
    )


def cost_table(rows: Sequence[Row]) -> Table | None:
    """What every defense cost; None where no defense edited anything."""
    shown = [row for row in rows if row.role == "defended" and row.edited]
    if not shown:
        return None
    cells = [[cost_cell(row, cost) for cost in _PAGE_COST] for row in shown]
    headings, title = list(_PAGE_COST.values()), "Cost of every defense"
    return _table(shown, headings, cells, "cost", title, _COST_LEGEND, "defense")


def cost_cell(row: Row, name: str) -> Cell:
    """One of the defense's costs with its unit; empty for models that no defense made."""
    if not row.cost:
        return Cell()
    peak = max(row.cost["prepare_peak_bytes"], row.cost["apply_peak_bytes"])
    value = {**row.cost, "peak": peak}[name]
    if math.isnan(value):
        return Cell("-")
    if name == "parameters_edited":
        text = f"{value:,.0f}"
    elif name == "share_edited":
        text = f"{100 * value:.2f} %"
    elif name.endswith("_seconds"):
        text = f"{value:,.2f} s"
    else:
        text = f"{value / 1e6:,.0f} MB"
    return Cell(text, sort=value)


def estimate_cell(
    estimate: Estimate | None, unit: str, notes: tuple[str, ...] = (), **marks: Any
) -> Cell:
    """An estimate with its interval and n; a dash where there were no rows."""
    if estimate is None or not estimate.n:
        return Cell("-")
    value, *more = estimate.shown(unit)
    known = not math.isnan(estimate.value)
    sort = estimate.value if known else None
    return Cell(value, tuple(filter(None, more)), notes, sort, **marks if known else {})


def _metric_cell(row: Row, metric: str, notes: tuple[str, ...] = (), hot: bool = False) -> Cell:
    estimate, test = row.metrics.get(metric), row.paired.get(metric)
    starred = test is not None and test.p_holm < _SIGNIFICANT
    heat = estimate.value if hot and estimate is not None else None
    unit = MetricName.parse(metric).unit
    return estimate_cell(estimate, unit, notes, heat=heat, starred=starred)


def paired_cell(test: PairedTest | None) -> Cell:
    """A difference in points with its interval and p-value; a dash where there were no rows."""
    if test is None or not test.n:
        return Cell("-")
    difference, interval, p_value = test.shown()
    return Cell(difference, (f"{interval} ({p_value})".strip(),), sort=test.difference)


def setting_names(rows: Sequence[Row]) -> dict[str, str]:
    """Headings of the varying settings, shortened where that is unambiguous, and of labels."""
    keys = dict.fromkeys(key for row in rows for key in row.settings)
    names = {short(key, keys): key for key in keys}
    return names | {name: name for name in differing_labels(rows)}


def _setting(row: Row, key: str) -> Cell:
    """What a row has of a column of `setting_names`; empty where it doesn't depend on it."""
    value = row.labels.get(key, row.settings.get(key, ""))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return Cell(text, sort=value if is_number(value) else text or None)


def _title(columns: Mapping[str, str], title: str = "", note: str = "") -> str:
    """A table's title in the terminal: what it is of, and what its cells hold."""
    unit = "share in %, its 95 % interval, n"
    if any(not MetricName.parse(name).unit for name in columns):
        unit = "shares in %, other figures as they are, 95 % interval, n"
    heading = ": ".join(filter(None, (title, unit if columns else "")))
    return f"{heading} ({note})" if note else heading


def show(collected: Collected, console: Console) -> None:
    """Prints the table, in parts where the terminal is too narrow, and those of further figures."""
    rows, note = collected.rows, collected.note
    columns, costs = main_columns(rows), any(row.cost for row in rows)
    whole = as_terminal(
        model_table(rows, columns, title=_title(columns, "", note), costs=costs, seeds=False)
    )
    unbounded = console.options.update(max_width=_UNBOUNDED)
    if console.measure(whole, options=unbounded).maximum <= console.width:
        console.print(whole)
    else:
        show_parts(rows, console, note)
        if costs:
            title = _title({}, "cost", note)
            console.print(as_terminal(model_table(rows, {}, title=title, costs=True, seeds=False)))
    show_sections(rows, console)
    for sentence in cut_rows(collected.runs):
        console.print(sentence, highlight=False, soft_wrap=True)


def show_parts(
    rows: Sequence[Row], console: Console, note: str = "", left_out: Sequence[str] = ()
) -> None:
    """Prints the metrics of every report, then those of this one in a table of their own."""
    columns = main_columns(rows)
    asked = {name: head for name, head in columns.items() if name not in (*COLUMNS, *left_out)}
    for part in ({name: head for name, head in columns.items() if name in COLUMNS}, asked):
        if part:
            title = _title(part, "", note)
            console.print(as_terminal(model_table(rows, part, title=title, seeds=False)))


def show_sections(rows: Sequence[Row], console: Console) -> None:
    """Prints the tables beside the main one."""
    for section in sections(rows):
        console.print(as_terminal(section_table(rows, section, seeds=False)))


def frame(collected: Collected) -> pd.DataFrame:
    """The whole table as data: every metric with its interval and n, costs, settings."""
    import pandas as pd

    records = []
    for row in collected.rows:
        record: dict[str, Any] = {"role": row.role, **row.labels, **row.settings}
        record["broken"] = row.broken
        record["seeds"] = " ".join(str(seed) for seed in row.seeds)
        record |= metric_columns(row.metrics)
        for name, test in row.paired.items():
            record |= {
                f"{name}_difference": test.difference,
                f"{name}_difference_low": test.low,
                f"{name}_difference_high": test.high,
                f"{name}_difference_n": test.n,
                f"{name}_p_value": test.p_value,
                f"{name}_p_holm": test.p_holm,
                f"{name}_test": test.test,
            }
        records.append({**record, **row.cost})
    return pd.DataFrame(records)


def metric_columns(metrics: Mapping[str, Estimate]) -> dict[str, float]:
    """Metrics as columns of a CSV: value, interval and n of each."""
    columns: dict[str, float] = {}
    for name, estimate in metrics.items():
        columns[name] = estimate.value
        columns[f"{name}_low"] = estimate.low
        columns[f"{name}_high"] = estimate.high
        columns[f"{name}_n"] = estimate.n
    return columns


def markdown(collected: Collected) -> str:
    """The tables and the paired tests as Markdown, with what their columns mean under them."""
    rows = collected.rows
    columns = main_columns(rows)
    text = as_markdown(model_table(rows, columns, costs=True)) + "\n" + legend(columns, rows)
    note = f"{collected.note[0].upper()}{collected.note[1:]}.\n\n" if collected.note else ""
    beside = [section_table(rows, section) for section in sections(rows)]
    return (
        note
        + "".join(f"{said}.\n\n" for said in collected.unknown)
        + text
        + "".join(map(_under_title, beside))
        + "".join(f"\n{sentence}.\n" for sentence in cut_rows(collected.runs))
        + "".join(_under_title(table, "\n") for table in difference_tables(rows))
    )


def _under_title(table: Table, gap: str = "") -> str:
    return f"\n{table.title}:\n\n{as_markdown(table)}\n{table.legend}"


def write(collected: Collected, folder: Path) -> list[Path]:
    """Writes `table.csv` and `table.md` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "table.csv", folder / "table.md"]
    frame(collected).to_csv(paths[0], index=False)
    paths[1].write_text(markdown(collected), encoding="utf-8")
    return paths
