"""NLSR's official variant, bit for bit, against its description written out in plain torch.

A row at a time, no padding, dense products, float32 throughout, and autograd's own gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, logsigmoid

from data.rows import Prompt
from defenses.base import Models
from defenses.nlsr import MASKS, NLSR, REFERENCE
from defenses.nlsr.identify import identify
from defenses.nlsr.masks import load_masks
from defenses.nlsr.patch import draw, patch_probabilities
from modeling.capture import TokenRow
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model
from modeling.lora import open_adapter
from tests.defenses.tiny_lora_models import (
    PROJECTIONS,
    NumberCalibration,
    save_adapter,
    save_base,
    save_resumed,
)

LAYERS, RANK = 3, 8
# Shares of which round and int disagree, and a usual one.
SPARSITIES = (0.7, 0.85, 0.8)
IN_BLOCK = [f"self_attn.{name}" for name in PROJECTIONS[:4]] + [
    f"mlp.{name}" for name in PROJECTIONS[4:]
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    base = save_base(tmp_path_factory.mktemp("base"), width=24, layers=LAYERS)
    return replace(base, adapter=save_adapter(base, tmp_path_factory.mktemp("ref"), 1, rank=RANK))


def _rows(count: int, seed: int) -> list[TokenRow]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, 39, (length,), generator=generator).tolist()

    return [(ids(2, 6), [*ids(2, 8), 39]) for _ in range(count)]


def _weights(model: Any, block: int) -> dict[str, Tensor]:
    """The adapter's matrices in one block."""
    layer = model.get_base_model().model.layers[block]
    return {
        f"model.layers.{block}.{name}.{side}": getattr(
            layer.get_submodule(name), f"lora_{side}"
        ).default.weight
        for name in IN_BLOCK
        for side in "AB"
    }


def _wanda(model: Any, weights: dict[str, Tensor], rows: list[TokenRow]) -> dict[str, Tensor]:
    """|W| sqrt(mean over samples of ||x_col||^2), answers' positions alone."""
    modules = {id(weight): key for key, weight in weights.items()}
    squares = {key: torch.zeros(weight.shape[1]) for key, weight in weights.items()}
    start, handles = [0], []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) in modules:
            key = modules[id(module.weight)]

            def take(_: Any, args: tuple[Tensor, ...], key: str = key) -> None:
                squares[key] += args[0][0, start[0] :].norm(dim=0) ** 2

            handles.append(module.register_forward_pre_hook(take))
    for prompt, answer in rows:
        start[0] = len(prompt)
        with torch.no_grad():
            model(input_ids=torch.tensor([prompt + answer]))
    for handle in handles:
        handle.remove()
    return {
        key: weight.detach().abs() * (squares[key] / len(rows)).sqrt()
        for key, weight in weights.items()
    }


def _answer_loss(model: Any, row: TokenRow, reduction: str) -> Tensor:
    prompt, answer = row
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return cross_entropy(logits, torch.tensor(answer), reduction=reduction)


def _snip_losses(model: Any, rows: list[TokenRow]) -> list[Callable[[], Tensor]]:
    return [lambda row=row: _answer_loss(model, row, "mean") for row in rows]


def _preference_losses(model: Any, rows: list[TokenRow]) -> list[Callable[[], Tensor]]:
    def loss(chosen: TokenRow, rejected: TokenRow) -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            before = [_answer_loss(model, row, "sum") for row in (chosen, rejected)]
        after = [_answer_loss(model, row, "sum") for row in (chosen, rejected)]
        return -logsigmoid(0.1 * ((before[0] - after[0]) - (before[1] - after[1])))

    return [lambda at=at: loss(rows[at], rows[at + 1]) for at in range(0, len(rows), 2)]


