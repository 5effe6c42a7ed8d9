"""The methods' own work beside their authors' codes: `python -m benchmarks.methods`.

With `--official FOLDER`, which holds the user's clones of NLSR, SafetyLock and SafeLoRA in folders
of these names, the authors' functions run on the same random models and rows (`official.py`);
without it, and where there is no code, the literal formula does where there is one.  Both sides
take turns in a process each; a repeat's peak memory is what its step took above its start.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import literal, official, ours
from benchmarks.inputs import Inputs, Sizes, make_inputs
from modeling.measure import measured

# Gets the inputs; what it does is not measured, what it returns is called and is.
Side = Callable[[Inputs], Callable[[], object]]


@dataclass(frozen=True)
class Work:
    """One row: how this project does it, and what stands beside it."""

    ours: Side
    official: Side | None = None
    literal: Side | None = None


@dataclass(frozen=True)
class Cost:
    """Seconds (of the processor with one thread, else by the clock) and bytes above the start."""

    seconds: float
    peak: float


def works() -> dict[str, Work]:
    """The rows by name."""
    found = {}
    for method in ("low_rank", "wanda", "snip", "preference_snip"):
        theirs = partial(official.identify, method=method)
        found[f"NLSR, {method}"] = Work(partial(ours.identify, method=method), theirs)
        if method != "low_rank":
            sequential = partial(ours.identify, method=method, variant="official")
            found[f"NLSR, {method}, block by block"] = Work(sequential, theirs)
    found["NLSR, similarity, selection and patch"] = Work(ours.realign, official.realign)
    found["NLSR, projection and cosine of an up_proj"] = Work(ours.module, literal=literal.module)
    found["SafetyLock, prepare"] = Work(ours.prepare_lock, official.prepare_lock)
    for rank in (128, 16):
        for tau, how in ((-1.0, "nothing"), (1.0, "all")):
            sides = (
                partial(side, rank=rank, tau=tau) for side in (ours.safelora, official.safelora)
            )
            found[f"SafeLoRA, rank {rank}, {how} projected"] = Work(*sides)
    for direction in ("LoRA", "dense"):
        for delta in ("LoRA", "dense"):
            mine, formula = (
                partial(side, kinds=(direction, delta)) for side in (ours.fgsn, literal.fgsn)
            )
            found[f"FGSN, D {direction}, Delta {delta}"] = Work(mine, literal=formula)
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.methods")
    parser.add_argument("--official", type=Path, metavar="FOLDER", help="the user's clones")
    parser.add_argument("--repeats", type=int, default=3, help="default 3")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--only", default="", help="rows whose names begin so")
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    options = parser.parse_args()
    sizes = Sizes(**{name: getattr(options, name) for name in vars(Sizes())})
    chosen = {name: work for name, work in works().items() if name.startswith(options.only)}
    if not chosen:
        parser.error(f"no row begins with {options.only!r}; known: {', '.join(works())}")
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(Path(folder), sizes, options.official)
        Console(width=130).print(_table(chosen, inputs, options.repeats, options.threads))


def _table(chosen: dict[str, Work], inputs: Inputs, repeats: int, threads: int) -> Table:
    clock = "processor seconds, one thread" if threads == 1 else f"seconds, {threads} threads"
    title = f"{clock}; MiB above the start; medians of {repeats}"
    heads = ("beside", "theirs, s", "ours, s", "ratio", "theirs, MiB", "ours, MiB")
    table = Table("work", *heads, title=title)
    context = multiprocessing.get_context("spawn")
    known: dict[Side, Cost] = {}
    with (
        ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as one,
        ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as other,
    ):
        for name, work in chosen.items():
            beside = "official" if inputs.official and work.official else "literal"
            theirs = work.official if beside == "official" else work.literal
            pools = {work.ours: one} | ({theirs: other} if theirs not in (None, *known) else {})
            costs: dict[Side, list[Cost]] = {side: [] for side in pools}
            for _ in range(repeats):
                for side, pool in pools.items():
                    costs[side].append(pool.submit(cost_of, side, inputs, threads).result())
            known |= {side: _median(of_side) for side, of_side in costs.items()}
            mine, yours = known[work.ours], known.get(theirs) if theirs else None
            print(f"{name}: ours {mine}, theirs {yours}", file=sys.stderr, flush=True)
            if yours is None:
                table.add_row(name, "", "", f"{mine.seconds:.3g}", "", "", f"{mine.peak:.0f}")
                continue
            ratio = f"{yours.seconds / mine.seconds:.1f}"
            seconds = (f"{cost.seconds:.3g}" for cost in (yours, mine))
            mib = (f"{cost.peak:.0f}" for cost in (yours, mine))
            table.add_row(name, beside, *seconds, ratio, *mib)
    return table


def cost_of(side: Side, inputs: Inputs, threads: int) -> Cost:
    """What a side's step costs once."""
    step = side(inputs)
    with measured() as clock:
        start = time.process_time()
        step()
        processor = time.process_time() - start
    return Cost(processor if threads == 1 else clock.seconds, clock.peak_bytes / 2**20)


def _median(costs: Iterable[Cost]) -> Cost:
    seconds, peaks = zip(*((cost.seconds, cost.peak) for cost in costs), strict=True)
    return Cost(statistics.median(seconds), statistics.median(peaks))


if __name__ == "__main__":
    main()
