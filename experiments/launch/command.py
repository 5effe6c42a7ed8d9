"""What `experiments.run` and `experiments.rerun` share: the end of a command that runs jobs."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from experiments.config.explain import explain, is_users
from experiments.launch import launchers, sweep
from experiments.launch.job import quiet_libraries


def run_command(start: Callable[[], int]) -> int:
    """Runs a command that may start a multirun; returns the exit code.

    Errors that a user can mend are one sentence on stderr; others keep their stack trace. A
    launcher that breaks off is waited for, and the outcome of its jobs is shown as at every end.

    Args:
        start: Runs the jobs and returns the exit code.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and this function words the message.
    quiet_libraries()
    sweep.forget()
    try:
        return start()
    except KeyboardInterrupt:
        print(sweep.interrupt(), file=sys.stderr)
        return 130
    except Exception as error:
        sentence = launchers.missing_plugin(error)
        if sentence is None and sweep.wait_for_outcome():
            if not launchers.is_breakdown(error) and not is_users(error):
                traceback.print_exception(error)
            sentence = (
                launchers.breakdown(error) if launchers.is_breakdown(error) else explain(error)
            )
        sweep.stop_progress()
        if sentence is None and not is_users(error):
            raise
        print(f"error: {sentence or explain(error)}", file=sys.stderr)
        return 1
    finally:
        sweep.stop_progress()
