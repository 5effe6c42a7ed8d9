"""Export: a fine-tuned model with biases on its o_proj, as a plain folder for every engine.

The folder is a Llama's whose every layer has q, k, v and o biases.  Anything less is served wrong
without a word: a bias is dropped where `attention_bias` is not set, and a missing q, k or v bias is
uninitialised memory in vLLM.

transformers and vLLM read `attention_bias` of a Llama config, and with it o_proj.bias; in Qwen2
and Mistral both drop such a tensor without a word.  Those two compute what Llama computes as long
as no sliding window is in use, so their configs are written anew as Llama's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.architectures import LLAMA, has_o_bias, has_qkv_bias, is_llama, llama_obstacle
from modeling.checkpoint import Checkpoint, local_folder
from modeling.heads import head_layout
from modeling.inspection import inspect_model, read_config, require_own_names
from modeling.loading import copy_tokenizer, load_tokenizer
from modeling.lora import LoraAdapter, mergeable_adapter, merged_weights
from modeling.model_files import FLOATS, read_header, stored_tensors, weight_files
from modeling.shards import Content, new_folder, write_shards
from modeling.stored import is_linking, read_rows, read_tensor
from settings import ModelError

Shapes = dict[str, tuple[int, ...]]

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
_ATTENTION_BIAS = re.compile(r"\.self_attn\.[qkvo]_proj\.bias$")
_O_WEIGHT = re.compile(r"^(?P<block>model\.layers\.\d+\.self_attn)\.o_proj\.weight$")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def check_exportable(checkpoint: Checkpoint, setting: str) -> None:
    """Refuses, from config files and headers alone, what `export_with_biases` can't write.

    Raises:
        ModelError: One sentence that says why, and what to set instead.
    """
    config = llama_config(checkpoint, setting)
    _check_adapter(mergeable_adapter(checkpoint, setting), config)
    if _has_weights(checkpoint):
        require_own_names(checkpoint)


def export_with_biases(checkpoint: Checkpoint, biases: Mapping[int, Tensor], out: Path) -> None:
    """Writes a model folder: adapter merged, biases added to o_proj, in the checkpoint's dtype.

    W + scale B A and the sums of biases are computed in float32 and then cast.  Tokenizer, chat
    template and generation config are copied.  There is one output file per input file; the
    folder appears complete or not at all.  The checkpoint's `steering` plays no part.

    Args:
        checkpoint: The fine-tuned model.
        biases: {layer: (hidden,)}, added to what o_proj has already; zero elsewhere.
        out: The folder; must be missing or empty.

    Raises:
        ModelError: `check_exportable` refuses it, the weights aren't those of its config, or
            aren't finite.
    """
    config = llama_config(checkpoint, "model.base")
    adapter = mergeable_adapter(checkpoint, "model.adapter")
    _check_adapter(adapter, config)
    _check_biases(biases, config)
    shards = _plan(checkpoint, config)
    folder = local_folder(checkpoint)
    with new_folder(out) as part:
        computed = _computed(folder, shards, adapter, biases)
        write_shards(folder, part, shards, checkpoint.dtype, computed)
        copy_tokenizer(checkpoint, part)
        _keep_tokenizer(checkpoint, part)
        (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def llama_config(checkpoint: Checkpoint, setting: str) -> dict[str, Any]:
    """The config.json of the same function as a Llama with biases in its attention.

    Rotary settings are written both ways: `rope_parameters` for transformers 5, `rope_theta` and
    `rope_scaling` for transformers 4 and vLLM.

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
            "a plain folder; set defense.form=hooked to run it with hooks instead"
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
        # A head in the files is the model's own, whatever the config says, where it differs.
        "tie_word_embeddings": config.tie_word_embeddings and not _has_own_head(checkpoint),
        **_rope(config),
        "dtype": checkpoint.dtype,
        "torch_dtype": checkpoint.dtype,
        "transformers_version": transformers.__version__,
    }


def llama_shapes(config: dict[str, Any]) -> Shapes:
    """{tensor name: shape} of the model that `llama_config` describes, its lm_head in any case."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _rope(config: Any) -> dict[str, Any]:
    parameters = dict(config.rope_parameters)
    parameters.pop("type", None)
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return {
        "rope_parameters": parameters,
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
    }


def _keep_tokenizer(checkpoint: Checkpoint, out: Path) -> None:
    """Names the class that reads the tokenizer now: for a Llama transformers may take another."""
    path = out / "tokenizer_config.json"
    if read_config(checkpoint).model_type == LLAMA or not path.is_file():
        return
    name = type(load_tokenizer(checkpoint)).__name__
    config = json.loads(path.read_bytes())
    # The name that transformers 4 knows, and 5 reads as the same.
    config["tokenizer_class"] = "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _has_weights(checkpoint: Checkpoint) -> bool:
    """Whether there are weights to look at; a plan may know the config alone."""
    return any(local_folder(checkpoint).glob("*.safetensors"))


def _has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether the files hold a head that isn't the embeddings again."""
    if not _has_weights(checkpoint) or not inspect_model(checkpoint).own_head:
        return False
    files = stored_tensors(local_folder(checkpoint))
    pairs = zip(*(read_rows(files[name]) for name in (_HEAD, _EMBEDDING)), strict=True)
    return not all(torch.equal(head, embedding) for (_, head), (_, embedding) in pairs)


