"""Names of rows, which tell those of a table, figure or sentence apart, and of settings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from experiments.report.pool import Row

LABELS = ("model", "align", "attack", "task", "protocol")
"""The labels that may tell rows apart besides the defense's, which is in every row's name."""


def names(rows: Sequence[Row], without: Collection[str] = ()) -> list[str]:
    """What each row is called among these: its name and, in brackets, what tells it apart.

    `without` are labels and settings that something else says, as an axis does.
    """
    details = distinguishing_labels(rows, without)
    return [
        f"{row.name} ({apart})" if apart else row.name
        for row, apart in zip(rows, details, strict=True)
    ]


def distinguishing_labels(rows: Sequence[Row], without: Collection[str] = ()) -> list[str]:
    """What tells each row from the others: labels, then settings as "ratio=0.1"; "" for a lone row.

    A label or setting tells rows apart that have other values of it, and rows of one name of which
    only some have it; those of `without` are left out.
    """
    labels = [name for name in differing_labels(rows) if name not in without]
    keys = dict.fromkeys(key for row in rows for key in row.settings)
    differing = [key for key in keys if key not in without and _differs(rows, key)]
    return [
        ", ".join(
            [
                *(row.labels[name] for name in labels if row.labels.get(name)),
                *(
                    f"{short(k, keys)}={plain(row.settings[k])}"
                    for k in differing
                    if k in row.settings
                ),
            ]
        )
        for row in rows
    ]


def titles(rows: Sequence[Row]) -> list[str]:
    """Model, attack and task of attacked rows, and what else tells each from the others."""
    labels = dict.fromkeys(("model", "attack", "task", *differing_labels(rows)))
    apart = distinguishing_labels(rows, without=labels)
    return [
        ", ".join(filter(None, [*map(row.labels.get, labels), settings]))
        for row, settings in zip(rows, apart, strict=True)
    ]


def _differs(rows: Sequence[Row], key: str) -> bool:
    if len({repr(row.settings[key]) for row in rows if key in row.settings}) > 1:
        return True
    having: dict[str, set[bool]] = {}
    for row in rows:
        having.setdefault(row.name, set()).add(key in row.settings)
    return any(len(each) > 1 for each in having.values())


def differing_labels(rows: Iterable[Row]) -> list[str]:
    """The labels besides the defense's of which the rows have several values."""
    shown = list(rows)
    return [n for n in LABELS if len({row.labels[n] for row in shown if n in row.labels}) > 1]


def plain(value: Any) -> str:
    """A setting's value as a reader writes it: 0.05, 1e-4, 2000, null."""
    if value is None:
        return "null"
    if not is_number(value):
        return str(value)
    if value and not 1e-2 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_number(value: Any) -> bool:
    """Whether a setting's value is a number; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def short(key: str, keys: Iterable[str]) -> str:
    """The last part of a dotted key, or the whole key where another of `keys` ends alike."""
    last = key.rpartition(".")[2]
    return key if sum(other.rpartition(".")[2] == last for other in set(keys)) > 1 else last
