"""Runs jobs of a sweep again: `python -m experiments.rerun --failed SWEEP [overrides]`.

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
from experiments.launch import launchers, sweep
from experiments.launch.job import job, quiet_libraries
from experiments.results.events import EVENTS, Tail
from experiments.results.status import OVERRIDES, Job, is_alive, is_here, jobs_in
from settings import RelockError, SettingError

_MULTIRUN = "multirun.yaml"
_LOCK = ".rerun.lock"
_OURS = ("hydra.sweep.dir", "hydra.sweep.subdir", "hydra.mode")


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep's folder and what it says.

    Attributes:
        folder: Where it lies, absolute.
        saved: Its configuration's `hydra` section.
        jobs: Every job that it has or should have, by number.
        overrides: Their settings.
    """

    folder: Path
    saved: DictConfig
    jobs: dict[int, Job]
    overrides: dict[int, list[str]]

    @property
    def is_search(self) -> bool:
        """Whether each job followed from those before it, so that none can be told beforehand."""
        return not str(self.saved.sweeper._target_).endswith("BasicSweeper")

    def named(self, number: int) -> str:
        """A job with the settings that not all jobs share."""
        common = set.intersection(*(set(each) for each in self.overrides.values()))
        own = [each for each in self.overrides[number] if each not in common]
        return f"job {number} ({' '.join(own)})" if own else f"job {number}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 1 if a job of the sweep isn't done at the end, else 0."""
    options = _parser().parse_intermixed_args(arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and this function words the message.
    quiet_libraries()
    sweep.forget()
    try:
        return _rerun(options)
    except KeyboardInterrupt:
        print(sweep.interrupt(), file=sys.stderr)
        return 130
    except Exception as error:
        plugin = launchers.missing(error)
        if plugin is None and not is_users(error):
            raise
        print(f"error: {plugin or explain(error)}", file=sys.stderr)
        return 1
    finally:
        sweep.stop_progress()


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
    saved = _saved(folder)
    cwd = Path(str(saved.hydra.runtime.cwd))
    if cwd.is_dir() and cwd != Path.cwd():
        # Relative paths among the settings, and plugins, are found from there.
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
        found = _read(folder, saved, hydra.config_loader)
        chosen = _chosen(found, options)
        if not (options.failed or options.all):
            return _say(found, chosen)
        if not chosen:
            done = sum(each.state == "done" for each in found.jobs.values())
            print(f"nothing to do: {done} of {len(found.jobs)} jobs are done")
            return 0
        _warn_of_other_versions(found)
        return _launch(hydra, found, chosen, options.overrides)


def _saved(folder: Path) -> DictConfig:
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


def _read(folder: Path, config: DictConfig, loader: ConfigLoader) -> Sweep:
    jobs = jobs_in(folder)
    overrides: dict[int, list[str]] = {}
    found = Sweep(folder, config.hydra, jobs, overrides)
    if not found.is_search and (folder / _MULTIRUN).is_file():
        overrides.update(enumerate(combinations(config, loader)))
        for number in overrides.keys() - jobs.keys():
            jobs[number] = Job(number, "never started")
    for number in jobs:
        path = folder / str(number) / OVERRIDES
        if path.is_file():
            overrides[number] = [str(each) for each in OmegaConf.load(path)]
    for number in jobs.keys() - overrides.keys():
        del jobs[number]  # A kill left its folder before its settings: a search has them itself.
    return Sweep(folder, config.hydra, dict(sorted(jobs.items())), overrides)


def _chosen(found: Sweep, options: argparse.Namespace) -> list[int]:
    """The jobs to run again; says which ones are left alone."""
    going_on = {
        number
        for number, each in found.jobs.items()
        if each.state == "running" or (each.state == "elsewhere" and not options.lost)
    }
    parent_lives = _is_going_on(found.folder)
    chosen = []
    for number, each in found.jobs.items():
        if number in going_on:
            hint = "; if that machine is gone, add --lost" if each.state == "elsewhere" else ""
            print(f"{found.named(number)} still runs ({each.reason}); it is left alone{hint}")
        elif each.state == "never started" and (going_on or parent_lives):
            print(f"{found.named(number)} hasn't started; it is left to the sweep, which goes on")
        elif options.all or each.state != "done":
            chosen.append(number)
    return chosen


def _is_going_on(folder: Path) -> bool:
    """Whether the process that started the sweep still lives on this machine."""
    if not (folder / EVENTS).is_file():
        return False
    events = [event for event in Tail(folder).new() if event.get("event") == "sweep"]
    last = events[-1] if events else {}
    if last.get("status") != "started" or not {"host", "pid", "time"} <= last.keys():
        return False
    return is_here(last) and is_alive(last)


def _say(found: Sweep, chosen: Sequence[int]) -> int:
    for number in chosen:
        each = found.jobs[number]
        print(f"{found.named(number)}: {each.state}{': ' if each.reason else ''}{each.reason}")
    done = sum(each.state == "done" for each in found.jobs.values())
    print(f"{done} of {len(found.jobs)} jobs are done, {len(chosen)} would run again", end="")
    print("; add --failed to do it, or --all for every job" if chosen else "")
    return 0


def _launch(hydra: Hydra, found: Sweep, numbers: Sequence[int], extra: Sequence[str]) -> int:
    loader = hydra.config_loader
    ours, task = _given(loader, extra)
    master = _master(hydra, found, ours)
    overrides = []
    for number in numbers:
        own = [*_merged(loader, found.overrides[number], task), f"hydra.sweep.subdir='{number}'"]
        _check(loader, master, number, own)
        overrides.append(own)
    if found.is_search:
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
    broken: Exception | None = None
    try:
        for result in launcher.launch(overrides, initial_job_idx=0):
            _ = result.return_value  # Raises what the job couldn't write down.
    except Exception as error:
        launchers.wait_for_jobs(master)
        broken = error
    callbacks.on_multirun_end(config=master, config_name="config")
    if broken is not None:
        if not launchers.broke(broken):
            raise broken
        print(f"error: {launchers.breakdown(broken)}", file=sys.stderr)
        return 1
    return 1 if any(each.state != "done" for each in jobs_in(found.folder).values()) else 0


def _given(loader: ConfigLoader, overrides: Sequence[str]) -> tuple[list[Override], list[Override]]:
    """What the command line says: of Hydra, and of the jobs."""
    hydras: list[Override] = []
    task: list[Override] = []
    for override in _parsed(loader, overrides):
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
            f"job {number} can't be run again with its settings: {explain(error)}"
        ) from error


