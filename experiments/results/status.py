"""`JobStatus`, how a sweep's jobs stand by their folders; rerun, progress and report read it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.results.record import RECORD, ROWS

STATUS = "status.json"
"""In a job's folder: "running", "done" or "failed" under "status", and where the job runs."""

OVERRIDES = Path(".hydra", "overrides.yaml")

State = Literal["done", "failed", "killed", "running", "elsewhere", "never started"]

# Clocks and process tables count in steps.
_TOLERANCE_SECONDS = 2.0
_PARQUET = b"PAR1"


@dataclass(frozen=True, slots=True)
class JobStatus:
    """How a job of a sweep stands; its number is its folder's name.

    Attributes:
        state: "running" is a process of this machine that lives, "elsewhere" a job that says it
            runs and did so on another machine; "killed" left no last word.
        reason: Why it failed, or where it runs; "" where there is nothing to say.
    """

    number: int
    state: State
    reason: str = ""


def jobs_in(sweep: Path) -> dict[int, JobStatus]:
    """The jobs of a sweep that have a folder, by number."""
    return {
        int(each.name): JobStatus(int(each.name), *state_of(each)) for each in job_folders(sweep)
    }


def job_folders(sweep: Path) -> list[Path]:
    """The folders of a sweep's jobs, by number."""
    found = [path for path in sweep.glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def is_alive(process: Mapping[str, Any]) -> bool:
    """Whether the process "pid" of this machine still lives, which did at "time" (since 1970)."""
    import psutil  # type: ignore[import-untyped]

    try:
        found = psutil.Process(int(process["pid"]))
        if found.status() == psutil.STATUS_ZOMBIE:
            return False  # Killed, in a container whose first process collects no orphans.
        started = found.create_time()
    except psutil.NoSuchProcess:
        return False
    # A later process may have the number.
    return bool(started <= float(process["time"]) + _TOLERANCE_SECONDS)


def is_here(process: Mapping[str, Any]) -> bool:
    """Whether "host" is this machine."""
    return bool(process["host"] == socket.gethostname())


def state_of(folder: Path) -> tuple[State, str]:
    """A job's state and reason, as `JobStatus` has them, by what lies in its folder."""
    try:
        status = json.loads((folder / STATUS).read_text())
    except (OSError, ValueError):
        status = None
    if not isinstance(status, dict):
        return "killed", ""
    said = status.get("status")
    if said == "failed":
        return "failed", str(status.get("reason", ""))
    if said == "done":
        missing = _damaged_record(folder)
        return ("failed", missing) if missing else ("done", "")
    if not {"host", "pid", "time"} <= status.keys():
        return "killed", ""
    where = f"process {status['pid']} on {status['host']}"
    if not is_here(status):
        return "elsewhere", where
    if status["pid"] == os.getpid() or not is_alive(status):
        return "killed", ""
    return "running", where


def _damaged_record(folder: Path) -> str:
    for name in (RECORD, ROWS):
        if not (folder / name).is_file():
            return f"its {name} is gone"
    try:
        json.loads((folder / RECORD).read_text())
    except ValueError:
        return f"its {RECORD} is damaged"
    return "" if _is_whole(folder / ROWS) else f"its {ROWS} is damaged"


def _is_whole(parquet: Path) -> bool:
    """Whether a file begins and ends as Parquet does; one that was cut short doesn't."""
    with parquet.open("rb") as file:
        start, size = file.read(len(_PARQUET)), file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(_PARQUET)))
        return start == file.read() == _PARQUET
