"""A multirun: how far it is while it runs, and at its end every job, every failure, one table."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    from experiments.progress.watch import View

_failures: list[str] = []
_view: View | None = None
_unfinished: DictConfig | None = None


def failures() -> list[str]:
    """The failed jobs of the multirun that ended in this process last."""
    return _failures


def forget() -> None:
    """Forgets an earlier multirun of this process."""
    global _unfinished
    _failures.clear()
    _unfinished = None
    stop_progress()


def unfinished() -> DictConfig | None:
    """The configuration of the multirun that was started and whose end wasn't told yet."""
    return _unfinished


def finish(config: DictConfig) -> None:
    """Ends the view of a multirun and tells its outcome."""
    global _unfinished
    _unfinished = None
    stop_progress()
    folder = Path(config.hydra.sweep.dir)
    _failures.extend(_failed_jobs(folder))
    _print(folder)


def stop_progress() -> None:
    """Ends the view of a multirun, however that ended; there may be none, or none any more."""
    global _view
    view, _view = _view, None
    if view is not None:
        view.stop()


class SweepSummary(Callback):
    """Hydra callback: shows a sweep's progress, and its outcome when its last job has ended.

    Where only some of a sweep's jobs run again, `on_multirun_start` is given their `numbers`.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _unfinished
        forget()
        _unfinished = config
        _start_progress(config, kwargs.get("numbers"))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        finish(config)


def _start_progress(config: DictConfig, numbers: Sequence[int] | None) -> None:
    from experiments.progress.expected import expected
    from experiments.progress.watch import View

    global _view
    try:
        jobs = expected(config)
    except (HydraException, OmegaConfBaseException):
        return  # Hydra says what is wrong with it when it starts the jobs.
    progress = "off" if config.runtime.progress is False else str(config.runtime.progress)
    _view = View(Path(config.hydra.sweep.dir), progress, {**jobs, "numbers": numbers})


def _failed_jobs(folder: Path) -> list[str]:
    """One line per job that failed or was killed."""
    from experiments.progress.state import SweepState

    sweep = SweepState(folder)
    sweep.refresh()
    failed = []
    for job in sweep.of("failed", "killed", "running", "queued"):
        command = f" ({shlex.join(job.overrides)})" if job.overrides else ""
        reason = job.reason if job.status == "failed" else "it was killed before it ended"
        failed.append(f"job {job.number}{command}: {reason}")
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
    if _failures:
        again = f"again: python -m experiments.rerun --failed {folder}"
        console.print(again, soft_wrap=True, highlight=False)
    console.print(f"record: {folder}", soft_wrap=True, highlight=False)
    console.print(f"report: python -m experiments.report {folder}", soft_wrap=True, highlight=False)
