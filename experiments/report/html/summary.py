"""One paragraph on what the runs show, computed from the report's rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evaluation.statistics import Estimate, PairedTest
from experiments.report.html.families import Family, families
from experiments.report.html.grid import signed
from experiments.report.pool import Row
from experiments.report.style import plain
from experiments.report.tables import label, paired_cell

_MOST = 4
_ACCURACY = "accuracy_strict"


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one attacked model.

    Attributes:
        text: The attacked model beside the aligned one.
        restored: Repairs whose HS interval reaches down to the aligned model's, with their cost.
        others: The other repairs.
    """

    text: str
    restored: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def findings(rows: Sequence[Row]) -> list[Finding]:
    """One finding per model, attack and task: of its attacked model with the highest HS."""
    hardest: dict[tuple[str, ...], Family] = {}
    for family in families(rows):
        names = tuple(family.attacked.labels.values())
        known = hardest.get(names)
        if known is None or _hs(family.attacked).value > _hs(known.attacked).value:
            hardest[names] = family
    found = [_finding(family) for family in list(hardest.values())[:_MOST]]
    if len(hardest) > _MOST:
        found.append(Finding(f"{len(hardest) - _MOST} more attacked models stand in the table."))
    return found


def _finding(family: Family) -> Finding:
    before, after = _hs(family.aligned), _hs(family.attacked)
    text = (
        f"The attacked model with the highest HS ({family.name}) has HS {_share(after)} where the "
        f"aligned model has {_share(before)}, and task accuracy "
        f"{_share(family.attacked.metrics[_ACCURACY])}."
    )
    if not before.n:
        return Finding(text)
    if after.low <= before.high:
        text += " The two intervals overlap: there is no measured loss of safety to repair."
        return Finding(text)
    if not family.repaired:
        return Finding(f"{text} No repair was tried on it.")
    good = [row for row in family.repaired if _hs(row).low <= before.high]
    bad = [row for row in family.repaired if row not in good]
    text += (
        f" Of {len(family.repaired)} {'repair' if len(family.repaired) == 1 else 'repairs'}, "
        f"{len(good)} {'brings' if len(good) == 1 else 'bring'} HS down to an interval that "
        "overlaps the aligned model's. The change of accuracy is in points, against the attacked "
        "model."
    )
    return Finding(text, _lines(good), _lines(bad))


def _hs(row: Row) -> Estimate:
    return row.metrics["hs"]


def _lines(rows: Iterable[Row]) -> tuple[str, ...]:
    ordered = sorted(rows, key=lambda row: _hs(row).value)
    return tuple(
        f"{_name(row)}: HS {_share(_hs(row))}, accuracy {_change(row.paired[_ACCURACY])}"
        for row in ordered
    )


def _name(row: Row) -> str:
    settings = [
        f"{key.rpartition('.')[2]}={plain(value)}"
        for key, value in row.settings.items()
        if key.startswith("defense.")
    ]
    return f"{label(row)} ({', '.join(settings)})" if settings else label(row)


def _share(estimate: Estimate) -> str:
    if not estimate.n:
        return "not measured"
    value, low, high = (100 * end for end in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def _change(test: PairedTest) -> str:
    # Below all of them stands whose p-values these are.
    return signed(paired_cell(test)).replace(", Holm", "") if test.n else "not measured"
