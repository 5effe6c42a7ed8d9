"""The one model that is open: stages that need the same model in a row load it once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from evaluation.base import Backend, Classifier
from evaluation.token_engine import Engine
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint

_open: dict[str, Any] = {}


def engine(
    backend: Backend,
    checkpoint: Checkpoint,
    style: PromptStyle,
    reference: Checkpoint | None = None,
) -> Engine:
    """The model's engine: the one that is open, or a new one after the open one was closed.

    The arguments are those of `Backend.open`.
    """
    parts = [asdict(checkpoint), style.model_dump(), reference and asdict(reference)]
    return _opened(backend, parts, lambda: backend.open(checkpoint, style, reference))


def classifier(backend: Backend, folder: str, dtype: str) -> Classifier:
    """A sequence classifier: the one that is open, or a new one after what is open was closed."""
    return _opened(backend, [folder, dtype], lambda: backend.classifier(folder, dtype))


@contextmanager
def closing() -> Iterator[None]:
    """Closes what was opened within, whatever happens there."""
    try:
        yield
    finally:
        close_engines()


def close_engines() -> None:
    """Gives back the memory of the model that was kept open."""
    while _open:
        _open.popitem()[1].close()


def _opened(backend: Backend, parts: list[Any], load: Callable[[], Any]) -> Any:
    wanted = json.dumps([type(backend).__name__, backend.model_dump(mode="json"), *parts])
    if wanted not in _open or not _open[wanted].usable:
        close_engines()
        _open[wanted] = load()
    return _open[wanted]
