"""Hashes of rows, so that a stage's key follows what it reads and not where that came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any


def of_rows(rows: Iterable[Any]) -> str:
    """SHA-256 (16 hex digits) of dataclass rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(asdict(row), sort_keys=True).encode())
    return digest.hexdigest()[:16]
