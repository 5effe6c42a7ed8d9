"""Steering by hooks: which positions, in which models, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling.checkpoint import Checkpoint
from modeling.heads import head_layout
from modeling.loading import load_model
from modeling.steering import SteeredPositions, Steering, load_steering, save_steering, steer
from settings import ModelError
from tests.modeling.tiny_models import (
    LAYERS,
    MODELS,
    ROWS,
    logits,
    random_steering,
    save_adapter,
    save_model,
)

HEADS = [(0, 1), (1, 3), (2, 0)]
WIDTH = 32


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_model("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapted(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


def _steering(positions: SteeredPositions, strength: float = 1.0) -> Steering:
    generator = torch.Generator().manual_seed(4)
    deltas = {k: strength * torch.randn(WIDTH, generator=generator) for k in range(LAYERS)}
    return Steering(deltas, positions)


def _seen(model: Any, run: Callable[[], object]) -> list[torch.Tensor]:
    """What the last layer's o_proj reads in each forward pass of `run`."""
    inner = getattr(model, "get_base_model", lambda: model)()
    inputs: list[torch.Tensor] = []
    # Registered after the steering's hooks, so that it sees what they leave.
    handle = inner.model.layers[-1].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].clone())
    )
    run()
    handle.remove()
    return inputs


def _generate(model: Any, rows: list[list[int]], tokens: int = 5) -> torch.Tensor:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.inference_mode():
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )[:, width:]


@pytest.mark.parametrize("name", MODELS)
def test_removing_restores_the_model_bit_for_bit(name: str, tmp_path: Path) -> None:
    checkpoint = save_model(name, tmp_path)
    model = load_model(checkpoint, device="cpu").eval()
    before = logits(model)
    steering = random_steering(head_layout(checkpoint), HEADS)
    for positions in ("all", "last_token", "generated"):
        with steer(model, Steering(steering.deltas, positions)):
            steered = logits(model)
        for old, new, during in zip(before, logits(model), steered, strict=True):
            assert torch.equal(old, new)
            # Without a cache nothing is a generated token.
            assert torch.equal(old, during) == (positions == "generated")
            if positions == "last_token":
                assert torch.equal(old[:-1], during[:-1])


@pytest.mark.parametrize("positions", ["all", "last_token", "generated"])
def test_a_zero_delta_is_the_identity(positions: SteeredPositions, base: Checkpoint) -> None:
    model = load_model(base, device="cpu").eval()
    before, answers = logits(model), _generate(model, ROWS)
    with steer(model, _steering(positions, strength=0.0)):
        assert all(torch.equal(a, b) for a, b in zip(before, logits(model), strict=True))
        assert torch.equal(_generate(model, ROWS), answers)


def test_the_delta_reaches_its_positions_and_heads_only(base: Checkpoint) -> None:
    model = load_model(base, device="cpu").eval()
    layout = head_layout(base)
    # The last layer's alone: earlier ones would change what it reads by themselves.
    steering = random_steering(layout, [(LAYERS - 1, 2)])
    delta = steering.deltas[LAYERS - 1]
    ids = torch.tensor(ROWS[:1])

    def run() -> None:
        with torch.no_grad():
            cache = model(input_ids=ids).past_key_values
            model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)

    plain = _seen(model, run)
    for positions, expected in {
        "all": [torch.ones(7, 1), torch.ones(2, 1)],
        "last_token": [torch.eye(7)[-1:].T, torch.eye(2)[-1:].T],
        "generated": [torch.zeros(7, 1), torch.ones(2, 1)],
    }.items():
        with steer(model, Steering(steering.deltas, positions)):
            steered = _seen(model, run)
        for old, new, where in zip(plain, steered, expected, strict=True):
            assert torch.equal(new[0], old[0] + where * delta)
            outside = [i for i in range(layout.width) if i not in range(*_bounds(layout, 2))]
            assert torch.equal(new[..., outside], old[..., outside])


def _bounds(layout: Any, head: int) -> tuple[int, int]:
    columns = layout.columns(head)
    return columns.start, columns.stop


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("positions", ["all", "last_token", "generated"])
def test_batched_generation_is_that_of_single_rows(
    positions: SteeredPositions, wrapped: bool, base: Checkpoint, adapted: Checkpoint
) -> None:
    model = load_model(adapted if wrapped else base, device="cpu").eval()
    plain = _generate(model, ROWS)
    with steer(model, _steering(positions)):
        batch = _generate(model, ROWS)
        singles = torch.cat([_generate(model, [row]) for row in ROWS])
    assert torch.equal(batch, singles)
    assert not torch.equal(batch, plain)


