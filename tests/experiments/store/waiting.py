"""What a run's child does until it is ended."""

from __future__ import annotations

import os
import signal


def say_and_wait() -> None:
    """Prints its process's id, and waits."""
    print(os.getpid(), flush=True)
    signal.pause()
