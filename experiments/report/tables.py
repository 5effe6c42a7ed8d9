"""The side-by-side table: for the terminal, as CSV and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.statistics import PairedTest
from experiments.report.columns import (
    ALWAYS,
    COLUMNS,
    LEGEND,
    PAIRED,
    TESTS_LEGEND,
    heading,
    is_number,
    main_columns,
    sections,
)
from experiments.report.names import differing_labels as differing_labels
from experiments.report.pool import Collected, Row
from experiments.results.record import Record

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from evaluation.statistics import Estimate

COST = {
    "prepare_seconds": "prepare",
    "apply_seconds": "apply",
    "peak": "peak memory",
    "share_edited": "edited",
}
_UNBOUNDED = 10_000


def show(collected: Collected, console: Console) -> None:
    """Prints the table, in parts where the terminal is too narrow, and those of further figures."""
    whole = terminal_table(collected)
    unbounded = console.options.update(max_width=_UNBOUNDED)
    if console.measure(whole, options=unbounded).maximum <= console.width:
        console.print(whole)
    else:
        _show_parts(collected, console)
        if any(row.cost for row in collected.rows):
            console.print(terminal_table(collected, columns={}, title="cost"))
    for section in sections(collected.rows):
        console.print(terminal_table(collected, False, section.columns, section.title))


def _show_parts(collected: Collected, console: Console, left_out: Sequence[str] = ()) -> None:
    """Prints the metrics of every report, then those of this one in a table of their own."""
    console.print(terminal_table(collected, costs=False))
    columns = main_columns(collected.rows, wide=True)
    asked = {name: head for name, head in columns.items() if name not in (*COLUMNS, *left_out)}
    if asked:
        console.print(terminal_table(collected, costs=False, columns=asked))


def terminal_table(
    collected: Collected,
    costs: bool = True,
    columns: Mapping[str, str] | None = None,
    title: str = "",
) -> Table:
    """A table as `rich` prints it: per cell the share in %, its 95 % interval, and n."""
    from rich.table import Table

    names = setting_names(collected.rows)
    columns = main_columns(collected.rows, wide=costs) if columns is None else columns
    unit = "share in %, its 95 % interval, n"
    if any(is_number(name) for name in columns):
        unit = "shares in %, other figures as they are, 95 % interval, n"
    heading = ": ".join(part for part in (title, unit if columns else "") if part)
    if collected.note:
        heading += f" ({collected.note})"
    table = Table(title=heading, title_justify="left", header_style="bold")
    for head in ["model", *names, *columns.values()]:
        table.add_column(head, overflow="fold")
    shown = COST if costs else {}
    for head in shown.values():
        table.add_column(head, justify="right")
    for row in collected.rows:
        table.add_row(
            label(row),
            *(setting(row, name) for name in names.values()),
            *(_cell(row, name, "\n") for name in columns),
            *(cost_cell(row, name) for name in shown),
        )
    return table


def print_run(collected: Collected, record: Record) -> None:
    """What a single run shows at its end: the models, the steps, and what the defense cost."""
    from experiments.report import steps

    console = terminal()
    _show_parts(collected, console, left_out=ALWAYS)
    for section in sections(collected.rows):
        console.print(terminal_table(collected, False, section.columns, section.title))
    (defended,) = (row for row in collected.rows if row.role == "defended")
    console.print(
        f"{record.labels['defense']}: prepare {cost_cell(defended, 'prepare_seconds')}, "
        f"apply {cost_cell(defended, 'apply_seconds')}, "
        f"peak memory {cost_cell(defended, 'peak')}, "
        f"parameters edited {cost_cell(defended, 'share_edited')} "
        f"({record.cost['parameters_edited']:,} of {record.cost['parameters_total']:,})",
        highlight=False,
    )
    name, refine = record.labels["defense"], record.labels["refine"]
    console.print(f"{name} against attacked: {_paired(record.paired)}", highlight=False)
    if record.paired_refined:
        console.print(
            f"{name}, then {refine} against {name}: {_paired(record.paired_refined)}",
            highlight=False,
        )
    for trajectory in steps.trajectories([defended]):
        console.print(steps.terminal_table(trajectory))


def _paired(tests: Mapping[str, Mapping[str, Any]]) -> str:
    """Differences in points with their intervals and p-values."""
    parts = []
    for metric, head in COLUMNS.items():
        test = PairedTest.of(tests[metric])
        if test.n:
            parts.append(f"{head} {paired_cell(test)}")
    return ", ".join(parts)


def one_line(record: Record) -> str:
    """What one job of a multirun says: HS and accuracy before and after the defense."""
    shown = {"hs": "HS", "accuracy_strict": "accuracy"}
    changes = (
        f"{name} {_per_cent(record, 'attacked', metric)} -> {_per_cent(record, 'defended', metric)}"
        for metric, name in shown.items()
    )
    return f"attacked -> {record.labels['defense']}: {', '.join(changes)}"


def _per_cent(record: Record, model: str, metric: str) -> str:
    value = record.metrics[model][metric]["value"]
    return "-" if value is None else f"{100 * value:.1f}"


def terminal() -> Console:
    """A console that fits the terminal, or is wide enough for any table where there is none."""
    from rich.console import Console

    # Brackets are a user's lists, and no markup.
    console = Console(markup=False)
    return console if console.is_terminal else Console(width=200, soft_wrap=True, markup=False)


def frame(collected: Collected) -> pd.DataFrame:
    """The whole table as data: every metric with its interval and n, costs, settings."""
    import pandas as pd

    records = []
    for row in collected.rows:
        record: dict[str, Any] = {"role": row.role, **row.labels, **row.settings}
        record["seeds"] = " ".join(str(seed) for seed in row.seeds)
        record |= columns_of(row.metrics)
        for name, test in row.paired.items():
            record[f"{name}_difference"] = test.difference
            record[f"{name}_difference_low"] = test.low
            record[f"{name}_difference_high"] = test.high
            record[f"{name}_difference_n"] = test.n
            record[f"{name}_p_value"] = test.p_value
            record[f"{name}_p_holm"] = test.p_holm
            record[f"{name}_test"] = test.test
        records.append({**record, **row.cost})
    return pd.DataFrame(records)


def columns_of(metrics: Mapping[str, Estimate]) -> dict[str, float]:
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
    names = setting_names(rows)
    text = _markdown_table(rows, names, main_columns(rows, wide=True), costs=True) + "\n" + LEGEND
    for section in sections(rows):
        table = _markdown_table(rows, names, section.columns, costs=False)
        text += f"\n{section.title[0].upper()}{section.title[1:]}:\n\n{table}\n{section.legend}"
    note = f"{collected.note[0].upper()}{collected.note[1:]}.\n\n" if collected.note else ""
    return note + text + _tests(rows, names)


def _markdown_table(
    rows: Sequence[Row], names: Mapping[str, str], columns: Mapping[str, str], costs: bool
) -> str:
    shown = COST if costs else {}
    head = ["model", *names, *columns.values(), *shown.values(), "seeds"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = [label(row), *(setting(row, name) for name in names.values())]
        cells += [_cell(row, name, " ") for name in columns]
        cells += [cost_cell(row, name) for name in shown]
        lines.append(_line([*cells, str(len(row.seeds))]))
    return "\n".join(lines) + "\n"


def _tests(rows: Sequence[Row], names: Mapping[str, str]) -> str:
    """Defended models compared with the attacked ones, refined with defended, as Markdown."""
    edited = [row for row in rows if row.cost.get("parameters_edited")]
    refined = [row for row in rows if row.role == "refined"]
    tested = _tested(edited, names, "Against the attacked model:")
    return tested + _tested(refined, names, "Against the model before it was fine-tuned again:")


def _tested(rows: Sequence[Row], names: Mapping[str, str], title: str) -> str:
    if not rows:
        return ""
    further = dict.fromkeys(m for row in rows for m in row.paired if m.startswith("hs:"))
    shown = PAIRED | {metric: heading(metric) for metric in further}
    head = ["defense", *names, *shown.values(), "seeds"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = [label(row), *(setting(row, name) for name in names.values())]
        cells += [paired_cell(row.paired.get(metric)) for metric in shown]
        lines.append(_line([*cells, str(len(row.seeds))]))
    return f"\n{title}\n\n" + "\n".join(lines) + "\n\n" + TESTS_LEGEND


def paired_cell(test: PairedTest | None) -> str:
    """A difference in points with its interval and p-value; a dash where there were no rows."""
    if test is None or test.n == 0:
        return "-"
    difference, interval, p_value = test.shown()
    return " ".join(filter(None, (difference, interval, f"({p_value})")))


def write(collected: Collected, folder: Path) -> list[Path]:
    """Writes `table.csv` and `table.md` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "table.csv", folder / "table.md"]
    frame(collected).to_csv(paths[0], index=False)
    paths[1].write_text(markdown(collected))
    return paths


