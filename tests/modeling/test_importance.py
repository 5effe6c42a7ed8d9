"""Input norms and top shares against their definitions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modeling.checkpoint import Checkpoint
from modeling.heads import head_layout
from modeling.importance import input_norms, top_share
from modeling.loading import load_model
from modeling.projections import projections
from modeling.steering import save_steering
from settings import DataError, ModelError
from tests.modeling.tiny_models import random_steering, save_adapter, save_model

ROWS = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10]), ([11, 12], []), ([3, 1], [4, 1, 5, 9, 2, 6])]
TAKEN: dict[str, Callable[[int, int], slice]] = {
    "prompt": lambda prompt, _: slice(0, prompt),
    "answer": lambda prompt, end: slice(prompt, end),
    "all": lambda _, end: slice(0, end),
}


def _norms(checkpoint: Checkpoint, positions: str, prefix: str = "") -> dict[str, Tensor]:
    """Unpadded rows, one at a time, through the whole model."""
    model = load_model(checkpoint, device="cpu").eval()
    seen: dict[str, list[Tensor]] = {}
    names = projections(checkpoint)

    def keep(name: str, span: slice) -> Callable[..., None]:
        return lambda _, args: seen.setdefault(name, []).append(args[0][0, span].double())

    for prompt, answer in ROWS:
        span = TAKEN[positions](len(prompt), len(prompt + answer))
        hooks = [
            model.get_submodule(prefix + name).register_forward_pre_hook(keep(name, span))
            for name in names
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([prompt + answer]))
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts).square().sum(0).sqrt() for name, parts in seen.items()}


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, norms in expected.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], norms, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("positions", ["prompt", "answer", "all"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_norms_are_those_of_single_rows(positions: str, batch_size: int, tmp_path: Path) -> None:
    model = save_model("qwen2", tmp_path)
    found = input_norms(model, ROWS, batch_size, positions)
    assert list(found) == list(projections(model))
    _assert_same(found, _norms(model, positions), 1e-5)


def test_an_adapter_counts(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "base")
    model = save_adapter(base, tmp_path / "adapter")
    found = input_norms(model, ROWS, 2, "all")
    _assert_same(found, _norms(model, "all", "base_model.model."), 1e-5)
    plain = input_norms(base, ROWS, 2, "all")
    last = "model.layers.2.mlp.down_proj"
    assert not torch.allclose(found[last], plain[last], rtol=1e-2)


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "mistral_wide_heads"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    _assert_same(input_norms(model, ROWS, 4, "answer"), _norms(model, "answer"), 1e-5)


def test_steering_counts(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "base")
    save_steering(random_steering(head_layout(model), [(1, 2)]), tmp_path / "steering")
    steered = Checkpoint(model.base, steering=str(tmp_path / "steering"))
    found, plain = (input_norms(m, ROWS, 2, "all") for m in (steered, model))
    for name, norms in found.items():
        if not name.startswith("model.layers.1.self_attn"):
            untouched = name.startswith("model.layers.0")
            assert torch.allclose(norms, plain[name], rtol=1e-4) == untouched, name


def test_half_precision(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path, dtype="bfloat16")
    _assert_same(input_norms(model, ROWS, 1, "all"), _norms(model, "all"), 1e-6)


def test_only_the_named_projections(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path)
    names = {"model.layers.2.mlp.up_proj", "model.layers.0.self_attn.v_proj"}
    found = input_norms(model, ROWS, 2, "all", names)
    assert list(found) == sorted(names)
    everything = input_norms(model, ROWS, 2, "all")
    assert all(torch.equal(norms, everything[name]) for name, norms in found.items())


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path)
    with pytest.raises(ModelError, match=r"no projection model\.layers\.9\.mlp\.up_proj"):
        input_norms(model, ROWS, 2, "all", ["model.layers.9.mlp.up_proj"])
    with pytest.raises(DataError, match="positions=answer"):
        input_norms(model, [([1, 2], [])], 2, "answer")
    with pytest.raises(DataError, match="positions=all"):
        input_norms(model, [], 2, "all")


def _expected(row: list[float], k: int) -> list[bool]:
    """The k first of a stable sort, largest first."""
    order = sorted(range(len(row)), key=lambda i: -row[i])[:k]
    return [i in order for i in range(len(row))]


scores = st.integers(1, 9).flatmap(
    lambda n: st.lists(
        st.lists(
            st.sampled_from([0.0, 0.5, 1.0, 2.5, -1.0, float("-inf")]), min_size=n, max_size=n
        ),
        min_size=1,
        max_size=5,
    )
)


@settings(deadline=None, max_examples=200)
@given(
    scores,
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_top_shares_are_those_of_a_stable_sort(
    rows: list[list[float]], share: float, dtype: torch.dtype
) -> None:
    tensor = torch.tensor(rows, dtype=dtype)
    n = len(rows[0])
    by_row = top_share(tensor, share, "row")
    assert by_row.tolist() == [_expected(row, round(share * n)) for row in rows]
    flat = [value for row in rows for value in row]
    whole = top_share(tensor, share, "tensor")
    assert whole.shape == tensor.shape
    assert whole.flatten().tolist() == _expected(flat, round(share * len(flat)))


def test_top_share_of_a_vector_and_of_columns_in_memory_order() -> None:
    vector = torch.tensor([3.0, 1.0, 2.0, 3.0])
    assert top_share(vector, 0.5, "tensor").tolist() == [True, False, False, True]
    assert top_share(vector, 0.25, "row").tolist() == [True, False, False, False]
    turned = torch.arange(6.0).reshape(2, 3).mT
    assert top_share(turned, 0.5, "tensor").tolist() == [[False, True]] * 3


def test_top_shares_of_large_tensors_with_many_ties() -> None:
    """Large enough to be counted in several blocks."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 7, (1300, 900), generator=generator).float()
    assert tensor.numel() > 1 << 20
    for scope, flat in (("tensor", tensor.reshape(1, -1)), ("row", tensor)):
        k = round(0.3 * flat.shape[1])
        first = flat.argsort(dim=1, descending=True, stable=True)[:, :k]
        expected = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, first, True)
        assert torch.equal(top_share(tensor, 0.3, scope), expected.reshape(tensor.shape))


def test_scores_that_cannot_be_ordered_are_refused() -> None:
    with pytest.raises(ModelError, match="NaN"):
        top_share(torch.tensor([1.0, float("nan")]), 0.5, "tensor")
    with pytest.raises(ValueError, match=r"share=1\.5"):
        top_share(torch.ones(3), 1.5, "tensor")
