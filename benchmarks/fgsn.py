"""What FGSN's projection costs: `python -m benchmarks.fgsn`.

All seven projections of one layer at Llama-3-8B's shapes, read from bfloat16 files: with alignment
and fine-tuning as LoRAs, with a LoRA fine-tuned on a fully aligned model, and with full weights
throughout.  `methods` has one projection beside the literal formula.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.inputs import random_adapter
from defenses.base import Models
from defenses.fgsn.project import Projection, edit_neurons
from modeling.checkpoint import Checkpoint
from modeling.deltas import alignment, fine_tuning
from modeling.measure import measured
from modeling.projections import projections

PLAN = Projection("project", "fro")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.fgsn")
    sizes = {"width": 4096, "inner": 14336, "kv": 1024, "rank": 16}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    options = parser.parse_args()
    torch.manual_seed(0)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        console.print(_layer(options, Path(folder)))


def _layer(options: argparse.Namespace, folder: Path) -> Table:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=options.width,
        intermediate_size=options.inner,
        num_hidden_layers=1,
        num_attention_heads=options.width // 128,
        num_key_value_heads=options.kv // 128,
    )
    base, aligned, attacked = (_full(config, folder / name) for name in ("base", "whole", "tuned"))
    size = sum(p.stat().st_size for p in Path(base.base).glob("*.safetensors"))
    rank = options.rank
    adapted, resumed = (random_adapter(base, folder / name, rank) for name in ("lora", "more"))
    fresh = random_adapter(aligned, folder / "fresh", rank)
    cases = {
        "LoRA, resumed LoRA": (Models(base, adapted), resumed),
        "dense, LoRA": (Models(base, aligned), fresh),
        "dense, dense": (Models(base, aligned), attacked),
    }
    title = f"one layer of Llama-3-8B's shapes, {_mib(size)} MiB in bfloat16"
    table = Table("D, Delta", "seconds", "peak MiB above its start", "of the layer", title=title)
    for name, (models, victim) in cases.items():
        _project(models, victim, "model.layers.0.self_attn.k_proj")  # Starts up libraries.
        with measured() as cost:
            for module in projections(base):
                _project(models, victim, module)
        share = f"{cost.peak_bytes / size:.2f}"
        table.add_row(name, f"{cost.seconds:.2f}", _mib(cost.peak_bytes), share)
    return table


def _project(models: Models, attacked: Checkpoint, name: str) -> None:
    delta = fine_tuning(models.aligned, attacked, name, "cpu")
    mask = torch.arange(delta.shape[0]) % 4 == 0
    edit_neurons(lambda: alignment(models, name, "cpu"), delta, mask, PLAN)


def _full(config: LlamaConfig, folder: Path) -> Checkpoint:
    """A model of one random layer; its vocabulary is too small to count."""
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return Checkpoint(str(folder), dtype="bfloat16")


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f}"


if __name__ == "__main__":
    main()
