"""RESTA: the formula on adapters and on full weights, and what drop and rescale keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defenses.base import Edit, Models
from defenses.resta import Resta
from defenses.resta.arithmetic import drop_and_rescale, generator_of
from settings import SettingError
from tests.defenses.victims import (
    KINDS,
    Case,
    harm_calibration,
    plain_logits,
    projection_weights,
    shared_case,
    shared_weights,
    state,
)


def _repair(case: Case, out: Path, **settings: Any) -> Edit:
    out.mkdir(exist_ok=True)
    defense = Resta(**settings)
    defense.check(case.models, case.attacked)
    return defense.apply(out, case.attacked, out / "defended", case.models)


@pytest.mark.parametrize("kind", KINDS)
def test_it_adds_gamma_times_what_alignment_added(kind: str, tmp_path: Path) -> None:
    case = shared_case("qwen2", kind)
    edit = _repair(case, tmp_path / "out", gamma=0.7)
    base, aligned, attacked = shared_weights(case)
    defended = projection_weights(state(edit.defended))
    for name, weight in attacked.items():
        expected = weight + 0.7 * (aligned[name] - base[name])
        torch.testing.assert_close(defended[name], expected, rtol=1e-4, atol=1e-5)
    assert all(bool(row.isfinite().all()) for row in plain_logits(edit.defended))


@pytest.mark.parametrize("kind", KINDS)
def test_gamma_zero_is_the_attacked_model(kind: str, tmp_path: Path) -> None:
    case = shared_case("llama", kind)
    edit = _repair(case, tmp_path / "out", gamma=0.0)
    for before, after in zip(plain_logits(case.attacked), plain_logits(edit.defended), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert (edit.parameters_edited, edit.modules) == (0, ())


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_stays_one_where_alignment_is_one_too(kind: str, tmp_path: Path) -> None:
    case = shared_case("llama", kind)
    both = case.keeps_adapter and case.models.aligned.adapter is not None
    plain = _repair(case, tmp_path / "plain")
    assert (plain.defended.adapter is not None) == both
    thinned = _repair(case, tmp_path / "thinned", dare_rate=0.5)
    assert thinned.defended.adapter is None


@pytest.mark.parametrize("kind", KINDS)
def test_everything_but_projections_stays(kind: str, tmp_path: Path) -> None:
    case = shared_case("qwen2", kind)
    edit = _repair(case, tmp_path / "out", dare_rate=0.3)
    before, after = state(case.attacked), state(edit.defended)
    others = [name for name in before if not name.endswith("_proj.weight")]
    assert any(name.endswith("q_proj.bias") for name in others)
    assert all(torch.equal(before[name], after[name]) for name in others)


@pytest.mark.parametrize("kind", KINDS)
def test_dare_drops_or_rescales_each_entry_of_the_fine_tuning(kind: str, tmp_path: Path) -> None:
    case = shared_case("llama", kind)
    edit = _repair(case, tmp_path / "out", gamma=0.0, dare_rate=0.4)
    _, aligned, attacked = shared_weights(case)
    defended = projection_weights(state(edit.defended))
    dropped = total = 0
    for name in edit.modules:
        delta, found = attacked[name] - aligned[name], defended[name] - aligned[name]
        gone = found.abs() < 1e-6
        torch.testing.assert_close(found[~gone], delta[~gone] / 0.6, rtol=1e-3, atol=1e-5)
        dropped, total = dropped + int(gone.sum()), total + gone.numel()
    assert dropped / total == pytest.approx(0.4, abs=0.03)
    assert edit.parameters_edited <= total


def test_what_is_dropped_depends_on_the_seed_alone(tmp_path: Path) -> None:
    case = shared_case("llama", "resumed/lora")
    runs = [
        state(_repair(case, tmp_path / str(at), dare_rate=0.5, seed=seed).defended)
        for at, seed in enumerate((1, 1, 2))
    ]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert not torch.equal(runs[0][name], runs[2][name])


def test_modules_draw_for_themselves() -> None:
    one, two = (torch.rand(50, generator=generator_of(3, name)) for name in ("a", "b"))
    assert not torch.equal(one, two)
    assert torch.equal(one, torch.rand(50, generator=generator_of(3, "a")))


@given(st.integers(0, 2**31), st.floats(0, 0.9))
def test_what_dare_keeps_is_rescaled_and_rate_zero_keeps_all(seed: int, rate: float) -> None:
    delta = torch.linspace(-1, 1, 200).reshape(10, 20)
    found = drop_and_rescale(delta, rate, torch.Generator().manual_seed(seed))
    kept = found != 0
    torch.testing.assert_close(found[kept], delta[kept] / (1 - rate))
    whole = drop_and_rescale(delta, 0.0, torch.Generator().manual_seed(seed))
    assert torch.equal(whole, delta)


def test_without_an_alignment_it_is_refused(tmp_path: Path) -> None:
    case = shared_case("llama", "full/full")
    same = Models(case.models.aligned, case.models.aligned)
    with pytest.raises(SettingError, match=r"set model\.base to the model before its alignment"):
        Resta().check(same, None)


def test_nothing_is_prepared_so_that_settings_sweep_freely(tmp_path: Path) -> None:
    models = shared_case("llama", "resumed/lora").models
    (tmp_path / "artefact").mkdir()
    assert Resta().prepare(models, harm_calibration(), tmp_path / "artefact") == {}
    assert Resta(gamma=2.0).prepare_settings() == Resta(dare_rate=0.9).prepare_settings()


@pytest.mark.parametrize("settings", [{"gamma": -0.1}, {"dare_rate": 1.0}, {"dare_rate": -0.5}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=rf"defense\.{next(iter(settings))}="):
        Resta.validated(settings, "defense")
