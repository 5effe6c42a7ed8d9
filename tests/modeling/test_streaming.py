"""Models whose weights stay in their files: the same results to the bit, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from defenses.base import Models
from defenses.fgsn.layers import hidden_states
from defenses.nlsr import NLSR
from defenses.nlsr.identify import identify
from defenses.safetylock.activations import head_outputs
from modeling.checkpoint import Checkpoint
from modeling.export import export_with_biases
from modeling.heads import head_layout, output_biases
from modeling.importance import input_norms
from modeling.loading import load_decoder
from modeling.lora import open_adapter
from modeling.projections import projections
from modeling.rewrite import rewrite_weights
from modeling.streaming import held, load_streamed, streamed_blocks, weight_bytes
from modeling.verify import verify_export, verify_written
from settings import ModelError, SettingError
from settings.memory import say_streaming
from tests.modeling.tiny_models import LAYERS, ROWS, random_steering, save_adapter, save_model

# Pairs of answers to one prompt.
TOKENS = [(row[:2], answer) for row in ROWS for answer in (row[1:], row[:0:-1])]


@pytest.fixture(autouse=True)
def _unsaid() -> Iterator[None]:
    yield
    say_streaming(None)


def _both(work: Callable[[], Any]) -> tuple[Any, Any]:
    """What comes of it with all weights in memory, and with streamed ones."""
    say_streaming(False)
    whole = work()
    say_streaming(True)
    return whole, work()


@pytest.mark.parametrize(
    ("adapted", "dtype"),
    [
        (False, "float32"),
        (True, "bfloat16"),
        pytest.param(False, "bfloat16", marks=pytest.mark.slow),
        pytest.param(True, "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "mistral_wide_heads", "qwen3", "gemma2"])
def test_activations_are_the_same_to_the_bit(
    name: str, adapted: bool, dtype: str, tmp_path: Path
) -> None:
    checkpoint = save_model(name, tmp_path / "base", dtype=dtype, shard="20KB")
    if adapted:
        checkpoint = save_adapter(checkpoint, tmp_path / "adapter")
    names, layout = list(projections(checkpoint)), head_layout(checkpoint)
    whole, streamed = _both(lambda: input_norms(checkpoint, TOKENS, 2, "all"))
    assert all(torch.equal(norms, streamed[key]) for key, norms in whole.items())
    assert torch.equal(*_both(lambda: hidden_states(checkpoint, names, TOKENS, 2)))
    assert torch.equal(
        *_both(lambda: head_outputs(load_decoder(checkpoint), layout, TOKENS, 2, batch_size=2))
    )


@pytest.mark.parametrize("method", ["low_rank", "wanda"])
@pytest.mark.parametrize("sequential", [False, True])
def test_safety_critical_neurons_are_the_same(
    method: str, sequential: bool, tmp_path: Path
) -> None:
    checkpoint = save_adapter(save_model("llama", tmp_path / "base"), tmp_path / "adapter")
    adapter = open_adapter(str(checkpoint.adapter), "model.aligned")
    plan = NLSR(method=method, sequential=sequential, sparsity=0.5, batch_size=2)
    whole, streamed = _both(lambda: identify(load_decoder(checkpoint), adapter, TOKENS, plan))
    assert whole.keys() == streamed.keys()
    for name, pair in whole.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, streamed[name], strict=True))


def test_a_block_has_its_weights_only_while_it_is_held(tmp_path: Path) -> None:
    checkpoint = save_model("qwen2", tmp_path / "base")
    model = load_streamed(save_adapter(checkpoint, tmp_path / "adapter"), "cpu")
    blocks = streamed_blocks(model)
    assert len(blocks) == LAYERS

    def held_bytes(module: nn.Module = model) -> int:
        weights = (p for name, p in module.named_parameters() if "lora" not in name)
        return sum(weight.untyped_storage().nbytes() for weight in weights)

    empty = held_bytes()
    assert empty < weight_bytes(checkpoint) / 2
    with held(blocks[1]):
        own = held_bytes(blocks[1])
        assert own > (weight_bytes(checkpoint) - empty) / (LAYERS + 1)
        assert not any(parameter.isnan().any() for parameter in blocks[1].parameters())
        assert held_bytes() > empty + 0.99 * own
    assert held_bytes() == empty


def test_a_model_that_does_not_fit_is_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, free = save_model("llama", tmp_path / "base"), 0
    monkeypatch.setattr("modeling.loading._free_bytes", lambda: free)
    assert streamed_blocks(load_decoder(checkpoint))
    free = weight_bytes(checkpoint) + 1
    assert not streamed_blocks(load_decoder(checkpoint))


def test_gradients_are_refused(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    models = Models(base, save_adapter(base, tmp_path / "adapter"))
    say_streaming(True)
    NLSR(method="wanda").check(models, None)
    with pytest.raises(SettingError, match=r"takes gradients.*stream_weights=false"):
        NLSR(method="snip").check(models, None)


def test_the_dtype_that_runs_counts(tmp_path: Path) -> None:
    stored = save_model("llama", tmp_path / "base", dtype="bfloat16")
    assert 2 * weight_bytes(stored) == weight_bytes(Checkpoint(stored.base, dtype="float32"))


@pytest.mark.parametrize("name", ["llama_tied", "qwen2"])
@pytest.mark.parametrize("adapted", [False, True])
def test_what_was_written_is_verified_alike(name: str, adapted: bool, tmp_path: Path) -> None:
    source = save_model(name, tmp_path / "base")
    if adapted:
        source = save_adapter(source, tmp_path / "adapter")
    edited = "model.layers.1.mlp.up_proj"
    rewrite_weights(source, tmp_path / "out", lambda _, weight: -weight, names=[edited])
    written = Checkpoint(str(tmp_path / "out"), dtype=source.dtype)
    whole, streamed = _both(lambda: verify_written(written, source, changed=True))
    assert whole == streamed
    with pytest.raises(ModelError, match="answers differently"):
        verify_written(written, source, changed=False)
    steering = random_steering(head_layout(source), [(0, 1), (2, 3)])
    export_with_biases(source, output_biases(source, steering.deltas), tmp_path / "locked")
    whole, streamed = _both(lambda: verify_export(tmp_path / "locked", source, steering, ROWS))
    assert whole == streamed
