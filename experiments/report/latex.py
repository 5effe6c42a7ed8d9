"""The side-by-side table for a paper: booktabs, with every interval."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from evaluation.metric_names import MetricName
from experiments.report.columns import main_columns
from experiments.report.pool import Collected, Row
from experiments.report.table import Cell, Table
from experiments.report.tables import model_table

FILE = "table.tex"

_STAR = "$^{*}$"
# Left out: the CSV has them, and no page is wide enough.
_LEFT_OUT = ("degenerate",)
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def write(collected: Collected, folder: Path) -> Path:
    """Writes `table.tex` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(table(collected.rows, collected.note), encoding="utf-8")
    return folder / FILE


def table(rows: Sequence[Row], note: str = "") -> str:
    """A `table*` of all models: shares in % with their 95 % intervals; n stands in the caption.

    A rule stands between roles; a star marks a difference to the attacked model (for refined
    models: to the one before) whose p-value after Holm's correction is below 0.05.
    """
    rows = [row for row in rows if not row.is_attacked_again]
    columns = {
        name: head
        for name, head in main_columns(rows).items()
        if name not in _LEFT_OUT and _counts(rows, name)
    }
    shown = model_table(rows, columns, name=_label(rows), seeds=False)
    caption = _caption(shown, rows, columns, note)
    body, before = [], ""
    for role, row in zip(shown.roles, shown.rows, strict=True):
        if before and role != before:
            body.append(r"\midrule")
        before = role
        body.append(_line(map(_cell, row)))
    lines = [
        r"% \usepackage{booktabs, graphicx}",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{{shown.name}}}",
        r"\footnotesize",
        # As wide as the text at most.
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{'l' * (len(shown.headings) - len(columns))}{'r' * len(columns)}}}",
        r"\toprule",
        _line(map(escape, shown.headings)),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text that LaTeX sets as it is; line ends become spaces."""
    return "".join(_SPECIAL.get(character, character) for character in " ".join(text.split()))


def _cell(cell: Cell) -> str:
    """A cell with its star and its interval, the first of what stands under it, if there is one."""
    if cell.text == "-" or (cell.more and cell.sort is None):
        return "--"
    interval = cell.more[0].replace("–", ", ") if len(cell.more) > 1 else ""
    said = rf" {{\scriptsize [{interval}]}}" if interval else ""
    return f"{escape(cell.text)}{_STAR if cell.starred else ''}{said}"


def _line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _caption(shown: Table, rows: Sequence[Row], columns: Mapping[str, str], note: str) -> str:
    counts = [f"{escape(head)} {_counts(rows, name)}" for name, head in columns.items()]
    shares = "Shares in \\%"
    if any(not MetricName.parse(name).unit for name in columns):
        shares += ", other figures as they are"
    caption = (
        f"{shares}, with 95 \\% intervals: Wilson's for shares, a bootstrap's for means; over "
        f"several seeds, clustered by seed and prompt. $n$: {'; '.join(counts)}."
    )
    if any(cell.starred for row in shown.rows for cell in row):
        caption += (
            f" {_STAR}: differs from the attacked model (after a further fine-tuning: from the "
            "model before it), $p < 0.05$ after Holm's correction."
        )
    return f"{caption} {escape(note[0].upper() + note[1:])}." if note else caption


def _counts(rows: Sequence[Row], name: str) -> str:
    """How many rows a metric's estimates are of; "" where none has a value."""
    estimates = [row.metrics[name] for row in rows if name in row.metrics]
    counts = {each.n for each in estimates if each.n and not math.isnan(each.value)}
    return "--".join(str(count) for count in sorted({min(counts), max(counts)})) if counts else ""


def _label(rows: Iterable[Row]) -> str:
    """A label without anything that LaTeX reads: of the experiment, or of the models."""
    runs = [run for row in rows for run in row.runs]
    experiments = {run.record.labels.get("experiment", "") for run in runs} - {""}
    names = experiments or {run.record.labels.get("model", "") for run in runs}
    return "tab:" + re.sub(r"[^A-Za-z0-9]+", "-", "-".join(sorted(names))).strip("-")
