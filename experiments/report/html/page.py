"""The page itself: what stands on it, and the template's surroundings."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from experiments.report import published
from experiments.report.html import charts, grid, jobs, summary
from experiments.report.pool import Collected, Row, Run
from experiments.report.published import Comparison
from settings import RelockError

FILE = "report.html"

_CHANGES = "+changes"


def write(
    collected: Collected, comparisons: Sequence[Comparison], paths: Sequence[Path], folder: Path
) -> Path:
    """Writes `report.html` to `folder`: one file that asks for no other.

    Args:
        collected: The runs and their rows; none where all jobs failed.
        comparisons: The papers' figures beside ours.
        paths: The folders that were asked for; their failed jobs are listed.
        folder: Where the page goes.

    Raises:
        RelockError: A heat map of a run is malformed; the page has been written without it.
    """
    from markupsafe import Markup

    further, malformed = _further(collected)
    rows = collected.rows
    script = _text("page.js")
    context = {
        **_tables(rows, comparisons),
        "title": _title(collected.runs, paths),
        "sources": [str(path) for path in paths],
        "runs": jobs.commands(collected.runs, folder),
        "failures": jobs.failures(paths),
        "span": _span(collected.runs),
        "notes": _notes(collected.runs),
        "findings": summary.findings(rows),
        "charts": charts.main_charts(rows),
        "cost_charts": charts.cost_charts(rows),
        "further": further,
        "commits": _commits(collected.runs),
        "versions": _versions(collected.runs),
        # Ours, and free of what a user wrote.
        "style": Markup(_text("page.css")),
        "script": Markup(script),
        "policy": _policy(script),
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{FILE}"
    temporary.write_text(_template().render(context), encoding="utf-8")
    temporary.replace(folder / FILE)
    if malformed:
        raise malformed
    return folder / FILE


def _tables(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "main": grid.main_grid(rows, comparisons) if rows else None,
        "differences": grid.difference_grids(rows),
        "sections": grid.section_grids(rows),
        "categories": grid.category_grid(rows),
        "cost": grid.cost_grid(rows),
        "published": [
            (grid.published_grid(comparison, number), published.sentences(comparison))
            for number, comparison in enumerate(comparisons)
        ],
    }


def _further(collected: Collected) -> tuple[list[charts.Chart], RelockError | None]:
    """The further charts, and what was wrong with one of them."""
    found: list[charts.Chart] = []
    try:
        for chart in charts.further_charts(collected):
            found.append(chart)
    except RelockError as error:
        return found, error
    return found, None


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
    return environment.get_template("page.html.jinja")


def _text(name: str) -> str:
    return (files("experiments.report.html") / name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """A content security policy that lets this script run and nothing be fetched."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _title(runs: Sequence[Run], paths: Sequence[Path]) -> str:
    experiments = {run.record.labels.get("experiment", "") for run in runs} - {""}
    if len(experiments) == 1:
        return experiments.pop()
    return ", ".join(path.resolve().name for path in paths)


def _span(runs: Sequence[Run]) -> str:
    """When the first and the last run ended."""
    times = sorted(run.record.created for run in runs)
    if not times:
        return ""
    first, last = (_time(time) for time in (times[0], times[-1]))
    return first if first == last else f"{first} to {last}"


def _time(created: str) -> str:
    return f"{created.removesuffix('Z').replace('T', ' ')[:16]} UTC"


def _commits(runs: Sequence[Run]) -> dict[str, int]:
    """How many runs each commit made."""
    counts: dict[str, int] = {}
    for run in runs:
        commit = run.record.environment.get("commit") or "unknown"
        counts[commit] = counts.get(commit, 0) + 1
    return counts


def _versions(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Every package's versions among the runs, and Python's and the platform's."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        environment = run.record.environment
        known = {name: environment.get(name) for name in ("python", "platform")}
        for name, version in {**known, **environment.get("packages", {})}.items():
            if version:
                found.setdefault(name, {})[version] = None
    return {name: list(versions) for name, versions in found.items()}


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
