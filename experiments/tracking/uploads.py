"""Uploads of a sweep to W&B: which of its runs are there, and the run that sums it up."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.report.pool import Collected, Run
from experiments.tracking.wandb_tracker import WandbTracker

log = logging.getLogger("relock")

SUMMARY = "summary"
"""The job type of a sweep's summary run."""

PAGE, POOLED = "report", "pooled"
"""The names under which that run logs the report's page and its table."""

_OFFLINE = "offline-run-*"
_CLASS = f"{WandbTracker.__module__}.{WandbTracker.__qualname__}"


@dataclass(frozen=True)
class Uploads:
    """What was tracked of a sweep.

    Attributes:
        folder: The sweep's folder.
        jobs: How many runs finished.
        untracked: Runs that no W&B run stands for.
        waiting: Runs whose W&B run is offline and was never uploaded.
    """

    folder: Path
    jobs: int
    untracked: tuple[Run, ...]
    waiting: tuple[Run, ...]

    def to_do(self, again: str) -> str:
        """The command line that uploads what is missing and then makes the dashboard.

        Args:
            again: The command line that makes the dashboard.
        """
        if self.untracked:
            return f"{again} --track"
        return f"{_sync(self.folder, self.waiting)} && {again}" if self.waiting else again

    @property
    def complete(self) -> bool:
        """Whether every run has been uploaded."""
        return not self.untracked and not self.waiting


def uploads(folder: Path, runs: Sequence[Run]) -> Uploads:
    """Looks at what W&B's library left in the runs' folders."""
    untracked, waiting = [], []
    for run in runs:
        here = run.folder / "wandb"
        if any(not any(path.glob("*.synced")) for path in here.glob(_OFFLINE)):
            waiting.append(run)
        elif not any(here.glob("*run-*-*")):
            untracked.append(run)
    return Uploads(folder, len(runs), tuple(untracked), tuple(waiting))


def _sync(folder: Path, runs: Sequence[Run]) -> str:
    """The command that uploads offline runs; one pattern where a sweep's jobs lie side by side."""
    if all(run.folder.parent == folder for run in runs):
        return f"wandb sync {shlex.quote(str(folder))}/*/wandb/{_OFFLINE}"
    return "wandb sync " + " ".join(
        f"{shlex.quote(str(run.folder))}/wandb/{_OFFLINE}" for run in runs
    )


def tracker_of(runs: Sequence[Run], project: str | None, entity: str | None) -> WandbTracker:
    """The tracker's settings that the sweep was run with, or the usual ones."""
    trackers = (run.record.settings.get("tracker") or {} for run in runs)
    used: dict[str, Any] = next((t for t in trackers if t.get("_target_") == _CLASS), {})
    options = {"project": project, "entity": entity}
    options = {name: value for name, value in options.items() if value is not None}
    settings = {name: value for name, value in used.items() if name != "_target_"}
    return WandbTracker.validated(settings | options, "tracker")


def track(sweep: Uploads, tracker: WandbTracker) -> None:
    """Tracks the runs that the server knows nothing of, from their records and rows."""
    runs = [*sweep.untracked, *(sweep.waiting if tracker.online else ())]
    for number, run in enumerate(runs, start=1):
        group = None if run.folder == sweep.folder else sweep.folder.resolve().name
        line = tracker.track(run.record, run.rows, run.folder, group)
        log.info("[%d/%d] %s", number, len(runs), line)


def sum_up(
    collected: Collected,
    page: Path,
    figures: Sequence[Path],
    tracker: WandbTracker,
    sweep: Path,
    group: str,
) -> str:
    """Logs the report of a sweep as one run, in place of an earlier one.

    Args:
        collected: The sweep's rows, as they may leave this machine.
        page: The report's page, likewise.
        figures: The report's figures.
        tracker: Where to.
        sweep: The sweep's folder.
        group: The sweep's name on W&B.

    Returns:
        The run's address.

    Raises:
        wandb.Error: The server can't be reached or refuses.
    """
    import wandb

    from experiments.report import tables

    commits = sorted({str(run.record.environment["commit"]) for run in collected.runs})
    media: dict[str, Any] = {
        PAGE: wandb.Html(str(page)),
        POOLED: wandb.Table(dataframe=tables.frame(collected)),
        **{figure_key(path): wandb.Image(str(path)) for path in figures},
    }
    with tracker.start(
        sweep,
        online=True,
        group=group,
        job_type=SUMMARY,
        name=f"summary of {group}",
        tags=[SUMMARY],
        config={"sweep": group, "jobs": len(collected.runs), "commits": ", ".join(commits)},
    ) as run:
        run.log(media)
        return str(run.url)


def figure_key(path: Path) -> str:
    """The name under which a figure is logged."""
    return f"figures/{path.stem}"
