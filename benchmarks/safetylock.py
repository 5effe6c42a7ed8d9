"""What applying a SafetyLock costs: `python -m benchmarks.safetylock`.

At Llama-3-8B's shapes (32 layers, W_o 4096 x 4096, bfloat16, K = 24 heads of 128): the biases from
the chosen heads' columns alone, from weights in memory and from a checkpoint's files, against full
products W_o delta in the same run.  Then the export of a smaller model, for its memory: weights
are streamed, so that it should be far below the model's size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from modeling.checkpoint import Checkpoint
from modeling.export import export_with_biases
from modeling.heads import HeadLayout, output_biases, sum_biases
from modeling.measure import measured

REPEATS = 7


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--k", type=int, default=24)
    options = parser.parse_args()
    torch.manual_seed(0)
    hidden = options.heads * options.head_dim
    layout = HeadLayout("llama", options.layers, options.heads, 8, options.head_dim, hidden)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        console.print(_biases(layout, options.k, Path(folder)))
        console.print(_export(Path(folder)))


def _biases(layout: HeadLayout, k: int, folder: Path) -> Table:
    weights = [
        torch.randn(layout.hidden, layout.width, dtype=torch.bfloat16) for _ in range(layout.layers)
    ]
    indices = torch.randperm(layout.layers * layout.heads)[:k].tolist()
    heads = sorted(divmod(index, layout.heads) for index in indices)
    deltas = _deltas(layout, heads)
    checkpoint = _save(layout, weights, folder / "model")

    def columns() -> Iterator[tuple[tuple[int, int], Tensor]]:
        for layer, head in heads:
            yield (layer, head), weights[layer][:, layout.columns(head)].contiguous().float()

    ways: dict[str, Callable[[], object]] = {
        f"columns of {k} heads, in memory": lambda: sum_biases(columns(), layout, deltas),
        f"columns of {k} heads, from files": lambda: output_biases(checkpoint, deltas),
        f"full products of {len(deltas)} layers, in memory": lambda: [
            weights[layer].float() @ delta for layer, delta in deltas.items()
        ],
    }
    seconds = {name: _median(work) for name, work in ways.items()}
    first = next(iter(seconds.values()))
    title = f"{layout.layers} layers, W_o {layout.hidden} x {layout.width}, bfloat16"
    table = Table("biases", "seconds (median)", "ratio", title=title)
    for name, value in seconds.items():
        table.add_row(name, f"{value:.4f}", f"{value / first:.1f}")
    return table


def _deltas(layout: HeadLayout, heads: list[tuple[int, int]]) -> dict[int, Tensor]:
    deltas: dict[int, Tensor] = {}
    for layer, head in heads:
        delta = deltas.setdefault(layer, torch.zeros(layout.width))
        delta[layout.columns(head)] = torch.randn(layout.head_dim)
    return deltas


def _save(layout: HeadLayout, weights: list[Tensor], folder: Path) -> Checkpoint:
    """A folder with the config of the whole model and the o_proj weights alone."""
    config = LlamaConfig(
        hidden_size=layout.hidden,
        num_hidden_layers=layout.layers,
        num_attention_heads=layout.heads,
        num_key_value_heads=layout.kv_heads,
        head_dim=layout.head_dim,
    )
    config.save_pretrained(folder)
    tensors = {f"model.layers.{i}.self_attn.o_proj.weight": w for i, w in enumerate(weights)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Checkpoint(str(folder), dtype="bfloat16")


def _median(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _export(folder: Path) -> Table:
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    source = folder / "small"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    biases = {layer: torch.randn(1024) for layer in range(16)}
    with measured() as cost:
        export_with_biases(Checkpoint(str(source), dtype="bfloat16"), biases, folder / "exported")
    table = Table("model, MiB", "seconds", "peak MiB above its start", title="export, bfloat16")
    table.add_row(f"{size / 2**20:.0f}", f"{cost.seconds:.2f}", f"{cost.peak_bytes / 2**20:.0f}")
    return table


if __name__ == "__main__":
    main()
