"""What writing a defended checkpoint costs beside copying it: `python -m benchmarks.streaming`.

And what it costs to prepare on one whose weights aren't held in memory.

Layers of Llama-3-8B's shapes in bfloat16, in four shards, of random numbers; the vocabulary grows
with the layers, so that `--layers 32` is the whole model. Every way of writing one and `cp` of the
same files take turns in one process that was started for them, after a first round that isn't
counted. All files are in memory if they fit there: 32 layers need 48 GB of disk, and without as
much memory the disk's speed is what is measured. In a control group whose memory is limited the
whole can be shown to stay below that limit; leave out what holds the weights in memory then.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.inputs import random_adapter
from defenses.base import Models
from defenses.resta.arithmetic import add_to_adapter, add_to_weights
from defenses.safetylock.activations import head_outputs
from modeling.checkpoint import Checkpoint
from modeling.deltas import write_edited
from modeling.export import export_with_biases, llama_shapes
from modeling.heads import head_layout
from modeling.loading import load_decoder
from modeling.lora import LoraPair, open_adapter, rewrite_adapter
from modeling.measure import measured
from modeling.projections import Factored, projections
from modeling.shards import write_index, write_tensors
from modeling.stored import BLOCK, linking
from settings.memory import say_streaming

HIDDEN, SHARDS, ROWS, TOKENS_PER_LAYER = 4096, 4, 8, 128256 // 32
# FGSN's window, as a share of the layers.
WINDOW = 0.1875


@dataclass(frozen=True)
class Inputs:
    """What is read: full weights before and after alignment and tuning, and LoRAs on the first."""

    base: Checkpoint
    aligned: Checkpoint
    tuned: Checkpoint
    aligned_lora: Checkpoint
    tuned_lora: Checkpoint
    layers: int

    @property
    def biases(self) -> dict[int, Tensor]:
        """SafetyLock's, in every layer."""
        return {layer: torch.randn(HIDDEN) for layer in range(self.layers)}


def _halved(_: str, delta: Factored | Tensor) -> Factored | Tensor:
    return Factored(delta.a, delta.b / 2) if isinstance(delta, Factored) else delta.mul_(0.5)


def _copy(given: Inputs, out: Path) -> None:
    subprocess.run(["cp", "-r", given.tuned.base, out], check=True)


def _copy_adapter(given: Inputs, out: Path) -> None:
    subprocess.run(["cp", "-r", str(given.tuned_lora.adapter), out], check=True)


def _export(given: Inputs, out: Path) -> None:
    export_with_biases(given.tuned, given.biases, out)


def _export_linked(given: Inputs, out: Path) -> None:
    with linking():
        export_with_biases(given.tuned, given.biases, out)


def _export_merged(given: Inputs, out: Path) -> None:
    export_with_biases(given.tuned_lora, given.biases, out)


def _edit(share: float) -> Callable[[Inputs, Path], None]:
    def write(given: Inputs, out: Path) -> None:
        layers = math.ceil(share * given.layers)
        names = [name for name in projections(given.tuned) if int(name.split(".")[2]) < layers]
        write_edited(given.aligned, given.tuned, out, _halved, names=names)

    return write


def _resta(given: Inputs, out: Path) -> None:
    add_to_weights(Models(given.base, given.aligned), given.tuned, out, 0.5, 0.0, 42)


def _splice(given: Inputs, out: Path) -> None:
    def spliced(_: str, pair: LoraPair) -> LoraPair:
        a, b = (torch.where(side > 0, -side, side) for side in (pair.a, pair.b))
        return LoraPair(a, b, pair.scale)

    rewrite_adapter(open_adapter(str(given.tuned_lora.adapter), "the adapter"), out, spliced)


def _edit_adapter(given: Inputs, out: Path) -> None:
    write_edited(given.aligned_lora, given.tuned_lora, out, _halved)


def _resta_adapter(given: Inputs, out: Path) -> None:
    add_to_adapter(Models(given.base, given.aligned_lora), given.tuned_lora, out, 0.5)


def _activations(streamed: bool) -> Callable[[Inputs, Path], None]:
    def run(given: Inputs, out: Path) -> None:
        say_streaming(streamed)
        rows = [([1] * 24, list(range(2, 10 + at))) for at in range(ROWS)]
        head_outputs(load_decoder(given.tuned), head_layout(given.tuned), rows, 5, ROWS)
        out.mkdir()

    return run


