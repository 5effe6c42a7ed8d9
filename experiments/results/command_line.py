"""The command line that makes one run again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

_COMMAND = "python -m experiments.run"
_MODE = "hydra.mode"


def command_line(overrides: Sequence[str], *more: str) -> str:
    """The command of one job, quoted for a shell.

    Args:
        overrides: The job's, as its record or status has them.
        more: Further ones, each in the place of a given one of the same key.
    """
    replaced = {_MODE, *map(_key, more)}
    kept = [override for override in overrides if _key(override) not in replaced]
    # An experiment may ask for its whole sweep.
    alone = [f"{_MODE}=RUN"] if "experiment" in map(_key, overrides) else []
    return f"{_COMMAND} {shlex.join([*kept, *alone, *more])}".rstrip()


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]
