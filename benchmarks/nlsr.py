"""What NLSR costs: `python -m benchmarks.nlsr`.

Measures the identification (low-rank score, sequential) and the patch on a random Llama with a
random LoRA on all seven projections, and, in the same run, one module by this project's algebra
against the literal formulas: the singular value decomposition of the dense X W^T and the cosine
of the dense d_out x d_in products.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.timing import cost_of
from defenses.nlsr import NLSR, scores
from defenses.nlsr.identify import identify
from defenses.nlsr.masks import save_masks
from defenses.nlsr.patch import similarities, splice
from modeling.capture import TokenRow
from modeling.checkpoint import Checkpoint
from modeling.loading import device_name, load_model
from modeling.lora import LoraAdapter, LoraPair, open_adapter, product_cosine, rewrite_adapter
from modeling.measure import measured
from modeling.training import PROJECTIONS

VOCABULARY = 1024


def main() -> None:
    """Runs the benchmark and prints its two tables."""
    options = _options()
    logging.disable_progress_bar()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _make_models(Path(folder), options)
        reference = open_adapter(str(checkpoint.adapter), "the reference adapter")
        attacked = _resumed(reference, Path(folder) / "attacked")
        rows = _rows(options.sequences, options.length)
        console.print(_whole(checkpoint, reference, attacked, rows, Path(folder)))
        console.print(_literal(reference, attacked, options.sequences * options.length))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.nlsr")
    sizes = {"rank": 128, "width": 1024, "layers": 8, "sequences": 64, "length": 64}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser.parse_args()


def _make_models(folder: Path, options: argparse.Namespace) -> Checkpoint:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 128,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=list(PROJECTIONS))
    adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(folder / "reference")
    return Checkpoint(str(folder / "base"), str(folder / "reference"))


def _resumed(reference: LoraAdapter, folder: Path) -> LoraAdapter:
    """The reference with a little noise on every scalar, as an attack would leave it."""

    def moved(_: str, pair: LoraPair) -> LoraPair:
        a, b = (w + 1e-3 * torch.randn_like(w) for w in (pair.a, pair.b))
        return LoraPair(a, b, pair.scale)

    rewrite_adapter(reference, folder, moved)
    return open_adapter(folder, "the attacked adapter")


def _rows(sequences: int, length: int) -> list[TokenRow]:
    """Random tokens; the first quarter of each row is its prompt."""
    ids = torch.randint(1, VOCABULARY, (sequences, length)).tolist()
    return [(row[: length // 4], row[length // 4 :]) for row in ids]


def _whole(
    checkpoint: Checkpoint,
    reference: LoraAdapter,
    attacked: LoraAdapter,
    rows: list[TokenRow],
    folder: Path,
) -> Table:
    model = load_model(checkpoint)
    with measured() as identified:
        save_masks(identify(model, reference, rows, NLSR()), folder / "masks.safetensors")
    del model
    with measured() as compared:
        similar = similarities(reference, attacked, folder / "masks.safetensors", device_name())
    with measured() as patched:
        splice(reference, attacked, folder / "masks.safetensors", set(similar), folder / "patched")
    table = Table("step", "seconds", "peak MiB above its start", title="NLSR, all modules")
    costs = {"identify": identified, "similarity": compared, "patch": patched}
    for step, cost in costs.items():
        table.add_row(step, f"{cost.seconds:.2f}", f"{cost.peak_bytes / 2**20:.0f}")
    return table


def _literal(reference: LoraAdapter, attacked: LoraAdapter, tokens: int) -> Table:
    """One module both ways, on the same random inputs."""
    name = next(name for name in reference.names if name.endswith("up_proj"))
    device = device_name()
    (a, b), (a_t, b_t) = (
        (stack[0] for stack in adapter.stack([name], device)) for adapter in (reference, attacked)
    )
    x = torch.randn(tokens, a.shape[1], device=device)
    rank = max(1, round(a.shape[0] * 0.2))
    ours = cost_of(lambda: _by_this_project(x, a, b, a_t, b_t, rank))
    dense = cost_of(lambda: _by_the_formula(x, a, b, a_t, b_t, rank))
    table = Table("", "this project", "literal", "ratio", title=f"{name}, {tokens} tokens")
    table.add_row(
        "seconds",
        f"{ours.seconds:.3f}",
        f"{dense.seconds:.3f}",
        f"{dense.seconds / ours.seconds:.1f}",
    )
    table.add_row("peak MiB", *(f"{cost.peak_bytes / 2**20:.0f}" for cost in (ours, dense)), "")
    return table


def _by_this_project(x: Tensor, a: Tensor, b: Tensor, a_t: Tensor, b_t: Tensor, rank: int) -> None:
    z = (x @ a.T).double()
    scores.project(a[None], b[None], (z.T @ z)[None], rank, rank)
    product_cosine(a, b, a_t, b_t)


def _by_the_formula(x: Tensor, a: Tensor, b: Tensor, a_t: Tensor, b_t: Tensor, rank: int) -> None:
    z = x @ a.T
    for inputs, w in ((x, a), (z, b)):
        v = torch.linalg.svd(inputs @ w.T, full_matrices=False).Vh[:rank].T
        _ = (v @ v.T) @ w
    torch.nn.functional.cosine_similarity((b @ a).flatten(), (b_t @ a_t).flatten(), dim=0)


if __name__ == "__main__":
    main()
