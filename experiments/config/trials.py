"""The trials of a search: overrides drawn from its ranges, for the plan of what it will cost."""

from __future__ import annotations

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

_SEED = 0


def is_search(master: DictConfig) -> bool:
    """Whether a sweeper goes by what jobs return, and isn't a grid's."""
    return "direction" in master.hydra.sweeper


def trials(master: DictConfig, loader: ConfigLoader) -> list[list[str]]:
    """Overrides of as many jobs as a search has trials, with values drawn from its ranges.

    The search itself will choose other values, so that of what depends on them only the amount of
    work is foretold, and not what the store holds already.

    Args:
        master: The search's configuration, with its `hydra` section.
        loader: What loaded it.

    Raises:
        HydraException: An override can't be parsed.
    """
    import logging

    import optuna
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

    sweeper = master.hydra.sweeper
    params = [f"{key!s}={value}" for key, value in dict(sweeper.params or {}).items()]
    overrides = [*params, *map(str, master.hydra.overrides.task)]
    OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    ranges, fixed = create_params_from_overrides(overrides)
    optuna.logging.set_verbosity(logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=_SEED))
    rest = [f"{name}={value}" for name, value in fixed.items()]
    jobs = []
    for _ in range(sweeper.n_trials):
        values = study.ask(
            {name: each for name, each in ranges.items() if name not in fixed}
        ).params
        jobs.append([*(f"{name}={value}" for name, value in values.items()), *rest])
    return jobs
