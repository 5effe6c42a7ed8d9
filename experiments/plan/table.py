"""`show`, a plan as a table by kind of stage, what is fetched, and what all of it assumes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.plan.totals import KindTotals, Totals

if TYPE_CHECKING:
    from rich.console import Console


def show(plan: Totals, console: Console, *, measured: bool) -> None:
    """Prints a plan.

    Args:
        plan: The plan.
        console: Where to.
        measured: Whether the rates of finished stages stand beside.
    """
    from rich.table import Table

    heads = ["to run", "reused", "rows", "prompt tokens", "answer tokens ≤", "disk", "GPU", "time"]
    heads += ["tokens/s measured (estimated)"] if measured else []
    table = Table("stage")
    for head in heads:
        table.add_column(head, justify="right")
    for kind in plan.kinds:
        table.add_row(*_cells(kind, measured))
    table.add_section()
    counts = [sum(kind.to_run for kind in plan.kinds), sum(kind.reused for kind in plan.kinds)]
    cells = ["together", *map(str, counts), "", "", "", _bytes(plan.disk_bytes)]
    table.add_row(*cells, _bytes(plan.gpu_bytes), _time(plan.hours))
    console.print(table)
    for text in _footer(plan):
        console.print(text, highlight=False, soft_wrap=True)


def _cells(kind: KindTotals, measured: bool) -> list[str]:
    cells = [kind.kind, str(kind.to_run), str(kind.reused), f"{kind.rows:,}"]
    cells += [f"{kind.prompt_tokens:,}", f"{kind.answer_tokens:,}"]
    cells += [_bytes(kind.disk_bytes), _bytes(kind.gpu_bytes), _time(kind.hours)]
    if measured:
        rates = (kind.measured_tokens_per_second, kind.estimated_tokens_per_second)
        shown = [f"{rate:,.0f}" for rate in rates if rate is not None]
        cells.append(f"{shown[0]} ({shown[1]})" if len(shown) == 2 else "")
    return cells


def _footer(plan: Totals) -> list[str]:
    lines = [f"{plan.jobs} job{'s' if plan.jobs > 1 else ''}"]
    for name, size in plan.downloads:
        known = "size unknown" if size is None else _bytes(size)
        lines.append(f"to fetch: {name} ({known})")
    lines += [f"note: {note}" for note in plan.notes]
    lines.append(
        "Time: at the tokens per second that finished stages of a kind have reached; without any, "
        f"of arithmetic at {plan.rates.tflops:g} TFLOP/s (--tflops) and of reading all weights for "
        f"each generated token at {plan.rates.bandwidth:g} TB/s (--bandwidth) alone. Answers at "
        "full length, stages one after another on one GPU."
    )
    lines.append(
        "GPU memory: of the hungriest stage, without the CUDA context and fragmentation (add a "
        "tenth); the formulas are in experiments/pipeline/cost.py."
    )
    return lines


def _bytes(size: int) -> str:
    if size >= 10**8:
        return f"{size / 10**9:,.1f} GB"
    return f"{size / 10**6:,.1f} MB" if size else "0"


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"
