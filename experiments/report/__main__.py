"""`python -m experiments.report PATH ...`: one table, its figures and examples from any runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from settings import RelockError
from settings.places import check_folder
from settings.terminal import exit_code


def main(arguments: list[str] | None = None) -> int:
    """Reads the runs under the given folders, prints and writes the report."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="folders of runs or of whole sweeps")
    parser.add_argument(
        "--output", type=Path, help="where the files go (default: report/ in the first folder)"
    )
    parser.add_argument(
        "--examples",
        type=_count,
        default=0,
        metavar="N",
        help="print N prompts with what every model made of them; examples.md has more of them",
    )
    parser.add_argument(
        "--show-text",
        action="store_true",
        help="show harmful prompts and the answers to them as text too; keep that page local",
    )
    parser.add_argument(
        "--html",
        action="store_true",
        help="write report.html too: one page that needs no other file",
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: _report(options))


def _report(options: argparse.Namespace) -> int:
    output = options.output or options.paths[0] / "report"
    report(options.paths, output, options.examples, options.show_text, options.html)
    return 0


def _count(given: str) -> int:
    if not given.isdecimal():
        raise argparse.ArgumentTypeError(f"{given!r} is no number of prompts; write e.g. 5")
    return int(given)


def report(
    paths: list[Path],
    output: Path,
    examples: int = 0,
    show_text: bool = False,
    as_page: bool = False,
) -> None:
    """Prints the table of the runs under `paths`; writes CSV, Markdown, LaTeX and PNG to `output`.

    Runs of a paper's experiment are printed and written beside the paper's own figures, and so many
    example prompts with what every model made of them, harmful text only if `show_text`. The page
    may be of failed jobs alone.

    Raises:
        RelockError: A path doesn't exist or holds no record, or `output` can't be written.
    """
    from experiments.report import (
        examples_markdown,
        figures,
        html,
        latex,
        pareto,
        published,
        steps,
        tables,
    )
    from experiments.report.examples import MAIN, side_by_side
    from experiments.report.pool import collect
    from experiments.report.table import terminal

    for path in paths:
        if not path.is_dir():
            raise RelockError(f"{path} is not a folder; give a run's or a sweep's folder")
    check_folder(output, "--output")
    collected, screen = collect(paths), terminal()
    written: list[Path] = []
    if collected.runs:
        tables.show(collected, screen)
        for sentence in pareto.sentences(collected):
            screen.print(sentence, markup=False, highlight=False, soft_wrap=True)
        comparisons = published.comparisons(collected)
        published.show(comparisons, screen)
        compared = side_by_side(collected, max(examples, MAIN))
        examples_markdown.show(compared, screen, examples, show_text)
        written += [*tables.write(collected, output), latex.write(collected, output)]
        written += steps.write(collected.rows, output)
        written += published.write(comparisons, output)
        written += examples_markdown.write(compared, output, show_text)
    else:
        names = ", ".join(str(path) for path in paths)
        if not (as_page and html.failures(paths)):
            raise RelockError(f"no record.json under {names}; give a folder of finished runs")
        screen.print(f"no run under {names} has ended with a result", highlight=False)
        comparisons = []
    if as_page:
        written.append(html.write(collected, comparisons, paths, output))
    if collected.runs:
        written += figures.write(collected, output)
    for path in written:
        screen.print(str(path), soft_wrap=True, highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
