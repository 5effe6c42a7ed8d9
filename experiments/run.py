"""The main command: `python -m experiments.run defense=nlsr attack=harmful_ft model=organism`."""

from __future__ import annotations

import sys

import hydra

from experiments.config.experiment import CONF
from experiments.launch import sweep
from experiments.launch.job import job
from experiments.launch.sweep import run_command
from settings import SettingError


def main() -> int:
    """Runs the command line; returns the exit code."""
    return run_command(_start)


def _start() -> int:
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except OSError as error:
        if error.filename is None:
            raise
        # Of the run's own folder; the jobs' errors don't come here.
        raise SettingError(
            f"{str(error.filename)!r} can't be made a folder ({error.strerror}); set "
            "hydra.run.dir, or hydra.sweep.dir for a sweep, to one that can be written"
        ) from error
    return 1 if sweep.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
