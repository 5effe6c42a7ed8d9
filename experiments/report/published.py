"""Our figures beside the papers' own, and what differs between the two set-ups.

Every number of ours is computed from stored rows; what differs is computed from the runs' resolved
settings and `experiments/results/published`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.statistics import Estimate
from experiments.report.pool import Collected, Row, Run, collect
from experiments.report.table import Table, as_markdown, as_terminal, text_cell
from experiments.results import published
from experiments.results.published import PaperFigure, PaperTable, conditions, number

if TYPE_CHECKING:
    from rich.console import Console

FILES = ("published.md", "published.csv")

_HEADINGS = ("method", "where", "figure", "paper", "ours", "95 %", "n", "difference", "remark")
# What a share, a time and a mean score are multiplied with to be in a figure's unit.
_SCALE = {"%": 100.0, "s": 1.0, "min": 1 / 60, "score": 1.0}
_ABSENT = "not there"


@dataclass(frozen=True, slots=True)
class ComparedFigure:
    """One figure of a paper and, in its unit, ours; the remark says why there is none."""

    figure: PaperFigure
    ours: Estimate | None
    remark: str

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's, in the figure's unit (points for shares)."""
        theirs = number(self.figure.value)
        return None if self.ours is None or math.isnan(theirs) else self.ours.value - theirs


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting that the paper states otherwise; `case` is under which condition, "" for all."""

    setting: str
    case: str
    paper: str
    ours: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """A published table against the runs of its experiment.

    Its figures are in the paper's order; `stated` counts the settings that it states of such runs.
    """

    published: PaperTable
    lines: tuple[ComparedFigure, ...]
    differences: tuple[Difference, ...]
    stated: int


def comparisons(collected: Collected) -> list[Comparison]:
    """One comparison per published table whose experiment is among the runs.

    Runs on the validation split are left out: the paper's figures are of test prompts.
    """
    found = []
    for name in published.names():
        runs = [
            run
            for run in collected.runs
            if run.record.labels.get("experiment") == name and not run.validates
        ]
        if not runs:
            continue
        mine = collected if len(runs) == len(collected.runs) else collect(r.folder for r in runs)
        paper = published.load(name)
        lines = tuple(_line(figure, mine.rows) for figure in paper.figures)
        found.append(Comparison(paper, lines, *differences(paper, runs)))
    return found


def differences(paper: PaperTable, runs: Sequence[Run]) -> tuple[tuple[Difference, ...], int]:
    """The settings that the runs have otherwise than the paper states, and how many it states."""
    stated, differing = 0, []
    for case, settings in {"": paper.settings, **paper.cases}.items():
        fitting = [run for run in runs if holds(run, conditions(case))]
        for setting, value in settings.items() if fitting else ():
            stated += 1
            theirs = _text(value)
            ours = sorted({_text(run.flat.get(setting, _ABSENT)) for run in fitting})
            if not all(_allowed(one, theirs.split("|")) for one in ours):
                differing.append(Difference(setting, case, theirs, ", ".join(ours)))
    return tuple(differing), stated


def _line(figure: PaperFigure, rows: Sequence[Row]) -> ComparedFigure:
    if not figure.defense or not figure.metric:
        return ComparedFigure(figure, None, figure.note)
    estimates, missing = [], []
    for values in product(*figure.where.values()):
        condition = {name: (value,) for name, value in zip(figure.where, values, strict=True)}
        fitting = [
            row for row in rows if _is_of(row, figure.defense) and holds(row.runs[0], condition)
        ]
        if len(fitting) > 1:
            return ComparedFigure(figure, None, _ambiguous(fitting))
        if not fitting:
            apart = {name: condition[name] for name in condition if len(figure.where[name]) > 1}
            missing.append(_written(apart))
            continue
        estimate = _measured(fitting[0], figure.metric)
        if estimate is None:
            note = f"; {figure.note}" if figure.note else ""
            return ComparedFigure(figure, None, f"{figure.metric} wasn't measured{note}")
        estimates.append(estimate)
    if not estimates:
        none = f"no run of defense={figure.defense} {_written(figure.where)}"
        return ComparedFigure(figure, None, none)
    without = f"without {', '.join(missing)}, of which there is no run" if missing else ""
    remark = "; ".join(filter(None, (figure.note, without)))
    return ComparedFigure(figure, _mean(estimates, figure.unit), remark)


def _is_of(row: Row, defense: str) -> bool:
    # No defense leaves the attacked model, whichever ones the runs went on to.
    if defense == "none":
        return row.role == "attacked"
    return row.role == "defended" and row.labels["defense"] == defense


def holds(run: Run, condition: Mapping[str, Sequence[str]]) -> bool:
    """Whether a run has one of the values of every setting, or of every label such as "attack"."""
    known = {**run.record.labels, **run.flat}
    return all(
        name in known and _allowed(_text(known[name]), values) for name, values in condition.items()
    )


def _allowed(value: str, allowed: Sequence[str]) -> bool:
    return value in allowed or any(number(value) == number(other) for other in allowed)


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _written(condition: Mapping[str, Sequence[str]]) -> str:
    return " ".join(f"{name}={'|'.join(values)}" for name, values in condition.items())


def _ambiguous(rows: Sequence[Row]) -> str:
    names = [
        name
        for name in dict.fromkeys(name for row in rows for name in (*row.settings, *row.labels))
        if len({_text((row.settings | row.labels).get(name)) for row in rows}) > 1
    ]
    return f"{len(rows)} models fit it ({', '.join(names)} differ); report their runs apart"


def _measured(row: Row, metric: str) -> Estimate | None:
    """A metric, a cost, a figure of the defense's report, or the share that one step edited."""
    if metric in row.metrics:
        estimate = row.metrics[metric]
        return None if math.isnan(estimate.value) else estimate
    kind, _, step = metric.partition("/")
    values = []
    for run in row.runs:
        record = run.record
        shares = {entry["name"]: entry["share"] for entry in record.steps}
        known = {**record.defense["prepare"], **record.cost}
        values.append(shares.get(step) if step and kind == "share_edited" else known.get(metric))
    numbers = [value for value in values if isinstance(value, int | float)]
    if not numbers or len(numbers) < len(values):
        return None
    return Estimate(sum(numbers) / len(numbers), math.nan, math.nan, len(numbers))


