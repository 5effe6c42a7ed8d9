"""How far a long piece of work is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any

log = logging.getLogger("relock")

EVERY_SECONDS = 30.0
"""The least time between two lines."""


class Progress:
    """Counts a piece of work, such as a training's steps or a generation's prompts.

    Used as a context manager. The lines go to the log, with the time left at the mean pace so far.
    """

    def __init__(self, total: int, what: str, unit: str) -> None:
        self._total, self._what, self._unit = total, what, unit
        self._done = 0
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """So many more are done; `note` is what else there is to say, such as the loss."""
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif now - self._last >= EVERY_SECONDS and self._done < self._total:
            self._last = now
            left = (now - self._start) / self._done * (self._total - self._done)
            said = f"{self._what}: {self._done} of {self._total} {self._unit}"
            log.info("%s", ", ".join(filter(None, (said, note, f"about {duration(left)} left"))))


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for unit, length, most in (("s", 1, 99.5), ("min", 60, 5970), ("h", 3600, 172800)):
        if seconds < most:
            value = seconds / length
            return f"{value:.1f} {unit}" if unit == "h" and value < 9.95 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"
