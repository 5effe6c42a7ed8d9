"""Antidote: the exact share of each row, by Wanda scores of the attacked model on harmful rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from defenses.antidote import ROWS, Antidote
from defenses.antidote.prune import factor_norms, prune_weight
from defenses.base import Edit
from modeling.importance import input_norms
from modeling.loading import load_model, load_tokenizer
from modeling.lora import open_adapter
from modeling.model_files import ADAPTER_WEIGHTS
from settings import DataError, ModelError, SettingError
from tests.defenses.tiny_lora_models import NumberCalibration
from tests.defenses.victims import (
    KINDS,
    Case,
    harm_calibration,
    plain_logits,
    projection_weights,
    shared_case,
    state,
)


def _repair(case: Case, out: Path, **settings: Any) -> Edit:
    defense = Antidote(**{"batch_size": 4, **settings})
    defense.check(case.models, case.attacked)
    (out / "artefact").mkdir(parents=True)
    defense.prepare(case.models, harm_calibration(), out / "artefact")
    return defense.apply(out / "artefact", case.attacked, out / "defended", case.models)


@pytest.mark.parametrize("kind", KINDS)
def test_the_top_of_each_row_is_zeroed_and_nothing_else(kind: str, tmp_path: Path) -> None:
    case = shared_case("qwen2", kind)
    edit = _repair(case, tmp_path / "out", dense_ratio=0.3)
    rows = [tuple(row) for row in json.loads((tmp_path / "out" / "artefact" / ROWS).read_text())]
    norms = input_norms(case.attacked, rows, 2, "all")
    before, after = state(case.attacked), state(edit.defended)
    zeroed = 0
    for name, weight in projection_weights(before).items():
        gone = after[f"{name}.weight"] == 0
        count = round(0.3 * weight.shape[1])
        assert gone.sum(1).tolist() == [count] * weight.shape[0]
        scores = weight.abs() * norms[name]
        highest_kept = scores.masked_fill(gone, 0).amax(1)
        lowest_gone = scores.masked_fill(~gone, float("inf")).amin(1)
        assert bool((lowest_gone >= highest_kept * (1 - 1e-5)).all())
        torch.testing.assert_close(after[f"{name}.weight"][~gone], weight[~gone])
        zeroed += count * weight.shape[0]
    others = [name for name in before if not name.endswith("_proj.weight")]
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert edit.parameters_edited == edit.diagnostics["parameters_masked"] == zeroed
    assert edit.defended.adapter is None
    assert all(bool(row.isfinite().all()) for row in plain_logits(edit.defended))


@pytest.mark.parametrize("kind", KINDS)
def test_a_ratio_of_zero_is_the_attacked_model(kind: str, tmp_path: Path) -> None:
    case = shared_case("llama", kind)
    edit = _repair(case, tmp_path / "out", dense_ratio=0.0)
    for before, after in zip(plain_logits(case.attacked), plain_logits(edit.defended), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert (edit.parameters_edited, edit.modules) == (0, ())


@pytest.mark.parametrize("kind", ["resumed/lora", "fresh/full"])
def test_factors_lose_the_top_of_each_row_and_the_base_nothing(kind: str, tmp_path: Path) -> None:
    case = shared_case("qwen2", kind)
    edit = _repair(case, tmp_path / "out", dense_ratio=0.5, prune="factors")
    rows = [tuple(row) for row in json.loads((tmp_path / "out" / "artefact" / ROWS).read_text())]
    norms = input_norms(case.attacked, rows, 2, "all")
    before, after = (
        load_file(Path(str(each.adapter)) / ADAPTER_WEIGHTS)
        for each in (case.attacked, edit.defended)
    )
    assert edit.defended.base == case.attacked.base
    for key, weight in before.items():
        gone = after[key] == 0
        assert gone.sum(1).tolist() == [round(0.5 * weight.shape[1])] * weight.shape[0]
        assert torch.equal(after[key][~gone], weight[~gone])
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scores = weight.abs() * norms[name]
            lowest_gone = scores.masked_fill(~gone, float("inf")).amin(1)
            assert bool((lowest_gone >= scores.masked_fill(gone, 0).amax(1) * (1 - 1e-5)).all())
    zeroed = sum(int((after[key] != before[key]).sum()) for key in before)
    assert edit.parameters_edited == edit.diagnostics["parameters_masked"] == zeroed
    assert edit.diagnostics["masked_share"] == pytest.approx(0.5, abs=0.1)


def test_what_enters_b_is_what_leaves_a(tmp_path: Path) -> None:
    case = shared_case("llama", "resumed/lora")
    row = ([3, 9, 4], [7, 2])
    adapter = open_adapter(str(case.attacked.adapter), "the attacked model")
    norms = factor_norms(case.attacked, adapter, [row], 1, "answer")
    model = load_model(case.attacked, device="cpu")
    seen = []
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_forward_hook(lambda *args: seen.append(args[2][0, 3:]))
    with torch.no_grad():
        model(input_ids=torch.tensor([row[0] + row[1]]))
    expected = seen[0].double().norm(dim=0)
    torch.testing.assert_close(norms["model.layers.0.self_attn.q_proj.B"], expected)


def test_full_weights_have_no_factors(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"set defense\.prune=merged"):
        _repair(shared_case("llama", "full/lora"), tmp_path / "out", prune="factors")


def test_rows_are_prompts_with_their_unsafe_answers(tmp_path: Path) -> None:
    models = shared_case("llama", "resumed/lora").models
    calibration = harm_calibration(5)
    assert Antidote().prepare(models, calibration, tmp_path) == {"rows": 5}
    for (prompt, answer), pair in zip(
        json.loads((tmp_path / ROWS).read_text()), calibration.safety_pairs, strict=True
    ):
        assert prompt == [int(word) for word in pair.prompt.split()]
        assert answer[:-1] == [int(word) for word in pair.rejected.split()]


def test_positions_choose_the_inputs(tmp_path: Path) -> None:
    case = shared_case("llama", "resumed/lora")
    found = {
        positions: state(_repair(case, tmp_path / positions, positions=positions).defended)
        for positions in ("prompt", "answer", "all")
    }
    again = state(_repair(case, tmp_path / "again", positions="all").defended)
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(found["prompt"][name], found["answer"][name])
    assert all(torch.equal(found["all"][key], again[key]) for key in again)


@given(st.integers(0, 2**31), st.floats(0, 1))
def test_exact_counts_per_row(seed: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, norms = torch.randn(6, 11, generator=generator), torch.rand(11, generator=generator)
    mask, edited = prune_weight(weight, norms.double(), ratio)
    assert mask.sum(1).tolist() == [round(11 * ratio)] * 6
    assert torch.equal(edited, weight.where(~mask, 0.0))


@given(st.integers(0, 2**31), st.floats(0, 1))
def test_official_rows_keep_what_is_rounded_down(seed: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, norms = torch.randn(6, 11, generator=generator), torch.rand(11, generator=generator)
    mask, _ = prune_weight(weight, norms.double(), ratio, "down")
    for row, lost in zip(weight.abs() * norms, mask, strict=True):
        kept = row.argsort()[: int(11 * (1 - ratio))]
        assert {*lost.nonzero().flatten().tolist()} == {*range(11)} - {*kept.tolist()}


@pytest.mark.parametrize("prune", ["merged", "factors"])
def test_the_official_calibration_counts_padding(prune: str, tmp_path: Path) -> None:
    case = shared_case("llama", "resumed/lora")
    edit = _repair(case, tmp_path / "out", prune=prune, variant="official", batch_size=2)
    rows = json.loads((tmp_path / "out" / "artefact" / ROWS).read_text())
    tokenizer = load_tokenizer(case.attacked)
    tokenizer.padding_side = "right"
    model = load_model(case.attacked, device="cpu").eval()
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    squares = [0.0, 0.0]
    sides = (layer, layer.lora_B["default"])
    handles = [
        side.register_forward_pre_hook(
            lambda _, args, at=at: squares.__setitem__(
                at, squares[at] + args[0].detach().flatten(0, 1).double().square().sum(0)
            )
        )
        for at, side in enumerate(sides)
    ]
    for at in range(0, len(rows), 2):
        ids = [{"input_ids": prompt + answer} for prompt, answer in rows[at : at + 2]]
        with torch.no_grad():
            model(**tokenizer.pad(ids, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    if prune == "merged":
        name = "model.layers.1.mlp.down_proj.weight"
        before, after = (state(each)[name] for each in (case.attacked, edit.defended))
        pairs = [(before, after, squares[0])]
    else:
        before, after = (
            dict(open_adapter(str(each.adapter), "x").pairs(["model.layers.1.mlp.down_proj"]))
            for each in (case.attacked, edit.defended)
        )
        (before,), (after,) = before.values(), after.values()
        pairs = [(before.a, after.a, squares[0]), (before.b, after.b, squares[1])]
    for weight, pruned, square in pairs:
        columns = weight.shape[1]
        lost = columns - int(columns * (1 - 0.2))
        literal = torch.zeros_like(weight, dtype=torch.bool)
        order = (weight.abs() * square.sqrt()).argsort(dim=1, descending=True)
        literal.scatter_(1, order[:, :lost], True)
        assert torch.equal(pruned == 0, literal)


def test_each_of_the_official_variants_differences_has_a_name() -> None:
    assert Antidote().resolved == ("nearest", "all")
    assert Antidote(variant="official").resolved == ("down", "padded")
    assert Antidote(variant="official", rounding="nearest").resolved == ("nearest", "padded")
    assert Antidote(variant="official", count_padding=False).resolved == ("down", "all")
    assert Antidote(count_padding=True).resolved == ("nearest", "padded")
    assert Antidote(count_padding=True, positions="answer").resolved == ("nearest", "answer")
    assert not {"variant", "rounding", "count_padding"} & Antidote().model_dump().keys()
    assert Antidote(variant="official").model_dump()["variant"] == "official"


def test_the_artefact_depends_on_no_setting() -> None:
    assert Antidote(dense_ratio=0.5, positions="answer").prepare_settings() == {}


def test_missing_rows_are_refused(tmp_path: Path) -> None:
    case = shared_case("llama", "resumed/lora")
    with pytest.raises(DataError, match=r"no harmful rows; set sources\.safety_pairs"):
        Antidote().prepare(case.models, NumberCalibration([]), tmp_path)
    with pytest.raises(ModelError, match=r"no artefact of defense=antidote \(rows\.json"):
        Antidote().apply(tmp_path / "nowhere", case.attacked, tmp_path / "out", case.models)


@pytest.mark.parametrize("settings", [{"dense_ratio": 1.5}, {"positions": "last"}])
def test_wrong_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=rf"defense\.{next(iter(settings))}="):
        Antidote.validated(settings, "defense")
