"""All tests."""

from __future__ import annotations

import gc
import sys

import yaml

# OmegaConf reads by it. A sixth of a composition's time goes, of which there are a thousand.
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

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
