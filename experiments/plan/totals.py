"""`Totals`, a plan's stages added up by kind, with hours, and the table that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from experiments.pipeline.cost import Work
from experiments.plan.dry_run import Entry, Ledger

if TYPE_CHECKING:
    from rich.console import Console

KINDS = (
    "answer", "align", "merge", "attack", "prepare", "apply",
    "generate", "likelihood", "judge", "score",
)  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What the machine is taken to sustain.

    Attributes:
        tflops: Arithmetic in the weights' dtype, in TFLOP/s.
        bandwidth: Reading of weights for each generated token, in TB/s. PyTorch's own loop waits
            for the host, which starts its kernels, and reaches a fraction of what the GPU's memory
            does: by default a sixth of an H100's.
    """

    tflops: float = 300.0
    bandwidth: float = 0.5

    def seconds(self, work: Work) -> float:
        """Arithmetic, and then the weights that are read for each generated token."""
        return work.operations / (self.tflops * 1e12) + work.weight_reads / (self.bandwidth * 1e12)


@dataclass(frozen=True)
class KindTotals:
    """All stages of one kind: how many are to run or there, and what those to run take.

    Attributes:
        gpu_bytes: Of the hungriest stage; all else is summed.
        hours: By what the stages that are there have reached; without any, by the estimate.
        measured_tokens_per_second: What the stages that are there have reached; None without any,
            or where they read no tokens.
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
class Totals:
    """A whole plan, by kind of stage, with what isn't known.

    `downloads` are models that a run would fetch, with their bytes (None: the hub wasn't asked).
    """

    jobs: int
    kinds: tuple[KindTotals, ...]
    downloads: tuple[tuple[str, int | None], ...]
    rates: Rates
    notes: tuple[str, ...]

    @property
    def hours(self) -> float:
        """Of all stages to run, one after another."""
        return sum(kind.hours for kind in self.kinds)

    @property
    def disk_bytes(self) -> int:
        """Of all stages to run."""
        return sum(kind.disk_bytes for kind in self.kinds)

    @property
    def gpu_bytes(self) -> int:
        """Of the hungriest stage."""
        return max((kind.gpu_bytes for kind in self.kinds), default=0)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "jobs": self.jobs,
            "hours": self.hours,
            "disk_bytes": self.disk_bytes,
            "gpu_bytes": self.gpu_bytes,
            "stages": [asdict(kind) for kind in self.kinds],
            "downloads": [{"model": name, "bytes": size} for name, size in self.downloads],
            "rates": asdict(self.rates),
            "notes": list(self.notes),
        }


def add_up(ledger: Ledger, rates: Rates) -> Totals:
    """Adds a ledger up."""
    models = list(ledger.sizes.library.located.values())
    notes = [model.note for model in models if model.note]
    notes += [
        f"no tokenizer of {name} on this machine: its tokens are its characters / 4"
        for name in sorted(ledger.sizes.inexact)
    ]
    by_kind = {
        kind: [entry for entry in ledger.entries.values() if entry.name == kind] for kind in KINDS
    }
    return Totals(
        jobs=ledger.jobs,
        kinds=tuple(_kind(kind, entries, rates) for kind, entries in by_kind.items() if entries),
        downloads=tuple({model.name: model.download for model in models if model.fetched}.items()),
        rates=rates,
        notes=tuple(dict.fromkeys(notes)),
    )


def _kind(kind: str, entries: Sequence[Entry], rates: Rates) -> KindTotals:
    to_run = [entry.work for entry in entries if not entry.reused]
    reused = [entry for entry in entries if entry.reused and entry.seconds > 0]
    tokens = sum(_tokens(entry.work) for entry in reused)
    took = sum(entry.seconds for entry in reused)
    estimate = sum(rates.seconds(entry.work) for entry in reused)
    seconds = sum(rates.seconds(work) for work in to_run)
    if tokens:
        seconds = sum(map(_tokens, to_run)) * took / tokens
    elif reused:
        seconds = len(to_run) * took / len(reused)
    return KindTotals(
        kind=kind,
        to_run=len(to_run),
        reused=len(entries) - len(to_run),
        rows=sum(work.rows for work in to_run),
        prompt_tokens=sum(work.prompt_tokens for work in to_run),
        answer_tokens=sum(work.answer_tokens for work in to_run),
        disk_bytes=sum(work.disk for work in to_run),
        gpu_bytes=max((work.memory for work in to_run), default=0),
        hours=seconds / 3600,
        measured_tokens_per_second=tokens / took if tokens else None,
        estimated_tokens_per_second=tokens / estimate if tokens and estimate else None,
    )


def _tokens(work: Work) -> int:
    return work.answer_tokens or work.prompt_tokens


def show(plan: Totals, console: Console, *, measured: bool) -> None:
    """Prints a plan; `measured` is whether the rates of finished stages stand beside."""
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
    cells = ["together", *map(str, counts), "", "", "", decimal(plan.disk_bytes)]
    table.add_row(*cells, decimal(plan.gpu_bytes), _time(plan.hours))
    console.print(table)
    for text in _footer(plan):
        console.print(text, highlight=False, soft_wrap=True)


def _cells(kind: KindTotals, measured: bool) -> list[str]:
    cells = [kind.kind, str(kind.to_run), str(kind.reused), f"{kind.rows:,}"]
    cells += [f"{kind.prompt_tokens:,}", f"{kind.answer_tokens:,}"]
    cells += [decimal(kind.disk_bytes), decimal(kind.gpu_bytes), _time(kind.hours)]
    if measured:
        rates = (kind.measured_tokens_per_second, kind.estimated_tokens_per_second)
        shown = [f"{rate:,.0f}" for rate in rates if rate is not None]
        cells.append(f"{shown[0]} ({shown[1]})" if len(shown) == 2 else "")
    return cells


def _footer(plan: Totals) -> list[str]:
    lines = [f"{plan.jobs} job{'s' if plan.jobs > 1 else ''}"]
    for name, size in plan.downloads:
        known = "size unknown" if size is None else decimal(size)
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


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.0f} min" if hours >= 1 / 60 else f"{3600 * hours:.0f} s"
