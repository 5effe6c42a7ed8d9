"""Number and varying settings of a sweep's jobs before the first one starts, for its view."""

from __future__ import annotations

from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from experiments.config.jobs import combinations
from experiments.launch.progress.state import varying

_GRID = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def expected(config: DictConfig) -> dict[str, Any]:
    """How many jobs there will be, and which settings vary among them.

    Args:
        config: The sweep's configuration, with its `hydra` section.

    Returns:
        "total" (None where the sweeper doesn't say) and "varies".

    Raises:
        HydraException: An override can't be parsed.
    """
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