@pytest.mark.parametrize("wrapped", [False, True])
def test_generated_starts_behind_the_first_new_token(
    wrapped: bool, base: Checkpoint, adapted: Checkpoint
) -> None:
    model = load_model(adapted if wrapped else base, device="cpu").eval()
    plain = _generate(model, ROWS)
    with steer(model, _steering("generated", strength=3.0)):
        steered = _generate(model, ROWS)
        again = _generate(model, ROWS)
    assert torch.equal(steered[:, 0], plain[:, 0])
    assert not torch.equal(steered, plain)
    assert torch.equal(steered, again)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_what_it_is(dtype: str, tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base", dtype=dtype)
    for checkpoint in (base, save_adapter(base, tmp_path / "adapter")):
        model = load_model(checkpoint, device="cpu").eval()
        with steer(model, _steering("all")):
            inputs = _seen(model, lambda: logits(model))  # noqa: B023
            assert all(row.dtype == getattr(torch, dtype) for row in logits(model))
        assert all(x.dtype == getattr(torch, dtype) for x in inputs)


@settings(max_examples=20, deadline=None)
@given(
    layers=st.sets(st.integers(0, 40), max_size=4),
    width=st.integers(1, 9),
    positions=st.sampled_from(["all", "last_token", "generated"]),
)
def test_round_trip_through_disk(
    layers: set[int],
    width: int,
    positions: SteeredPositions,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("steering")
    steering = Steering({layer: torch.randn(width) for layer in layers}, positions)
    save_steering(steering, folder)
    loaded = load_steering(folder)
    assert loaded.positions == positions
    assert loaded.deltas.keys() == steering.deltas.keys()
    assert all(torch.equal(loaded.deltas[k], steering.deltas[k]) for k in layers)


def test_a_checkpoint_carries_its_steering(
    base: Checkpoint, adapted: Checkpoint, tmp_path: Path
) -> None:
    steering = _steering("all")
    save_steering(steering, tmp_path)
    for checkpoint in (base, adapted):
        model = load_model(checkpoint, device="cpu").eval()
        with steer(model, steering):
            expected = logits(model)
        loaded = load_model(replace(checkpoint, steering=str(tmp_path)), device="cpu").eval()
        assert all(torch.equal(a, b) for a, b in zip(expected, logits(loaded), strict=True))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("steering.json", None),
        ("steering.safetensors", None),
        ("steering.safetensors", b"short"),
        ("steering.json", b"{"),
        ("steering.json", b"[]"),
        ("steering.json", {"layers": [0, 1]}),
        ("steering.json", {"layers": [0, 1, 2, 3]}),
        ("steering.json", {"width": 31}),
        ("steering.json", {"format": 2}),
        ("steering.json", {"positions": "prompt"}),
    ],
)
def test_damaged_folders_are_refused(file: str, content: Any, tmp_path: Path) -> None:
    save_steering(_steering("all"), tmp_path)
    path = tmp_path / file
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    else:
        path.write_bytes(content)
    with pytest.raises(ModelError, match="make it again"):
        load_steering(tmp_path)


def test_wrong_vectors_are_refused(base: Checkpoint) -> None:
    model = load_model(base, device="cpu")
    with pytest.raises(ModelError, match="choose all, last_token or generated"):
        Steering({}, "everywhere")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no finite float32 vector"):
        Steering({0: torch.tensor([1.0, float("nan")])})
    with pytest.raises(ModelError, match="no finite float32 vector"):
        Steering({0: torch.ones(2, dtype=torch.float64)})
    with pytest.raises(ModelError, match="different widths"):
        Steering({0: torch.ones(2), 1: torch.ones(3)})
    with pytest.raises(ModelError, match="edits layer 7, but the model has 3"):
        steer(model, Steering({7: torch.ones(WIDTH)}))
    with pytest.raises(ModelError, match="31 values per layer, but o_proj reads 32"):
        steer(model, Steering({0: torch.ones(31)}))
