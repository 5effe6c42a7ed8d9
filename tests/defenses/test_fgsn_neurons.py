"""FGSN's layers, scores, masks and the set of edited neurons."""

from __future__ import annotations

import json
from bisect import bisect_left
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from defenses.fgsn.layers import (
    by_layer,
    hidden_states,
    layer_of,
    named_layers,
    safety_gap,
    safety_layers,
    window_size,
)
from defenses.fgsn.neurons import find_q, neuron_scores, safety_mask, top
from defenses.fgsn.union import BITS, FOLDER, RECORD, Union, load_union
from modeling.capture import TokenRow
from modeling.checkpoint import Checkpoint
from modeling.importance import wanda_scores
from modeling.loading import load_model
from modeling.projections import projections
from settings import ModelError, SettingError

SHAPES = {"model.layers.0.mlp.up_proj": (5, 3), "model.layers.1.mlp.up_proj": (4, 9)}
UP0, UP1 = SHAPES


# Layers


def test_hidden_states_are_those_behind_each_block(aligned: Checkpoint) -> None:
    rows: list[TokenRow] = [([3, 9, 12, 5], [7]), ([8, 2], []), ([30, 31, 4, 4, 6], [])]
    found = hidden_states(aligned, list(projections(aligned)), rows, batch_size=2)
    model = load_model(aligned, device="cpu")
    blocks: dict[int, Tensor] = {}
    for at, block in enumerate(model.get_base_model().model.layers):
        block.register_forward_hook(lambda _, __, out, at=at: blocks.update({at: out}))
    assert found.shape == (3, 3, 32)
    for index, (prompt, _) in enumerate(rows):
        with torch.no_grad():
            model(input_ids=torch.tensor([prompt]))
        for at, output in blocks.items():
            alone = (output[0] if isinstance(output, tuple) else output)[0, -1]
            torch.testing.assert_close(found[at, index], alone, atol=1e-5, rtol=1e-4)


def test_the_last_state_is_not_normed(aligned: Checkpoint, base: Checkpoint) -> None:
    rows: list[TokenRow] = [([3, 9, 12, 5], [])]
    found = hidden_states(base, list(projections(base)), rows, batch_size=1)
    model = LlamaForCausalLM.from_pretrained(base.base)
    with torch.no_grad():
        states = model(input_ids=torch.tensor([[3, 9, 12, 5]]), output_hidden_states=True)
    torch.testing.assert_close(found[0, 0], states.hidden_states[1][0, -1], atol=1e-5, rtol=1e-4)
    normed = model.model.norm(found[-1, 0])
    torch.testing.assert_close(normed, states.hidden_states[-1][0, -1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[-1, 0], normed, atol=1e-2)


def test_the_gap_is_a_difference_of_mean_cosines() -> None:
    benign = torch.eye(4)[:2].mul(torch.tensor([1.0, 0, 0, 0])) + torch.tensor([1.0, 0, 0, 0])
    harmful = torch.tensor([[0.0, 2.0, 0, 0], [0, 3.0, 0, 0]])
    assert safety_gap(benign[None], harmful[None], 20, 0) == pytest.approx([1.0])
    assert safety_gap(benign[None], -benign[None], 20, 0) == pytest.approx([2.0])
    assert safety_gap(benign[None], benign[None], 20, 0) == pytest.approx([0.0])


def test_the_gap_follows_from_its_seed() -> None:
    benign, harmful = torch.randn(2, 9, 5), torch.randn(2, 7, 5)
    gap = safety_gap(benign, harmful, 12, 3)
    assert gap == safety_gap(benign, harmful, 12, 3) != safety_gap(benign, harmful, 12, 4)


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12), st.integers(2, 12))
def test_the_window_rises_most(gaps: list[float], size: int) -> None:
    size = min(size, len(gaps))
    chosen = safety_layers(gaps, size)
    assert chosen == list(range(chosen[0], chosen[0] + size))
    rises = [gaps[at + size - 1] - gaps[at] for at in range(len(gaps) - size + 1)]
    assert gaps[chosen[-1]] - gaps[chosen[0]] == max(rises)
    assert rises[: chosen[0]] == [] or max(rises[: chosen[0]]) < max(rises)


