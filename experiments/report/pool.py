"""Reading runs back and pooling them: one row per model that was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.metric_names import HS, MetricName, worst_hs
from evaluation.metrics import compare, summarise
from evaluation.statistics import holm
from experiments.results.record import RECORD, ROWS, Record, broken
from settings import DataError, first_line

if TYPE_CHECKING:
    import pandas as pd

    from evaluation.statistics import Estimate, PairedTest

# What each of a table's rows may depend on besides what the row before it does: sections of the
# settings, or parts of them.
_OWN_SECTIONS: dict[str, tuple[str, ...]] = {
    "base": (
        "model",
        "evaluation",
        "judges",
        "protocol",
        "tasks",
        "prompts",
        "data",
        "sources.harmful",
        "sources.benign",
        "sources.over_refusal",
        "sources.held_out",
        "sources.validation",
    ),
    "aligned": ("align", "sources.sft", "sources.pairs"),
    "attacked": ("attack", "sources.poison"),
    "defended": (
        "defense",
        "sources.calibration",
        "sources.safety_pairs",
        "sources.safety_prompts",
        "sources.utility_prompts",
    ),
    "refined": ("refine",),
}
ROLES = tuple(_OWN_SECTIONS)
"""The models of a run, each made of the one before it."""

MEASURED = "measured"
"""The role of a model that was measured alone; such a run's models are called by what they are."""

_SECTIONS = dict(zip(_OWN_SECTIONS, accumulate(_OWN_SECTIONS.values()), strict=True))
_SECTIONS[MEASURED] = _SECTIONS["base"]
# Labels tell these apart.
_NAMES = ("model.name", "model.alignment", "attack.task", "protocol.name")
_CLASS = "_target_"
# Records of before there was a choice asked the test split.
_SPLIT, _VALIDATION = "evaluation.split", "sources.validation."
_LABELS = {
    "base": ("model", "task", "protocol"),
    "aligned": ("model", "align", "task", "protocol"),
    "attacked": ("model", "align", "attack", "task", "protocol"),
    "defended": ("model", "align", "attack", "task", "defense", "protocol"),
    "refined": ("model", "align", "attack", "task", "defense", "refine", "protocol"),
    MEASURED: ("model", "task", "protocol"),
}
# The model that a row's differences are to.
_AGAINST = {"defended": "attacked", "refined": "defended"}


Identity = tuple[str, tuple[tuple[str, str], ...], tuple[tuple[str, Any], ...]]
"""What rows are pooled by: role, labels and settings."""


@dataclass(frozen=True)
class Run:
    """One run's record and where it lies."""

    folder: Path
    record: Record

    @cached_property
    def rows(self) -> pd.DataFrame:
        """One row per model, prompt set and prompt.

        Raises:
            DataError: The file is gone or damaged.
        """
        import pandas as pd

        try:
            return pd.read_parquet(self.folder / ROWS)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{str(self.folder / ROWS)!r}, of which every figure is computed, can't be read "
                f"({first_line(error)}); copy it again, run it again (experiments.rerun, for a "
                "sweep's job), or leave that folder out"
            ) from error

    @cached_property
    def measured(self) -> pd.DataFrame:
        """The rows without the prompts' text."""
        return self.rows.drop(columns=["prompt", "asked"], errors="ignore")

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The resolved settings by dotted key, without sources that the run's split doesn't ask."""
        flat = {_SPLIT: "test", **dict(_flatten(self.record.settings))}
        if flat[_SPLIT] == "test":
            return {key: flat[key] for key in flat if not key.startswith(_VALIDATION)}
        return flat

    @property
    def names(self) -> tuple[str, ...]:
        """Of a run that only measured, its models; the first is what the others are tested against.

        () of a run that attacked one.
        """
        return tuple(self.record.models) if self.record.labels.get("attack") == "" else ()

    @property
    def validates(self) -> bool:
        """Whether it asked the validation split, whose figures are for choosing settings."""
        return self.flat[_SPLIT] != "test"


@dataclass(frozen=True)
class Row:
    """One line of a table: a model, pooled over seeds.

    Attributes:
        role: One of `ROLES`, or `MEASURED`.
        labels: Names of model, attack, task and defense, as far as they apply.
        settings: The settings that vary among the runs and that this row depends on.
        metrics: By name, over the rows of all seeds, which are its clusters.
        seeds: Seeds pooled.
        runs: One run for each model that is pooled.
        cost: The defense's mean cost; empty for other roles.
        paired: By metric, the test over the same prompts of the same seeds: of defended against
            attacked models, of refined against defended ones, and of measured ones against the
            first of their run. Holm's correction is across the
            rows of one role that edited something and go back to the same attacked row.
        lineage: By role, the identity of the row that this one goes back to, its own included.
    """

    role: str
    labels: dict[str, str]
    settings: dict[str, Any]
    metrics: dict[str, Estimate]
    seeds: tuple[int, ...]
    runs: tuple[Run, ...] = ()
    cost: dict[str, float] = field(default_factory=dict)
    paired: dict[str, PairedTest] = field(default_factory=dict)
    lineage: dict[str, Identity] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its role, or the defense that made it and what came after.

        `names.names` tells rows of one name apart.
        """
        if self.role == MEASURED:
            return self.labels[MEASURED]
        if self.role == "refined":
            return f"{self.labels['defense']}, then {self.labels['refine']}"
        return self.labels["defense"] if self.role == "defended" else self.role

    @property
    def edited(self) -> bool:
        """Whether a defense changed weights: no for a model before any defense, or left alone."""
        return self.role == "refined" or bool(self.cost.get("parameters_edited"))

    @property
    def broken(self) -> str:
        """How its repair broke it, as "accuracy 0"; "" for what works, or that none repaired."""
        test = self.paired.get("accuracy_strict")
        lost = 0.0 if test is None else test.difference
        return broken(self.metrics, lost) if self.edited else ""

    @property
    def one_judge(self) -> bool:
        """Whether its HS and ASR are the same judge's in all its runs, and so the same figure."""
        return bool(self.runs) and all(run.record.one_judge for run in self.runs)

    @property
    def is_attacked_again(self) -> bool:
        """Whether its defense edited nothing, so that it is the attacked model once more."""
        return self.role == "defended" and not self.edited

    @property
    def family(self) -> Identity | None:
        """The identity of the attacked row that it is or goes back to; None before an attack."""
        return self.lineage.get("attacked")

    @property
    def worst(self) -> MetricName:
        """Plain HS or HS under a trigger or attack prompt, whichever is this model's highest.

        Where a defended model is set beside its attacked or aligned one, both are asked what *the
        defended model* is worst under, so that like is compared with like. A chart of many models
        shows each one's own worst.
        """
        return worst_hs(self.metrics) or HS

    @property
    def worst_hs(self) -> Estimate:
        """The figure that `worst` names."""
        return self.metrics[str(self.worst)]


