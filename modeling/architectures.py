"""Architectures: what is known of each model family, for exports and for serving with vLLM.

Everything that depends on a family's name stands here: which can be written anew as a Llama's,
which projections have biases, what vLLM computes as transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LLAMA = "llama"
# What messages name where a model's blocks aren't of the usual form.
LLAMA_LIKE = "a Llama-like model (Llama, Mistral, Qwen, Gemma)"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family of decoder models whose every member vLLM computes as transformers does.

    Attributes:
        stem: How transformers names its classes, e.g. "Llama" for `LlamaForCausalLM`.
        is_llama: Whether a Llama with biases computes the same function, windows aside.
        qkv_bias: Whether its q_proj, k_proj and v_proj have biases; None where the config's
            `attention_bias` says.  Stated for those that a Llama can express.
    """

    stem: str
    is_llama: bool = False
    qkv_bias: bool | None = None


ARCHITECTURES = {
    LLAMA: Architecture("Llama", is_llama=True),
    "mistral": Architecture("Mistral", is_llama=True, qkv_bias=False),
    "qwen2": Architecture("Qwen2", is_llama=True, qkv_bias=True),
    "mixtral": Architecture("Mixtral"),
    "qwen3": Architecture("Qwen3"),
    "gemma": Architecture("Gemma"),
    "gemma2": Architecture("Gemma2"),
    "gemma3_text": Architecture("Gemma3"),
    "phi3": Architecture("Phi3"),
    "olmo2": Architecture("Olmo2"),
}

# Rotary embeddings that transformers' and vLLM's Llama both have.
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
# Settings of other architectures that change what is computed.  transformers' own classes don't
# read them here, other engines do: with one of them set it isn't clear what the model is.
_FOREIGN = (
    "attention_chunk_size",
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "dual_chunk_attention_config",
    "embedding_multiplier",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "qk_layernorm",
    "qk_norm",
    "qkv_bias",
    "residual_multiplier",
    "use_bidirectional_attention",
    "use_qk_norm",
)
# Head sizes of vLLM's attention on a CPU (its CPUAttentionBackend, 0.32); with another one it
# loads the model and fails at the first token.
_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def has_qkv_bias(config: Any) -> bool:
    """Whether the model of a transformers config, one that a Llama expresses, has q/k/v biases."""
    stated = ARCHITECTURES[config.model_type].qkv_bias
    return bool(config.attention_bias) if stated is None else stated


def has_o_bias(config: Any) -> bool:
    """Whether the model of a transformers config reads o_proj biases, which only Llamas do."""
    return config.model_type == LLAMA and bool(config.attention_bias)


def is_llama(config: Any) -> bool:
    """Whether a transformers config is of a family that a Llama with biases can express."""
    architecture = ARCHITECTURES.get(config.model_type)
    return architecture is not None and architecture.is_llama


def llama_obstacle(config: Any) -> str | None:
    """Why a model isn't a Llama with biases, to follow the model's name; None if it is one.

    Args:
        config: Its transformers config.
    """
    if getattr(config, "quantization_config", None) is not None:
        return "is quantised"
    if not is_llama(config):
        return f"is of type {config.model_type!r}, which no Llama with biases can express"
    if config.is_heterogeneous:
        return "has layers of different shapes"
    if _has_window(config):
        return "attends through a sliding window"
    if config.hidden_act != "silu":
        return f"has the activation {config.hidden_act!r}, which vLLM's Llama doesn't know"
    if config.hidden_size % config.num_attention_heads:
        heads = config.num_attention_heads
        return f"has a hidden size that its {heads} heads don't divide"
    rope = config.rope_parameters
    if rope.get("rope_type") not in _ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"has the rotary embeddings {rope}"
    for name in _FOREIGN:
        value = getattr(config, name, None)
        if value not in (None, False, 1, 1.0, 0, []):
            return f"has {name}={value!r} in its config.json"
    return None


def vllm_has(config: Mapping[str, Any]) -> bool:
    """Whether the model of a config.json is of a family that vLLM has its own code for."""
    kinds = ("ForCausalLM", "ForSequenceClassification")
    classes = {each.stem + kind for each in ARCHITECTURES.values() for kind in kinds}
    return not classes.isdisjoint(config.get("architectures") or ())


def vllm_head_obstacle(config: Mapping[str, Any]) -> str | None:
    """What vLLM on a CPU has against the head size of a config.json; None where nothing."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return None
    config = config.get("text_config", config)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim") or (hidden // heads if heads and hidden else None)
    if size is None or size in _CPU_HEADS:
        return None
    sizes = f"{', '.join(map(str, _CPU_HEADS[:-1]))} and {_CPU_HEADS[-1]}"
    return f"attention heads of size {size}, and on a CPU vLLM has {sizes}"


def _has_window(config: Any) -> bool:
    """Whether some layer attends to less than the model's whole context.

    A stray `sliding_window` counts for Llama too: transformers' KV cache obeys it.
    """
    window = getattr(config, "sliding_window", None)
    if window is None:
        kinds = getattr(config, "layer_types", None) or ()
        return any(kind != "full_attention" for kind in kinds)
    if config.model_type == "qwen2" and all(k == "full_attention" for k in config.layer_types):
        return False
    return window < config.max_position_embeddings
