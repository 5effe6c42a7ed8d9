"""What happens in a sweep and in each of its jobs, as lines of `progress.jsonl` in its folder.

Every line is a JSON object with "event", "status" and "time" (seconds since 1970):

- in the sweep's folder, event "sweep": "started" (host, pid; total and varies as
  `progress.expected` has them; numbers: the jobs that run, null for all) and "ended";
- in a job's folder, event "job": "running", "measured" (result, in a few words), "done" or
  "failed"; and event "stage" (name, key):
  "waiting" for another process that makes it, "running", "made" or "reused" (seconds that making
  it takes or once took).
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

EVENTS = "progress.jsonl"


def append(folder: Path, event: str, status: str, **details: Any) -> None:
    """Adds one line to a folder's events; what can't be written is left out, and nothing fails."""
    content = {"event": event, "status": status, "time": time.time(), **details}
    with suppress(OSError):
        handle = os.open(folder / EVENTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, (json.dumps(content) + "\n").encode())
        finally:
            os.close(handle)


def read(folder: Path) -> list[dict[str, Any]]:
    """A folder's events; a line that a full disk cut short is left out."""
    try:
        text = (folder / EVENTS).read_bytes()
    except OSError:
        return []
    events = []
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                events.append(event)
    return events