def _mean(estimates: Sequence[Estimate], unit: str) -> Estimate:
    """The mean with equal weights, in `unit`.

    The interval's ends are the means of the intervals' ends: models that were asked the same
    prompts don't err independently, so the mean's interval is taken to be no narrower than theirs.
    """
    value, low, high = (
        _SCALE[unit] * sum(getattr(estimate, end) for estimate in estimates) / len(estimates)
        for end in ("value", "low", "high")
    )
    return Estimate(value, low, high, sum(estimate.n for estimate in estimates))


def show(found: Iterable[Comparison], console: Console) -> None:
    """Prints every comparison: figures, what differs, what isn't known."""
    for comparison in found:
        console.print(as_terminal(table(comparison)))
        for sentence in sentences(comparison):
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def write(found: Sequence[Comparison], folder: Path) -> list[Path]:
    """Writes `published.md` and `published.csv` to `folder` where there is a comparison."""
    import pandas as pd

    if not found:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    document, figures = (folder / name for name in FILES)
    document.write_text("\n".join(map(_markdown, found)), encoding="utf-8")
    frame = pd.DataFrame([_record(each, line) for each in found for line in each.lines])
    # Whole numbers, although a dash's n is missing.
    frame.astype({"n": "Int64"}).to_csv(figures, index=False)
    return [document, figures]


def table(comparison: Comparison) -> Table:
    """The papers' figures with ours; a remark that the line above has too isn't repeated."""
    paper = comparison.published
    rows = [_cells(comparison, line) for line in comparison.lines]
    for above, row in reversed(list(pairwise(rows))):
        if (row[0], row[-1]) == (above[0], above[-1]):
            row[-1] = ""
    title = f"{paper.name}: {paper.table} of {paper.paper} (arXiv {paper.arxiv})"
    body = [[text_cell(text) for text in row] for row in rows]
    return Table(f"published-{paper.name}", title, _HEADINGS, body)


def _cells(comparison: Comparison, line: ComparedFigure) -> list[str]:
    figure, ours = line.figure, line.ours
    # Our metric's name, or the paper's table where we have none.
    name = figure.metric or f"({figure.table})"
    start = [figure.method, _apart(comparison, figure), name, f"{figure.value} {figure.unit}"]
    if ours is None:
        return [*start, "-", "", "", "", line.remark]
    digits = 2 if line.difference is None else max(1, len(figure.value.partition(".")[2]))
    interval = "" if math.isnan(ours.low) else f"{ours.low:.{digits}f}–{ours.high:.{digits}f}"
    change = "" if line.difference is None else f"{line.difference:+.{digits}f}"
    return [*start, f"{ours.value:.{digits}f}", interval, str(ours.n), change, line.remark]


def _apart(comparison: Comparison, figure: PaperFigure) -> str:
    """The conditions that not all figures of the table share; several values are a mean."""
    every = [line.figure.where for line in comparison.lines]
    parts = []
    for name, values in figure.where.items():
        last = name.rpartition(".")[2]
        if any(where.get(name) != values for where in every):
            several = len(values) > 1
            parts.append(
                f"mean of {last} {', '.join(values)}" if several else f"{last}={values[0]}"
            )
    return " ".join(parts)


def sentences(comparison: Comparison) -> list[str]:
    """What differs, what isn't known, and what is known to be otherwise."""
    paper = comparison.published
    differing = comparison.differences
    lines = [
        f"What differs: {len(differing)} of the {comparison.stated} settings that the paper states."
    ]
    for each in differing:
        case = f" ({each.case})" if each.case else ""
        lines.append(
            f"- {each.setting}{case}: {each.paper} in the paper, {each.ours} in these runs"
        )
    for head, sentences in (("Not known:", paper.unknown), ("Notes:", paper.notes)):
        if sentences:
            lines += [head, *(f"- {sentence}" for sentence in sentences)]
    return lines


def _markdown(comparison: Comparison) -> str:
    shown = table(comparison)
    text = "\n".join(
        sentence if sentence.startswith("- ") else f"\n{sentence}\n"
        for sentence in sentences(comparison)
    )
    return f"## {shown.title}\n\n{as_markdown(shown)}\n{LEGEND}{text}\n"


LEGEND = """Ours with its 95 % interval and n, in the paper's unit; differences are ours minus \
the paper's, in points for shares. The interval of a mean is the mean of its parts' intervals, n \
is their sum. The papers give no intervals.
"""


def _record(comparison: Comparison, line: ComparedFigure) -> dict[str, Any]:
    figure, ours = line.figure, line.ours
    return {
        "experiment": comparison.published.name,
        "table": figure.table,
        "method": figure.method,
        "defense": figure.defense,
        "where": _written(figure.where),
        "metric": figure.metric,
        "unit": figure.unit,
        "paper": figure.value,
        "ours": ours and ours.value,
        "low": ours and ours.low,
        "high": ours and ours.high,
        "n": ours and ours.n,
        "difference": line.difference,
        "remark": line.remark,
    }
