"""Collections of garbage: rare while libraries are imported, and then as they were."""

from __future__ import annotations

import gc

import pytest

from settings import process
from settings.process import collect_as_usual, collect_rarely


@pytest.fixture(autouse=True)
def _as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test's command may have begun to import.
    monkeypatch.setattr(process, "_usual", None)


def test_garbage_is_collected_as_usual_after_the_imports() -> None:
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        gc.set_threshold(700, 10, 10)
        collect_rarely()
        collect_rarely()
        assert gc.get_threshold() == (100_000, 20, 50)
        kept = [[] for _ in range(1000)]
        collect_as_usual()
        assert gc.get_threshold() == (700, 10, 10)
        assert gc.get_freeze_count() >= frozen + len(kept)
    finally:
        gc.set_threshold(*usual)


def test_what_was_set_in_between_is_kept_without_imports() -> None:
    usual = gc.get_threshold()
    try:
        gc.set_threshold(500, 5, 5)
        collect_as_usual()
        assert gc.get_threshold() == (500, 5, 5)
    finally:
        gc.set_threshold(*usual)