# Each beside the first of its group.
GROUPS: dict[str, dict[str, Callable[[Inputs, Path], None]]] = {
    "full weights": {
        "cp": _copy,
        "safetylock": _export,
        "safetylock, linked": _export_linked,
        "safetylock, a LoRA of rank 16 merged": _export_merged,
        "safelora, fgsn: no module edited": _edit(0),
        "fgsn: its window of layers edited": _edit(WINDOW),
        "safelora, fgsn: every delta halved": _edit(1),
        "resta": _resta,
    },
    "a LoRA of rank 16": {
        "cp": _copy_adapter,
        "nlsr": _splice,
        "safelora, fgsn: every delta halved": _edit_adapter,
        "resta (twice the rank, float32)": _resta_adapter,
    },
    "activations of every head, 8 rows": {
        "weights in memory": _activations(False),
        "weights streamed": _activations(True),
    },
}
WAYS = sorted({name for group in GROUPS.values() for name in group})


def main() -> None:
    """Prints a table for each group."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.streaming")
    parser.add_argument("--layers", type=int, default=4, help="default 4: 2 GB; 32: 16 GB")
    parser.add_argument(
        "--repeats", type=int, default=5, help="default 5; 0: one round, which counts"
    )
    parser.add_argument(
        "--leave-out", nargs="+", default=[], choices=WAYS, metavar="WAY", help="as the tables say"
    )
    parser.add_argument("--folder", help="where the files go; default: the system's")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        given = _make(Path(name), options.layers)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            for group, ways in GROUPS.items():
                names = [name for name in ways if name not in options.leave_out]
                if names:
                    rows = process.submit(_measure, group, names, given, options.repeats).result()
                    console.print(_table(group, given, rows))


def _make(folder: Path, layers: int) -> Inputs:
    config = _config(layers)
    tuned, aligned = (_weights(config, folder / name, at) for at, name in enumerate("ta"))
    # The same files under further names, to save disk; their numbers don't matter here.
    shutil.copytree(tuned.base, folder / "base", copy_function=os.link)
    base = Checkpoint(str(folder / "base"), dtype="bfloat16")
    loras = [random_adapter(base, folder / name, 16) for name in ("aligned_lora", "tuned_lora")]
    return Inputs(base, aligned, tuned, *loras, layers)


def _config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=layers * TOKENS_PER_LAYER,
        hidden_size=HIDDEN,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        dtype="bfloat16",
    )


def _weights(config: LlamaConfig, folder: Path, seed: int) -> Checkpoint:
    config.save_pretrained(folder)
    shapes = llama_shapes(config.to_dict())
    noise = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)) / 50).bfloat16()

    def rows(number: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
        left = math.prod(shape)
        for at in range(0, left, BLOCK):
            yield noise.roll(7919 * number + at // BLOCK)[: left - at]

    names, shards = list(shapes), {}
    per_shard = math.ceil(len(names) / SHARDS)
    for at in range(SHARDS):
        part = {name: shapes[name] for name in names[at * per_shard : (at + 1) * per_shard]}
        file = f"model-{at + 1:05}-of-{SHARDS:05}.safetensors"
        contents = ((name, rows(names.index(name), shape)) for name, shape in part.items())
        write_tensors(folder / file, part, "bfloat16", contents)
        shards[file] = part
    write_index(folder, shards, "bfloat16")
    return Checkpoint(str(folder), dtype="bfloat16")


def _measure(
    group: str, names: list[str], given: Inputs, repeats: int
) -> dict[str, list[tuple[float, float, int]]]:
    """Seconds, CPU seconds and peak bytes of each repeat of each way, after one uncounted."""
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
    out = Path(given.base.base).with_name("out")
    for repeat in range(repeats + 1):
        for name in names:
            with measured() as cost:
                before = sum(os.times()[:4])
                GROUPS[group][name](given, out)
                spent = sum(os.times()[:4]) - before
            shutil.rmtree(out)
            if repeat or not repeats:
                found[name].append((cost.seconds, spent, cost.peak_bytes))
    return found


def _table(group: str, given: Inputs, rows: dict[str, list[tuple[float, float, int]]]) -> Table:
    source = str(given.tuned_lora.adapter) if "LoRA" in group else given.tuned.base
    size = sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))
    heads = ("seconds (median)", "best", "of the first's speed", "CPU s", "of its", "peak MiB")
    table = Table("", *heads, title=f"{group}, {size / 2**20:.0f} MiB")
    first: tuple[float, float] | None = None
    for name, repeats in rows.items():
        seconds, spent, peak = zip(*repeats, strict=True)
        middle, cpu = statistics.median(seconds), statistics.median(spent)
        first = first or (middle, cpu)
        cells = (f"{middle:.2f}", f"{min(seconds):.2f}", f"{first[0] / middle:.0%}")
        spending = (f"{cpu:.2f}", f"{first[1] / cpu:.0%}" if cpu else "")
        table.add_row(name, *cells, *spending, f"{max(peak) / 2**20:.0f}")
    return table


if __name__ == "__main__":
    main()
