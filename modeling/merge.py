"""Adapters that can be merged: plain LoRA on linear projections, W + scale B A."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from modeling.checkpoint import Checkpoint
from modeling.lora import LoraAdapter, LoraPair, open_adapter
from modeling.model_files import ADAPTER_WEIGHTS, read_header
from settings import ModelError

_PAIR = re.compile(r"\.lora_[AB]\.weight$")
# Settings of PEFT's LoRA under which the adapted projection isn't x (W + scale B A)^T.
_NOT_PLAIN = (
    "modules_to_save",
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# These change the base weights when the adapter is attached: the others only start A and B.
_MOVING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def mergeable_adapter(
    checkpoint: Checkpoint, setting: str, *, otherwise: str = ", or set defense.form=hooked"
) -> LoraAdapter | None:
    """The checkpoint's adapter, or None where it has none; only config and header are read.

    Args:
        checkpoint: The model.
        setting: The setting that named it, for messages.
        otherwise: What the message says that one can do instead of training a plain LoRA.

    Raises:
        ModelError: The adapter is more than LoRA on linear projections.
    """
    if checkpoint.adapter is None:
        return None
    adapter = open_adapter(checkpoint.adapter, setting)
    odd = _oddity(adapter.config) or next(
        (key for key in read_header(adapter.folder / ADAPTER_WEIGHTS)[0] if not _PAIR.search(key)),
        None,
    )
    if odd is not None:
        raise ModelError(
            f"{setting}={checkpoint.adapter!r} can't be merged into its base because it is more "
            f"than LoRA on linear projections ({odd}); train it as plain LoRA{otherwise}"
        )
    return adapter


def _oddity(config: dict[str, Any]) -> str | None:
    for name in _NOT_PLAIN:
        if config.get(name):
            return f"{name}={config[name]!r}"
    if config.get("bias", "none") != "none":
        return f"bias={config['bias']!r}"
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(_MOVING_STARTS):
        return f"init_lora_weights={start!r}"
    return None


def merge(weight: Tensor, pair: LoraPair) -> Tensor:
    """W + scale B A in float32.

    Args:
        weight: W, (d_out, d_in).
        pair: A (r, d_in) and B (d_out, r).

    Returns:
        (d_out, d_in) float32; the product is accumulated in place, so that memory holds one
        work copy.
    """
    # A copy even of float32: writing to a tensor that maps its file keeps those pages in memory.
    work = weight.to(torch.float32, copy=True)
    return work.addmm_(pair.b.float(), pair.a.float(), alpha=pair.scale)


def read_merged(path: Path, key: str, adapter: LoraAdapter | None) -> Tensor:
    """One tensor of a weights file, with the adapter's product added where it has one.

    Args:
        path: The safetensors file.
        key: The tensor's name.
        adapter: An adapter on this model, or None.

    Returns:
        The tensor in its own dtype, or W + scale B A in float32.
    """
    # Opened anew each time: an open file keeps all that was read of it mapped.
    with safe_open(path, framework="pt") as file:
        value: Tensor = file.get_tensor(key)
    module = key.removesuffix(".weight")
    if adapter is None or module == key or module not in adapter.shapes:
        return value
    return merge(value, next(adapter.pairs([module]))[1])
