"""Activation capture: what is taken, from where, and summed to what."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modeling.capture import Grams, SquareSums, batches, captured_inputs, run_block

ROWS = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10]), ([11, 12], [13]), ([3, 1], [4, 1, 5])]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def _answer_inputs(model: LlamaForCausalLM, name: str) -> torch.Tensor:
    """The inputs of a module at answer tokens, one unpadded row at a time."""
    module, seen = model.get_submodule(name), []
    for prompt, answer in ROWS:
        start = len(prompt)
        handle = module.register_forward_pre_hook(
            lambda _, args, start=start: seen.append(args[0][0, start:])
        )
        with torch.no_grad():
            model(input_ids=torch.tensor([prompt + answer]))
        handle.remove()
    return torch.cat(seen).double()


def test_batches_mark_the_answers() -> None:
    (batch,) = batches(ROWS[:2], 2, "cpu")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert batch.answers.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
    assert batches(ROWS, 3, "cpu")[1].attention_mask.tolist() == [[1, 1, 1, 1, 1]]


def test_sorting_by_length_keeps_every_row() -> None:
    rows = [
        tuple(ids[mask.bool()].tolist())
        for batch in batches(ROWS, 2, "cpu", by_length=True)
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert [len(row) for row in rows] == [3, 5, 5, 5]
    assert sorted(rows) == sorted(tuple(prompt + answer) for prompt, answer in ROWS)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_sums_see_answer_tokens_only_whatever_the_batch(model: LlamaForCausalLM, size: int) -> None:
    names = ["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"]
    modules = {name: model.get_submodule(name) for name in names}
    grams, squares = Grams(), SquareSums()

    def consume(name: str, x: torch.Tensor) -> None:
        grams.add(name, x)
        squares.add(name, x)

    with captured_inputs(modules, consume) as focus, torch.no_grad():
        for batch in batches(ROWS, size, "cpu", by_length=True):
            focus.positions = batch.answers
            model(**batch.inputs)
    for name in names:
        x = _answer_inputs(model, name)
        torch.testing.assert_close(grams.sums[name], x.mT @ x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(squares.sums[name], x.square().sum(0), rtol=1e-4, atol=1e-5)


def test_hooks_are_gone_afterwards(model: LlamaForCausalLM) -> None:
    calls: list[str] = []
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    (batch,) = batches(ROWS, 4, "cpu")
    with captured_inputs({"up": module}, lambda name, _: calls.append(name)) as focus:
        model(**batch.inputs)
        assert calls == []
        focus.positions = batch.answers
        model(**batch.inputs)
    model(**batch.inputs)
    assert calls == ["up"]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_blocks_one_by_one_are_the_whole_model(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=7,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    (batch,) = batches(ROWS, 4, "cpu")
    blocks = list(model.model.layers)
    hidden = None
    with torch.no_grad():
        for index in range(len(blocks)):
            hidden = run_block(model, blocks, index, batch, hidden)
        output = model.model.norm(hidden)
        expected = model.model(**batch.inputs).last_hidden_state
    kept = batch.attention_mask.bool()
    torch.testing.assert_close(output[kept], expected[kept])


def test_a_block_gets_the_input_it_is_given(model: LlamaForCausalLM) -> None:
    (batch,) = batches(ROWS, 4, "cpu")
    blocks = list(model.model.layers)
    given = torch.randn(4, 5, 16)
    with torch.no_grad():
        first, again = (run_block(model, blocks, 2, batch, given) for _ in range(2))
        other = run_block(model, blocks, 2, batch, given + 1)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert all("forward" not in block.__dict__ for block in blocks)


def test_earlier_and_later_blocks_cost_nothing(model: LlamaForCausalLM) -> None:
    (batch,) = batches(ROWS, 4, "cpu")
    blocks, ran = list(model.model.layers), []
    handles = [
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, block in enumerate(blocks)
    ]
    with torch.no_grad():
        run_block(model, blocks, 1, batch, torch.randn(4, 5, 16))
    for handle in handles:
        handle.remove()
    assert ran == [1]