def _check_adapter(adapter: LoraAdapter | None, config: dict[str, Any]) -> None:
    if adapter is None:
        return
    adapter.check({k.removesuffix(".weight"): v for k, v in llama_shapes(config).items()})
    for name in adapter.names:
        if config["tie_word_embeddings"] and f"{name}.weight" in (_EMBEDDING, _HEAD):
            raise ModelError(
                f"the adapter {str(adapter.folder)!r} edits {name}, which is tied to the "
                "embeddings, and can't be merged; set defense.form=hooked"
            )


def _check_biases(biases: Mapping[int, Tensor], config: Mapping[str, Any]) -> None:
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    for layer, bias in biases.items():
        if not 0 <= layer < layers or tuple(bias.shape) != (hidden,):
            raise ModelError(
                f"a bias {tuple(bias.shape)} for layer {layer} doesn't fit a model of {layers} "
                f"layers with o_proj outputs ({hidden},); use a lock made for this model"
            )


def _plan(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, Shapes]:
    """{output file: {tensor name: shape}}: the input's tensors and the biases it lacks.

    These have a file of their own where files are linked, so that all others can be.

    The checkpoint must hold exactly what its config describes. A tensor that its model doesn't
    read (a bias without `attention_bias`) would come to life in the export.
    """
    wanted, source = llama_shapes(config), read_config(checkpoint)
    reads = {
        name
        for name in wanted
        if not _ATTENTION_BIAS.search(name)
        or (has_o_bias(source) if ".o_proj." in name else has_qkv_bias(source))
    }
    folder = local_folder(checkpoint)
    shards: dict[str, Shapes] = {}
    for file in weight_files(folder):
        shards[file] = {}
        for name, entry in read_header(folder / file)[0].items():
            if name.endswith(".rotary_emb.inv_freq"):
                continue  # Old Llama files store it; every engine computes it from the config.
            shape = tuple(entry["shape"])
            if name not in reads or shape != wanted[name] or entry["dtype"] not in FLOATS:
                raise _unlike(checkpoint, f"{name} ({entry['dtype']} {shape})")
            shards[file][name] = shape
    if config["tie_word_embeddings"]:
        reads.discard(_HEAD)
        for shapes in shards.values():
            shapes.pop(_HEAD, None)
    names = [name for shapes in shards.values() for name in shapes]
    if missing := sorted(reads.difference(names)):
        raise _unlike(checkpoint, f"{missing[0]} (missing)")
    if len(set(names)) != len(names):
        raise _unlike(checkpoint, "a tensor (twice)")
    apart: Shapes = {}
    for shapes in shards.values():
        for block in [match["block"] for name in shapes if (match := _O_WEIGHT.match(name))]:
            for bias in (f"{block}.{side}_proj.bias" for side in "qkvo"):
                if bias not in names:
                    (apart if is_linking() else shapes)[bias] = wanted[bias]
    if not apart:
        return shards
    parts = [*shards.values(), apart]
    return {f"model-{n:05}-of-{len(parts):05}.safetensors": s for n, s in enumerate(parts, 1)}


def _unlike(checkpoint: Checkpoint, what: str) -> ModelError:
    return ModelError(
        f"the weights of {checkpoint.base!r} aren't those that its config.json describes: {what}; "
        "save or download the model again, or set defense.form=hooked"
    )


def _computed(
    folder: Path,
    shards: Mapping[str, Shapes],
    adapter: LoraAdapter | None,
    biases: Mapping[int, Tensor],
) -> dict[str, Callable[[], Content]]:
    """What isn't the same in the export: adapted weights, o_proj's biases and those that lacked."""
    stored = stored_tensors(folder)
    computed = {} if adapter is None else merged_weights(adapter, stored)
    added = {f"model.layers.{k}.self_attn.o_proj.bias": bias for k, bias in biases.items()}

    def bias(name: str, shape: tuple[int, ...]) -> Tensor:
        own = read_tensor(stored[name]) if name in stored else torch.zeros(shape)
        return own.float() + added[name].float().cpu() if name in added else own

    for shapes in shards.values():
        for name, shape in shapes.items():
            if name in added or name not in stored:
                computed[name] = partial(bias, name, shape)
    return computed
