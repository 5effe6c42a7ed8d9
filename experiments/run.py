"""The main command: `python -m experiments.run defense=nlsr attack=harmful_ft model=organism`."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import hydra
from omegaconf import DictConfig

from experiments.config.experiment import CONF
from experiments.config.explain import explain, is_users
from experiments.launch import launchers, sweep
from experiments.launch.job import job, quiet_libraries


def main() -> int:
    """Runs the command line; returns the exit code.

    Errors that a user can mend are one sentence on stderr; others keep their stack trace. A
    launcher that breaks off is waited for, and what became of its jobs is told as at every end.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and this function words the message.
    quiet_libraries()
    sweep.forget()
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(job)()
    except KeyboardInterrupt:
        print(sweep.interrupt(), file=sys.stderr)
        return 130
    except Exception as error:
        sentence = launchers.missing(error) or _of_folder(error)
        config = sweep.unfinished()
        if sentence is None and config is not None and Path(config.hydra.sweep.dir).is_dir():
            return _broken_off(config, error)
        sweep.stop_progress()
        if sentence is None and not is_users(error):
            raise
        print(f"error: {sentence or explain(error)}", file=sys.stderr)
        return 1
    finally:
        sweep.stop_progress()
    return 1 if sweep.failures() else 0


def _of_folder(error: Exception) -> str | None:
    """One sentence where Hydra couldn't make its folder; the jobs' own errors don't come here."""
    if not isinstance(error, FileExistsError | NotADirectoryError | PermissionError):
        return None
    return (
        f"{str(error.filename)!r} can't be made a folder ({error.strerror}); set hydra.run.dir, or "
        "hydra.sweep.dir for a sweep, to one that can be written"
    )


def _broken_off(config: DictConfig, error: Exception) -> int:
    launchers.wait_for_jobs(config)
    sweep.finish(config)
    if launchers.broke(error):
        print(f"error: {launchers.breakdown(error)}", file=sys.stderr)
        return 1
    if not is_users(error):
        traceback.print_exception(error)
    print(f"error: {explain(error)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
