"""An attacked model with the repairs that were tried on it: what may be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.report.pool import Row
from experiments.report.style import plain

_HS = "hs"


@dataclass(frozen=True, slots=True)
class Family:
    """One attacked model, pooled over seeds.

    Attributes:
        attacked: Its row.
        aligned: The row of the model that was attacked.
        repaired: Rows of the defenses that edited it.
    """

    attacked: Row
    aligned: Row
    repaired: list[Row]

    @property
    def name(self) -> str:
        """Model, attack and task, and the settings that tell it from other attacked models."""
        return ", ".join(self.parts)

    @property
    def parts(self) -> list[str]:
        """What its name consists of."""
        labels = {**self.attacked.labels}
        if labels.get("protocol") == "default":
            del labels["protocol"]
        settings = (
            f"{key.rpartition('.')[2]}={plain(value)}"
            for key, value in self.attacked.settings.items()
        )
        return [*filter(None, labels.values()), *settings]


def families(rows: Sequence[Row]) -> list[Family]:
    """One family per attacked row on which HS was measured."""
    found = []
    for attacked in rows:
        if attacked.role != "attacked" or not attacked.metrics[_HS].n:
            continue
        aligned = next(row for row in rows if _shares(row, attacked, "aligned"))
        repaired = [
            row
            for row in rows
            if _shares(row, attacked, "attacked", "defended") and row.cost["parameters_edited"]
        ]
        found.append(Family(attacked, aligned, repaired))
    return found


def apart(found: Sequence[Family]) -> list[str]:
    """What tells each family from the others; "" for a single one."""
    common = set.intersection(*(set(family.parts) for family in found)) if found else set()
    return [", ".join(p for p in family.parts if p not in common) for family in found]


def _shares(row: Row, attacked: Row, model: str, role: str = "") -> bool:
    """Whether it is a row of that role whose runs have one of the attacked row's models.

    One model may be asked in two ways, such as by either split: what labels and settings both rows
    have is the same.
    """
    theirs = {run.record.models[model] for run in attacked.runs}
    same = any(run.record.models[model] in theirs for run in row.runs)
    alike = _agree(row.labels, attacked.labels) and _agree(row.settings, attacked.settings)
    return row.role == (role or model) and same and alike


def _agree(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(other[key] == value for key, value in one.items() if key in other)