def _master(hydra: Hydra, found: Sweep, ours: Sequence[Override]) -> DictConfig:
    """The sweep's configuration, with another launcher or the like where that was asked for."""
    kept = [each for each in found.saved.overrides.hydra if not str(each).startswith(_OURS)]
    own = [
        *_merged(hydra.config_loader, kept, ours),
        f"hydra.sweep.dir='{found.folder}'",
        "hydra.mode=MULTIRUN",
    ]
    sources = [
        source.path
        for source in found.saved.runtime.config_sources
        if source.provider == "command-line"
    ]
    if sources:
        own.append(f"hydra.searchpath=[{','.join(f'file://{path}' for path in sources)}]")
    return hydra.compose_config(
        config_name="config",
        overrides=[*own, *(str(each) for each in found.saved.overrides.task)],
        run_mode=RunMode.MULTIRUN,
    )


def _parsed(loader: ConfigLoader, overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))


def _merged(loader: ConfigLoader, old: Sequence[str], new: Sequence[Override]) -> list[str]:
    """Overrides with some given anew: Hydra takes a group but once."""
    taken = {override.get_key_element() for override in new}
    kept = [str(each) for each in old]
    kept = [each for each in kept if _parsed(loader, [each])[0].get_key_element() not in taken]
    return [*kept, *(str(override.input_line) for override in new)]


def _warn_of_other_versions(found: Sweep) -> None:
    from experiments.results.environment import environment
    from experiments.results.record import RECORD, Record

    done = [number for number, each in found.jobs.items() if each.state == "done"]
    if not done or not (found.folder / str(done[0]) / RECORD).is_file():
        return
    then, now = Record.read(found.folder / str(done[0])).environment, environment()
    differing = [
        f"{name} {old} then, {new} now"
        for name, old, new in [
            ("commit", then.get("commit"), now["commit"]),
            *(
                (name, then.get("packages", {}).get(name), version)
                for name, version in now["packages"].items()
            ),
        ]
        if old != new
    ]
    if differing:
        print(f"warning: the sweep's results will be of mixed versions: {'; '.join(differing)}")


if __name__ == "__main__":
    sys.exit(main())
