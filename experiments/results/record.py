"""The record of a run: what was asked, what was done, what came out; JSON beside the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.statistics import Estimate, PairedTest
from settings import DataError

if TYPE_CHECKING:
    import pandas as pd


RECORD, ROWS = "record.json", "rows.parquet"
DEGENERATE_LIMIT = 0.2
"""The share of degenerate answers above which a repair has broken its model."""


def broken(metrics: Mapping[str, Estimate], accuracy_change: float) -> str:
    """How a repair broke its model: "accuracy 0", "degenerate 45 %" or both; "" if it didn't.

    Args:
        metrics: The repaired model's.
        accuracy_change: Its strict accuracy less that of the model before, which may have had none
            to lose.
    """
    accuracy, degenerate = metrics["accuracy_strict"].value, metrics["degenerate"].value
    said = ["accuracy 0"] if accuracy == 0 and accuracy_change < 0 else []
    if degenerate > DEGENERATE_LIMIT:
        said.append(f"degenerate {100 * degenerate:.0f} %")
    return ", ".join(said)


@dataclass(frozen=True, slots=True)
class Record:
    """What `record.json` holds.

    Attributes:
        created: When the run ended, UTC; it took `seconds`.
        overrides: The command line's overrides.
        command: What stood before them on it, where that isn't `experiments.run` alone.
        labels: Names of what was chosen: model, align, attack, task, defense, refine, protocol,
            experiment; "" where nothing was.
        settings: The whole resolved configuration.
        models: Content key of base, aligned, attacked and defended model, of those between the
            steps of a defense, and of the refined model where there is one. That of a hub model is
            "id@commit", the revision that was resolved when it ran.
        metrics: Per model and metric: value, low, high (95 %), n; None where there were no rows.
        paired: Per metric, the test of the defended against the attacked model, as
            `evaluation.statistics.PairedTest` has it. Holm's correction is for a family of runs,
            which one run doesn't know.
        cost: The defense's cost: seconds and peak bytes to prepare and to apply, scalars edited.
        paired_refined: The same tests of the refined against the defended model; empty without.
        align: The report of our own alignment by phase, "sft" and "preference": rows or pairs,
            those that were cut or left out, loss curve; empty where the aligned model was given.
        attack: The attack's report: rows by kind, those that were cut at `max_length` or left out,
            loss curve.
        refine: The report of the fine-tuning of the defended model; empty without one.
        defense: The defense's diagnostics of both of its stages.
        stages: Every stage with its key, its seconds and whether it was reused.
        data: Sources with fingerprints and leakage counts.
        judges: What each judge's verdicts depend on, by role ("harm", "refusal") or name: settings,
            and the content hash or "id@commit" of its weights.
        backends: What ran each model: its class and the settings that answers depend on.
        environment: Package versions, commit, machine.
        steps: The steps of a defense that goes in several: name, label of the model after it
            in `metrics` and rows ("defended" for the last), parameters_edited (scalars that this
            step changed and no step before had), share (of all the model's).
        objective: What a search goes by: values, directions, feasible (None without a constraint),
            violation (points), and of, the figures that they were computed from; empty without.
    """

    created: str
    seconds: float
    overrides: list[str]
    labels: dict[str, str]
    seed: int
    settings: dict[str, Any]
    models: dict[str, str]
    metrics: dict[str, dict[str, dict[str, float | None]]]
    paired: dict[str, dict[str, float | str | None]]
    cost: dict[str, Any]
    attack: dict[str, Any]
    defense: dict[str, Any]
    stages: list[dict[str, Any]]
    data: dict[str, Any]
    environment: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    refine: dict[str, Any] = field(default_factory=dict)
    paired_refined: dict[str, dict[str, float | str | None]] = field(default_factory=dict)
    judges: dict[str, Any] = field(default_factory=dict)
    backends: dict[str, dict[str, Any]] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    align: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    @property
    def unknown_training(self) -> str:
        """What is to be said of a given model; "" where the attack was a run's own."""
        given = self.settings.get("attack", {}).get("model")
        if given is None:
            return ""
        return (
            f"{given}: what it was trained on is unknown, so that leakage isn't checked; rows that "
            "the evaluation asks may be among it"
        )

    def estimates(self, model: str) -> dict[str, Estimate]:
        """The figures of one model, by metric."""
        return {name: Estimate.of(figures) for name, figures in self.metrics[model].items()}

    @property
    def broken(self) -> str:
        """How the defense broke the attacked model; "" if it didn't."""
        if not self.cost["parameters_edited"]:
            return ""
        lost = PairedTest.of(self.paired["accuracy_strict"]).difference
        return broken(self.estimates("defended"), lost)

    @property
    def one_judge(self) -> bool:
        """Whether HS and ASR are the same judge's, and so the same figure."""
        return "harm" in self.judges and self.judges["harm"] == self.judges.get("refusal")

    def write(self, folder: Path, rows: pd.DataFrame) -> None:
        """Writes `rows.parquet` and `record.json`, each complete or not at all.

        A record is never there without its own rows, wherever a kill or a full disk ends this.
        """
        folder.mkdir(parents=True, exist_ok=True)
        new_rows, new_record = folder / f".{ROWS}", folder / f".{RECORD}"
        try:
            rows.to_parquet(new_rows, index=False)
            new_record.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")
            (folder / RECORD).unlink(missing_ok=True)  # An earlier run's had other rows.
            new_rows.replace(folder / ROWS)
            new_record.replace(folder / RECORD)
        finally:
            for left in (new_rows, new_record):
                left.unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Reads the record that lies in `folder`.

        Raises:
            DataError: It isn't one, or another version of this project wrote it.
        """
        try:
            return cls(**json.loads((folder / RECORD).read_text()))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{folder / RECORD} is no record that this version reads ({error}); read it with "
                "the commit that it names"
            ) from None
