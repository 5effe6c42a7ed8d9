"""The side-by-side table for a paper: booktabs, with every interval."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.report.columns import is_number, main_columns
from experiments.report.pool import Collected, Row
from experiments.report.tables import label, setting, setting_names

if TYPE_CHECKING:
    from evaluation.statistics import Estimate

FILE = "table.tex"

_SIGNIFICANT = 0.05
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

    A star marks a difference to the attacked model (for refined models: to the one before) whose
    p-value after Holm's correction is below 0.05.

    Args:
        rows: The report's.
        note: What the caption says besides.
    """
    # A defense that edited nothing is the attacked model again.
    rows = [row for row in rows if row.role != "defended" or row.cost["parameters_edited"]]
    names = setting_names(rows)
    columns = {
        name: head
        for name, head in main_columns(rows, wide=True).items()
        if name not in _LEFT_OUT and any(_known(row, name) for row in rows)
    }
    head = ["model", *names, *columns.values()]
    body, before = [], ""
    for row in rows:
        if before and row.role != before:
            body.append(r"\midrule")
        before = row.role
        cells = [label(row), *(setting(row, key) for key in names.values())]
        body.append(_line([*map(escape, cells), *(_cell(row, name) for name in columns)]))
    lines = [
        r"% \usepackage{booktabs, graphicx}",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{_caption(rows, columns, note)}}}",
        rf"\label{{{_label(rows)}}}",
        r"\footnotesize",
        # As wide as the text at most.
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{'l' * (1 + len(names))}{'r' * len(columns)}}}",
        r"\toprule",
        _line(map(escape, head)),
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


def _known(row: Row, name: str) -> Estimate | None:
    """The row's estimate of a metric; None where there is nothing to show."""
    estimate = row.metrics.get(name)
    shown = estimate is not None and estimate.n and not math.isnan(estimate.value)
    return estimate if shown else None


def _cell(row: Row, name: str) -> str:
    estimate = _known(row, name)
    if estimate is None:
        return "--"
    scale, digits = (1, 2) if is_number(name) else (100, 1)
    value, low, high = (
        f"{scale * end:.{digits}f}" for end in (estimate.value, estimate.low, estimate.high)
    )
    test = row.paired.get(name)
    star = _STAR if test is not None and test.p_holm < _SIGNIFICANT else ""
    interval = "" if math.isnan(estimate.low) else rf" {{\scriptsize [{low}, {high}]}}"
    return f"{value}{star}{interval}"


def _line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _caption(rows: Sequence[Row], columns: Mapping[str, str], note: str) -> str:
    counts = [f"{escape(head)} {_counts(rows, name)}" for name, head in columns.items()]
    shares = "Shares in \\%"
    if any(is_number(name) for name in columns):
        shares += ", other figures as they are"
    caption = (
        f"{shares}, with 95 \\% intervals: Wilson's for shares, a bootstrap's for means; over "
        f"several seeds, clustered by seed and prompt. $n$: {'; '.join(counts)}."
    )
    if any(_STAR in _cell(row, name) for row in rows for name in columns):
        caption += (
            f" {_STAR}: differs from the attacked model (after a further fine-tuning: from the "
            "model before it), $p < 0.05$ after Holm's correction."
        )
    return f"{caption} {escape(note[0].upper() + note[1:])}." if note else caption


def _counts(rows: Sequence[Row], name: str) -> str:
    counts = {estimate.n for row in rows if (estimate := _known(row, name))}
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}--{high}"


def _label(rows: Iterable[Row]) -> str:
    """A label without anything that LaTeX reads: of the experiment, or of the models."""
    runs = [run for row in rows for run in row.runs]
    experiments = {run.record.labels.get("experiment", "") for run in runs} - {""}
    names = experiments or {run.record.labels.get("model", "") for run in runs}
    return "tab:" + re.sub(r"[^A-Za-z0-9]+", "-", "-".join(sorted(names))).strip("-")
