"""LoRA folders and low-rank algebra."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from modeling.checkpoint import Checkpoint, count_parameters
from modeling.lora import (
    LoraPair,
    open_adapter,
    product_cosine,
    product_inner,
    product_norm,
    rewrite_adapter,
)
from settings import ModelError


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=11,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def _save(folder: Path, **options: object) -> PeftModel:
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options}
    model = get_peft_model(_model(), LoraConfig(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return model


sizes = st.integers(1, 7)


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, sizes, sizes, st.integers(0, 2**31))
def test_products_equal_their_dense_definition(
    r1: int, r2: int, d_in: int, d_out: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a1, a2 = (torch.randn(3, r, d_in, generator=generator) for r in (r1, r2))
    b1, b2 = (torch.randn(3, d_out, r, generator=generator) for r in (r1, r2))
    dense1, dense2 = (b1 @ a1).double().flatten(1), (b2 @ a2).double().flatten(1)
    inner = (dense1 * dense2).sum(1)
    torch.testing.assert_close(product_inner(a1, b1, a2, b2), inner, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product_norm(a1, b1), dense1.norm(dim=1), rtol=1e-4, atol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(dense1, dense2, dim=1)
    torch.testing.assert_close(product_cosine(a1, b1, a2, b2), cosine, rtol=1e-3, atol=1e-3)


def test_zero_products_have_a_defined_cosine() -> None:
    a, b = torch.ones(2, 3), torch.ones(4, 2)
    assert product_cosine(a, 0 * b, a, 0 * b) == 1
    assert product_cosine(a, b, a, 0 * b) == 0
    assert product_cosine(a, b, a, 2 * b) == pytest.approx(1)


def test_pairs_are_the_models_own_weights_in_block_order(tmp_path: Path) -> None:
    model = _save(tmp_path)
    adapter = open_adapter(tmp_path, "adapter")
    blocks = [int(name.split(".")[2]) for name in adapter.names]
    assert blocks == sorted(blocks)
    assert max(blocks) == 10
    for name, pair in adapter.pairs():
        layer = model.get_base_model().get_submodule(name)
        assert torch.equal(pair.a, layer.lora_A["default"].weight)
        assert torch.equal(pair.b, layer.lora_B["default"].weight)
        assert pair.scale == layer.scaling["default"]


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}},
        {"alpha_pattern": {"layers.3.self_attn.q_proj": 24}},
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 1}, "use_rslora": True},
    ],
)
def test_scales_are_those_of_peft(tmp_path: Path, options: dict[str, object]) -> None:
    model = _save(tmp_path, **options)
    for name, shape in open_adapter(tmp_path, "adapter").shapes.items():
        layer = model.get_base_model().get_submodule(name)
        assert math.isclose(shape.scale, layer.scaling["default"])
        assert shape.rank == layer.lora_A["default"].out_features


def test_groups_cover_every_module_once_within_the_limit(tmp_path: Path) -> None:
    _save(tmp_path, rank_pattern={"layers.3.mlp.down_proj": 2})
    adapter = open_adapter(tmp_path, "adapter")
    groups = list(adapter.groups(limit=300))
    assert sorted(name for names in groups for name in names) == sorted(adapter.names)
    for names in groups:
        assert len({adapter.shapes[name] for name in names}) == 1
        a, b = adapter.stack(names)
        assert len(names) == 1 or a.numel() + b.numel() <= 300


def test_rewriting_changes_what_was_edited_and_nothing_else(tmp_path: Path) -> None:
    _save(tmp_path / "in", modules_to_save=["lm_head"])
    source = open_adapter(tmp_path / "in", "adapter")
    chosen = source.names[5]

    def edit(name: str, pair: LoraPair) -> LoraPair | None:
        return LoraPair(pair.a + 1, pair.b * 2, pair.scale) if name == chosen else None

    rewrite_adapter(source, tmp_path / "out", edit)
    before, after = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("in", "out"))
    assert before.keys() == after.keys()
    assert any("lm_head" in key for key in after)
    for key, tensor in before.items():
        expected = tensor
        if chosen in key:
            expected = tensor + 1 if "lora_A" in key else tensor * 2
        assert torch.equal(after[key], expected), key
    loaded = PeftModel.from_pretrained(_model(), tmp_path / "out").get_base_model()
    weight = loaded.get_submodule(chosen).lora_A["default"].weight
    assert torch.equal(weight, next(source.pairs([chosen]))[1].a + 1)


def test_rewriting_keeps_half_precision(tmp_path: Path) -> None:
    model = _save(tmp_path / "f32").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "in")
    source = open_adapter(tmp_path / "in", "adapter")

    def edit(_: str, pair: LoraPair) -> LoraPair:
        return LoraPair(pair.a.float() * 1.9, pair.b.float(), pair.scale)

    rewrite_adapter(source, tmp_path / "out", edit)
    for (_, old), (_, new) in zip(
        source.pairs(), open_adapter(tmp_path / "out", "adapter").pairs(), strict=True
    ):
        assert new.a.dtype == torch.bfloat16
        assert torch.equal(new.a, (old.a.float() * 1.9).bfloat16())
        assert torch.equal(new.b, old.b)


def test_dora_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, use_dora=True)
    with pytest.raises(ModelError, match=r"not a plain LoRA.*magnitude"):
        open_adapter(tmp_path, "adapter")


def test_a_model_folder_is_no_adapter(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no adapter folder"):
        open_adapter(tmp_path, "adapter")


def test_a_half_adapter_is_refused(tmp_path: Path) -> None:
    _save(tmp_path)
    from safetensors.torch import save_file

    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    del tensors[next(key for key in tensors if "lora_B" in key)]
    save_file(tensors, weights)
    with pytest.raises(ModelError, match="lacks lora_A or lora_B"):
        open_adapter(tmp_path, "adapter")


def test_parameters_are_counted_from_headers(tmp_path: Path) -> None:
    model = _model()
    expected = sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    (tmp_path / "one" / "consolidated.safetensors").write_bytes(b"not counted")
    assert count_parameters(Checkpoint(str(tmp_path / "one"))) == expected
    assert count_parameters(Checkpoint(str(tmp_path / "many"))) == expected
    adapter = _save(tmp_path / "adapter")
    extra = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    checkpoint = Checkpoint(str(tmp_path / "one"), str(tmp_path / "adapter"))
    assert count_parameters(checkpoint) == expected + extra


def test_config_keeps_the_name_of_its_base(tmp_path: Path) -> None:
    _save(tmp_path / "in")
    config = tmp_path / "in" / "adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": "somebody/some-model"}
    config.write_text(json.dumps(values))
    rewrite_adapter(open_adapter(tmp_path / "in", "adapter"), tmp_path / "out", lambda *_: None)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == values
