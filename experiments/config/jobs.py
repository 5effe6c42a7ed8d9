"""The jobs of a command line, by Hydra's own composition and sweep; read by plan and progress."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from experiments.config.experiment import CONF, Experiment, validate
from experiments.config.trials import is_search, trials
from settings import Settings, target

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JobConfig:
    """One job of a command line, composed and validated.

    Attributes:
        overrides: Its settings, as on a command line.
        experiment: What they make.
    """

    overrides: tuple[str, ...]
    experiment: Experiment


def expand(overrides: Sequence[str], *, multirun: bool, config: Path = CONF) -> Iterator[JobConfig]:
    """The jobs that `experiments.run` would run, validated one after another.

    Args:
        overrides: The command line's.
        multirun: Whether it has -m.
        config: The configuration folder.

    Raises:
        SettingError: A setting of a job is wrong.
        HydraException: An override can't be parsed or names nothing.
    """
    shared = _Shared()
    GlobalHydra.instance().clear()  # What an earlier run in this process left.
    with initialize_config_dir(str(config), job_name="run", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration(
            "config", list(overrides), RunMode.MULTIRUN, validate_sweep_overrides=False
        )
        if not multirun and master.hydra.mode != RunMode.MULTIRUN:
            yield _job(loader.load_configuration("config", list(overrides), RunMode.RUN), shared)
            return
        for job in (trials if is_search(master) else combinations)(master, loader):
            yield _job(loader.load_sweep_config(master, list(job)), shared)


def combinations(master: DictConfig, loader: ConfigLoader) -> list[list[str]]:
    """The overrides of every job of a grid, in the order in which Hydra's own sweeper has them.

    Args:
        master: The sweep's configuration, with its `hydra` section.
        loader: What loaded it.

    Raises:
        HydraException: An override can't be parsed.
    """
    params = dict(master.hydra.sweeper.params or {})
    task = [*(f"{key!s}={value}" for key, value in params.items()), *_task(master)]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(task)
    return [list(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]


def _task(config: DictConfig) -> list[str]:
    return [str(override) for override in config.hydra.overrides.task]


def _job(config: DictConfig, shared: _Shared) -> JobConfig:
    hydra = config.hydra
    choices = {str(key): value for key, value in hydra.runtime.choices.items()}
    folders = [
        Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"
    ]
    overrides = tuple(_task(config))
    with open_dict(config):
        del config["hydra"]
    return JobConfig(overrides, shared.experiment(validate(config, choices, folders)))


class _Shared:
    """Sources of equal settings are one object for all jobs, so that each is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Any] = {}

    def experiment(self, experiment: Experiment) -> Experiment:
        """An experiment on the sources that other jobs have read, where they are equal."""
        sources = experiment.sources
        names = [each.name for each in fields(sources)]
        evaluation = experiment.evaluation
        prompts = {name: self._one(each) for name, each in evaluation.prompt_sets.items()}
        return replace(
            experiment,
            sources=replace(sources, **{n: self._one(getattr(sources, n)) for n in names}),
            tasks={name: self._one(task) for name, task in experiment.tasks.items()},
            evaluation=replace(evaluation, prompt_sets=prompts),
        )

    def _one(self, source: T) -> T:
        if not isinstance(source, Settings):
            return source
        known: T = self._known.setdefault((target(source), source.model_dump_json()), source)
        return known
