"""Panels of the report's figures: the rows that go back to one attack, and the lines they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluation.metric_names import harm_questions
from experiments.report.drawing import Look, looks, tints
from experiments.report.names import LABELS, distinguishing_labels, names
from experiments.report.pool import Row, Run

# With more lines in a figure, those of one name become one.
_MOST_NAMED = 14
_DEFAULT_PROTOCOL = "default"

Member = tuple[Row, Run]
"""A run of a row."""


@dataclass(frozen=True)
class Line:
    """What a panel shows in one colour and marker, under one name of the legend."""

    name: str
    look: Look
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """Models that may be set against each other: repaired after the same attack.

    Its title tells the attack from the other panels'; "" for a single one.
    """

    title: str
    lines: list[Line]

    @property
    def rows(self) -> list[Row]:
        """The rows of all its lines."""
        return [row for line in self.lines for row in line.rows]


def panels(
    rows: Sequence[Row], report: Iterable[Row], axis: Collection[str] = (), merged: bool = False
) -> list[Panel]:
    """One panel for each attack; rows of one name that differ in the axis alone are one line.

    Lines of one name are tints of its colour.

    Args:
        rows: What is shown; base and aligned models stand in the panels of their attacks.
        report: All rows of the report, whose names have a colour each.
        axis: Settings that the x axis shows.
        merged: Whether all settings of a defense are one line, as where they are many.
    """
    attacks: dict[Any, Row] = {}
    for row in rows:
        if row.role == "attacked":
            attacks.setdefault(_attack(row, axis), row)
    of_attacks = {key for row in attacks.values() for key in row.settings}
    shown = dict(zip(map(id, rows), names(rows, {*axis, *of_attacks, *LABELS}), strict=True))
    if merged or (not axis and len(set(shown.values())) > _MOST_NAMED):
        counts = Counter(name for name, _ in {(row.name, shown[id(row)]) for row in rows})
        shown = {
            id(row): f"{row.name}, {n} settings" if (n := counts[row.name]) > 1 else row.name
            for row in rows
        }
    look_of = _looks(rows, shown, report)
    titles = distinguishing_labels(list(attacks.values()), axis)
    found = []
    for title, (attack, attacked) in zip(titles, attacks.items(), strict=True):
        lines: dict[str, Line] = {}
        for row in rows:
            if _is_of(row, attack, attacked, axis):
                name = shown[id(row)]
                lines.setdefault(name, Line(name, look_of[name])).rows.append(row)
        found.append(Panel(title, list(lines.values())))
    return found


def _attack(row: Row, axis: Collection[str]) -> Any:
    """What identifies the attack that a row goes back to, but for the axis; None before one."""
    if row.family is None:
        return None
    role, labels, settings = row.family
    return role, labels, tuple(pair for pair in settings if pair[0] not in axis)


def _is_of(row: Row, attack: Any, attacked: Row, axis: Collection[str]) -> bool:
    if row.family is None:
        return row.lineage[row.role] == attacked.lineage.get(row.role)
    return bool(_attack(row, axis) == attack)


def _looks(rows: Sequence[Row], shown: dict[int, str], report: Iterable[Row]) -> dict[str, Look]:
    own = looks(row.name for row in report)
    variants: dict[str, dict[str, None]] = {}
    for row in rows:
        variants.setdefault(row.name, {})[shown[id(row)]] = None
    return {
        variant: look
        for name, known in variants.items()
        for variant, look in zip(known, tints(own[name], len(known)), strict=True)
    }


def subject(rows: Iterable[Row]) -> str:
    """Model, alignment, attack, task and protocol, as far as all these rows have the same."""
    values = [{row.labels.get(name, "") for row in rows if row.family} for name in LABELS]
    common = [each.pop() for each in values if len(each) == 1]
    # An alignment may have its model's name.
    said = dict.fromkeys(value for value in common if value and value != _DEFAULT_PROTOCOL)
    return ", ".join(said)


def asked(rows: Iterable[Row], figure: str = "HS", plainly: str = "; hollow: asked plainly") -> str:
    """What is to be said where harmful prompts were asked in several ways; else ""."""
    questions = [name for row in rows for name in harm_questions(row.metrics)]
    prompts = list(dict.fromkeys(name.attack_prompt for name in questions if name.attack_prompt))
    if not prompts:
        return ""
    ways = " or ".join(["asked plainly", *(f"under {prompt}" for prompt in prompts)])
    return f"{figure} is of what each model is most harmful under, {ways}{plainly}"


def group_names(groups: Sequence[Sequence[Member]]) -> list[str]:
    """What tells groups of runs apart, as "ratio=0.1, seed=2"; "" for a single one."""
    if len(groups) == 1:
        return [""]
    rows = list({id(row): row for group in groups for row, _ in group}.values())
    labels = dict(zip(map(id, rows), distinguishing_labels(rows), strict=True))
    in_common: list[dict[str, None]] = []
    for group in groups:
        parts = [
            dict.fromkeys([row.name, *labels[id(row)].split(", "), f"seed={run.record.seed}"])
            for row, run in group
        ]
        in_common.append({p: None for p in parts[0] if p and all(p in each for each in parts)})
    everywhere = set(in_common[0]).intersection(*in_common)
    found = [", ".join(p for p in parts if p not in everywhere) for parts in in_common]
    if len(set(found)) < len(groups) or "" in found:
        return [str(number) for number in range(1, len(groups) + 1)]
    return found
