"""The report's figures as PNG files: of harmfulness, sweeps, steps and heat maps of defenses."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from experiments.report import harm, heatmaps, steps, sweeps
from experiments.report.drawing import Drawing
from experiments.report.pool import Collected

_DPI = 160
# So many of a heading's characters fit into an inch.
_CHARACTERS = 11


def write(collected: Collected, folder: Path) -> list[Path]:
    """Writes the figures that the runs allow to `folder`, as PNG; docs/report.md lists them.

    Raises:
        RelockError: A heat map is malformed; all other figures have been written.
    """
    import matplotlib

    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    # A "$" in a name is a dollar sign.
    with matplotlib.rc_context({"text.parse_math": False}):
        for drawing in chain(harm.figures(collected.rows), further(collected)):
            width = int(_CHARACTERS * drawing.figure.get_figwidth())
            heading = (drawing.title, drawing.note, collected.note)
            lines = chain.from_iterable(textwrap.wrap(text, width) for text in heading)
            drawing.figure.suptitle("\n".join(lines), fontsize=11)
            written.append(folder / f"{drawing.stem}.png")
            drawing.figure.savefig(written[-1], dpi=_DPI)
    return written


def further(collected: Collected) -> Iterator[Drawing]:
    """Sweeps of settings, steps and heat maps: what has a figure only where it was run.

    Raises:
        RelockError: A heat map is malformed; this comes after all the others.
    """
    rows = collected.rows
    yield from chain(sweeps.figures(rows), steps.figures(rows), heatmaps.figures(rows))
