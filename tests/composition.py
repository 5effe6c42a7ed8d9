"""Hydra's composing, shortened for a suite that composes a thousand times from a few dozen choices.

What the options of `conf/` that a command line chooses add up to is composed once a process and
copied after that; the values it sets are applied anew each time, and so is all that follows.
Folders of configuration that a test brings of its own are read as ever.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Hashable
from typing import Any

import yaml
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from experiments.config.experiment import CONF

_list: Callable[..., DefaultsList] = config_loader_impl.create_defaults_list
_compose: Callable[..., DictConfig] = ConfigLoaderImpl._compose_config_from_defaults_list
_found: dict[Hashable, bytes] = {}


def shorten() -> None:
    """Lets this process compose each set of options once."""
    # OmegaConf reads by this loader.
    yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    # To look for plugins imports their modules anew.
    Plugins.instance()
    config_loader_impl.create_defaults_list = _list_once
    ConfigLoaderImpl._compose_config_from_defaults_list = _compose_once  # type: ignore[method-assign]


def _once(repo: IConfigRepository, key: Hashable, make: Callable[[], Any]) -> Any:
    files = {source.path for source in repo.get_sources() if source.scheme() == "file"}
    if files != {str(CONF)}:
        return make()
    if key not in _found:
        _found[key] = pickle.dumps(make())
    return pickle.loads(_found[key])


def _list_once(
    repo: IConfigRepository, config_name: str | None, overrides_list: list[Override], **how: bool
) -> DefaultsList:
    values = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
    options = tuple(each.input_line for each in overrides_list if each not in values)
    found: DefaultsList = _once(
        repo,
        (config_name, options, *how.values()),
        lambda: _list(repo, config_name, overrides_list, **how),
    )
    return dataclasses.replace(found, config_overrides=values)


def _compose_once(
    self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository
) -> DictConfig:
    composed: DictConfig = _once(repo, repr(defaults), lambda: _compose(self, defaults, repo))
    return composed
