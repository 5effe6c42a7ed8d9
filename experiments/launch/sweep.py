"""The end of a command that runs jobs; of a multirun also how far it is, and one table at last."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config.explain import explain, is_users
from experiments.config.jobs import combinations
from experiments.launch import launchers
from experiments.launch.job import quiet_libraries
from experiments.launch.progress.state import JobState, SweepState, varying
from settings.process import collect_rarely
from settings.terminal import print_in_ascii

if TYPE_CHECKING:
    from experiments.launch.progress.view import View

_GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
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
    """Ends the view of a multirun, however that ended; there may be none, or none any more."""
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
    from experiments.launch.progress.view import View

    global _view
    progress = "off" if config.runtime.progress is False else str(config.runtime.progress)
    # Hydra says what is wrong with the jobs, or their folder, when it starts them.
    with suppress(HydraException, OmegaConfBaseException, OSError):
        jobs = _expected(config)
        _view = View(Path(config.hydra.sweep.dir), progress, {**jobs, "numbers": numbers})


def _in_words(job: JobState) -> str:
    command = f" ({shlex.join(job.overrides)})" if job.overrides else ""
    reasons = {"failed": job.reason, "queued": "it didn't begin"}
    reason = reasons.get(job.status, "it was killed before it ended")
    return f"job {job.number}{command}: {reason}"


def _print(folder: Path, unstarted: int, *, lost: bool) -> None:
    """Prints the outcome.

    `lost` is whether a job that was killed still says that it runs, on another machine.
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


def _expected(config: DictConfig) -> dict[str, Any]:
    """How many jobs there will be (None if unknown), and which settings vary among them."""
    loader = GlobalHydra.instance().config_loader()
    sweeper = config.hydra.sweeper
    if OmegaConf.select(sweeper, "_target_") == _GRID:
        jobs = combinations(config, loader)
        return {"total": len(jobs), "varies": varying(jobs)}
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(
        [str(override) for override in config.hydra.overrides.task]
    )
    swept = [override.get_key_element() for override in parsed if override.is_sweep_override()]
    params = OmegaConf.select(sweeper, "params") or {}
    varies = list(dict.fromkeys([*(str(name) for name in params), *swept]))
    return {"total": OmegaConf.select(sweeper, "n_trials"), "varies": varies}


def run_command(start: Callable[[], int]) -> int:
    """Runs a command that may start a multirun; returns the exit code.

    Errors that a user can mend are one sentence on stderr; others keep their stack trace. A
    launcher that breaks off is waited for, and the outcome of its jobs is shown as at every end.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and this function words the message.
    print_in_ascii()
    quiet_libraries()
    collect_rarely()
    forget()
    try:
        return start()
    except KeyboardInterrupt:
        print(interrupt(), file=sys.stderr)
        return 130
    except Exception as error:
        sentence = launchers.missing_plugin(error)
        if sentence is None and wait_for_outcome():
            if launchers.is_breakdown(error):
                sentence = launchers.breakdown(error)
            else:
                sentence = explain(error, sys.argv[1:])
                if not is_users(error):
                    traceback.print_exception(error)
        stop_progress()
        if sentence is None and not is_users(error):
            raise
        print(f"error: {sentence or explain(error, sys.argv[1:])}", file=sys.stderr)
        return 1
    finally:
        stop_progress()