@dataclass(frozen=True)
class Collected:
    """Runs and the table rows that they give."""

    runs: list[Run]
    rows: list[Row]

    @property
    def note(self) -> str:
        """What is to be said of runs that asked the validation split; "" where none did."""
        validating = sum(run.validates for run in self.runs)
        if not validating:
            return ""
        which = "" if validating == len(self.runs) else "rows with split=validation: "
        return f"{which}validation split, for choosing settings and not for results"

    @property
    def unknown(self) -> list[str]:
        """What is to be said of given models, whose training nobody here knows."""
        said = (run.record.unknown_training for run in self.runs)
        return list(dict.fromkeys(filter(None, said)))


def collect(paths: Iterable[Path]) -> Collected:
    """Reads every record under `paths` and pools them.

    Runs that differ only in their seed are pooled; a model that several runs share (the base,
    an attack under several defenses) counts once.
    """
    folders = sorted({record.parent for path in paths for record in Path(path).rglob(RECORD)})
    runs = [Run(folder, Record.read(folder)) for folder in folders]
    varying = _varying(runs)
    groups: dict[Identity, list[Run]] = {}
    for role in ROLES:
        for run in (run for run in runs if not run.names):
            # The model of no defense is the attacked one; a search's trial counts all the same.
            again = run.record.labels["defense"] == "none" and not run.record.objective
            if role in run.record.models and not (role == "defended" and again):
                groups.setdefault(_group(run, role, varying), []).append(run)
    for run in runs:
        for name in run.names:
            groups.setdefault(_group(run, MEASURED, varying, name), []).append(run)
    ordered = sorted(groups.items(), key=lambda item: _place(item[0]))
    rows = [_row(group, members, varying) for group, members in ordered]
    families: dict[tuple[str, Identity | None], list[int]] = {}
    for place, row in enumerate(rows):
        if row.paired:
            families.setdefault((row.role, row.family), []).append(place)
    for family in families.values():
        _correct(rows, family)
    return Collected(runs, rows)


def _correct(rows: list[Row], family: Sequence[int]) -> None:
    """Corrects the p-values of each metric by Holm's method for the number of the family's rows."""
    for metric in dict.fromkeys(metric for place in family for metric in rows[place].paired):
        tested = [place for place in family if metric in rows[place].paired]
        p_values = holm([rows[place].paired[metric].p_value for place in tested])
        for place, p_holm in zip(tested, p_values, strict=True):
            paired = rows[place].paired
            corrected = {metric: replace(paired[metric], p_holm=p_holm)}
            rows[place] = replace(rows[place], paired=paired | corrected)


