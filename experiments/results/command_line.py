"""The command line that makes one run again, ready for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_COMMAND = "python -m experiments.run"
_MODE = "hydra.mode"
# Where Hydra keeps what a job was started with.
_HYDRA = Path(".hydra", "hydra.yaml")


def command_line(overrides: Sequence[str], *more: str, folder: Path | None = None) -> str:
    """The command of one job, quoted for a shell.

    Args:
        overrides: The job's, as its record or status has them.
        more: Further ones, each in the place of a given one of the same key.
        folder: The job's folder, which says whether it ran with `--config-dir`.
    """
    replaced = {_MODE, *map(_key, more)}
    kept = [override for override in overrides if _key(override) not in replaced]
    # An experiment may ask for its whole sweep.
    alone = [f"{_MODE}=RUN"] if "experiment" in map(_key, overrides) else []
    options = [f"--config-dir={path}" for path in _config_dirs(folder)]
    return f"{_COMMAND} {shlex.join([*options, *kept, *alone, *more])}".rstrip()


def _config_dirs(folder: Path | None) -> list[str]:
    """The configuration folder that a job's command line named, if any."""
    if folder is None or not (folder / _HYDRA).is_file():
        return []
    try:
        hydra = OmegaConf.load(folder / _HYDRA)
        sources = OmegaConf.select(hydra, "hydra.runtime.config_sources") or ()
    except (OSError, OmegaConfBaseException):
        return []
    return [str(each["path"]) for each in sources if each["provider"] == "command-line"]


def _key(override: str) -> str:
    return override.lstrip("+").partition("=")[0]