def _by_gradient(
    losses: list[Callable[[], Tensor]], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """|W| sum |g|, the gradients never zeroed between samples."""
    sums = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
        weight.grad = None
    for loss in losses:
        loss().backward()
        for key, weight in weights.items():
            sums[key] += weight.grad.abs()
    for weight in weights.values():
        weight.requires_grad_(False)
    return {key: weight.detach().abs() * sums[key] for key, weight in weights.items()}


def _row_masks(scores: Tensor, sparsity: float) -> Tensor:
    """All of a row but its int(columns P_SR) lowest."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    for row, lowest in enumerate(scores.argsort(dim=1, stable=True).tolist()):
        mask[row, lowest[: int(scores.shape[1] * sparsity)]] = False
    return mask


def _literal(
    reference: Checkpoint, rows: list[TokenRow], method: str, sparsity: float
) -> dict[str, Tensor]:
    model: Any = load_model(reference, device="cpu").eval()
    model.requires_grad_(False)
    masks: dict[str, Tensor] = {}
    for block in range(LAYERS):
        weights = _weights(model, block)
        if method == "wanda":
            scores = _wanda(model, weights, rows)
        elif method == "snip":
            scores = _by_gradient(_snip_losses(model, rows), weights)
        else:
            scores = _by_gradient(_preference_losses(model, rows), weights)
        for key, score in scores.items():
            masks[key] = _row_masks(score, sparsity)
            weights[key].data[~masks[key]] = 0
    return masks


def _found(
    reference: Checkpoint, rows: list[TokenRow], method: str, sparsity: float, **changes: Any
) -> dict[str, Tensor]:
    plan = NLSR(variant="official", method=method, sparsity=sparsity, batch_size=3, **changes)
    model = load_model(reference, device="cpu")
    masks = identify(model, open_adapter(str(reference.adapter), "reference"), rows, plan)
    return {
        f"{name}.{side}": mask
        for name, pair in masks.items()
        for side, mask in zip("AB", pair, strict=True)
    }


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("method", ["wanda", "snip", "preference_snip"])
def test_masks_are_those_of_the_description(
    reference: Checkpoint, method: str, sparsity: float
) -> None:
    rows = _rows(10, seed=int(100 * sparsity))
    expected = _literal(reference, rows, method, sparsity)
    found = _found(reference, rows, method, sparsity)
    assert found.keys() == expected.keys()
    assert sum(int((found[key] != mask).sum()) for key, mask in expected.items()) == 0
    at_once = _found(reference, rows, method, sparsity, sequential=False)
    first = [key for key in expected if key.startswith("model.layers.0.")]
    assert all(torch.equal(at_once[key], expected[key]) for key in first)
    assert any(not torch.equal(at_once[key], expected[key]) for key in expected)


def _chances(similar: list[float], prune_rate: float, eps: float) -> Tensor:
    """Ranks N + 1 .. 2, normalised to [0, 1] and clipped, in float32."""
    n = len(similar)
    ranks = torch.empty(n)
    for place, module in enumerate(sorted(range(n), key=lambda j: -similar[j])):
        ranks[module] = n + 1 - place
    norm = (ranks - ranks.min()) / (ranks.max() - ranks.min())
    return torch.clip((prune_rate - eps) + 2 * eps * norm, 0, 1)


@settings(deadline=None)
@given(st.integers(2, 300), st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 0.5))
def test_probabilities_and_draws_are_those_of_float32(
    n: int, seed: int, prune_rate: float, eps: float
) -> None:
    similar = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = patch_probabilities(
        similar.tolist(), prune_rate, 2 * eps, "most_similar", "min_max", "float32"
    )
    expected = _chances(similar.tolist(), prune_rate, eps)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    torch.manual_seed(seed)
    assert draw(found, seed) == torch.bernoulli(expected).bool().tolist()


@pytest.mark.parametrize("method", ["low_rank", "wanda"])
def test_modules_are_drawn_as_they_stand_in_the_model(
    reference: Checkpoint, tmp_path: Path, method: str
) -> None:
    base = replace(reference, adapter=None)
    victim = replace(base, adapter=save_resumed(base, str(reference.adapter), tmp_path / "victim"))
    prompts = [" ".join(map(str, prompt)) for prompt, _ in _rows(8, seed=3)]
    calibration = NumberCalibration([Prompt(text, text) for text in prompts])
    defense = NLSR(variant="official", method=method, calibration_rows=8)
    models = Models(base, reference)
    (tmp_path / "artefact").mkdir()
    defense.prepare(models, calibration, tmp_path / "artefact")
    edit = defense.apply(tmp_path / "artefact", victim, tmp_path / "defended", models)
    adapter = open_adapter(tmp_path / "artefact" / REFERENCE, "reference")
    before, after = (
        dict(open_adapter(str(each.adapter), "x").pairs()) for each in (victim, edit.defended)
    )
    names = [f"model.layers.{block}.{name}" for block in range(LAYERS) for name in IN_BLOCK]
    aligned = dict(open_adapter(str(reference.adapter), "aligned").pairs())
    masks, similar = {}, []
    for name in names:
        a, b = (
            side[0] for side in load_masks(tmp_path / "artefact" / MASKS, adapter, [name], "cpu")
        )
        masks[name] = a, b
        e, t = (((b * p.b) @ (a * p.a)).flatten() for p in (aligned[name], before[name]))
        similar.append(float(cosine_similarity(e, t, dim=0)))
    torch.manual_seed(42)
    drawn = torch.bernoulli(_chances(similar, 0.5, 0.2)).bool().tolist()
    assert list(edit.diagnostics["probability"]) == names
    assert 0 < sum(drawn) < len(names)
    assert edit.modules == tuple(name for name, take in zip(names, drawn, strict=True) if take)
    for name, take in zip(names, drawn, strict=True):
        for side, mask in zip("ab", masks[name], strict=True):
            attacked, safe = getattr(before[name], side), 1.8 * getattr(aligned[name], side)
            expected = torch.where(mask, safe, attacked) if take else attacked
            assert torch.equal(getattr(after[name], side), expected)
