"""`python -m experiments.report PATH ...`: one table and its figures from any set of runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from settings import RelockError


def main(arguments: list[str] | None = None) -> int:
    """Reads the runs under the given folders, prints and writes the report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="folders of runs or of whole sweeps")
    parser.add_argument(
        "--output", type=Path, help="where the files go (default: report/ in the first folder)"
    )
    options = parser.parse_args(arguments)
    try:
        report(options.paths, options.output or options.paths[0] / "report")
    except RelockError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def report(paths: list[Path], output: Path) -> None:
    """Prints the table of the runs under `paths`; writes CSV, Markdown and PNG to `output`.

    Runs of a paper's experiment are printed and written beside the paper's own figures.

    Raises:
        RelockError: A path doesn't exist or holds no record.
    """
    from experiments.report import figures, published, steps, tables
    from experiments.report.collect import collect

    for path in paths:
        if not path.is_dir():
            raise RelockError(f"{path} is not a folder; give a run's or a sweep's folder")
    collected = collect(paths)
    if not collected.runs:
        names = ", ".join(str(path) for path in paths)
        raise RelockError(f"no record.json under {names}; give a folder of finished runs")
    console = tables.terminal()
    console.print(tables.terminal_table(collected))
    comparisons = published.comparisons(collected)
    published.show(comparisons, console)
    written = [*tables.write(collected, output), *steps.write(collected.rows, output)]
    written += published.write(comparisons, output)
    for path in [*written, *figures.write(collected, output)]:
        console.print(str(path), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