@pytest.mark.parametrize(
    ("window", "depth", "size"),
    [(0.1875, 32, 6), (0.1875, 28, 5), (6, 28, 6), (0.1875, 6, 2), (8, 6, 6), (1.0, 6, 6)],
)
def test_window_sizes(window: int | float, depth: int, size: int) -> None:
    assert window_size(window, depth) == size


def test_named_layers() -> None:
    assert named_layers([0.3125, 0.5], 32) == list(range(10, 16))
    assert named_layers([0.0, 1.0], 6) == list(range(6))
    assert named_layers([5, 0], 6) == [0, 5]
    with pytest.raises(SettingError, match="layers 0 to 5 only"):
        named_layers([6], 6)
    with pytest.raises(SettingError, match="set them further apart"):
        named_layers([0.5, 0.52], 6)


def test_layers_of_names() -> None:
    assert layer_of("model.layers.11.self_attn.q_proj") == 11
    assert layer_of("model.layers.3.block_sparse_moe.experts.7.w1") == 3
    names = {"model.layers.10.mlp.up_proj": (1, 1), "model.layers.9.mlp.up_proj": (1, 1)}
    assert list(by_layer(names)) == [9, 10]


# Scores and masks


def test_a_neurons_score_is_the_sum_of_its_weights_scores() -> None:
    weight, norms = torch.randn(2500, 7), torch.rand(7, 3, dtype=torch.float64)
    rows = neuron_scores(weight, norms)
    for at in range(3):
        expected = wanda_scores(weight, norms[:, at])
        torch.testing.assert_close(rows[:, at], expected.sum(1))
        literal = weight.abs() * norms[:, at].float()
        assert torch.equal(expected, literal)


def _wei(harmful: Tensor, benign: Tensor, q: float, p: float) -> Tensor:
    """Wei et al. 2024: the top q of the safety scores less the top p of the utility scores."""
    sets = []
    for scores, share in ((harmful, q), (benign, p)):
        order = scores.flatten().argsort(descending=True, stable=True)
        sets.append(set(order[: round(share * scores.numel())].tolist()))
    mask = torch.zeros(harmful.numel(), dtype=torch.bool)
    mask[list(sets[0] - sets[1])] = True
    return mask.reshape(harmful.shape)


SHARE = st.floats(0, 1)


