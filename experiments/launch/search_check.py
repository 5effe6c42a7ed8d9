"""`SearchCheck`, Hydra's callback that refuses a search before it starts; conf/config.yaml has it.

It compares the sweeper's direction with the objective's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from experiments.results.objective import build_objective
from settings import SettingError, first_line


class SearchCheck(Callback):
    """Hydra callback: refuses a search that couldn't be ranked, before its first job."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        reason = refusal(config)
        if reason:
            print(f"error: {reason}", file=sys.stderr)
            # Hydra makes a warning of whatever else a callback raises.
            raise SystemExit(1)
        if "direction" in config.hydra.sweeper:
            import optuna

            _commit_at_once(config.hydra.sweeper)
            # Its own handler writes colours even where there is no terminal.
            optuna.logging.disable_default_handler()
            optuna.logging.enable_propagation()


def _commit_at_once(sweeper: DictConfig) -> None:
    """Opens a study's database such that every statement is kept.

    Optuna 2 leaves some to SQLAlchemy 1's own commits, which SQLAlchemy 2 doesn't make.
    """
    url = sweeper.get("storage")
    if isinstance(url, str):
        with flag_override(sweeper, ["struct", "readonly"], [False, False]):
            sweeper.storage = {
                "_target_": "optuna.storages.RDBStorage",
                "url": url,
                "engine_kwargs": {"isolation_level": "AUTOCOMMIT"},
            }


def refusal(config: DictConfig) -> str | None:
    """Why a multirun can't be searched, in one sentence; None where it can, or is no search."""
    sweeper = config.hydra.sweeper
    if "direction" not in sweeper:
        return None
    if config.get("objective") is None:
        return (
            "a search (hydra/sweeper) needs an objective to go by; add "
            "objective=hs_within_accuracy, or objective=pareto"
        )
    try:
        node = OmegaConf.to_container(config.objective, resolve=True, throw_on_missing=True)
        objective = build_objective(node, tuple(config.plugins))
    except (SettingError, OmegaConfBaseException) as error:
        return first_line(error)
    assert objective is not None
    ours, theirs = list(objective.directions), _directions(sweeper.direction)
    if ours == theirs:
        return None
    return (
        f"hydra.sweeper.direction is {_written(theirs)}, but the objective's is {_written(ours)}; "
        f"write hydra.sweeper.direction={_written(ours)}"
    )


def _directions(direction: Any) -> list[str]:
    is_list = isinstance(direction, Sequence) and not isinstance(direction, str)
    several = direction if is_list else [direction]
    return [str(getattr(each, "name", each)) for each in several]


def _written(directions: Sequence[str]) -> str:
    return directions[0] if len(directions) == 1 else f"[{','.join(directions)}]"
