"""`python -m experiments.plan OVERRIDES`: what `experiments.run` would do with the same ones.

python -m experiments.plan experiment=nlsr_table1
python -m experiments.plan -m defense=none,nlsr seed=0,1 --json plan.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.config.explain import explain, is_users
from experiments.plan.effort import Rates

if TYPE_CHECKING:
    from experiments.plan.models import Library


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    given = _parse(arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from experiments.plan.models import Library

    with tempfile.TemporaryDirectory() as scratch:
        library = Library(Path(scratch))
        try:
            _plan(given, library)
        except Exception as error:
            if not is_users(error):
                raise
            print(f"error: {library.real_name(explain(error))}", file=sys.stderr)
            return 1
    return 0


def _plan(given: argparse.Namespace, library: Library) -> None:
    from experiments.config.experiment import register_resolvers
    from experiments.config.jobs import expand
    from experiments.plan.sweep import foresee
    from experiments.plan.table import show
    from experiments.report.table import terminal

    register_resolvers()
    rates = Rates(given.tflops, given.bandwidth, given.disk)
    overrides = list(given.overrides)
    if given.config_dir is not None:
        overrides.append(f"hydra.searchpath=[file://{given.config_dir.absolute()}]")
    plan = foresee(expand(overrides, multirun=given.multirun), library, rates)
    show(plan, terminal(), measured=given.measured)
    if given.json is not None:
        given.json.write_text(json.dumps(plan.as_json(), indent=1) + "\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    rates = Rates()
    parser = argparse.ArgumentParser(
        "python -m experiments.plan", description="What a run or a sweep will cost."
    )
    parser.add_argument("overrides", nargs="*", help="as for python -m experiments.run")
    parser.add_argument("-m", "--multirun", action="store_true", help="the overrides are a sweep")
    parser.add_argument(
        "-cd", "--config-dir", type=Path, metavar="FOLDER", help="a further configuration folder"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument(
        "--measured", action="store_true", help="show what finished stages have reached beside"
    )
    parser.add_argument(
        "--tflops",
        type=_positive,
        default=rates.tflops,
        help="sustained TFLOP/s in the weights' dtype; 300 is some third of an H100's peak in "
        "bfloat16 (default: %(default)g)",
    )
    parser.add_argument(
        "--bandwidth",
        type=_positive,
        default=rates.bandwidth,
        help="TB/s of GPU memory; an H100's is 3.35 (default: %(default)g)",
    )
    parser.add_argument(
        "--disk",
        type=_positive,
        default=rates.disk,
        help="GB/s of the disk that holds weights and store (default: %(default)g)",
    )
    return parser.parse_intermixed_args(arguments)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