@settings(deadline=None)
@given(SHARE, SHARE, st.integers(0, 99))
def test_single_weights_masks_are_the_wanda_set_difference(q: float, p: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    harmful, benign = (torch.rand(6, 9, generator=generator) for _ in range(2))
    mask = safety_mask({UP0: harmful}, {UP0: benign}, q, p, "tensor")[UP0]
    assert torch.equal(mask, _wei(harmful, benign, q, p))


@settings(deadline=None)
@given(SHARE, SHARE, SHARE, st.sampled_from(["tensor", "row", "layer"]), st.integers(0, 99))
def test_masks_grow_with_q_and_shrink_with_p(
    q: float, more: float, p: float, scope: str, seed: int
) -> None:
    q, more = sorted((q, more))
    generator = torch.Generator().manual_seed(seed)
    harmful, benign = (
        {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in range(2)
    )
    small, large = (safety_mask(harmful, benign, share, p, scope) for share in (q, more))
    strict = safety_mask(harmful, benign, more, 1.0, scope)
    for name in SHAPES:
        assert not (small[name] & ~large[name]).any()
        assert not strict[name].any()
        assert not safety_mask(harmful, benign, 0.0, p, scope)[name].any()


def test_scopes_share_out_differently() -> None:
    scores = {UP0: torch.arange(15.0).reshape(5, 3), UP1: 100 + torch.arange(36.0).reshape(4, 9)}
    by_tensor, by_row, layer = (top(scores, 1 / 3, scope) for scope in ("tensor", "row", "layer"))
    assert [int(by_tensor[name].sum()) for name in scores] == [5, 12]
    assert by_row[UP0].sum(1).tolist() == [1] * 5
    assert by_row[UP1].sum(1).tolist() == [3] * 4
    assert [int(layer[name].sum()) for name in scores] == [0, 17]


@settings(deadline=None, max_examples=25)
@given(st.floats(0.001, 1), st.lists(st.integers(0, 200), min_size=200, max_size=200))
def test_q_is_found_by_bisection(target: float, places: list[int]) -> None:
    places.sort()

    def share(q: float) -> float:
        return bisect_left(places, 200 * q) / 200

    best = min(abs(share(at / 2000) - target) for at in range(2001))
    assert abs(share(find_q(share, target)) - target) <= best + 1e-9


# The union


@given(st.sampled_from(["row", "weight"]), st.integers(0, 99))
def test_a_union_is_a_set(granularity: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = SHAPES[UP1] if granularity == "weight" else SHAPES[UP1][:1]
    one, two = (torch.rand(size, generator=generator) < 0.4 for _ in range(2))
    union = Union(granularity, SHAPES)
    union.add(UP1, one)
    before = union.copy()
    union.add(UP1, two)
    assert torch.equal(union.mask(UP1), one | two)
    assert torch.equal(before.mask(UP1), one)
    assert not union.mask(UP0).any()
    width = 9 if granularity == "row" else 1
    assert union.scalars == {UP1: int((one | two).sum()) * width}


def _stored(folder: Path, granularity: str = "row") -> Tensor:
    union = Union(granularity, SHAPES)
    mask = torch.rand(SHAPES[UP1] if granularity == "weight" else 4) < 0.5
    union.add(UP1, mask)
    union.save(folder / FOLDER, {"aligned": {"base": "b", "adapter": None}, "attacked": None})
    return mask


@pytest.mark.parametrize("granularity", ["row", "weight"])
@pytest.mark.parametrize("inside", [FOLDER, "."])
def test_a_union_survives_the_disk(tmp_path: Path, granularity: str, inside: str) -> None:
    mask = _stored(tmp_path, granularity)
    origin = {"base": "b", "adapter": None}
    union, record = load_union(tmp_path / inside, origin, granularity, SHAPES)
    assert torch.equal(union.mask(UP1), mask)
    assert union.scalars == {UP1: int(mask.sum()) * (9 if granularity == "row" else 1)}
    assert record["aligned"] == origin


def test_a_foreign_or_damaged_union_is_refused(tmp_path: Path) -> None:
    _stored(tmp_path)
    origin = {"base": "b", "adapter": None}
    with pytest.raises(ModelError, match=r"defense\.continue_from=.*of another aligned model"):
        load_union(tmp_path, {"base": "other", "adapter": None}, "row", SHAPES)
    with pytest.raises(ModelError, match="of another shape"):
        load_union(tmp_path, origin, "row", {**SHAPES, UP1: (4, 8)})
    with pytest.raises(ModelError, match=r"set defense\.granularity=row"):
        load_union(tmp_path, origin, "weight", SHAPES)
    with pytest.raises(ModelError, match="holds no edited neurons"):
        load_union(tmp_path / "elsewhere", origin, "row", SHAPES)
    place = tmp_path / FOLDER
    save_file({UP1: load_file(place / BITS)[UP1][:0]}, place / BITS)
    with pytest.raises(ModelError, match="is damaged"):
        load_union(tmp_path, origin, "row", SHAPES)
    (place / BITS).write_bytes(b"x")
    with pytest.raises(ModelError, match="can't be read"):
        load_union(tmp_path, origin, "row", SHAPES)
    _stored(tmp_path)
    record = json.loads((place / RECORD).read_text())
    (place / RECORD).write_text(json.dumps({**record, "format": 9}))
    with pytest.raises(ModelError, match="of format 9"):
        load_union(tmp_path, origin, "row", SHAPES)
