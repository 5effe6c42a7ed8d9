"""`python -m experiments.plan OVERRIDES`: what `experiments.run` would do with the same ones.

python -m experiments.plan experiment=nlsr_table1
python -m experiments.plan -m defense=none,nlsr seed=0,1 --json plan.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from experiments.config.experiment import register_resolvers
from experiments.config.jobs import expand
from experiments.launch.sweep import run_command
from experiments.plan.dry_run import walk
from experiments.plan.models import Library
from experiments.plan.totals import Rates, add_up, show
from experiments.report.table import terminal
from settings import RelockError
from settings.places import check_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parse(arguments)
    return run_command(lambda: _plan(options))


def _plan(options: argparse.Namespace) -> int:
    register_resolvers()
    if options.json is not None:
        check_file(options.json, "--json")
    rates = Rates(options.tflops, options.bandwidth)
    overrides = list(options.overrides)
    if options.config_dir is not None:
        overrides.append(f"hydra.searchpath=[file://{options.config_dir.absolute()}]")
    with tempfile.TemporaryDirectory() as scratch:
        library = Library(Path(scratch))
        try:
            plan = add_up(walk(expand(overrides, multirun=options.multirun), library), rates)
        except RelockError as error:
            raise type(error)(library.real_name(str(error))) from error
    show(plan, terminal(), measured=options.measured)
    if options.json is not None:
        options.json.write_text(json.dumps(plan.as_json(), indent=1) + "\n")
    return 0


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
        help="TB/s at which weights are read for each generated token; 0.5 is what PyTorch's own "
        "loop may reach on an H100, whose memory does 3.35 (default: %(default)g)",
    )
    return parser.parse_intermixed_args(arguments)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
