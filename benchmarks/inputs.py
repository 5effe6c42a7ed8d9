"""Random models, adapters, rows and pairs that the methods are measured on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from data.rows import PreferencePair
from defenses.nlsr.masks import MaskPair, save_masks
from experiments.config.experiment import PROJECT
from modeling.capture import TokenRow
from modeling.checkpoint import Checkpoint
from modeling.loading import load_tokenizer
from modeling.lora import LoraPair, open_adapter, rewrite_adapter
from modeling.projections import projections

ORGANISM = PROJECT / "organism" / "weights" / "base"


@dataclass(frozen=True)
class Sizes:
    """Of the models and the data.

    Attributes:
        width: Of the residual stream; FGSN's matrix is twice as wide, the model whose heads are
            probed half as wide.
        blocks: The model whose heads are probed has twice as many.
        rank: Of the adapters.
        rows: Calibration rows of NLSR.
        length: Their tokens; the first quarter is the prompt.
        pairs: Of SafetyLock.
    """

    width: int = 1024
    blocks: int = 8
    rank: int = 128
    rows: int = 64
    length: int = 64
    pairs: int = 100


@dataclass(frozen=True)
class Inputs:
    """Where they lie, in one folder, and the user's clones of the authors' codes."""

    folder: Path
    sizes: Sizes
    official: Path | None

    @property
    def reference(self) -> Checkpoint:
        """W_0 with the reference adapter."""
        return Checkpoint(str(self.folder / "base"), str(self.folder / "reference"))

    def rows(self, count: int) -> list[TokenRow]:
        """Random tokens."""
        generator = torch.Generator().manual_seed(1)
        shape = (count, self.sizes.length)
        ids = torch.randint(1, _vocabulary(), shape, generator=generator).tolist()
        return [(row[: len(row) // 4], row[len(row) // 4 :]) for row in ids]

    def pairs(self) -> list[PreferencePair]:
        """Prompts of 12 random words, answers of 8 to 16."""
        generator = torch.Generator().manual_seed(2)
        words = [
            word for word in load_tokenizer(Checkpoint(str(ORGANISM))).get_vocab() if word.isalpha()
        ]

        def text(count: int) -> str:
            drawn = torch.randint(len(words), (count,), generator=generator).tolist()
            return " ".join(words[index] for index in drawn)

        def answer() -> str:
            return text(int(torch.randint(8, 17, (), generator=generator)))

        return [PreferencePair(text(12), answer(), answer()) for _ in range(self.sizes.pairs)]

    def masks(self) -> dict[str, MaskPair]:
        """A fifth of the reference's scalars."""
        generator = torch.Generator().manual_seed(3)
        shapes = open_adapter(self.folder / "reference", "the reference").shapes
        return {
            name: (
                torch.rand(s.rank, s.d_in, generator=generator) < 0.2,
                torch.rand(s.d_out, s.rank, generator=generator) < 0.2,
            )
            for name, s in shapes.items()
        }


def make_inputs(folder: Path, sizes: Sizes, official: Path | None) -> Inputs:
    """Writes the models and adapters to a folder."""
    inputs = Inputs(folder, sizes, official)
    torch.manual_seed(0)
    model = _llama(sizes.width, sizes.blocks, sizes.width // 64)
    base = _save(model, folder / "base")
    random_adapter(base, folder / "reference", sizes.rank, scale=2)
    move_adapter(folder / "reference", folder / "attacked")
    save_masks(inputs.masks(), folder / "masks.safetensors")
    for parameter in model.model.layers.parameters():
        parameter.data += 1e-3 * torch.randn_like(parameter)
    aligned = _save(model, folder / "aligned")
    for rank in (128, 16):
        random_adapter(aligned, folder / f"tuned{rank}", rank)
    _save(_llama(sizes.width // 2, 2 * sizes.blocks, sizes.width // 64), folder / "heads")
    return inputs


def random_adapter(base: Checkpoint, folder: Path, rank: int, scale: int = 1) -> Checkpoint:
    """A LoRA of random numbers on all projections, in float32."""
    shapes = projections(base)
    LoraConfig(
        base_model_name_or_path=base.base,
        r=rank,
        lora_alpha=scale * rank,
        target_modules=sorted({name.rpartition(".")[2] for name in shapes}),
        task_type="CAUSAL_LM",
    ).save_pretrained(folder)
    tensors = {}
    for name, (d_out, d_in) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, d_in) / d_in**0.5
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(d_out, rank) / 100
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return Checkpoint(base.base, str(folder), dtype=base.dtype)


def move_adapter(source: Path, out: Path) -> None:
    """Writes an adapter with a little noise on every scalar, as an attack would leave it."""

    def moved(_: str, pair: LoraPair) -> LoraPair:
        a, b = (side + 1e-3 * torch.randn_like(side) for side in (pair.a, pair.b))
        return LoraPair(a, b, pair.scale)

    rewrite_adapter(open_adapter(source, "the adapter"), out, moved)


def copy_tokenizer(folder: Path) -> None:
    """Puts the organism's tokenizer beside a model's weights."""
    for path in (*ORGANISM.glob("tokenizer*"), ORGANISM / "chat_template.jinja"):
        shutil.copy(path, folder)


@cache
def _vocabulary() -> int:
    return len(load_tokenizer(Checkpoint(str(ORGANISM))))


def _llama(width: int, blocks: int, heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=_vocabulary(),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
    )
    return LlamaForCausalLM(config)


def _save(model: LlamaForCausalLM, folder: Path) -> Checkpoint:
    model.save_pretrained(folder)
    copy_tokenizer(folder)
    return Checkpoint(str(folder))
