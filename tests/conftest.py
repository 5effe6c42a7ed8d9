"""All tests."""

from __future__ import annotations

import gc
import sys

import pytest

from tests import composition

composition.shorten()

# Nothing here is so large that garbage needs to be found at once.
gc.set_threshold(100_000, 20, 50)
_modules = 0


def pytest_collection_finish() -> None:
    _freeze()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    ends = nextitem is None or nextitem.path != item.path
    if ends or len(sys.modules) > _modules + 100:
        _freeze()


def _freeze() -> None:
    """Leaves what imports and caches have made out of every later collection of garbage.

    A run collects after each model that it closes, and torch and transformers alone are a million
    objects to look through; much of them comes in where a test first uses it.
    """
    global _modules
    _modules = len(sys.modules)
    gc.collect()
    gc.freeze()
