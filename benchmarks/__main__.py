"""`python -m benchmarks [NAME ...]`: runs the benchmarks, or those named."""

from __future__ import annotations

import argparse
import subprocess
import sys
from itertools import takewhile

from experiments.launch.job import quiet_libraries

NAMES = ("fgsn", "methods", "real", "reuse", "safetylock", "serving", "streaming", "training")


def main() -> int:
    """Runs each benchmark in a process of its own, so that none warms another's memory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(NAMES)}")
    arguments = sys.argv[1:]
    named = list(takewhile(lambda each: not each.startswith("-"), arguments))
    options = arguments[len(named) :]
    # Without a name the options are --help, or none that there is.
    names = parser.parse_args(named or options).names or NAMES
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]}; known: {', '.join(NAMES)}")
    if options and len(names) > 1:
        parser.error(f"{options[0]} goes to one benchmark; name that one alone")
    quiet_libraries()
    codes = [
        subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *options]) for name in names
    ]
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
