"""All tests."""

from __future__ import annotations

import gc


def pytest_collection_finish() -> None:
    """Leaves what the imports have made out of every later collection of garbage.

    A run collects after each model that it closes, and torch and transformers alone are a million
    objects to look through.
    """
    gc.freeze()
