"""Attacked models of every kind: resumed, fresh and full, on adapters and on full alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.rows import Prompt
from defenses.base import Models
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model
from modeling.training import write_merged
from tests.defenses.tiny_lora_models import (
    NumberCalibration,
    number_pairs,
    number_prompts,
    save_tokenizer,
)
from tests.modeling.tiny_models import PROJECTIONS, ROWS, logits, save_model

# The attack, and whether the alignment is a "lora" or "full" weights.
KINDS = ["resumed/lora", "fresh/lora", "full/lora", "fresh/full", "full/full"]


@dataclass(frozen=True)
class Case:
    """Base, aligned and attacked model."""

    models: Models
    attacked: Checkpoint

    @property
    def keeps_adapter(self) -> bool:
        """Whether the attacked model is an adapter."""
        return self.attacked.adapter is not None


_FOLDERS: list[TemporaryDirectory[str]] = []


@cache
def shared_case(architecture: str, kind: str) -> Case:
    """Models of one kind, made once for all tests that only read them."""
    _FOLDERS.append(TemporaryDirectory())
    return save_case(architecture, kind, Path(_FOLDERS[-1].name))


def save_case(architecture: str, kind: str, folder: Path) -> Case:
    """Random models of one kind; every weight that is trained has moved a little."""
    attack, _, alignment = kind.partition("/")
    base = save_model(architecture, folder / "base")
    save_tokenizer(folder / "base")
    if alignment == "full":
        aligned = _moved(base, folder / "aligned", seed=1)
    else:
        aligned = _lora(base, folder / "aligned", seed=1)
    if attack == "resumed":
        return Case(Models(base, aligned), _resumed(aligned, folder / "attacked"))
    merged = aligned
    if aligned.adapter is not None:
        write_merged(aligned, folder / "merged")
        merged = Checkpoint(str(folder / "merged"))
    if attack == "full":
        return Case(Models(base, aligned), _moved(merged, folder / "attacked", seed=2))
    some = ["q_proj", "v_proj", "up_proj"]
    return Case(Models(base, aligned), _lora(merged, folder / "attacked", 2, rank=3, modules=some))


def _lora(
    base: Checkpoint, folder: Path, seed: int, rank: int = 4, modules: Sequence[str] = PROJECTIONS
) -> Checkpoint:
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules))
    model = get_peft_model(load_model(base, device="cpu"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return Checkpoint(base.base, str(folder))


def _resumed(aligned: Checkpoint, folder: Path) -> Checkpoint:
    torch.manual_seed(9)
    model = load_model(aligned, trainable_adapter=True, device="cpu")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return Checkpoint(aligned.base, str(folder))


def _moved(source: Checkpoint, folder: Path, seed: int) -> Checkpoint:
    torch.manual_seed(seed)
    model = load_model(source, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return Checkpoint(str(folder))


@dataclass
class HarmCalibration(NumberCalibration):
    """Harmful and benign prompts besides."""

    safety_prompts: Sequence[Prompt] = ()
    utility_prompts: Sequence[Prompt] = ()


def harm_calibration(count: int = 6) -> HarmCalibration:
    """Different prompts of each kind, and pairs."""
    prompts = number_prompts(3 * count)
    return HarmCalibration(
        prompts[:count],
        safety_pairs=number_pairs(count),
        safety_prompts=prompts[count : 2 * count],
        utility_prompts=prompts[2 * count :],
    )


def state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every parameter of a model, an adapter merged, as transformers and PEFT load it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.base, dtype=torch.float32)
    if checkpoint.adapter is not None:
        model = PeftModel.from_pretrained(model, checkpoint.adapter).merge_and_unload()
    return dict(model.state_dict())


@cache
def shared_weights(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Projections {module: W} of the base, the aligned and the attacked model, read once."""
    base, aligned, attacked = (
        projection_weights(state(each))
        for each in (case.models.base, case.models.aligned, case.attacked)
    )
    return base, aligned, attacked


def plain_logits(checkpoint: Checkpoint, rows: Sequence[Sequence[int]] = ROWS) -> list[Tensor]:
    """Logits of a model as transformers and PEFT load it, without this project."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint.base, dtype=torch.float32)
    if checkpoint.adapter is not None:
        model = PeftModel.from_pretrained(model, checkpoint.adapter)
    return logits(model.eval(), [list(row) for row in rows])


def projection_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the projections, by module."""
    return {
        name.removesuffix(".weight"): weight
        for name, weight in weights.items()
        if name.endswith("_proj.weight")
    }
