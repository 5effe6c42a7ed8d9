"""What the page says of each run: its command, its record, what it made, why it failed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.report.pool import Run
from experiments.results.command_line import command_line
from experiments.results.record import RECORD
from experiments.results.status import STATUS, State, job_folders, state_of

# No name of a machine stands on the page.
_SAID: dict[State, str] = {
    "killed": "it was killed before it ended",
    "running": "it is still running",
    "elsewhere": "it says that it is running, on another machine",
}


@dataclass(frozen=True, slots=True)
class Command:
    """One finished run.

    What it was in words, its command line, its record's path from the page, the stages that it made
    with their seconds, and those that it took from the store.
    """

    run: Run
    what: str
    line: str
    record: str
    made: tuple[tuple[str, float], ...]
    reused: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A job without a result: its folder, why, and its command line where that is known."""

    name: str
    reason: str
    line: str


def commands(runs: Iterable[Run], page: Path, *, shared: bool = False) -> list[Command]:
    """The runs in the order of their folders, numbers as numbers.

    Args:
        runs: The report's.
        page: The folder that the page lies in.
        shared: Whether the page leaves this machine: no configuration folder is then named.
    """
    found = []
    for run in sorted(runs, key=lambda run: _order(run.folder)):
        record, labels = run.record, run.record.labels
        named = [labels.get(name, "") for name in ("model", "attack", "task", "defense")]
        refine = f"then {labels['refine']}" if labels.get("refine") else ""
        made = [stage for stage in record.stages if not stage["reused"]]
        command = Command(
            run,
            what=", ".join(filter(None, [*named, refine, f"seed {record.seed}"])),
            line=command_line(
                record.overrides, folder=None if shared else run.folder, command=record.command
            ),
            record=os.path.relpath(run.folder / RECORD, page),
            made=tuple((stage["name"], stage["seconds"]) for stage in made),
            reused=tuple(stage["name"] for stage in record.stages if stage["reused"]),
        )
        found.append(command)
    return found


def failures(paths: Iterable[Path]) -> list[Failure]:
    """Jobs under `paths` that failed, were killed or haven't ended, by their status files.

    A numbered folder of a sweep without a status is a job that was killed before it began.
    """
    found: dict[Path, Failure] = {}
    for path in paths:
        for status in path.rglob(STATUS):
            failure = _failure(status)
            if failure:
                found[status.parent] = failure
        for sweep in path.rglob("multirun.yaml"):
            for job in job_folders(sweep.parent):
                if not ((job / STATUS).is_file() or (job / RECORD).is_file()):
                    found[job] = Failure(job.name, _SAID["killed"], "")
    return [found[job] for job in sorted(found, key=_order)]


def _failure(status: Path) -> Failure | None:
    name = status.parent.name
    try:
        overrides: list[str] = json.loads(status.read_text())["overrides"]
    except (OSError, ValueError, KeyError, TypeError):
        return Failure(name, f"its {STATUS} can't be read", "")
    state, reason = state_of(status.parent)
    if state == "done":
        return None
    return Failure(name, _SAID.get(state, reason), command_line(overrides, folder=status.parent))


def _order(folder: Path) -> tuple[str, int, str]:
    name = folder.name
    return str(folder.parent), int(name) if name.isdecimal() else -1, name
