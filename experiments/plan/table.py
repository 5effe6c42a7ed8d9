"""How a plan is shown: a table by kind of stage, what is fetched, and what all of it assumes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from experiments.plan.dry_run import Ledger
from experiments.plan.effort import HOST_SECONDS_PER_ADAPTED, HOST_SECONDS_PER_BLOCK, Rates
from experiments.plan.models import Located

if TYPE_CHECKING:
    from rich.console import Console

KINDS = (
    "align", "merge", "attack", "prepare", "apply", "generate", "likelihood", "judge", "score",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """All stages of one kind; what they take counts for those to run alone.

    Attributes:
        kind: "align", "merge", and so on.
        to_run: How many stages are to run.
        reused: How many are there.
        rows: As in `Cost`, summed.
        prompt_tokens: Likewise.
        answer_tokens: Likewise.
        disk_bytes: Likewise.
        gpu_bytes: Of the hungriest stage.
        hours: Summed.
        measured_tokens_per_second: What the stages that are there have reached, where the plan
            knows their tokens; None without any.
        estimated_tokens_per_second: The estimate for the same stages.
    """

    kind: str
    to_run: int
    reused: int
    rows: int
    prompt_tokens: int
    answer_tokens: int
    disk_bytes: int
    gpu_bytes: int
    hours: float
    measured_tokens_per_second: float | None
    estimated_tokens_per_second: float | None


@dataclass(frozen=True)
class Overview:
    """A whole plan.

    Attributes:
        jobs: How many jobs.
        lines: One per kind of stage that occurs.
        downloads: Models that a run would fetch: name and bytes (None: the hub wasn't asked).
        rates: What the machine is taken to sustain.
        notes: What isn't known.
    """

    jobs: int
    lines: tuple[Line, ...]
    downloads: tuple[tuple[str, int | None], ...]
    rates: Rates
    notes: tuple[str, ...]

    @property
    def hours(self) -> float:
        """Of all stages to run, one after another."""
        return sum(line.hours for line in self.lines)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "jobs": self.jobs,
            "hours": self.hours,
            "disk_bytes": sum(line.disk_bytes for line in self.lines),
            "gpu_bytes": max((line.gpu_bytes for line in self.lines), default=0),
            "stages": [asdict(line) for line in self.lines],
            "downloads": [{"model": name, "bytes": size} for name, size in self.downloads],
            "rates": asdict(self.rates),
            "notes": list(self.notes),
        }


def overview(
    jobs: int, ledger: Ledger, located: Iterable[Located], inexact: Iterable[str], rates: Rates
) -> Overview:
    """Sums a ledger up."""
    models = list(located)
    notes = [each.note for each in models if each.note]
    notes += [
        f"no tokenizer of {name} on this machine: its tokens are its characters / 4"
        for name in sorted(set(inexact))
    ]
    downloads = {each.name: each.download for each in models if each.fetched}
    kinds = [kind for kind in KINDS if any(e.name == kind for e in ledger.entries.values())]
    return Overview(
        jobs=jobs,
        lines=tuple(_line(kind, ledger) for kind in kinds),
        downloads=tuple(downloads.items()),
        rates=rates,
        notes=tuple(dict.fromkeys(notes)),
    )


def _line(kind: str, ledger: Ledger) -> Line:
    entries = [entry for entry in ledger.entries.values() if entry.name == kind]
    costs = [entry.cost for entry in entries if not entry.reused]
    made = [entry for entry in entries if entry.reused and entry.seconds > 0]
    tokens = sum(entry.cost.answer_tokens or entry.cost.prompt_tokens for entry in made)
    measured, estimated = (
        tokens / seconds if tokens and seconds else None
        for seconds in (sum(e.seconds for e in made), sum(e.cost.seconds for e in made))
    )
    return Line(
        kind=kind,
        to_run=len(costs),
        reused=len(entries) - len(costs),
        rows=sum(cost.rows for cost in costs),
        prompt_tokens=sum(cost.prompt_tokens for cost in costs),
        answer_tokens=sum(cost.answer_tokens for cost in costs),
        disk_bytes=sum(cost.disk for cost in costs),
        gpu_bytes=max((cost.memory for cost in costs), default=0),
        hours=sum(cost.seconds for cost in costs) / 3600,
        measured_tokens_per_second=measured,
        estimated_tokens_per_second=estimated,
    )


def show(plan: Overview, console: Console, *, measured: bool) -> None:
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
    for line in plan.lines:
        table.add_row(*_cells(line, measured))
    table.add_section()
    total = plan.as_json()
    counts = [sum(line.to_run for line in plan.lines), sum(line.reused for line in plan.lines)]
    cells = ["together", *map(str, counts), "", "", "", _bytes(total["disk_bytes"])]
    table.add_row(*cells, _bytes(total["gpu_bytes"]), _time(plan.hours))
    console.print(table)
    for text in _footer(plan):
        console.print(text, highlight=False, soft_wrap=True)


def _cells(line: Line, measured: bool) -> list[str]:
    cells = [line.kind, str(line.to_run), str(line.reused), f"{line.rows:,}"]
    cells += [f"{line.prompt_tokens:,}", f"{line.answer_tokens:,}"]
    cells += [_bytes(line.disk_bytes), _bytes(line.gpu_bytes), _time(line.hours)]
    if measured:
        rates = (line.measured_tokens_per_second, line.estimated_tokens_per_second)
        shown = [f"{rate:,.0f}" for rate in rates if rate is not None]
        cells.append(f"{shown[0]} ({shown[1]})" if len(shown) == 2 else "")
    return cells


def _footer(plan: Overview) -> list[str]:
    lines = [f"{plan.jobs} job{'s' if plan.jobs > 1 else ''}"]
    for name, size in plan.downloads:
        known = "size unknown" if size is None else _bytes(size)
        lines.append(f"to fetch: {name} ({known})")
    lines += [f"note: {note}" for note in plan.notes]
    rates = plan.rates
    lines.append(
        "All figures are estimates, none is measured: "
        f"{rates.tflops:g} TFLOP/s sustained (--tflops), {rates.bandwidth:g} TB/s of GPU memory "
        f"(--bandwidth), {rates.disk:g} GB/s of disk (--disk), "
        f"{1e3 * HOST_SECONDS_PER_BLOCK:g} ms of host time for each block and "
        f"{1e3 * HOST_SECONDS_PER_ADAPTED:g} ms for each adapted projection in a pass, answers at "
        "full length, stages one after another on one GPU."
    )
    lines.append(
        "GPU memory: of the hungriest stage, without the CUDA context and fragmentation (add a "
        "tenth); the formulas are in experiments/plan/memory.py and effort.py."
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
