"""Whether weights are streamed: the `runtime` section says it once, whatever loads a model asks."""

from __future__ import annotations

import os

_VARIABLE = "RELOCK_STREAM_WEIGHTS"  # Child processes inherit it.


def say_streaming(value: bool | None) -> None:
    """Sets it for this process and those that it starts; None leaves it to the memory at hand."""
    os.environ.pop(_VARIABLE, None)
    if value is not None:
        os.environ[_VARIABLE] = str(int(value))


def streaming() -> bool | None:
    """What was said last."""
    value = os.environ.get(_VARIABLE)
    return None if value is None else value == "1"
