"""All tests."""

from __future__ import annotations

import gc
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource

# There are a thousand compositions. OmegaConf reads by this loader, and Hydra every file anew.
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# To look for plugins imports their modules anew.
Plugins.instance()
_files: Any = SourcesRegistry.instance().types["file"]
_load: Callable[[ConfigSource, str], ConfigResult] = _files.load_config
_loaded: dict[tuple[Path, int], bytes] = {}


def _load_once(source: ConfigSource, config_path: str) -> ConfigResult:
    file = Path(source.path) / source._normalize_file_name(config_path)
    if not file.is_file():
        return _load(source, config_path)
    key = file, file.stat().st_mtime_ns
    if key not in _loaded:
        _loaded[key] = pickle.dumps(_load(source, config_path))
    found: ConfigResult = pickle.loads(_loaded[key])
    return found


_files.load_config = _load_once

# Nothing here is so large that garbage needs to be found at once.
gc.set_threshold(100_000, 20, 50)
_modules = 0


def pytest_collection_finish() -> None:
    _freeze()


def pytest_runtest_teardown() -> None:
    _freeze()


def _freeze() -> None:
    """Leaves what new imports have made out of every later collection of garbage.

    A run collects after each model that it closes, and torch and transformers alone are a million
    objects to look through; much of them comes in where a test first uses it.
    """
    global _modules
    if len(sys.modules) > _modules + 100:
        _modules = len(sys.modules)
        gc.collect()
        gc.freeze()
