"""The command line that makes one run again, ready for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

RUN, EVALUATE = (["python", "-m", f"experiments.{name}"] for name in ("run", "evaluate"))
_MODE = "hydra.mode"
# Where Hydra keeps what a job was started with.
_HYDRA = Path(".hydra", "hydra.yaml")


def command_line(
    overrides: Sequence[str],
    *more: str,
    folder: Path | None = None,
    command: Sequence[str] = (),
) -> str:
    """The command of one job, quoted for a shell; `command` is what it begins with, if not RUN.

    Further overrides stand in the place of given ones of the same key; the job's folder says
    whether it ran with `--config-dir`.
    """
    replaced = {_MODE, *map(override_key, more)}
    kept = [override for override in overrides if override_key(override) not in replaced]
    # An experiment may ask for its whole sweep.
    alone = [f"{_MODE}=RUN"] if "experiment" in map(override_key, overrides) else []
    options = [f"--config-dir={path}" for path in _config_dirs(folder)]
    return shlex.join([*(command or RUN), *options, *kept, *alone, *more])


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


def override_key(override: str) -> str:
    """The setting that an override is about, without the `+` of one that is added."""
    return override.lstrip("+").partition("=")[0]
