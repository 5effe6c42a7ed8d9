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
    replaced = {_MODE, *map(override_key, more)}
    kept = [override for override in overrides if override_key(override) not in replaced]
    # An experiment may ask for its whole sweep.
    alone = [f"{_MODE}=RUN"] if "experiment" in map(override_key, overrides) else []
    return f"{_COMMAND} {shlex.join([*kept, *alone, *more])}".rstrip()


def override_key(override: str) -> str:
    """The setting that an override is about, without the `+` of one that is added."""
    return override.lstrip("+").partition("=")[0]
