"""Configs written anew as Llama's: the one family whose o_proj takes a bias everywhere.

transformers and vLLM read `attention_bias` of a Llama config, and with it o_proj.bias; in Qwen2
and Mistral both drop such a tensor without a word.  Those two compute what Llama computes as long
as no sliding window is in use, so their configs can be written as Llama's.
"""

from __future__ import annotations

from typing import Any

from modeling.architectures import LLAMA, is_llama, llama_obstacle
from modeling.checkpoint import Checkpoint
from modeling.heads import head_layout, read_config
from modeling.model_files import FLOATS
from settings import ModelError

_HOOKED = "set defense.form=hooked to run it with hooks instead"


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
    import transformers

    config = read_config(checkpoint)
    layout = head_layout(checkpoint) if is_llama(config) else None
    reason = llama_obstacle(config)
    if checkpoint.dtype not in FLOATS.values():
        reason = f"runs in {checkpoint.dtype}, not in {', '.join(FLOATS.values())}"
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
        "transformers_version": transformers.__version__,
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


def _rope(config: Any) -> dict[str, Any]:
    parameters = dict(config.rope_parameters)
    parameters.pop("type", None)
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return {
        "rope_parameters": parameters,
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
    }
