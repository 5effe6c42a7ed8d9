"""Configs written anew as Llama's: the one family whose o_proj takes a bias everywhere.

transformers and vLLM read `attention_bias` of a Llama config, and with it o_proj.bias; in Qwen2
and Mistral both drop such a tensor without a word.  Those two compute what Llama computes as long
as no sliding window is in use, so their configs can be written as Llama's.
"""

from __future__ import annotations

from typing import Any

from modeling.checkpoint import Checkpoint
from modeling.heads import HeadLayout, head_layout, read_config
from settings import ModelError

LLAMA = "llama"
DTYPES = ("float32", "bfloat16", "float16")

_HOOKED = "set defense.form=hooked to run it with hooks instead"
# Whether q_proj, k_proj and v_proj have biases, by architecture; None: the config says.
_QKV_BIAS = {LLAMA: None, "mistral": False, "qwen2": True}
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


def source_has_qkv_bias(config: Any) -> bool:
    """Whether the model that a config describes reads q/k/v biases."""
    known = _QKV_BIAS[config.model_type]
    return bool(config.attention_bias) if known is None else known


def source_has_o_bias(config: Any) -> bool:
    """Whether the model that a config describes reads o_proj biases."""
    return config.model_type == LLAMA and bool(config.attention_bias)


def llama_config(checkpoint: Checkpoint, setting: str) -> dict[str, Any]:
    """The config.json of the same function as a Llama with biases in its attention.

    Rotary settings are written both ways: `rope_parameters` for transformers 5, `rope_theta` and
    `rope_scaling` for transformers 4 and vLLM.

    Args:
        checkpoint: The model, described by its base's config.json.
        setting: The setting that named it, for messages.

    Raises:
        ModelError: A Llama can't compute this function, or not in every engine.
    """
    config = read_config(checkpoint)
    layout = head_layout(checkpoint) if config.model_type in _QKV_BIAS else None
    reason = _obstacle(config, layout)
    if checkpoint.dtype not in DTYPES:
        reason = f"runs in {checkpoint.dtype}, not in {', '.join(DTYPES)}"
    if reason is not None or layout is None:
        raise ModelError(
            f"{setting}={checkpoint.base!r} {reason}, so the defended model can't be exported as "
            f"a plain folder; {_HOOKED}"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": LLAMA,
        "attention_bias": True,
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "head_dim": layout.head_dim,
        "num_attention_heads": layout.heads,
        "num_key_value_heads": layout.kv_heads,
        "num_hidden_layers": layout.layers,
        **{name: getattr(config, name) for name in _COPIED},
        **_rope(config),
        "dtype": checkpoint.dtype,
        "torch_dtype": checkpoint.dtype,
        "transformers_version": _version(),
    }


_COPIED = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "pad_token_id",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of every weight and bias of the model that `llama_config` describes.

    Args:
        config: What `llama_config` returned; lm_head is listed whether it is tied or not.
    """
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    linear = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    table = (config["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name, (d_out, d_in) in linear.items():
            shapes[f"{block}.{name}.weight"] = (d_out, d_in)
            if name.startswith("self_attn") or config["mlp_bias"]:
                shapes[f"{block}.{name}.bias"] = (d_out,)
        shapes[f"{block}.input_layernorm.weight"] = (hidden,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (hidden,)
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": table}


def _obstacle(config: Any, layout: HeadLayout | None) -> str | None:
    """Why a config can't be written as Llama's, to follow the model's name; None if it can."""
    if getattr(config, "quantization_config", None) is not None:
        return "is quantised"
    if layout is None:
        return f"is of type {config.model_type!r}, which no Llama with biases can express"
    if config.is_heterogeneous:
        return "has layers of different shapes"
    if _slides(config):
        return "attends through a sliding window"
    if config.hidden_act != "silu":
        return f"has the activation {config.hidden_act!r}, which vLLM's Llama doesn't know"
    if config.hidden_size % layout.heads:
        return f"has a hidden size that its {layout.heads} heads don't divide"
    rope = config.rope_parameters
    if rope.get("rope_type") not in _ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"has the rotary embeddings {rope}"
    for name in _FOREIGN:
        value = getattr(config, name, None)
        if value not in (None, False, 1, 1.0, 0, []):
            return f"has {name}={value!r} in its config.json"
    return None


def _slides(config: Any) -> bool:
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


def _rope(config: Any) -> dict[str, Any]:
    parameters = dict(config.rope_parameters)
    parameters.pop("type", None)
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return {
        "rope_parameters": parameters,
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
    }


def _version() -> str:
    import transformers

    return str(transformers.__version__)
