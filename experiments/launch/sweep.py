"""A multirun: how far it is while it runs, and at its end every job, every failure, one table."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.launch import launchers
from experiments.launch.progress.state import JobState, SweepState

if TYPE_CHECKING:
    from experiments.launch.progress.watch import View

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


def wait_for_outcome() -> bool:
    """Shows the outcome of a multirun that broke off, once its jobs have ended, if there is one."""
    if _unfinished is None or not Path(_unfinished.hydra.sweep.dir).is_dir():
        return False
    launchers.wait_for_jobs(_unfinished)
    _finish(_unfinished)
    return True


def _finish(config: DictConfig) -> None:
    """Ends the view of a multirun and shows its outcome."""
    global _unfinished
    _unfinished = None
    stop_progress()
    folder = Path(config.hydra.sweep.dir)
    sweep = SweepState(folder)
    sweep.refresh()
    failed = sweep.of("failed", "killed", "running", "queued")
    _failures.extend(map(_in_words, failed))
    if not sweep.jobs:
        return  # The error that comes next says all there is to say.
    unstarted = max(0, (sweep.total or 0) - len(sweep.jobs))
    _print(folder, unstarted, lost=any(job.status == "running" for job in failed))


def stop_progress(*, ended: bool = True) -> None:
    """Ends the view of a multirun, however that ended; there may be none, or none any more.

    Args:
        ended: Whether the multirun has ended, too.
    """
    global _view
    view, _view = _view, None
    if view is not None:
        view.stop(ended=ended)


def interrupt() -> str:
    """Ends the view of what the user has interrupted; returns what to say of it."""
    array = None if _unfinished is None else launchers.running_array(_unfinished)
    stop_progress(ended=array is None)
    if _unfinished is None or array is None:
        return "interrupted; what is finished is in the store, run the same command again to go on"
    return (
        f"interrupted; Slurm's array {array} goes on (scancel {array} ends it), and "
        f"python -m experiments.progress {_unfinished.hydra.sweep.dir} shows how far it is"
    )


class SweepSummary(Callback):
    """Hydra callback: shows a sweep's progress, and its outcome when its last job has ended.

    Where only some of a sweep's jobs run again, `on_multirun_start` is given their `numbers`.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _unfinished
        forget()
        reason = launchers.refusal(config)
        if reason:
            print(f"error: {reason}", file=sys.stderr)
            # Hydra makes a warning of whatever else a callback raises.
            raise SystemExit(1)
        _unfinished = config
        launchers.watch(config)
        _start_progress(config, kwargs.get("numbers"))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        _finish(config)


def _start_progress(config: DictConfig, numbers: Sequence[int] | None) -> None:
    from experiments.launch.progress.expected import expected
    from experiments.launch.progress.watch import View

    global _view
    progress = "off" if config.runtime.progress is False else str(config.runtime.progress)
    # Hydra says what is wrong with the jobs, or their folder, when it starts them.
    with suppress(HydraException, OmegaConfBaseException, OSError):
        jobs = expected(config)
        _view = View(Path(config.hydra.sweep.dir), progress, {**jobs, "numbers": numbers})


def _in_words(job: JobState) -> str:
    command = f" ({shlex.join(job.overrides)})" if job.overrides else ""
    reasons = {"failed": job.reason, "queued": "it didn't begin"}
    reason = reasons.get(job.status, "it was killed before it ended")
    return f"job {job.number}{command}: {reason}"


def _print(folder: Path, unstarted: int, *, lost: bool) -> None:
    """Prints the outcome.

    Args:
        folder: The sweep's folder.
        unstarted: How many of its jobs have none.
        lost: Whether a job that was killed still says that it runs, on another machine.
    """
    from experiments.report.pool import collect
    from experiments.report.table import terminal
    from experiments.report.tables import show

    console = terminal()
    collected = collect([folder])
    if collected.runs:
        show(collected, console)
    never = f", {unstarted} never started" if unstarted else ""
    counts = f"sweep: {len(collected.runs)} done, {len(_failures)} failed{never}"
    console.print(counts, highlight=False)
    for line in _failures:
        console.print(f"failed: {line}", style="red", highlight=False, soft_wrap=True)
    if _failures or unstarted:
        which = "--failed --lost" if lost else "--failed"
        again = f"again: python -m experiments.rerun {which} {folder}"
        console.print(again, soft_wrap=True, highlight=False)
    console.print(f"record: {folder}", soft_wrap=True, highlight=False)
    console.print(f"report: python -m experiments.report {folder}", soft_wrap=True, highlight=False)
