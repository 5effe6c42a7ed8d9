"""NLSR as a defense: prepare, apply, check, and the laws that tie them together."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file

from defenses.base import Edit, Models
from defenses.nlsr import LATER, MASKS, NLSR, RECORD, REFERENCE
from defenses.nlsr.masks import load_masks
from defenses.none import NoDefense
from modeling.checkpoint import Checkpoint, count_parameters
from modeling.loading import load_model
from modeling.lora import LoraAdapter, open_adapter
from settings import DataError, ModelError, SettingError, build
from tests.defenses.tensor_sizes import LargestNew
from tests.defenses.tiny_lora_models import NumberCalibration, save_adapter, save_base, save_resumed

ROOT = Path(__file__).parents[2]
Calibrate = Callable[..., NumberCalibration]


def _nlsr(**changes: Any) -> NLSR:
    values: dict[str, Any] = {"calibration_rows": 8, "sparsity": 0.5, "batch_size": 4}
    return NLSR(**{**values, **changes})


def _weights(folder: str | Path | None) -> dict[str, torch.Tensor]:
    return load_file(Path(str(folder)) / "adapter_model.safetensors")


def _repair(
    defense: NLSR, models: Models, attacked: Checkpoint, calibration: NumberCalibration, out: Path
) -> Edit:
    (out / "artefact").mkdir(parents=True, exist_ok=True)
    defense.prepare(models, calibration, out / "artefact")
    return defense.apply(out / "artefact", attacked, out / "defended", models)


def _masks(artefact: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    adapter = open_adapter(artefact / REFERENCE, "reference")
    stacked = {n: load_masks(artefact / MASKS, adapter, [n], "cpu") for n in adapter.names}
    return {name: (a[0], b[0]) for name, (a, b) in stacked.items()}


def _product(adapter: LoraAdapter, name: str) -> torch.Tensor:
    (_, pair), *_ = adapter.pairs([name])
    return pair.scale * pair.b.double() @ pair.a.double()


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_no_module_selected_is_the_attacked_model(
    models: Models, attacked: Checkpoint, calibration: Calibrate, tmp_path: Path, variant: str
) -> None:
    defense = _nlsr(variant=variant, selection="none")
    edit = _repair(defense, models, attacked, calibration(), tmp_path)
    before, after = _weights(attacked.adapter), _weights(edit.defended.adapter)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (edit.parameters_edited, edit.modules) == (0, ())


@pytest.mark.parametrize("method", ["low_rank", "random"])
def test_empty_masks_are_the_attacked_model(
    models: Models, attacked: Checkpoint, calibration: Calibrate, tmp_path: Path, method: str
) -> None:
    defense = _nlsr(method=method, selection="all", sparsity=1.0)
    edit = _repair(defense, models, attacked, calibration(), tmp_path)
    before, after = _weights(attacked.adapter), _weights(edit.defended.adapter)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert edit.parameters_edited == edit.diagnostics["parameters_masked"] == 0


def test_full_masks_on_all_modules_are_the_reference(
    models: Models, attacked: Checkpoint, calibration: Calibrate, tmp_path: Path
) -> None:
    defense = _nlsr(selection="all", sparsity=0.0)
    edit = _repair(defense, models, attacked, calibration(), tmp_path)
    after = _weights(edit.defended.adapter)
    for key, tensor in _weights(tmp_path / "artefact" / REFERENCE).items():
        assert torch.equal(after[key], tensor)
    assert edit.diagnostics["parameters_masked"] == sum(t.numel() for t in after.values())


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({}, 1.9),
        ({"variant": "official"}, 3.24),
        ({"beta": 0.0}, 1.0),
        ({"amplification": "factors", "alpha": 0.6}, 1.44),
        ({"variant": "official", "amplification": "delta"}, 1.9),
    ],
)
def test_the_reference_amplifies_the_alignment(
    models: Models,
    calibration: Calibrate,
    tmp_path: Path,
    settings: dict[str, Any],
    factor: float,
) -> None:
    _nlsr(method="random", **settings).prepare(models, calibration(), tmp_path)
    aligned = open_adapter(str(models.aligned.adapter), "aligned")
    reference = open_adapter(tmp_path / REFERENCE, "reference")
    for name in aligned.names:
        expected = factor * _product(aligned, name)
        torch.testing.assert_close(_product(reference, name), expected, rtol=1e-5, atol=1e-6)


def test_the_papers_reference_is_its_extrapolation_of_full_weights(
    models: Models, calibration: Calibrate, tmp_path: Path
) -> None:
    _nlsr(method="random").prepare(models, calibration(), tmp_path)
    amplified = replace(models.aligned, adapter=str(tmp_path / REFERENCE))
    w_0, w_a, w_e = (
        (model.merge_and_unload() if checkpoint.adapter else model).state_dict()
        for checkpoint in (models.base, models.aligned, amplified)
        for model in [load_model(checkpoint, device="cpu")]
    )
    for key, base in w_0.items():
        expected = 1.9 * w_a[key] - 0.9 * base
        torch.testing.assert_close(w_e[key], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_the_patch_is_the_splice(
    models: Models, attacked: Checkpoint, calibration: Calibrate, tmp_path: Path, variant: str
) -> None:
    defense = _nlsr(variant=variant)
    edit = _repair(defense, models, attacked, calibration(), tmp_path)
    masks, changed = _masks(tmp_path / "artefact"), 0
    assert 0 < len(edit.modules) < len(masks)
    folders = (attacked.adapter, tmp_path / "artefact" / REFERENCE, edit.defended.adapter)
    before, reference, after = (_weights(folder) for folder in folders)
    for name, pair in masks.items():
        for side, mask in zip("AB", pair, strict=True):
            key = f"base_model.model.{name}.lora_{side}.weight"
            selected = mask if name in edit.modules else torch.zeros_like(mask)
            assert torch.equal(after[key], torch.where(selected, reference[key], before[key]))
            changed += int((after[key] != before[key]).sum())
    assert edit.parameters_edited == changed
    assert edit.parameters_total == count_parameters(attacked)
    assert edit.diagnostics["parameters_masked"] == sum(
        int(mask.sum()) for name in edit.modules for mask in masks[name]
    )


def test_peft_loads_the_spliced_weights(
    models: Models, attacked: Checkpoint, calibration: Calibrate, tmp_path: Path
) -> None:
    edit = _repair(_nlsr(), models, attacked, calibration(), tmp_path)
    config = json.loads((tmp_path / "defended" / "adapter_config.json").read_text())
    original = json.loads((Path(str(attacked.adapter)) / "adapter_config.json").read_text())
    assert config == original
    model = load_model(edit.defended, device="cpu")
    assert isinstance(model, PeftModel)
    adapter = open_adapter(tmp_path / "defended", "defended")
    for name, pair in adapter.pairs():
        layer = model.get_base_model().get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, pair.a)
        assert torch.equal(layer.lora_B["default"].weight, pair.b)
    logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    unpatched = load_model(attacked, device="cpu")(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert not torch.allclose(logits, unpatched)


def test_variants_differ_in_sign_rank_and_scale(
    models: Models, attacked: Checkpoint, calibration: Calibrate, tmp_path: Path
) -> None:
    paper, official = (_nlsr(variant=variant, sparsity=0.8) for variant in ("paper", "official"))
    assert paper.scales == (1.0, 1.9)
    assert official.scales == (1.8, 1.8)
    assert paper.resolved["rank_rule"] == "kept"
    assert official.resolved["rank_rule"] == "dropped"
    assert (paper.resolved["topk"], official.resolved["topk"]) == ("row", "tensor")
    assert not paper.resolved["accumulate_gradients"]
    assert official.resolved["accumulate_gradients"]
    similar = [0.1, 0.9, 0.5]
    assert paper._select(similar)[0][0] > 0.5 > paper._select(similar)[0][1]
    assert official._select(similar)[0] == pytest.approx([0.3, 0.7, 0.5])
    edits = [
        _repair(defense, models, attacked, calibration(), tmp_path / defense.variant)
        for defense in (paper, official)
    ]
    masks = [_masks(tmp_path / variant / "artefact") for variant in ("paper", "official")]
    assert any(not torch.equal(masks[0][n][0], masks[1][n][0]) for n in masks[0])
    assert edits[0].modules != edits[1].modules


DIFFERENCES = {
    "amplification": "factors",
    "rank_rule": "dropped",
    "topk": "tensor",
    "rounding": "down",
    "sequential": True,
    "accumulate_gradients": True,
    "selection_order": "most_similar",
    "probability_rule": "min_max",
    "draw_order": "model",
    "draw_precision": "float32",
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_each_difference_can_be_ablated_alone(name: str) -> None:
    # The low-rank score goes block by block in both variants.
    method = "snip" if name == "sequential" else "low_rank"
    ablated = _nlsr(method=method, **{name: DIFFERENCES[name]}).resolved
    paper, official = (
        _nlsr(method=method, variant=variant).resolved for variant in ("paper", "official")
    )
    assert ablated == {**paper, name: DIFFERENCES[name]}
    assert paper[name] != official[name]
    assert set(paper) == set(DIFFERENCES)
    everything = _nlsr(**DIFFERENCES)
    assert everything.resolved == _nlsr(variant="official").resolved
    assert everything.prepare_settings() == _nlsr(variant="official").prepare_settings()


@pytest.mark.parametrize("method", ["low_rank", "wanda", "snip", "random"])
@pytest.mark.parametrize("name", ["rounding", "sequential", "draw_order", "draw_precision"])
def test_keys_hold_later_settings_only_where_they_change_a_result(name: str, method: str) -> None:
    plain = _nlsr(method=method)
    changed = plain.model_copy(update={name: DIFFERENCES[name]})
    prepared = plain.prepare_settings() != changed.prepare_settings()
    applied = plain.model_dump() != changed.model_dump()
    assert set(plain.model_dump()) == set(NLSR.model_fields) - {*LATER}
    assert plain.model_dump()["sequential"] is True
    if name == "rounding":
        assert (prepared, applied) == (True, True)
    elif name == "sequential":
        assert (prepared, applied) == (method in ("wanda", "snip"), False)
    else:
        assert (prepared, applied) == (False, True)


def test_other_scores_are_cut_per_row_in_both_variants() -> None:
    for method in ("wanda", "snip", "preference_snip", "random"):
        assert _nlsr(variant="official", method=method).resolved["topk"] == "row"
    assert _nlsr(method="wanda", topk="tensor").resolved["topk"] == "tensor"


@pytest.mark.parametrize(
    "changes",
    [
        {"selection": "all"},
        {"prune_rate": 0.1},
        {"delta": 0.1},
        {"tau": 0.1},
        {"selection_seed": 1},
        {"selection_order": "most_similar"},
        {"probability_rule": "min_max"},
        {"accumulate_gradients": True},
        {"dpo_beta": 0.5},
        {"alpha": 0.5},
    ],
)
def test_sweeping_apply_or_unused_settings_keeps_the_artefact(changes: dict[str, Any]) -> None:
    assert _nlsr(**changes).prepare_settings() == _nlsr().prepare_settings()


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.5},
        {"sparsity": 0.9},
        {"method": "wanda"},
        {"rank_rule": "dropped"},
        {"topk": "tensor"},
        {"sequential": False},
        {"calibration_rows": 9},
        {"calibration_seed": 1},
        {"take_available": True},
    ],
)
def test_sweeping_prepare_settings_changes_the_artefact(changes: dict[str, Any]) -> None:
    assert _nlsr(**changes).prepare_settings() != _nlsr().prepare_settings()


def test_prepare_is_determined_by_its_settings(
    models: Models, calibration: Calibrate, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        _nlsr().prepare(models, calibration(), tmp_path / name)
    for name in (MASKS, RECORD, f"{REFERENCE}/adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_draw_follows_its_seed(
    models: Models, attacked: Checkpoint, calibration: Calibrate, tmp_path: Path
) -> None:
    _nlsr().prepare(models, calibration(), tmp_path)
    picked = [
        _nlsr(selection_seed=seed).apply(tmp_path, attacked, tmp_path / f"out{at}", models).modules
        for at, seed in enumerate((42, 42, 7))
    ]
    assert picked[0] == picked[1] != picked[2]


def test_threshold_mode_patches_what_lies_below_tau(
    models: Models, attacked: Checkpoint, calibration: Calibrate, tmp_path: Path
) -> None:
    _nlsr().prepare(models, calibration(), tmp_path)
    similar = _nlsr().apply(tmp_path, attacked, tmp_path / "a", models).diagnostics["similarity"]
    tau = sorted(similar.values())[5]
    edit = _nlsr(selection="threshold", tau=tau).apply(tmp_path, attacked, tmp_path / "b", models)
    assert set(edit.modules) == {name for name, s in similar.items() if s < tau}
    assert len(edit.modules) == 5


@pytest.mark.parametrize("method", ["low_rank", "wanda", "snip", "preference_snip", "random"])
def test_masks_have_the_density_asked_for(
    models: Models, calibration: Calibrate, tmp_path: Path, method: str
) -> None:
    report = _nlsr(method=method, sparsity=0.75).prepare(models, calibration(), tmp_path)
    for a, b in _masks(tmp_path).values():
        assert (a.sum(1) == a.shape[1] // 4).all()
        assert (b.sum(1) == 1).all()
    assert report["density"] == pytest.approx(0.25)
    assert report["safety_neurons"] == sum(
        int(a.sum() + b.sum()) for a, b in _masks(tmp_path).values()
    )


def test_methods_find_different_neurons(
    models: Models, calibration: Calibrate, tmp_path: Path
) -> None:
    found = []
    for method in ("low_rank", "wanda", "snip", "preference_snip", "random"):
        (tmp_path / method).mkdir()
        _nlsr(method=method).prepare(models, calibration(), tmp_path / method)
        masks = _masks(tmp_path / method)
        found.append(torch.cat([mask.flatten() for pair in masks.values() for mask in pair]))
    for i, left in enumerate(found):
        assert all(not torch.equal(left, right) for right in found[:i])


def test_answers_come_from_the_reference_and_unsafe_ones_are_left_out(
    models: Models, calibration: Calibrate, tmp_path: Path
) -> None:
    service = calibration(count=12, unsafe=3)
    report = _nlsr().prepare(models, service, tmp_path)
    assert [model.adapter for model in service.asked] == [str(tmp_path / REFERENCE)]
    assert (report["prompts"], report["safe"], len(report["used"])) == (12, 9, 8)
    assert not {"p0", "p1", "p2"} & set(report["used"])
    assert report["used"] != sorted(report["used"], key=lambda id_: int(id_[1:]))


def test_preference_snip_rejects_the_base_models_answers(
    models: Models, calibration: Calibrate, tmp_path: Path
) -> None:
    service = calibration()
    _nlsr(method="preference_snip").prepare(models, service, tmp_path)
    assert [model.adapter for model in service.asked] == [str(tmp_path / REFERENCE), None]


def test_random_needs_no_calibration(
    models: Models, calibration: Calibrate, tmp_path: Path
) -> None:
    service = calibration(count=0)
    _nlsr(method="random").prepare(models, service, tmp_path)
    assert service.asked == []


def test_too_few_safe_answers_are_an_error(
    models: Models, calibration: Calibrate, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"calibration_rows=8.*only 6 of 10.*take_available=true"):
        _nlsr().prepare(models, calibration(count=10, unsafe=4), tmp_path)
    report = _nlsr(take_available=True).prepare(models, calibration(count=10, unsafe=4), tmp_path)
    assert len(report["used"]) == 6


def test_no_safe_answer_at_all_is_an_error_whatever_is_set(
    models: Models, calibration: Calibrate, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="only 0 of 5"):
        _nlsr(take_available=True).prepare(models, calibration(count=5, unsafe=5), tmp_path)


def test_a_resumed_victim_passes(models: Models, attacked: Checkpoint) -> None:
    _nlsr().check(models, attacked)
    _nlsr().check(models, models.aligned)
    _nlsr().check(models, None)


def test_a_fresh_adapter_of_the_same_shapes_is_refused(
    models: Models, base: Checkpoint, calibration: Calibrate, tmp_path: Path
) -> None:
    fresh = replace(base, adapter=save_adapter(base, tmp_path / "fresh", seed=2))
    with pytest.raises(SettingError, match=r"unrelated.*attack\.adapter=resume"):
        _nlsr().check(models, fresh)
    (tmp_path / "artefact").mkdir()
    _nlsr(method="random").prepare(models, calibration(), tmp_path / "artefact")
    with pytest.raises(SettingError, match=r"attack\.adapter=resume"):
        _nlsr().apply(tmp_path / "artefact", fresh, tmp_path / "out", models)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rank": 2}, "equal shapes and scales"),
        ({"layers_to_transform": [0, 1]}, "is in only one of them"),
        ({"use_rslora": True}, "equal shapes and scales"),
    ],
)
def test_an_adapter_of_other_shape_is_refused(
    models: Models, base: Checkpoint, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    folder = save_adapter(base, tmp_path, seed=1, **options)
    with pytest.raises(SettingError, match=rf"{sentence}.*attack\.adapter=resume"):
        _nlsr().check(models, replace(base, adapter=folder))


def test_harsh_training_still_counts_as_resumed(
    models: Models, base: Checkpoint, tmp_path: Path
) -> None:
    # A's initial scalars have a spread of about 0.1 here; 0.1 per scalar is as large a change.
    folder = save_resumed(base, str(models.aligned.adapter), tmp_path, step=0.1)
    _nlsr().check(models, replace(base, adapter=folder))


def test_models_without_adapters_are_refused(models: Models, base: Checkpoint) -> None:
    with pytest.raises(SettingError, match=r"attack\.adapter=resume"):
        _nlsr().check(models, base)
    with pytest.raises(SettingError, match=r"model\.alignment=own"):
        _nlsr().check(Models(base, base), None)


@pytest.mark.parametrize("name", [REFERENCE, MASKS, RECORD])
def test_half_an_artefact_is_refused(
    models: Models, attacked: Checkpoint, calibration: Calibrate, tmp_path: Path, name: str
) -> None:
    _nlsr(method="random").prepare(models, calibration(), tmp_path)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=f"{name} is missing"):
        _nlsr().apply(tmp_path, attacked, tmp_path / "out", models)


def test_the_record_says_what_was_done(
    models: Models, calibration: Calibrate, tmp_path: Path
) -> None:
    report = _nlsr().prepare(models, calibration(), tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["settings"] == _nlsr().prepare_settings()
    seconds = report.pop("identify_seconds")
    assert record["diagnostics"] == report
    assert seconds > 0
    assert record["aligned"] == open_adapter(str(models.aligned.adapter), "x").fingerprint()
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {
        ".json",
        ".safetensors",
    }


@pytest.mark.parametrize("method", ["low_rank", "snip"])
def test_half_precision_models_are_repaired_in_half_precision(
    models: Models, attacked: Checkpoint, calibration: Calibrate, tmp_path: Path, method: str
) -> None:
    for side, checkpoint in (("aligned", models.aligned), ("attacked", attacked)):
        model = load_model(replace(checkpoint, dtype="bfloat16"), device="cpu")
        model.to(torch.bfloat16).save_pretrained(tmp_path / side)
    halves = [
        Checkpoint(attacked.base, str(tmp_path / side), dtype="bfloat16")
        for side in ("aligned", "attacked")
    ]
    both = Models(replace(models.base, dtype="bfloat16"), halves[0])
    edit = _repair(_nlsr(method=method), both, halves[1], calibration(), tmp_path)
    assert {t.dtype for t in _weights(edit.defended.adapter).values()} == {torch.bfloat16}
    assert 0 < edit.parameters_edited <= edit.diagnostics["parameters_masked"]
    load_model(edit.defended)


def test_diagnostics_are_plain_json(
    models: Models, attacked: Checkpoint, calibration: Calibrate, tmp_path: Path
) -> None:
    edit = _repair(_nlsr(), models, attacked, calibration(), tmp_path)
    assert json.loads(json.dumps(edit.diagnostics)) == edit.diagnostics
    assert set(edit.diagnostics["similarity"]) == set(edit.diagnostics["probability"])
    assert all(-1 <= s <= 1 for s in edit.diagnostics["similarity"].values())
    assert edit.diagnostics["coordinate_cosine"]["median"] > 0.8


@pytest.mark.parametrize("method", ["low_rank", "wanda", "snip", "preference_snip"])
def test_no_product_is_ever_formed(tmp_path: Path, method: str) -> None:
    from defenses.nlsr.identify import identify
    from defenses.nlsr.masks import save_masks
    from defenses.nlsr.patch import similarities, splice

    width, rows = 512, [([1, 2], [3, 4, 39]), ([5], [6, 39])] * 2
    base = save_base(tmp_path / "base", width=width, layers=2)
    aligned = replace(base, adapter=save_adapter(base, tmp_path / "aligned", seed=1))
    victim = open_adapter(
        save_resumed(base, str(aligned.adapter), tmp_path / "attacked"), "attacked"
    )
    reference = open_adapter(str(aligned.adapter), "aligned")
    model, masks = load_model(aligned, device="cpu"), tmp_path / "masks.safetensors"
    plan = _nlsr(method=method)
    with LargestNew() as largest:
        save_masks(identify(model, reference, rows, plan), masks)
        similar = similarities(reference, victim, masks, "cpu")
        splice(reference, victim, masks, set(similar), tmp_path / "out")
    smallest_product = width * width // 2  # k_proj of the grouped-query attention
    assert 0 < largest.numel < smallest_product


def test_importing_and_validating_needs_no_torch() -> None:
    code = (
        "import sys; from defenses.nlsr import NLSR; NLSR(variant='official').prepare_settings();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def _configured(name: str, model: dict[str, Any]) -> Any:
    config = OmegaConf.create({"model": model})
    config.defense = OmegaConf.load(ROOT / "conf" / "defense" / f"{name}.yaml")
    return build(OmegaConf.to_container(config.defense, resolve=True), "defense")


def test_the_configuration_holds_the_defaults() -> None:
    assert _configured("nlsr", {"presets": {}}) == NLSR()
    node = OmegaConf.load(ROOT / "conf" / "defense" / "nlsr.yaml")
    assert set(node) == {*NLSR.model_fields, "_target_"}


def test_a_models_presets_change_the_defaults() -> None:
    presets = {"sparsity": 0.5, "calibration_rows": 64, "take_available": True}
    assert _configured("nlsr", {"presets": {"nlsr": presets}}) == NLSR(**presets)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sparsity": 1.5}, "defense.sparsity=1.5 is not allowed"),
        ({"variant": "paperr"}, "defense.variant='paperr'"),
        ({"sparsty": 0.5}, "did you mean defense.sparsity"),
        ({"calibration_rows": 0}, "defense.calibration_rows=0"),
    ],
)
def test_wrong_settings_say_what_to_write(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError) as caught:
        build({"_target_": "defenses.nlsr.NLSR", **values}, "defense")
    assert sentence in str(caught.value)


def test_no_defense_hands_the_attacked_model_back(
    models: Models, attacked: Checkpoint, calibration: Calibrate, tmp_path: Path
) -> None:
    defense = _configured("none", {})
    assert defense == NoDefense()
    defense.check(models, None)
    assert defense.prepare(models, calibration(), tmp_path) == {}
    edit = defense.apply(tmp_path, attacked, tmp_path / "out", models)
    assert edit == Edit(attacked, 0, count_parameters(attacked))
    assert not list(tmp_path.iterdir())
