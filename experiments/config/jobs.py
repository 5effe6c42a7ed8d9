"""The jobs of a command line, by Hydra's own composition and sweep; read by plan and progress."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from experiments.config.experiment import CONF, Experiment, validate

_SEED = 0


def expand(overrides: Sequence[str], *, multirun: bool) -> Iterator[Experiment]:
    """The experiments that `experiments.run` would run, validated one after another.

    Raises:
        SettingError: A setting of a job is wrong.
        HydraException: An override can't be parsed or names nothing.
    """
    GlobalHydra.instance().clear()  # What an earlier run in this process left.
    with initialize_config_dir(str(CONF), job_name="run", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration(
            "config", list(overrides), RunMode.MULTIRUN, validate_sweep_overrides=False
        )
        if not multirun and master.hydra.mode != RunMode.MULTIRUN:
            yield _job(loader.load_configuration("config", list(overrides), RunMode.RUN))
            return
        for job in (trials if is_search(master) else combinations)(master, loader):
            yield _job(loader.load_sweep_config(master, list(job)))


def combinations(master: DictConfig, loader: ConfigLoader) -> list[list[str]]:
    """The overrides of every job of a grid, in the order in which Hydra's own sweeper has them.

    Raises:
        HydraException: An override can't be parsed.
    """
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(_task(master))
    return [list(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]


def _task(master: DictConfig) -> list[str]:
    """What the sweeper's parameters and the command line say of the jobs."""
    params = dict(master.hydra.sweeper.params or {})
    lines = [f"{key!s}={value}" for key, value in params.items()]
    return [*lines, *map(str, master.hydra.overrides.task)]


def _job(config: DictConfig) -> Experiment:
    hydra = config.hydra
    choices = {str(key): value for key, value in hydra.runtime.choices.items()}
    folders = [
        Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"
    ]
    with open_dict(config):
        del config["hydra"]
    return validate(config, choices, folders)


def is_search(master: DictConfig) -> bool:
    """Whether a sweeper goes by what jobs return, and isn't a grid's."""
    return "direction" in master.hydra.sweeper


def trials(master: DictConfig, loader: ConfigLoader) -> list[list[str]]:
    """Overrides of as many jobs as a search has trials, with values drawn from its ranges.

    The search itself will choose other values, so that of what depends on them only the amount of
    work is foretold, and not what the store holds already.

    Raises:
        HydraException: An override can't be parsed.
    """
    import optuna
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

    overrides = _task(master)
    OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    ranges, fixed = create_params_from_overrides(overrides)
    optuna.logging.set_verbosity(logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=_SEED))
    rest = [f"{name}={value}" for name, value in fixed.items()]
    jobs = []
    for _ in range(master.hydra.sweeper.n_trials):
        values = study.ask(
            {name: each for name, each in ranges.items() if name not in fixed}
        ).params
        jobs.append([*(f"{name}={value}" for name, value in values.items()), *rest])
    return jobs
