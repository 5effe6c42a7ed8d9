"""Wanda's set difference: the mask, what is restored or zeroed, and what stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from defenses.base import Edit
from defenses.wanda_prune import NORMS, ROWS, WandaPrune, set_difference
from modeling.checkpoint import Checkpoint
from modeling.importance import wanda_scores
from modeling.loading import load_model
from settings import DataError, ModelError, SettingError
from tests.defenses.victims import (
    KINDS,
    Case,
    HarmCalibration,
    harm_calibration,
    plain_logits,
    projection_weights,
    shared_case,
    state,
)

SHARES = st.floats(0, 1)


def _repair(
    case: Case, out: Path, calibration: HarmCalibration | None = None, **settings: Any
) -> Edit:
    defense = WandaPrune(**{"positions": "all", "batch_size": 4, **settings})
    defense.check(case.models, case.attacked)
    (out / "artefact").mkdir(parents=True)
    defense.prepare(case.models, calibration or harm_calibration(), out / "artefact")
    return defense.apply(out / "artefact", case.attacked, out / "defended", case.models)


def _norms(checkpoint: Checkpoint, rows: list[list[list[int]]]) -> dict[str, Tensor]:
    """||X_j||_2 of every projection over all tokens, one row at a time, by plain hooks."""
    model = load_model(checkpoint, device="cpu").eval()
    core = model.get_base_model() if checkpoint.adapter else model
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def take(_: Any, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + args[0][0].detach().double().square().sum(0)

        return take

    for name, module in core.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for prompt, answer in rows:
            model(input_ids=torch.tensor([prompt + answer]))
    return {name: squares.sqrt() for name, squares in sums.items()}


def _literal_masks(
    case: Case, artefact: Path, scored: str, q: float, p: float
) -> dict[str, Tensor]:
    source = case.models.aligned if scored == "aligned" else case.attacked
    rows = json.loads((artefact / ROWS).read_text())
    safety, utility = (_norms(source, rows[kind]) for kind in ("safety", "utility"))
    masks = {}
    for name, weight in projection_weights(state(source)).items():
        tops = []
        for norms, share in ((safety, q), (utility, p)):
            scores = (weight.abs().double() * norms[name]).flatten()
            top = torch.zeros(scores.numel(), dtype=torch.bool)
            top[scores.argsort(descending=True)[: round(share * scores.numel())]] = True
            tops.append(top.reshape(weight.shape))
        masks[name] = tops[0] & ~tops[1]
    return masks


@pytest.mark.parametrize(
    ("kind", "action", "scored"),
    [
        *((kind, "restore", "aligned") for kind in KINDS),
        *((kind, "restore", "attacked") for kind in ("resumed/lora", "full/full")),
        *((kind, "zero", "aligned") for kind in ("fresh/lora", "full/lora")),
    ],
)
def test_the_set_difference_is_restored_or_zeroed(
    kind: str, action: str, scored: str, tmp_path: Path
) -> None:
    case = shared_case("qwen2", kind)
    edit = _repair(case, tmp_path / "out", q=0.3, p=0.2, action=action, scored=scored)
    masks = _literal_masks(case, tmp_path / "out" / "artefact", scored, 0.3, 0.2)
    aligned = projection_weights(state(case.models.aligned))
    attacked, defended = state(case.attacked), state(edit.defended)
    wrong = 0
    for name, mask in masks.items():
        before, after = attacked[f"{name}.weight"], defended[f"{name}.weight"]
        put = aligned[name] if action == "restore" else torch.zeros_like(before)
        close = (after - torch.where(mask, put, before)).abs() < 1e-5
        # Float32 and float64 scores may order a neighbouring pair differently.
        wrong += int((~close).sum())
    assert wrong <= 4
    others = [name for name in attacked if not name.endswith("_proj.weight")]
    assert all(torch.equal(attacked[name], defended[name]) for name in others)
    masked = sum(int(mask.sum()) for mask in masks.values())
    assert edit.diagnostics["parameters_masked"] == pytest.approx(masked, abs=4)
    assert 0 < edit.parameters_edited <= edit.diagnostics["parameters_masked"]
    assert edit.defended.adapter is None


@pytest.mark.parametrize("kind", ["resumed/lora", "fresh/full", "full/lora"])
@pytest.mark.parametrize("shares", [{"q": 0.0}, {"q": 0.4, "p": 1.0}])
def test_an_empty_difference_is_the_attacked_model(
    kind: str, shares: dict[str, float], tmp_path: Path
) -> None:
    case = shared_case("llama", kind)
    edit = _repair(case, tmp_path / "out", action="zero", **shares)
    for before, after in zip(plain_logits(case.attacked), plain_logits(edit.defended), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert (edit.parameters_edited, edit.modules) == (0, ())
    assert edit.diagnostics["masked_share"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_everything_restored_is_the_aligned_projections(kind: str, tmp_path: Path) -> None:
    case = shared_case("llama", kind)
    edit = _repair(case, tmp_path / "out", q=1.0, p=0.0)
    defended = projection_weights(state(edit.defended))
    for name, weight in projection_weights(state(case.models.aligned)).items():
        torch.testing.assert_close(defended[name], weight, rtol=1e-5, atol=1e-6)
    assert edit.diagnostics["masked_share"] == 1


@pytest.mark.parametrize("positions", ["prompt", "answer", "all"])
def test_the_same_settings_give_the_same_model(positions: str, tmp_path: Path) -> None:
    case = shared_case("llama", "resumed/lora")
    one, two = (
        state(_repair(case, tmp_path / name, positions=positions).defended) for name in ("1", "2")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_rows_hold_the_aligned_models_safe_answers(tmp_path: Path) -> None:
    case = shared_case("llama", "resumed/lora")
    calibration = harm_calibration(6)
    texts = [prompt.text for prompt in calibration.safety_prompts]
    calibration.unsafe = frozenset([texts[0], calibration.utility_prompts[0].text])
    _repair(case, tmp_path / "out", calibration)
    rows = json.loads((tmp_path / "out" / "artefact" / ROWS).read_text())
    assert (len(rows["safety"]), len(rows["utility"])) == (5, 6)
    answer = calibration.respond(case.models.aligned, texts[1:2])[0]
    assert rows["safety"][0][1][:-1] == [int(word) for word in answer.split()]
    assert all(model == case.models.aligned for model in calibration.asked)


def test_prompts_alone_need_no_answers(tmp_path: Path) -> None:
    case = shared_case("llama", "resumed/lora")
    calibration = harm_calibration()
    _repair(case, tmp_path / "out", calibration, positions="prompt")
    assert calibration.asked == []


@given(st.integers(0, 2**31), SHARES, SHARES)
def test_the_mask_is_a_difference_of_sets(seed: int, q: float, p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    safety, utility = (torch.rand(5, 8, generator=generator) for _ in range(2))
    mask = set_difference(safety, utility, q, p)
    assert int(mask.sum()) <= round(40 * q)
    assert int(mask.sum()) >= round(40 * q) - round(40 * p)
    assert not bool((mask & set_difference(utility, safety, p, 0.0)).any())
    assert int(set_difference(safety, safety, q, q).sum()) == 0


@given(st.integers(0, 2**31), SHARES, SHARES)
def test_the_official_shares_round_down(seed: int, q: float, p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    safety, utility = (torch.rand(7, 9, generator=generator) for _ in range(2))
    tops = [
        {*scores.flatten().argsort(descending=True)[: int(share * 63)].tolist()}
        for scores, share in ((safety, q), (utility, p))
    ]
    expected = torch.zeros(63, dtype=torch.bool)
    expected[sorted(tops[0] - tops[1])] = True
    assert torch.equal(set_difference(safety, utility, q, p, "down"), expected.reshape(7, 9))


def test_the_official_variant_restores_the_weights_of_its_shares(tmp_path: Path) -> None:
    case = shared_case("llama", "resumed/lora")
    counts = {}
    for variant in ("default", "official"):
        edit = _repair(case, tmp_path / variant, q=0.3, p=0.0, variant=variant)
        counts[variant] = edit.diagnostics["masked"]
    sizes = {name: w.numel() for name, w in projection_weights(state(case.attacked)).items()}
    assert counts["default"] == {name: round(0.3 * n) for name, n in sizes.items()}
    assert counts["official"] == {name: int(0.3 * n) for name, n in sizes.items()}
    assert counts["official"] != counts["default"]


def test_keys_hold_the_variant_only_where_it_is_given() -> None:
    assert not {"variant", "rounding"} & WandaPrune().model_dump().keys()
    assert WandaPrune(variant="official").model_dump()["variant"] == "official"
    assert WandaPrune(rounding="down").model_dump()["rounding"] == "down"


def test_scores_are_wandas() -> None:
    scores = wanda_scores(torch.tensor([[1.0, -2.0], [0.5, 0.0]]), torch.tensor([3.0, 5.0]))
    assert scores.tolist() == [[3.0, 10.0], [1.5, 0.0]]


def test_what_apply_alone_reads_needs_no_new_preparation(tmp_path: Path) -> None:
    settings = WandaPrune().prepare_settings()
    assert WandaPrune(q=0.5, p=0.3, action="zero").prepare_settings() == settings
    assert WandaPrune(scored="attacked").prepare_settings() != settings
    case = shared_case("llama", "resumed/lora")
    _repair(case, tmp_path / "out", scored="attacked")
    assert not (tmp_path / "out" / "artefact" / NORMS).exists()
    with pytest.raises(ModelError, match=r"scored=aligned \(norms\.safetensors is missing\)"):
        WandaPrune().apply(
            tmp_path / "out" / "artefact", case.attacked, tmp_path / "again", case.models
        )


def test_missing_rows_are_refused(tmp_path: Path) -> None:
    models = shared_case("llama", "resumed/lora").models
    empty = HarmCalibration([])
    with pytest.raises(DataError, match=r"no safety prompts; set sources\.safety_prompts"):
        WandaPrune().prepare(models, empty, tmp_path)
    unsafe = harm_calibration()
    unsafe.unsafe = frozenset(prompt.text for prompt in unsafe.safety_prompts)
    with pytest.raises(DataError, match=r"none of the safety prompts safely.*positions=prompt"):
        WandaPrune().prepare(models, unsafe, tmp_path)


@pytest.mark.parametrize("settings", [{"q": 1.1}, {"p": -0.1}, {"action": "drop"}])
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=rf"defense\.{next(iter(settings))}="):
        WandaPrune.validated(settings, "defense")
