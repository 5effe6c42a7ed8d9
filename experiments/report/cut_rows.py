"""What training didn't see of its rows: those that were cut at `max_length`, or left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from experiments.report.pool import Run
from experiments.results.record import Record


def cut_rows(runs: Iterable[Run]) -> list[str]:
    """A sentence for each phase of training that cut rows or left some out; alike ones once."""
    return list(dict.fromkeys(said for run in runs for said in _of_run(run.record)))


def _of_run(record: Record) -> Iterator[str]:
    labels = record.labels
    align = labels.get("align") or "alignment"
    phases = {f"{align}, {name}": (phase, "max_length") for name, phase in record.align.items()} | {
        f"{labels['attack']} on {labels['task']}": (record.attack, "attack.train.max_length"),
        f"refine={labels.get('refine')}": (record.refine, "refine.train.max_length"),
    }
    for name, (report, setting) in phases.items():
        cut, left_out = report.get("rows_cut", 0), report.get("rows_left_out", 0)
        if cut or left_out:
            yield (
                f"{name}: of {_rows(report)} training rows {cut} were cut and {left_out} left out, "
                f"being longer than {setting}"
            )


def _rows(report: Mapping[str, Any]) -> int:
    rows = report.get("rows", report.get("pairs", 0))
    return sum(rows.values()) if isinstance(rows, Mapping) else int(rows)
