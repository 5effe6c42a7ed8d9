"""`python -m experiments.progress FOLDER`: how far a run or a sweep is, from any terminal.

python -m experiments.progress outputs/sweeps/2026-11-21/10-00-00-000000
python -m experiments.progress outputs/sweeps/2026-11-21/10-00-00-000000 --once
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from experiments.launch.progress.console import is_live
from experiments.launch.progress.state import SweepState, is_watchable
from experiments.launch.progress.view import Watch, snapshot
from settings.terminal import print_in_ascii


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    given = _parse(arguments)
    print_in_ascii()
    if not is_watchable(given.folder):
        print(
            f"error: {given.folder} is neither a run nor a sweep; give the folder that a run "
            "writes to (hydra.run.dir), or a multirun its jobs (hydra.sweep.dir)",
            file=sys.stderr,
        )
        return 1
    if not given.once:
        try:
            with Watch(given.folder, live=not given.plain and is_live()) as watch:
                watch.until_end(threading.Event())
        except KeyboardInterrupt:
            return 130
    sweep = SweepState(given.folder)
    sweep.refresh()
    for line in snapshot(sweep):
        print(line)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m experiments.progress", description="How far a run or a sweep is."
    )
    parser.add_argument("folder", type=Path, help="the run's or the sweep's folder")
    parser.add_argument("--once", action="store_true", help="say how it stands, and end")
    parser.add_argument(
        "--plain", action="store_true", help="a line per job also on a terminal, no live view"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
