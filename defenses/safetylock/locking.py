"""Applying a lock to a fine-tuned model (Zhu et al., section 2)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from defenses.base import Edit
from defenses.safetylock.lock import Lock
from modeling.checkpoint import Checkpoint, count_parameters
from modeling.export import export_with_biases
from modeling.heads import HeadLayout, head_layout, output_biases
from modeling.steering import SteeredPositions, Steering, save_steering
from modeling.verify import verify_export
from settings import SettingError

PROVENANCE = "safetylock.json"
VERIFY_ROWS, VERIFY_LENGTH = 4, 24


def lock_model(
    lock: Lock,
    attacked: Checkpoint,
    heads: Sequence[tuple[int, int]],
    alpha: float,
    positions: SteeredPositions,
    baked: bool,
    out: Path,
) -> Edit:
    """Locks a fine-tuned model.

    Args:
        lock: The lock.
        attacked: A fine-tune of the model that the lock was taken from.
        heads: The heads to steer.
        alpha: Strength; below zero unlocks.
        positions: Which positions are steered.
        baked: Whether a plain model is written, which needs `positions` "all"; else `out` gets
            what a hook needs.
        out: The folder to write.

    Returns:
        What was written: the scalars edited are those of the biases (baked) or of the steering
        vectors (hooked) that aren't zero; the diagnostics, seconds and how the export compares
        with the hooked model.

    Raises:
        ModelError: The model has another shape, or the export differs from the hooked model.
        SettingError: The model is steered already.
    """
    if attacked.steering is not None:
        raise SettingError(
            "the model to be locked is steered by a hook already; apply the lock to the model "
            "that the hook was put on, or bake the first steering with defense.form=baked"
        )
    lock.check_fits(original_layout(attacked), f"the model {attacked.base!r}")
    steering = Steering(lock.deltas(heads, alpha), positions)
    modules = tuple(f"model.layers.{layer}.self_attn.o_proj" for layer in sorted(steering.deltas))
    total = count_parameters(attacked)
    if not baked:
        save_steering(steering, out)
        edited = sum(int(delta.count_nonzero()) for delta in steering.deltas.values())
        defended = replace(attacked, steering=str(out))
        return Edit(defended, edited, total, modules, {"baked": False})
    start = time.perf_counter()
    biases = output_biases(attacked, steering.deltas)
    computed = time.perf_counter()
    export_with_biases(attacked, biases, out)
    exported = time.perf_counter()
    _write_provenance(lock, attacked, heads, alpha, out)
    defended = Checkpoint(str(out), None, None, attacked.dtype)
    difference = verify_export(out, attacked, steering, _verification_rows(attacked))
    report = {
        "baked": True,
        "bias_seconds": computed - start,
        "export_seconds": exported - computed,
        "verify_seconds": time.perf_counter() - exported,
        "export": difference,
    }
    edited = sum(int(bias.count_nonzero()) for bias in biases.values())
    return Edit(defended, edited, total, modules, report)


def original_layout(checkpoint: Checkpoint) -> HeadLayout:
    """The model's shape; of a model that was exported in another architecture, its original's."""
    layout = head_layout(checkpoint)
    provenance = Path(checkpoint.base) / PROVENANCE
    if not provenance.is_file():
        return layout
    return replace(layout, model_type=json.loads(provenance.read_text())["model_type"])


def _write_provenance(
    lock: Lock, attacked: Checkpoint, heads: Sequence[tuple[int, int]], alpha: float, out: Path
) -> None:
    """Says beside the weights what was baked into them."""
    content = {
        "model_type": original_layout(attacked).model_type,
        "origin": lock.origin,
        "alpha": alpha,
        "heads": [list(head) for head in heads],
    }
    (out / PROVENANCE).write_text(json.dumps(content, indent=1) + "\n")


def _verification_rows(checkpoint: Checkpoint) -> list[list[int]]:
    """Token ids drawn with a fixed seed: two models either compute the same or they don't."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.base, revision=checkpoint.revision)
    generator = torch.Generator().manual_seed(0)
    shape = (VERIFY_ROWS, VERIFY_LENGTH)
    return torch.randint(config.vocab_size, shape, generator=generator).tolist()
