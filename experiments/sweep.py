"""What a multirun says at its end: every job, every failure with its reason, one table."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

_failures: list[str] = []


def failures() -> list[str]:
    """The failed jobs of the multirun that ended in this process last."""
    return _failures


def forget() -> None:
    """Forgets an earlier multirun of this process."""
    _failures.clear()


class SweepSummary(Callback):
    """Hydra callback: prints the sweep's outcome when its last job has ended."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        forget()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        _failures.extend(_failed_jobs(folder))
        _print(folder)


def _failed_jobs(folder: Path) -> list[str]:
    """One line per job that failed or left no status (it was killed)."""
    failed = []
    for job in sorted(folder.glob("[0-9]*"), key=lambda path: int(path.name)):
        status = job / "status.json"
        if not status.is_file():
            failed.append(f"job {job.name}: it was killed before it ended")
            continue
        content = json.loads(status.read_text())
        if content["status"] != "done":
            command = shlex.join(content["overrides"])
            failed.append(f"job {job.name} ({command}): {content['reason']}")
    return failed


def _print(folder: Path) -> None:
    from experiments.report.collect import collect
    from experiments.report.tables import show, terminal

    console = terminal()
    collected = collect([folder])
    if collected.runs:
        show(collected, console)
    console.print(f"sweep: {len(collected.runs)} done, {len(_failures)} failed", highlight=False)
    for line in _failures:
        console.print(f"failed: {line}", style="red", highlight=False, soft_wrap=True)
    console.print(f"record: {folder}", soft_wrap=True, highlight=False)
    console.print(f"report: python -m experiments.report {folder}", soft_wrap=True, highlight=False)
