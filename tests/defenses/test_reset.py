"""Reset gives the aligned model back, in the attacked one's form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from defenses.reset import Reset
from modeling.model_files import ADAPTER_WEIGHTS
from settings import ModelError
from tests.defenses.victims import (
    KINDS,
    harm_calibration,
    plain_logits,
    save_case,
    shared_case,
    state,
)


def test_it_prepares_nothing(tmp_path: Path) -> None:
    models = shared_case("llama", "resumed/lora").models
    (tmp_path / "artefact").mkdir()
    assert Reset().prepare(models, harm_calibration(), tmp_path / "artefact") == {}
    assert not any((tmp_path / "artefact").iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_result_is_the_aligned_model(architecture: str, kind: str, tmp_path: Path) -> None:
    case = shared_case(architecture, kind)
    edit = Reset().apply(tmp_path, case.attacked, tmp_path / "defended", case.models)
    aligned, defended = plain_logits(case.models.aligned), plain_logits(edit.defended)
    for expected, found in zip(aligned, defended, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (edit.defended.adapter is None) == (case.attacked.adapter is None)
    assert Path(edit.defended.adapter or edit.defended.base) == tmp_path / "defended"


def test_a_resumed_adapter_is_replaced_by_the_aligned_one_to_the_byte(tmp_path: Path) -> None:
    case = shared_case("llama", "resumed/lora")
    edit = Reset().apply(tmp_path, case.attacked, tmp_path / "defended", case.models)
    for name in ("adapter_config.json", ADAPTER_WEIGHTS):
        source = Path(str(case.models.aligned.adapter)) / name
        assert (tmp_path / "defended" / name).read_bytes() == source.read_bytes()
    assert edit.defended.base == case.attacked.base


@pytest.mark.parametrize("kind", ["full/lora", "full/full"])
def test_full_weights_are_the_aligned_ones_to_the_bit(kind: str, tmp_path: Path) -> None:
    case = shared_case("qwen2", kind)
    edit = Reset().apply(tmp_path, case.attacked, tmp_path / "defended", case.models)
    aligned, attacked, defended = (
        state(each) for each in (case.models.aligned, case.attacked, edit.defended)
    )
    for name, weight in defended.items():
        tolerance = 0 if kind == "full/full" else 1e-6
        torch.testing.assert_close(weight, aligned[name], rtol=0, atol=tolerance)
    differing = sum(int((defended[name] != attacked[name]).sum()) for name in defended)
    assert edit.parameters_edited == differing <= edit.parameters_total
    assert "model.embed_tokens" in edit.modules
    assert any(name.endswith("q_proj.bias") for name in edit.modules)


@pytest.mark.parametrize("kind", ["resumed/lora", "fresh/lora"])
def test_what_differs_is_counted_in_effective_weights(kind: str, tmp_path: Path) -> None:
    case = shared_case("llama", kind)
    edit = Reset().apply(tmp_path, case.attacked, tmp_path / "defended", case.models)
    attacked, defended = state(case.attacked), state(edit.defended)
    moved = {name: int((defended[name] != attacked[name]).sum()) for name in attacked}
    shapes = {name: attacked[f"{name}.weight"].numel() for name in edit.modules}
    assert {f"{name}.weight" for name in shapes} == {n for n, count in moved.items() if count}
    assert edit.parameters_edited == sum(shapes.values())
    # An entry or two may be moved by less than the last bit of its weight.
    assert 0.99 * edit.parameters_edited <= sum(moved.values()) <= edit.parameters_edited


def test_an_attack_that_did_nothing_leaves_nothing_to_undo(tmp_path: Path) -> None:
    models = shared_case("llama", "resumed/lora").models
    edit = Reset().apply(tmp_path, models.aligned, tmp_path / "defended", models)
    assert (edit.parameters_edited, edit.modules) == (0, ())


def test_an_adapter_that_would_leave_something_behind_is_refused(tmp_path: Path) -> None:
    case = save_case("llama", "fresh/full", tmp_path)
    path = Path(str(case.attacked.adapter)) / ADAPTER_WEIGHTS
    saved = {"base_model.model.lm_head.weight": torch.ones(48, 32)}
    save_file({**load_file(path), **saved}, path)
    with pytest.raises(ModelError, match="train it as plain LoRA"):
        Reset().apply(tmp_path, case.attacked, tmp_path / "defended", case.models)


def test_an_adapter_on_other_weights_is_refused(tmp_path: Path) -> None:
    case = shared_case("llama", "fresh/lora")
    stranger = replace(case.attacked, base=shared_case("llama", "full/lora").attacked.base)
    with pytest.raises(ModelError, match="isn't the aligned model"):
        Reset().apply(tmp_path, stranger, tmp_path / "defended", case.models)