def _place(group: Identity) -> tuple[Any, ...]:
    """Where a group stands: by role, names ("none" first among defenses), then settings."""
    role, labels, settings = group
    if role == MEASURED:
        return (len(ROLES),)
    names = ["" if value == "none" else value for _, value in labels]
    values = [
        (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))
        for _, value in settings
    ]
    return ROLES.index(role), names, values


def _flatten(node: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{path}.")
        else:
            # As it is written on the command line.
            yield path, f"[{','.join(map(str, value))}]" if isinstance(value, list) else value


def _varying(runs: Sequence[Run]) -> tuple[str, ...]:
    """Settings that differ among runs of the same model, attack or defense, whose they are.

    Two defenses may have settings of one name; that these differ tells nothing of either. A
    setting that only some of the runs have differs too.
    """
    keys = dict.fromkeys(key for run in runs for key in run.flat)
    return tuple(
        key
        for key in keys
        if key not in _NAMES and _is_of(key, _SECTIONS["refined"]) and _differs(key, runs)
    )


def _differs(key: str, runs: Iterable[Run]) -> bool:
    node, _, last = key.rpartition(".")
    if last == _CLASS and _is_of(key, ("defense.settings",)):
        return False  # A stack's order names its parts.
    values: dict[tuple[Any, ...], set[Any]] = {}
    for run in (run for run in runs if run.validates or not key.startswith(_VALIDATION)):
        # Another class has other settings, and is itself the difference.
        kind = None if last == _CLASS else run.flat.get(f"{node}.{_CLASS}")
        labels = run.record.labels
        # What it is a setting of: an attack, a defense, else the model.
        owner = labels.get(key.partition(".")[0], labels.get("model"))
        where = owner, labels.get("protocol"), kind
        values.setdefault(where, set()).add(run.flat.get(key, ...))
    return max(map(len, values.values()), default=0) > 1


def _is_of(key: str, sections: Iterable[str]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def _group(run: Run, role: str, varying: Sequence[str], model: str = "") -> Identity:
    """The identity of a run's model; `model` is what a measured one is called."""
    labels = tuple((name, run.record.labels.get(name, "")) for name in _LABELS[role])
    labels = ((MEASURED, model), *labels) if model else labels
    settings = tuple(
        (key, run.flat[key]) for key in varying if key in run.flat and _is_of(key, _SECTIONS[role])
    )
    return role, labels, settings


def _row(group: Identity, members: Sequence[Run], varying: Sequence[str]) -> Row:
    role, labels, settings = group
    name = dict(labels).get(MEASURED, role)
    # Of runs that share the model, the one whose attack had a further prompt that it was asked.
    most_asked = sorted(members, key=lambda run: len(run.record.metrics.get(name, ())))
    shared = {run.record.models[name]: run for run in most_asked}
    runs = tuple(shared[key] for key in dict.fromkeys(run.record.models[name] for run in members))
    if role == MEASURED:
        first = members[0].names[0]
        return Row(
            role,
            dict(labels),
            dict(settings),
            summarise(pooled(runs, name)),
            tuple(sorted({run.record.seed for run in runs})),
            runs,
            paired=compare(pooled(runs, name), pooled(runs, first)) if name != first else {},
            lineage={role: group},
        )
    # A defense that edited nothing left the attacked model, which isn't tested against itself.
    edited = any(run.record.cost["parameters_edited"] for run in members)
    changed = role == "refined" or (role == "defended" and edited)
    return Row(
        role=role,
        labels=dict(labels),
        settings=dict(settings),
        metrics=summarise(pooled(runs, role)),
        seeds=tuple(sorted({run.record.seed for run in runs})),
        runs=runs,
        cost=_mean_cost(members) if role == "defended" else {},
        paired=compare(pooled(runs, role), pooled(runs, _AGAINST[role])) if changed else {},
        lineage={each: _group(runs[0], each, varying) for each in ROLES[: ROLES.index(role) + 1]},
    )


def pooled(runs: Sequence[Run], model: str) -> pd.DataFrame:
    """The rows of the model of that label in each of the runs, whose number is their `seed`.

    Prompts are left out: no metric reads them.
    """
    import pandas as pd

    frames = [run.measured[run.measured["model"] == model] for run in runs]
    numbered = [rows.assign(seed=number) for number, rows in enumerate(frames)]
    return pd.concat(numbered, ignore_index=True)


def _mean_cost(members: Sequence[Run]) -> dict[str, float]:
    names = members[0].record.cost
    values = {name: [run.record.cost[name] for run in members] for name in names}
    return {
        name: math.nan if None in each else sum(each) / len(each) for name, each in values.items()
    }
