"""What is known of a sweep's jobs before the first one starts."""

from __future__ import annotations

from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from experiments.config.jobs import combinations
from experiments.results.command_line import override_key

_GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def expected(config: DictConfig) -> dict[str, Any]:
    """How many jobs there will be, which settings vary, and what each job has of them.

    Args:
        config: The sweep's configuration, with its `hydra` section.

    Returns:
        "total" (None where the sweeper doesn't say), "varies", and "jobs": by job, the settings
        that vary with their values; empty where the sweeper chooses them on the way.

    Raises:
        HydraException: An override can't be parsed.
    """
    loader = GlobalHydra.instance().config_loader()
    sweeper = config.hydra.sweeper
    if OmegaConf.select(sweeper, "_target_") == _GRID:
        jobs = [
            {override_key(each): each.partition("=")[2] for each in job}
            for job in combinations(config, loader)
        ]
        varies = [name for name in jobs[0] if len({job[name] for job in jobs}) > 1]
        settings = [{name: job[name] for name in varies} for job in jobs]
        return {"total": len(jobs), "varies": varies, "jobs": settings}
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(
        [str(override) for override in config.hydra.overrides.task]
    )
    swept = [override.get_key_element() for override in parsed if override.is_sweep_override()]
    params = OmegaConf.select(sweeper, "params") or {}
    total = OmegaConf.select(sweeper, "n_trials")
    varies = list(dict.fromkeys([*(str(name) for name in params), *swept]))
    return {"total": total, "varies": varies, "jobs": []}