def label(row: Row) -> str:
    """What a row is called."""
    return row.name


def _cell(row: Row, metric: str, separator: str) -> str:
    return cell(row.metrics.get(metric), separator, metric)


def cell(estimate: Estimate | None, separator: str, metric: str = "") -> str:
    """An estimate with its interval and n; a dash where there were no rows.

    Shares are in per cent; scores, kappas and perplexities as they are.
    """
    if estimate is None:
        return "-"
    return separator.join(filter(None, estimate.shown("" if is_number(metric) else "%")))


def cost_cell(row: Row, name: str) -> str:
    """One of the defense's costs with its unit; empty for models that no defense made."""
    if not row.cost:
        return ""
    if name == "share_edited":
        return f"{100 * row.cost[name]:.2f} %"
    if name == "peak":
        peak = max(row.cost["prepare_peak_bytes"], row.cost["apply_peak_bytes"])
        return f"{peak / 1e6:.0f} MB"
    return f"{row.cost[name]:.2f} s"


def setting_names(rows: Sequence[Row]) -> dict[str, str]:
    """Column heads of the varying settings: the last part of a key where that is unambiguous."""
    keys = dict.fromkeys(key for row in rows for key in row.settings)
    names: dict[str, str] = {}
    for key in keys:
        short = key.rpartition(".")[2]
        ambiguous = sum(other.rpartition(".")[2] == short for other in keys) > 1
        names[key if ambiguous else short] = key
    return names | {name: name for name in differing_labels(rows)}


def setting(row: Row, key: str) -> str:
    """What a row has of a column of `setting_names`; empty where it doesn't depend on it."""
    value = row.labels.get(key, row.settings.get(key, ""))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
