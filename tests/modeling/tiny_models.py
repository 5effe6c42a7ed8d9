"""Tiny random models of several architectures, with adapters and steering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from modeling.checkpoint import Checkpoint
from modeling.heads import HeadLayout
from modeling.loading import load_model
from modeling.steering import Steering

VOCABULARY, LAYERS = 48, 3
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = [[1, 2, 3, 4, 5, 6, 7], [40, 8, 30], [11, 12, 13, 9, 9, 2, 21, 34, 5, 17, 3]]
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Name: architecture and what differs from the shape above.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_wide_heads": ("llama", {"head_dim": 12}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"rope_theta": 500.0}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_wide_heads": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8}),
}
EXPORTABLE = [name for name in MODELS if name not in {"qwen3", "gemma2"}]

_LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# In use: the rows of the tests are longer than the window.
WINDOW = 4
# What is special about real models, as differences from the shape above with two layers.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-2": ("llama", {"num_key_value_heads": 4}),
    "Llama-3.1": ("llama", {"rms_norm_eps": 1e-5, "rope_parameters": _LLAMA_3_1}),
    # The window stands in its config and is switched off, as in Qwen's own.
    "Qwen2.5": ("qwen2", {"rope_theta": 1e6, "sliding_window": 64, "use_sliding_window": False}),
    "Qwen2.5-tied": ("qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "Mistral-v0.3": ("mistral", {"rope_theta": 1e6, "sliding_window": None}),
    "Mistral-v0.1": ("mistral", {"rope_theta": 1e4, "sliding_window": WINDOW}),
    "Mistral-Nemo": ("mistral", {"rope_theta": 1e6, "sliding_window": None, "head_dim": 6}),
    # query_pre_attn_scalar is hidden / heads in the 27B, and not head_dim.
    "Gemma-2": (
        "gemma2",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 8,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "Qwen3": ("qwen3", {"head_dim": 8}),
}
# Families that the defenses' tests leave out: fused projections, other names, a windowed Gemma.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi-3": ("phi3", {}),
    "NeoX": ("gpt_neox", {}),
    "Gemma-3": ("gemma3_text", {"head_dim": 8, "sliding_window": WINDOW}),
}
# A Llama with biases can't compute what these compute.
UNBAKEABLE = {"Mistral-v0.1", "Gemma-2", "Qwen3"}


def save_model(
    name: str, folder: Path, *, dtype: str = "float32", shard: str = "1GB", **options: object
) -> Checkpoint:
    """A random model of the tables above, its biases random too, where it has any."""
    model_type, differing = {**MODELS, **FAMILIES, **OTHERS}[name]
    torch.manual_seed(0)
    depth = {"num_hidden_layers": 2} if name in FAMILIES else {}
    config = AutoConfig.for_model(model_type, **{**_SHAPE, **depth, **differing, **options})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.3)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return Checkpoint(str(folder), dtype=dtype)


def save_adapter(base: Checkpoint, folder: Path, **options: object) -> Checkpoint:
    """The base with a random LoRA whose B isn't zero."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, **options}
    model = get_peft_model(load_model(base, device="cpu"), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return Checkpoint(base.base, str(folder), dtype=base.dtype)


def random_steering(
    layout: HeadLayout, heads: list[tuple[int, int]], strength: float = 1.0
) -> Steering:
    """Random vectors in some heads, at all positions."""
    generator = torch.Generator().manual_seed(4)
    deltas: dict[int, Tensor] = {}
    for layer, head in heads:
        delta = deltas.setdefault(layer, torch.zeros(layout.width))
        delta[layout.columns(head)] = strength * torch.randn(layout.head_dim, generator=generator)
    return Steering(deltas)


def logits(model: Any, rows: list[list[int]] = ROWS) -> list[Tensor]:
    """Each row's logits (length, vocabulary), one row at a time."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row], device=model.device)).logits[0] for row in rows]
