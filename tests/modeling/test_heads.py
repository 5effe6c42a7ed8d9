"""Attention heads: the layout read from a config, and the columns of o_proj."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from modeling.checkpoint import Checkpoint
from modeling.heads import head_layout, output_biases, output_projections, read_output_columns
from modeling.loading import load_model
from settings import ModelError
from tests.modeling.tiny_models import (
    LAYERS,
    MODELS,
    PROJECTIONS,
    random_steering,
    save_adapter,
    save_model,
)

HEADS = [(2, 3), (0, 1), (2, 0)]


def _merged_weights(checkpoint: Checkpoint) -> list[torch.Tensor]:
    """Every layer's o_proj weight as PEFT merges it."""
    model = load_model(checkpoint, device="cpu")
    if checkpoint.adapter is not None:
        model = model.merge_and_unload()
    return [layer.self_attn.o_proj.weight.detach().float() for layer in model.model.layers]


@pytest.mark.parametrize("name", MODELS)
def test_layout_is_that_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    checkpoint = save_model(name, tmp_path)
    layout = head_layout(checkpoint)
    attention = load_model(checkpoint, device="cpu").model.layers[0].self_attn
    assert (layout.layers, layout.heads, layout.kv_heads, layout.hidden) == (LAYERS, 4, 2, 32)
    assert layout.head_dim == attention.head_dim
    assert layout.width == attention.o_proj.in_features
    assert layout.model_type == MODELS[name][0]
    covered = [i for head in range(4) for i in range(layout.width)[layout.columns(head)]]
    assert covered == list(range(layout.width))


def test_layout_needs_no_weights(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "mistral", hidden_size=5120, num_attention_heads=32, head_dim=128, num_hidden_layers=40
    )
    config.save_pretrained(tmp_path)
    layout = head_layout(Checkpoint(str(tmp_path)))
    assert (layout.layers, layout.heads, layout.kv_heads) == (40, 32, 8)
    assert (layout.head_dim, layout.hidden, layout.width) == (128, 5120, 4096)


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", "bert", "qwen3_next"])
def test_models_without_such_heads_are_refused(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no self_attn\.o_proj with attention heads"):
        head_layout(Checkpoint(str(tmp_path)))


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "homemade"}))
    with pytest.raises(ModelError, match="architecture that transformers knows"):
        head_layout(Checkpoint(str(tmp_path)))


def test_head_out_of_range(tmp_path: Path) -> None:
    layout = head_layout(save_model("llama", tmp_path))
    with pytest.raises(IndexError):
        layout.columns(4)
    with pytest.raises(ModelError, match="head 4 of layer 0 is not in"):
        next(read_output_columns(Checkpoint(str(tmp_path)), layout, [(0, 4)]))


def test_projections_are_the_wrappers_of_peft_in_layer_order(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base", num_hidden_layers=11)
    plain = load_model(base, device="cpu")
    assert output_projections(plain) == [layer.self_attn.o_proj for layer in plain.model.layers]
    wrapped = load_model(save_adapter(base, tmp_path / "adapter"), device="cpu")
    layers = wrapped.get_base_model().model.layers
    assert output_projections(wrapped) == [layer.self_attn.o_proj for layer in layers]
    assert all(hasattr(module, "lora_A") for module in output_projections(wrapped))


@pytest.mark.parametrize("name", ["llama_wide_heads", "qwen2"])
@pytest.mark.parametrize("shard", ["1GB", "8KB"])
def test_columns_are_those_of_the_weights(name: str, shard: str, tmp_path: Path) -> None:
    checkpoint = save_model(name, tmp_path, dtype="bfloat16", shard=shard)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard == "8KB")
    layout, weights = head_layout(checkpoint), _merged_weights(checkpoint)
    found = list(read_output_columns(checkpoint, layout, HEADS))
    assert [head for head, _ in found] == HEADS
    for (layer, head), columns in found:
        assert columns.dtype == torch.float32
        assert torch.equal(columns, weights[layer][:, layout.columns(head)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.2.self_attn.o_proj": 2}, "alpha_pattern": {"o_proj": 24}},
        {"layers_to_transform": [0]},
        {"target_modules": [name for name in PROJECTIONS if name != "o_proj"]},
    ],
)
def test_columns_include_the_adapter(options: dict[str, object], tmp_path: Path) -> None:
    base = save_model("llama_wide_heads", tmp_path / "base")
    checkpoint = save_adapter(base, tmp_path / "adapter", **options)
    layout, weights = head_layout(checkpoint), _merged_weights(checkpoint)
    for (layer, head), columns in read_output_columns(checkpoint, layout, HEADS):
        expected = weights[layer][:, layout.columns(head)]
        torch.testing.assert_close(columns, expected, rtol=1e-6, atol=1e-6)


def test_biases_are_what_the_projection_makes_of_the_deltas(tmp_path: Path) -> None:
    base = save_model("llama_wide_heads", tmp_path / "base", shard="8KB")
    checkpoint = save_adapter(base, tmp_path / "adapter")
    layout, weights = head_layout(checkpoint), _merged_weights(checkpoint)
    deltas = dict(random_steering(layout, HEADS).deltas)
    biases = output_biases(checkpoint, {**deltas, 1: torch.zeros(layout.width)})
    assert sorted(biases) == [0, 2]
    for layer, bias in biases.items():
        torch.testing.assert_close(bias, weights[layer] @ deltas[layer], rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="use one made for this model"):
        output_biases(checkpoint, {0: torch.ones(layout.width + 1)})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, r"more than LoRA.*defense\.form=hooked"),
        ({"bias": "all"}, r"more than LoRA.*defense\.form=hooked"),
        ({"init_lora_weights": "olora"}, "save it as plain LoRA"),
    ],
)
def test_more_than_lora_is_refused(options: dict[str, object], said: str, tmp_path: Path) -> None:
    base = save_model("llama_biased", tmp_path / "base")
    checkpoint = save_adapter(base, tmp_path / "adapter", **options)
    with pytest.raises(ModelError, match=said):
        next(read_output_columns(checkpoint, head_layout(checkpoint), HEADS))


def test_quantised_and_missing_weights_are_refused(tmp_path: Path) -> None:
    checkpoint = save_model("llama", tmp_path)
    weights, name = load_file(tmp_path / "model.safetensors"), "model.layers.1.self_attn.o_proj"
    quantised = {**weights, f"{name}.weight": torch.zeros(512, 1, dtype=torch.uint8)}
    save_file(quantised, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"o_proj\.weight as \(512, 1\)"):
        next(read_output_columns(checkpoint, head_layout(checkpoint), HEADS))
    del weights[f"{name}.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"lacks trained weights for model\.layers\.1\.self_attn\.o_proj"
    ):
        next(read_output_columns(checkpoint, head_layout(checkpoint), HEADS))
