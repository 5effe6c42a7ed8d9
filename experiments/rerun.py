"""Rerun of a sweep's jobs: `python -m experiments.rerun --failed SWEEP [overrides]`.

Every job runs in its own folder, with its own number and overrides; what the store holds is
reused.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.config.experiment import CONF
from experiments.config.explain import explain, is_users
from experiments.config.jobs import combinations
from experiments.launch.job import job
from experiments.launch.sweep import run_command
from experiments.results.events import read
from experiments.results.status import OVERRIDES, JobStatus, is_alive, is_here, jobs_in
from settings import RelockError, SettingError

_MULTIRUN = "multirun.yaml"
_LOCK = ".rerun.lock"
_OURS = ("hydra.sweep.dir", "hydra.sweep.subdir", "hydra.mode")


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep's folder, its saved `hydra` section, and the jobs that it has or should have."""

    folder: Path
    saved: DictConfig
    jobs: dict[int, JobStatus]
    overrides: dict[int, list[str]]

    @property
    def is_search(self) -> bool:
        """Whether each job followed from those before it, so that none can be told beforehand."""
        return not str(self.saved.sweeper._target_).endswith("BasicSweeper")

    def label(self, number: int) -> str:
        """A job with the settings that not all jobs share."""
        common = set.intersection(*(set(each) for each in self.overrides.values()))
        own = [each for each in self.overrides[number] if each not in common]
        return f"job {number} ({' '.join(own)})" if own else f"job {number}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if a job of the sweep isn't done at the end, else 0."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command(lambda: _rerun(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.rerun",
        description="Runs jobs of a sweep again; without --failed or --all it says which.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--failed", action="store_true", help="those that failed, were killed or never started"
    )
    which.add_argument("--all", action="store_true", help="all that don't run right now")
    parser.add_argument(
        "--lost",
        action="store_true",
        help="count jobs that say they run on another machine as killed",
    )
    parser.add_argument("sweep", type=Path, help="the sweep's folder")
    parser.add_argument(
        "overrides", nargs="*", help="in place of the sweep's own, e.g. hydra/launcher=joblib"
    )
    return parser


def _rerun(options: argparse.Namespace) -> int:
    from filelock import FileLock, Timeout

    folder = options.sweep.resolve()
    saved = _read_hydra(folder)
    cwd = Path(str(saved.hydra.runtime.cwd))
    if cwd.is_dir() and cwd != Path.cwd():
        # Relative paths among the settings, and plugins, are looked up from there.
        os.chdir(cwd)
        sys.path.append(str(cwd))
    GlobalHydra.instance().clear()
    with ExitStack() as stack:
        if options.failed or options.all:
            try:
                stack.enter_context(FileLock(folder / _LOCK, timeout=0))
            except Timeout:
                raise RelockError(f"{folder} is being run again by another process; wait") from None
        stack.enter_context(initialize_config_dir(str(CONF), job_name="run", version_base="1.3"))
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        sweep = _read_sweep(folder, saved, hydra.config_loader)
        chosen = _select(sweep, options)
        if not (options.failed or options.all):
            return _list_jobs(sweep, chosen)
        if not chosen:
            done = sum(each.state == "done" for each in sweep.jobs.values())
            print(f"nothing to do: {done} of {len(sweep.jobs)} jobs are done")
            return 0
        _warn_of_other_versions(sweep)
        return _launch(hydra, sweep, chosen, options.overrides)


def _read_hydra(folder: Path) -> DictConfig:
    """The `hydra` section of the sweep's configuration, or of a job's where a search left none."""
    for path in (folder / _MULTIRUN, *sorted(folder.glob("[0-9]*/.hydra/hydra.yaml"))):
        try:
            config = OmegaConf.load(path)
        except OSError:
            continue
        if isinstance(config, DictConfig) and "hydra" in config:
            return config
    raise SettingError(
        f"{str(folder)!r} is no sweep's folder: it has no {_MULTIRUN} and no jobs; give the folder "
        "that the sweep named as its record"
    )


def _read_sweep(folder: Path, config: DictConfig, loader: ConfigLoader) -> Sweep:
    jobs = jobs_in(folder)
    overrides: dict[int, list[str]] = {}
    sweep = Sweep(folder, config.hydra, jobs, overrides)
    if not sweep.is_search and (folder / _MULTIRUN).is_file():
        overrides.update(enumerate(combinations(config, loader)))
        for number in overrides.keys() - jobs.keys():
            jobs[number] = JobStatus(number, "never started")
    for number in jobs:
        path = folder / str(number) / OVERRIDES
        if path.is_file():
            overrides[number] = [str(each) for each in OmegaConf.load(path)]
    for number in jobs.keys() - overrides.keys():
        del jobs[number]  # A kill left its folder before its settings: a search has them itself.
    return Sweep(folder, config.hydra, dict(sorted(jobs.items())), overrides)


def _select(sweep: Sweep, options: argparse.Namespace) -> list[int]:
    """The jobs to run again; says which ones are left alone."""
    alive = ("running",) if options.lost else ("running", "elsewhere")
    goes_on = any(each.state in alive for each in sweep.jobs.values())
    goes_on = goes_on or _parent_lives(sweep.folder)
    chosen = []
    for number, each in sweep.jobs.items():
        if each.state in alive:
            hint = "; if that machine is gone, add --lost" if each.state == "elsewhere" else ""
            print(f"{sweep.label(number)} still runs ({each.reason}); it is left alone{hint}")
        elif each.state == "never started" and goes_on:
            print(f"{sweep.label(number)} hasn't started; it is left to the sweep, which goes on")
        elif options.all or each.state != "done":
            chosen.append(number)
    return chosen


def _parent_lives(folder: Path) -> bool:
    """Whether the process that started the sweep still lives on this machine."""
    events = [event for event in read(folder) if event.get("event") == "sweep"]
    last = events[-1] if events else {}
    if last.get("status") != "started" or not {"host", "pid", "time"} <= last.keys():
        return False
    return is_here(last) and is_alive(last)


def _list_jobs(sweep: Sweep, chosen: Sequence[int]) -> int:
    for number in chosen:
        each = sweep.jobs[number]
        print(f"{sweep.label(number)}: {each.state}{': ' if each.reason else ''}{each.reason}")
    done = sum(each.state == "done" for each in sweep.jobs.values())
    print(f"{done} of {len(sweep.jobs)} jobs are done, {len(chosen)} would run again", end="")
    print("; add --failed to do it, or --all for every job" if chosen else "")
    return 0


def _launch(hydra: Hydra, sweep: Sweep, numbers: Sequence[int], extra: Sequence[str]) -> int:
    loader = hydra.config_loader
    ours, task = _split_overrides(loader, extra)
    master = _master(hydra, sweep, ours)
    overrides = []
    for number in numbers:
        own = [*_replaced(loader, sweep.overrides[number], task), f"hydra.sweep.subdir='{number}'"]
        _check(loader, master, number, own)
        overrides.append(own)
    if sweep.is_search:
        print(
            "the search that chose these jobs' settings isn't told of their results; to go on "
            "with it, run its own command with its hydra.sweeper.storage and study_name"
        )
    callbacks = Callbacks(master)
    launcher = Plugins.instance().instantiate_launcher(
        config=master,
        hydra_context=HydraContext(config_loader=loader, callbacks=callbacks),
        task_function=job,
    )
    callbacks.on_multirun_start(config=master, config_name="config", numbers=numbers)
    for result in launcher.launch(overrides, initial_job_idx=0):
        _ = result.return_value  # Raises what the job couldn't write down.
    callbacks.on_multirun_end(config=master, config_name="config")
    return 1 if any(each.state != "done" for each in jobs_in(sweep.folder).values()) else 0


def _split_overrides(
    loader: ConfigLoader, overrides: Sequence[str]
) -> tuple[list[Override], list[Override]]:
    """What the command line says: of Hydra, and of the jobs."""
    hydras: list[Override] = []
    task: list[Override] = []
    for override in _parse(loader, overrides):
        key = override.key_or_group
        if override.is_sweep_override():
            raise SettingError(
                f"{override.input_line} would make more jobs of one; give one value, or run "
                "another sweep"
            )
        if key in _OURS:
            raise SettingError(f"{key} is the sweep's own; leave it out")
        (hydras if key.startswith(("hydra.", "hydra/")) else task).append(override)
    return hydras, task


def _check(loader: ConfigLoader, master: DictConfig, number: int, overrides: Sequence[str]) -> None:
    try:
        loader.load_sweep_config(master, list(overrides))
    except Exception as error:
        if not is_users(error):
            raise
        raise SettingError(
            f"job {number} can't be run again with its settings: {explain(error, overrides)}"
        ) from error


def _master(hydra: Hydra, sweep: Sweep, ours: Sequence[Override]) -> DictConfig:
    """The sweep's configuration, with another launcher or the like where that was asked for."""
    kept = [each for each in sweep.saved.overrides.hydra if not str(each).startswith(_OURS)]
    own = [
        *_replaced(hydra.config_loader, kept, ours),
        f"hydra.sweep.dir='{sweep.folder}'",
        "hydra.mode=MULTIRUN",
    ]
    sources = [
        source.path
        for source in sweep.saved.runtime.config_sources
        if source.provider == "command-line"
    ]
    if sources:
        own.append(f"hydra.searchpath=[{','.join(f'file://{path}' for path in sources)}]")
    return hydra.compose_config(
        config_name="config",
        overrides=[*own, *(str(each) for each in sweep.saved.overrides.task)],
        run_mode=RunMode.MULTIRUN,
    )


def _parse(loader: ConfigLoader, overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))


def _replaced(loader: ConfigLoader, old: Sequence[str], new: Sequence[Override]) -> list[str]:
    """Overrides with some given anew: Hydra takes a group but once."""
    taken = {override.get_key_element() for override in new}
    kept = [str(each) for each in old]
    kept = [each for each in kept if _parse(loader, [each])[0].get_key_element() not in taken]
    return [*kept, *(str(override.input_line) for override in new)]


def _warn_of_other_versions(sweep: Sweep) -> None:
    from experiments.results.environment import environment
    from experiments.results.record import RECORD, Record

    done = [number for number, each in sweep.jobs.items() if each.state == "done"]
    if not done or not (sweep.folder / str(done[0]) / RECORD).is_file():
        return
    record = Record.read(sweep.folder / str(done[0]))
    then, now = (
        {"commit": each.get("commit"), **each.get("packages", {})}
        for each in (record.environment, environment())
    )
    differing = [
        f"{name} {then.get(name)} then, {version} now"
        for name, version in now.items()
        if then.get(name) != version
    ]
    if differing:
        print(f"warning: the sweep's results will be of mixed versions: {'; '.join(differing)}")


if __name__ == "__main__":
    sys.exit(main())
