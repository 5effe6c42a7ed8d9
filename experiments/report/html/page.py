"""The page itself: what stands on it, and the template's surroundings."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from experiments.report import published, tables
from experiments.report.columns import legend, main_columns, paired_columns, sections
from experiments.report.html import charts, jobs, setup, summary
from experiments.report.pool import Collected, Row, Run
from experiments.report.published import Comparison
from experiments.report.table import Table
from experiments.results.files import write_whole
from settings import RelockError

FILE = "report.html"

_CHANGES = "+changes"
_DELTA = (
    "Δ: difference to the attacked model in points (of a model that was fine-tuned again: to the "
    "one before), with Holm's p. "
)
_PAPER = "paper: the paper's figure for just this row; its HS counts flagged answers only. "
# What papers report in a metric's place.
_PAPERS = {"hs": "hs_flagged"}


def write(
    collected: Collected,
    comparisons: Sequence[Comparison],
    paths: Sequence[Path],
    folder: Path,
    *,
    shared: bool = False,
) -> Path:
    """Writes `report.html` to `folder`: one file that asks for no other.

    Args:
        collected: The runs and their rows; none where all jobs failed.
        comparisons: The papers' figures beside ours.
        paths: The folders that were asked for; their failed jobs are listed.
        folder: Where the page goes.
        shared: Whether it leaves this machine: `paths` are then their last names alone, and of
            failed jobs it has neither reason nor command line.

    Raises:
        RelockError: A heat map of a run is malformed; the page has been written without it.
    """
    from markupsafe import Markup

    further: list[charts.Chart] = []
    malformed = None
    try:
        further.extend(charts.further_charts(collected))
    except RelockError as error:
        malformed = error
    rows, runs = collected.rows, collected.runs
    style, script = (
        (files("experiments.report.html") / name).read_text("utf-8")
        for name in ("page.css", "page.js")
    )
    failures = jobs.failures(paths)
    times = sorted(run.record.created.removesuffix("Z").replace("T", " ")[:16] for run in runs)
    if shared:
        failures = [jobs.Failure(each.name, "its status.json says why", "") for each in failures]
    context = {
        **_tables(rows, comparisons),
        "title": setup.title(runs) or ", ".join(path.resolve().name for path in paths),
        "setup": setup.setup(runs),
        "sources": [path.resolve().name if shared else str(path) for path in paths],
        "runs": jobs.commands(runs, folder, shared=shared),
        "failures": failures,
        "span": " to ".join(f"{time} UTC" for time in dict.fromkeys(times[:1] + times[-1:])),
        "notes": [*_notes(runs), *(f"{said}." for said in collected.unknown)],
        "findings": summary.findings(rows),
        "charts": charts.main_charts(rows),
        "cost_charts": charts.cost_charts(rows),
        "further": further,
        "commits": _commits(runs),
        # Ours, and free of what a user wrote.
        "style": Markup(style),
        "script": Markup(script),
        "policy": _policy(script),
    }
    write_whole(folder / FILE, _template().render(context))
    if malformed:
        raise malformed
    return folder / FILE


def _tables(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    if not rows:
        return {"main": None}
    return {
        "main": _main_table(rows, comparisons),
        "differences": tables.difference_tables(rows),
        "sections": [
            tables.section_table(rows, section, f"section-{number}")
            for number, section in enumerate(sections(rows))
        ],
        "categories": tables.category_table(rows),
        "cost": tables.cost_table(rows),
        "published": [(published.table(each), published.sentences(each)) for each in comparisons],
        "papers": published.LEGEND,
    }


def _main_table(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> Table:
    """The side-by-side table with differences and the papers' figures, settings behind figures."""
    columns = main_columns(rows)
    table = tables.model_table(
        rows,
        columns,
        title="Shares in %, under them the 95 % interval and n",
        settings_last=True,
        notes=lambda row, metric: tuple(
            filter(None, (_against(row, metric), _paper(row, metric, comparisons)))
        ),
    )
    notes = [note for row in table.rows for cell in row[1:] for note in cell.notes]
    said = legend(columns, rows)
    for start, meaning in (("Δ", _DELTA), ("paper", _PAPER)):
        if any(note.startswith(start) for note in notes):
            said += meaning
    return replace(table, legend=said)


def _against(row: Row, metric: str) -> str:
    """The difference to the attacked or, for a refined one, to the defended model, and its p."""
    test = row.paired.get(metric)
    if test is None or not test.n or math.isnan(test.p_holm) or metric not in paired_columns([row]):
        return ""
    difference, _, p_value = test.shown()
    return f"Δ {difference}, {p_value.removesuffix(', Holm')}"


def _paper(row: Row, metric: str, comparisons: Sequence[Comparison]) -> str:
    """The paper's figure of the row's metric, where the paper gives one for just this row."""
    if row.role not in ("attacked", "defended") or row.runs[0].validates:
        return ""
    defense = "none" if row.role == "attacked" else row.labels["defense"]
    for comparison in comparisons:
        for figure in (line.figure for line in comparison.lines if line.ours):
            single = all(len(values) == 1 for values in figure.where.values())
            same = figure.metric in (metric, _PAPERS.get(metric)) and figure.defense == defense
            if single and same and published.holds(row.runs[0], figure.where):
                return f"paper {figure.value}"
    return ""


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("experiments.report.html", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # An SVG's text was escaped when it was written.
    environment.filters["markup"] = Markup
    # Minus signs in place of the hyphens before numbers.
    environment.filters["signed"] = lambda text: re.sub(r"(?<!\w)-(?=\d)", "−", text)
    return environment.get_template("page.html.jinja")


def _policy(script: str) -> str:
    """A content security policy that lets this script run and nothing be fetched."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _commits(runs: Sequence[Run]) -> dict[str, int]:
    """How many runs each commit made."""
    commits = [run.record.environment.get("commit") or "unknown" for run in runs]
    return {commit: commits.count(commit) for commit in commits}


def _notes(runs: Sequence[Run]) -> list[str]:
    """What a reader should know before comparing anything."""
    notes = []
    commits = _commits(runs)
    if len(commits) > 1:
        notes.append(
            f"These runs were made by {len(commits)} versions of the project "
            f"({', '.join(commits)}); figures of different ones may not be comparable."
        )
    if any(commit.endswith(_CHANGES) for commit in commits):
        notes.append(
            "Some runs were made with changes that no commit holds; their commit can't make them "
            "again."
        )
    tuned = sum(run.validates for run in runs)
    if tuned:
        notes.append(
            f"{tuned} of {len(runs)} runs were measured on the validation split that settings are "
            "chosen on. Their figures are no results: measure the chosen settings on the test "
            "split."
        )
    return notes
