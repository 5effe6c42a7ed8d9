"""The page's summary: what became of every attacked model, computed from the report's rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evaluation.metric_names import MetricName, harm_questions
from evaluation.statistics import Estimate
from experiments.report.names import names, titles
from experiments.report.pool import Row

_ACCURACY = "accuracy_strict"


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one attacked model, beside the aligned one.

    `restored` are the defenses whose HS interval reaches down to the aligned model's, with their
    cost in accuracy, `broken` those that broke the model whatever its HS, and `others` the rest.
    """

    title: str
    text: str
    restored: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()


def findings(rows: Sequence[Row]) -> list[Finding]:
    """One finding per attacked model on which HS was measured."""
    attacked = [row for row in rows if row.role == "attacked"]
    return [
        _finding(title, row, rows)
        for title, row in zip(titles(attacked), attacked, strict=True)
        if row.worst_hs.n
    ]


def _finding(title: str, attacked: Row, rows: Sequence[Row]) -> Finding:
    aligned = next(
        row
        for row in rows
        if row.role == "aligned" and row.lineage["aligned"] == attacked.lineage["aligned"]
    )
    text = (
        f"The attacked model has HS {_harm(attacked)} where the aligned model has "
        f"{_harm(aligned, like=attacked)}, and task accuracy {_share(attacked.metrics[_ACCURACY])}."
    )
    defended = [
        r for r in rows if r.role == "defended" and r.family == attacked.family and r.edited
    ]
    if not aligned.metrics["hs"].n:
        return Finding(title, text)
    if _reaches(attacked, aligned):
        text += " The intervals overlap: there is no measured loss of safety to repair."
        return Finding(title, text)
    if not defended:
        return Finding(title, f"{text} No defense was tried on it.")
    called = dict(zip(map(id, defended), names(defended), strict=True))
    broken = [row for row in defended if row.broken]
    working = [row for row in defended if not row.broken]
    good = [row for row in working if _reaches(row, aligned)]
    bad = [row for row in working if not _reaches(row, aligned)]
    however = ", however it is asked," if len(harm_questions(attacked.metrics)) > 1 else ""
    text += (
        f" Of {len(defended)} {'defense' if len(defended) == 1 else 'defenses'}, "
        f"{len(good)} {'brings' if len(good) == 1 else 'bring'} HS down{however} to an interval "
        "that overlaps the aligned model's. The change of accuracy is in points, against the "
        "attacked model."
    )
    return Finding(title, text, *(_lines(each, called) for each in (good, bad, broken)))


def _reaches(row: Row, aligned: Row) -> bool:
    """Whether HS overlaps the aligned model's, asked plainly and under every trigger and prompt."""
    return all(
        row.metrics[str(name)].low <= _at(aligned, name).high
        for name in harm_questions(row.metrics)
    )


def _at(row: Row, question: MetricName) -> Estimate:
    """HS under a question; asked plainly, where the row was not asked so."""
    estimate = row.metrics.get(str(question))
    return estimate if estimate is not None and estimate.n else row.metrics["hs"]


def _harm(row: Row, like: Row | None = None) -> str:
    """HS under what the row (or `like`) is worst under, then under everything else it was asked."""
    asked = like or row
    questions = harm_questions(asked.metrics)
    questions.sort(key=lambda name: -asked.metrics[str(name)].value)
    if len(questions) < 2:
        return _share(row.metrics["hs"])
    worst, *others = (
        f"{_share(_at(row, name))} "
        + (f"under {name.attack_prompt}" if name.attack_prompt else "asked plainly")
        for name in questions
    )
    return f"{worst} ({', '.join(others)})"


def _lines(rows: Iterable[Row], called: dict[int, str]) -> tuple[str, ...]:
    ordered = sorted(rows, key=lambda row: row.worst_hs.value)
    return tuple(
        f"{called[id(row)]}: {row.broken and f'{row.broken}; '}"
        f"HS {_harm(row)}, accuracy {_change(row)}"
        for row in ordered
    )


def _share(estimate: Estimate) -> str:
    if not estimate.n:
        return "not measured"
    value, interval, _ = estimate.shown()
    return f"{value} % [{interval.replace('–', ', ')}]"


def _change(row: Row) -> str:
    test = row.paired[_ACCURACY]
    if not test.n:
        return "not measured"
    difference, interval, p_value = test.shown()
    # Below all of them stands whose p-values these are.
    return f"{difference} {interval} ({p_value.removesuffix(', Holm')})"
