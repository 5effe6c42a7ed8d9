"""Tracking by Weights & Biases' own library; answers to harmful prompts stay local by default."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.record import Record
from settings import RelockError, Settings

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("relock")

_ANSWER_COLUMNS = ["model", "set", "id", "category", "prompt", "answer"]


class NoTracker(Settings):
    """Tracks nothing."""

    def track(self, record: Record, rows: pd.DataFrame, folder: Path, group: str | None) -> str:
        """Says that nothing was tracked."""
        return "W&B: off (tracker=none)"


class WandbTracker(Settings):
    """One W&B run per experiment.

    Attributes:
        project: W&B project.
        entity: W&B user or team; None: the key's own.
        mode: "auto" is online where an API key is set and offline elsewhere.
        group: Runs of one sweep share it; None: the sweep's own name.
        upload_answers: Whether prompts and answers leave this machine.
    """

    project: str = "relock"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    group: str | None = None
    upload_answers: bool = False

    def track(self, record: Record, rows: pd.DataFrame, folder: Path, group: str | None) -> str:
        """Logs config, timings, metrics, tables and figures as one run.

        Args:
            record: The run's record.
            rows: Its rows, uploaded only with `upload_answers`.
            folder: The run's folder; an offline run is written to its `wandb` folder.
            group: The sweep's name, or None for a single run.

        Returns:
            A line for the user: the run's address, or how to sync it.

        Raises:
            RelockError: W&B can't be reached although `mode` is "online".
        """
        import wandb

        online = self.mode == "online" or (self.mode == "auto" and _has_key())
        try:
            return self._track(record, rows, folder, group, online)
        except wandb.Error as error:
            if not online:
                raise
            if self.mode == "online":
                raise RelockError(
                    f"W&B can't be reached ({error}); the record is in {folder}; check the "
                    "key and the network, or set tracker.mode=offline"
                ) from error
            log.warning("W&B can't be reached (%s); tracking offline", error)
            return self._track(record, rows, folder, group, online=False)

    def _track(
        self, record: Record, rows: pd.DataFrame, folder: Path, group: str | None, online: bool
    ) -> str:
        import wandb

        labels = record.labels
        with wandb.init(
            project=self.project,
            entity=self.entity,
            dir=str(folder),
            mode="online" if online else "offline",
            group=self.group or group,
            name="-".join(labels[name] for name in ("model", "attack", "defense")),
            tags=[f"{name}:{value}" for name, value in labels.items() if value],
            config={**record.settings, "labels": labels, "environment": record.environment},
            settings=wandb.Settings(silent=True, console="off"),
        ) as run:
            self._log(run, record, rows, folder)
            place = run.url if online else run.settings.sync_dir
        if online:
            return f"W&B: {place}"
        return f"W&B: offline; to upload it, run: wandb sync {place}"

    def _log(self, run: Any, record: Record, rows: pd.DataFrame, folder: Path) -> None:
        import wandb

        from experiments.report import figures, tables
        from experiments.report.collect import collect

        run.summary.update(summary(record))
        for name, report in (("attack", record.attack), ("refine", record.refine)):
            for point in report.get("loss", []):
                run.log({f"{name}/step": point["step"], f"{name}/loss": point["loss"]})
        collected = collect([folder])
        media: dict[str, Any] = {"results": wandb.Table(dataframe=tables.frame(collected))}
        for path in figures.write(collected, folder / "figures"):
            media[f"figures/{path.stem}"] = wandb.Image(str(path))
        media["stages"] = wandb.Table(
            columns=["name", "key", "seconds", "reused"],
            data=[[s["name"], s["key"], s["seconds"], s["reused"]] for s in record.stages],
        )
        if self.upload_answers:
            media["answers"] = wandb.Table(dataframe=rows[_ANSWER_COLUMNS])
        run.log(media)


def summary(record: Record) -> dict[str, float | None]:
    """The record's figures by slash-separated names: metrics, costs, steps, seconds per stage."""
    values: dict[str, float | None] = {}
    for model, metrics in record.metrics.items():
        for metric, estimate in metrics.items():
            values[f"{model}/{metric}"] = estimate["value"]
            values[f"{model}/{metric}_low"] = estimate["low"]
            values[f"{model}/{metric}_high"] = estimate["high"]
            values[f"{model}/{metric}_n"] = estimate["n"]
    values |= {f"cost/{name}": value for name, value in record.cost.items()}
    for number, step in enumerate(record.steps, start=1):
        values |= {f"steps/{number}/{name}": step[name] for name in ("parameters_edited", "share")}
    seconds: dict[str, float] = {}
    for stage in record.stages:
        seconds[stage["name"]] = seconds.get(stage["name"], 0.0) + stage["seconds"]
    return values | {f"seconds/{name}": value for name, value in seconds.items()}


def _has_key() -> bool:
    """Whether W&B's library finds an API key, without asking for one or checking it."""
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
