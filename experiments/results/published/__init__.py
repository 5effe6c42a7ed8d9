"""The papers' own figures (NAME.csv) and set-ups (NAME.yaml), by the experiment they belong to.

A CSV holds one figure per line:

| column | meaning |
|---|---|
| table | the paper's table, or the part of the paper |
| method | what the paper calls the defense |
| defense | our option of `conf/defense`; empty where we have none |
| where | space-separated SETTING=VALUE that our run must have; A=1\\|2 is the mean over both |
| metric | our metric; empty where we measure nothing like it |
| unit | "%" (of a share), "s", "min" or "score" |
| value | as the paper writes it |
| note | what else to know; the reason, where defense or metric is empty |

A YAML holds `paper`, `arxiv`, `table`, what the paper states of its set-up under our dotted names
(`settings`, and `cases` that hold where a run fits a condition, written as `where` is), what is
`unknown` of it, and `notes` on known departures.  A stated value A|B is either of them.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

FOLDER = Path(__file__).resolve().parent
UNITS = ("%", "s", "min", "score")


@dataclass(frozen=True, slots=True)
class PaperFigure:
    """One figure of a paper; the fields are the columns that the module's docstring lists.

    By setting, `where` has the values that a run may have; the figure is the mean over several.
    """

    table: str
    method: str
    defense: str
    where: dict[str, tuple[str, ...]]
    metric: str
    unit: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A paper's table and set-up, as the module's docstring has it.

    `name` is the experiment's, an option of `conf/experiment`; `cases` are settings by condition.
    """

    name: str
    paper: str
    arxiv: str
    table: str
    settings: dict[str, Any]
    cases: dict[str, dict[str, Any]]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]
    figures: tuple[PaperFigure, ...]


def number(text: str) -> float:
    """The number that a text says; NaN where it is a range, a bound or words."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def names() -> list[str]:
    """The experiments that have published figures."""
    return sorted(path.stem for path in FOLDER.glob("*.csv"))


def load(name: str) -> PaperTable:
    """Reads the figures and the set-up that an experiment is held against."""
    setup: Any = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    with (FOLDER / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        lines: list[dict[str, Any]] = list(csv.DictReader(file, strict=True))
    figures = tuple(PaperFigure(**{**e, "where": conditions(e["where"])}) for e in lines)
    lists = {key: tuple(setup.pop(key)) for key in ("unknown", "notes")}
    return PaperTable(name=name, figures=figures, **{"cases": {}, **setup, **lists})


def conditions(text: str) -> dict[str, tuple[str, ...]]:
    """Reads "A=1 B=2|3": by setting, the values that it may have."""
    pairs = (condition.partition("=") for condition in text.split())
    return {name: tuple(values.split("|")) for name, _, values in pairs}
