"""Safe LoRA: literal C Delta, which modules get it, and what stays to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from defenses.base import Edit, Models
from defenses.safelora import SafeLoRA
from defenses.safelora.project import choose, compare, project
from modeling.model_files import ADAPTER_WEIGHTS
from modeling.projections import Factored, projections
from settings import SettingError
from tests.defenses.victims import (
    KINDS,
    Case,
    harm_calibration,
    plain_logits,
    projection_weights,
    save_case,
    shared_case,
    shared_weights,
    state,
)


def _repair(case: Case, out: Path, **settings: Any) -> Edit:
    defense = SafeLoRA(**settings)
    defense.check(case.models, case.attacked)
    return defense.apply(out, case.attacked, out / "defended", case.models)


def _literal(case: Case) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """{module: (W_aligned, Delta, C Delta)} with C = D D^T / ||D||_F formed, in float64."""
    base, aligned, attacked = shared_weights(case)
    found = {}
    for name, weight in aligned.items():
        d = (weight - base[name]).double()
        delta = (attacked[name] - weight).double()
        found[name] = weight, delta, d @ d.mT / d.norm() @ delta
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_module_projected_is_the_formula(kind: str, tmp_path: Path) -> None:
    case = shared_case("qwen2", kind)
    edit = _repair(case, tmp_path, tau=1.0)
    defended = projection_weights(state(edit.defended))
    for name, (weight, _, projected) in _literal(case).items():
        expected = weight.double() + projected
        torch.testing.assert_close(defended[name].double(), expected, rtol=1e-4, atol=1e-5)
    assert set(edit.modules) == set(edit.diagnostics["cosine"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"tau": -1.0}, {"mode": "number", "number": 0}])
def test_nothing_projected_is_the_attacked_model(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    case = shared_case("llama", kind)
    edit = _repair(case, tmp_path, **settings)
    for before, after in zip(plain_logits(case.attacked), plain_logits(edit.defended), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert (edit.parameters_edited, edit.modules) == (0, ())


@pytest.mark.parametrize("kind", ["resumed/lora", "fresh/full", "full/lora"])
def test_all_by_number_is_all_by_threshold(kind: str, tmp_path: Path) -> None:
    case = shared_case("llama", kind)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = _repair(case, tmp_path / "one", tau=1.0)
    modules = len(one.diagnostics["cosine"])
    two = _repair(case, tmp_path / "two", mode="number", number=modules)
    assert one.modules == two.modules
    first, second = state(one.defended), state(two.defended)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_cosines_are_those_of_the_dense_products(kind: str, tmp_path: Path) -> None:
    case = shared_case("qwen2", kind)
    found = _repair(case, tmp_path, mode="number", number=2).diagnostics
    literal = _literal(case)
    touched = [name for name, (_, delta, _) in literal.items() if bool(delta.any())]
    assert set(found["cosine"]) == set(touched)
    for name in touched:
        _, delta, projected = literal[name]
        expected = float((projected * delta).sum() / projected.norm() / delta.norm())
        assert found["cosine"][name] == pytest.approx(expected, abs=1e-4)
        ratio = float(projected.norm() / delta.norm())
        assert found["norm_ratio"][name] == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_lowest_cosines_are_projected_and_biases_stay(kind: str, tmp_path: Path) -> None:
    case = shared_case("qwen2", kind)
    edit = _repair(case, tmp_path, mode="number", number=2)
    cosines = edit.diagnostics["cosine"]
    assert set(edit.modules) == set(sorted(cosines, key=cosines.__getitem__)[:2])
    assert edit.diagnostics["projected"] == {name: name in edit.modules for name in cosines}
    before, after = state(case.attacked), state(edit.defended)
    for name, weight in before.items():
        if name.removesuffix(".weight") in edit.modules:
            assert not torch.equal(after[name], weight)
        elif name.endswith("_proj.weight") and case.keeps_adapter:
            torch.testing.assert_close(after[name], weight, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(after[name], weight), name
    sizes = sum(before[f"{name}.weight"].numel() for name in edit.modules)
    assert 0.99 * sizes <= edit.parameters_edited <= sizes


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_stay_adapters(kind: str, tmp_path: Path) -> None:
    case = shared_case("llama", kind)
    edit = _repair(case, tmp_path, tau=1.0)
    assert (edit.defended.adapter is not None) == case.keeps_adapter
    assert all(bool(row.isfinite().all()) for row in plain_logits(edit.defended))


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4))
def test_thin_factors_give_the_dense_projection_and_a_cosine_of_at_least_zero(
    seed: int, rank: int, safety_rank: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = {"a": (rank, 7), "b": (9, rank), "da": (safety_rank, 7), "db": (9, safety_rank)}
    drawn = {key: torch.randn(size, generator=generator) for key, size in shape.items()}
    d = Factored(drawn["da"], drawn["db"])
    delta = Factored(drawn["a"], drawn["b"])
    norm = float((d.b @ d.a).norm())
    thin, dense = project(d, delta, norm), project(d.b @ d.a, delta.b @ delta.a, norm)
    assert isinstance(thin, Factored)
    assert isinstance(dense, Tensor)
    assert torch.equal(thin.a, delta.a)
    torch.testing.assert_close(thin.b @ thin.a, dense, rtol=1e-3, atol=1e-4)
    whole = delta.b @ delta.a
    size = float(whole.norm())
    value = compare(thin, delta, size).cosine
    assert value == pytest.approx(compare(dense, whole, size).cosine, abs=1e-3)
    assert value is not None
    assert -1e-6 <= value <= 1


@given(st.dictionaries(st.text("abc", max_size=4), st.none() | st.floats(0, 1)), st.floats(0, 1))
def test_the_threshold_is_the_number_of_cosines_up_to_it(
    cosines: dict[str, float | None], tau: float
) -> None:
    by_threshold = choose(cosines, "threshold", tau, 0)
    assert choose(cosines, "number", 0.0, len(by_threshold)) == by_threshold
    assert all(cosines[name] is not None for name in choose(cosines, "threshold", 1.0, 0))


def test_a_module_that_alignment_left_alone_has_no_projection(tmp_path: Path) -> None:
    case = save_case("llama", "resumed/lora", tmp_path)
    path = Path(str(case.models.aligned.adapter)) / ADAPTER_WEIGHTS
    tensors = load_file(path)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file({**tensors, key: torch.zeros_like(tensors[key])}, path)
    edit = _repair(case, tmp_path, tau=1.0)
    name = "model.layers.1.self_attn.q_proj"
    assert edit.diagnostics["cosine"][name] is None
    assert name not in edit.modules
    before, after = state(case.attacked), state(edit.defended)
    torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"])


def test_without_an_alignment_it_is_refused(tmp_path: Path) -> None:
    case = shared_case("llama", "fresh/full")
    same = Models(case.models.aligned, case.models.aligned)
    with pytest.raises(SettingError, match=r"set model\.base to the model before its alignment"):
        SafeLoRA().check(same, None)
    copied = replace(case.models.aligned, base=case.models.aligned.base + "/.")
    models = Models(copied, case.models.aligned)
    with pytest.raises(SettingError, match="alignment changed none"):
        SafeLoRA().apply(tmp_path, case.attacked, tmp_path / "out", models)


def test_more_modules_than_there_are_are_refused(tmp_path: Path) -> None:
    case = shared_case("llama", "resumed/lora")
    modules = len(projections(case.models.aligned))
    SafeLoRA(mode="number", number=modules).check(case.models, None)
    with pytest.raises(SettingError, match=rf"more than the model's {modules} projections"):
        SafeLoRA(mode="number", number=modules + 1).check(case.models, None)


def test_the_official_number_is_a_share_of_the_fine_tuned_modules(tmp_path: Path) -> None:
    edit = _repair(shared_case("llama", "resumed/lora"), tmp_path, mode="number")
    assert len(edit.modules) == max(1, round(len(edit.diagnostics["cosine"]) * 10 / 64))
    # Where it isn't read, keys are those of when the default was 10.
    assert SafeLoRA().model_dump()["number"] == 10
    assert SafeLoRA(mode="number").model_dump()["number"] is None


def test_nothing_is_prepared_so_that_settings_sweep_freely(tmp_path: Path) -> None:
    models = shared_case("llama", "resumed/lora").models
    (tmp_path / "artefact").mkdir()
    assert SafeLoRA().prepare(models, harm_calibration(), tmp_path / "artefact") == {}
    assert SafeLoRA(tau=0.1).prepare_settings() == SafeLoRA(mode="number").prepare_settings()
