"""What a training step costs: `python -m benchmarks.training [--model FOLDER]`.

Supervised fine-tuning of a fresh LoRA on the organism's alignment rows, as TRL does it by itself
and with what this project adds, each in processes of its own, alternating. Tokens are the rows'
own, without padding; seconds are the process's on all cores, which a busy machine changes less. The
loss curve of each is held against that of the first with the same order of rows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.inputs import ORGANISM
from experiments.pipeline.runner import in_child

LLAMA_8B = 8.03e9
PLAIN: dict[str, Any] = {"learning_rate": 3e-4, "batch_size": 8, "max_length": 256}
ALONE = PLAIN | {"answer_logits_only": True}
GROUPED = ALONE | {"group_by_length": True}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "TRL by itself": ("float32", PLAIN),
    "logits of answers alone": ("float32", ALONE),
    "and rows by length": ("float32", GROUPED),
    "and two passes per step": ("float32", GROUPED | {"micro_batch_size": 4}),
    "bfloat16, its adapter in float32": ("bfloat16", GROUPED),
    "bfloat16, its adapter too": ("bfloat16", GROUPED | {"adapter_dtype": "model"}),
}


@dataclass(frozen=True)
class Trained:
    """One training: its cost, its losses, and how many parameters the model has."""

    cpu_seconds: float
    peak_bytes: int
    tokens: int
    losses: list[float]
    parameters: int


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.training")
    parser.add_argument("--model", type=Path, default=ORGANISM, help="default: the organism")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    runs: dict[str, list[Trained]] = {name: [] for name in VARIANTS}
    for _ in range(options.repeats):
        for name, (dtype, settings) in VARIANTS.items():
            train = partial(_train, str(options.model), dtype, settings, options.rows)
            runs[name].append(in_child(train, "training"))
            print(f"{name}: {runs[name][-1].cpu_seconds:.1f} CPU s", file=sys.stderr, flush=True)
    Console().print(_table(options.model.name, options.rows, runs))
    first = runs["and rows by length"]
    rate = statistics.median(run.tokens / run.cpu_seconds for run in first)
    rate *= first[0].parameters / LLAMA_8B
    print(f"a model of 8B parameters at this rate of operations: {rate:.2f} tokens per CPU second")


def _train(model: str, dtype: str, settings: dict[str, Any], count: int) -> Trained:
    from transformers.utils import logging

    from modeling.chat import PromptStyle
    from modeling.checkpoint import Checkpoint
    from modeling.loading import load_tokenizer
    from modeling.measure import measured
    from modeling.training import LoraSettings, TrainSettings, open_for_training, train_sft
    from organism.sources import AlignmentExamples

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable_progress_bar()
    examples = AlignmentExamples(harmful=count // 2, benign=count - count // 2, probes=0).examples()
    rows = [[("user", each.prompt, False), ("assistant", each.response, True)] for each in examples]
    checkpoint, style = Checkpoint(model, dtype=dtype), PromptStyle()
    tokenizer = load_tokenizer(checkpoint)
    encoded = [each for row in rows for each in style.encode_dialogue(tokenizer, row)]
    opened = open_for_training(checkpoint, LoraSettings(rank=16, alpha=32), 0)
    train = TrainSettings(**settings)
    with tempfile.TemporaryDirectory() as scratch, measured() as cost:
        start = time.process_time()
        report = train_sft(opened, tokenizer, rows, style, train, 0, Path(scratch))
        seconds = time.process_time() - start
    losses = [entry["loss"] for entry in report["loss"]]
    tokens = sum(len(ids) for ids, _ in encoded)
    return Trained(seconds, cost.peak_bytes, tokens, losses, opened.num_parameters())


def _table(model: str, rows: int, runs: dict[str, list[Trained]]) -> Table:
    title = (
        f"{model}: {rows} rows, batches of 8, {os.environ.get('OMP_NUM_THREADS', 'all')} threads"
    )
    table = Table("", "tokens per CPU second", "ratio", "peak MiB", "loss differs by", title=title)
    plain = runs["TRL by itself"][0].losses
    first = None
    for name, trained in runs.items():
        rate = statistics.median(run.tokens / run.cpu_seconds for run in trained)
        first = first or rate
        peak = statistics.median(run.peak_bytes for run in trained)
        own = VARIANTS[name][1]
        against = plain if "group_by_length" not in own else runs["and rows by length"][0].losses
        apart = max(abs(a - b) for a, b in zip(trained[0].losses, against, strict=True))
        table.add_row(
            name, f"{rate:.0f}", f"{rate / first:.2f}", f"{peak / 2**20:.0f}", f"{apart:.1e}"
        )
    return table


if __name__ == "__main__":
    main()
