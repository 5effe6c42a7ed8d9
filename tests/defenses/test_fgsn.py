"""FGSN as a defense: prepare, apply, check, and the laws that tie them together."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from defenses.artefacts import ROWS
from defenses.base import Models
from defenses.fgsn import FGSN
from defenses.fgsn.artefact import RECORD
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model
from modeling.projections import read_weight
from modeling.training import write_merged
from settings import DataError, ModelError, SettingError, build
from tests.defenses.fgsn_runs import (
    close,
    fgsn,
    prompt_calibration,
    repair,
    safety_matrix,
    same_weights,
    union_of,
    weights_of,
)
from tests.defenses.tiny_lora_models import (
    save_adapter,
    save_base,
    save_tokenizer,
)
from tests.modeling.tiny_models import save_model

ROOT = Path(__file__).parents[2]
KINDS = ["resumed", "fresh", "full"]


@pytest.fixture(scope="module")
def artefact(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact")
    fgsn(layers="auto").prepare(models, prompt_calibration(), folder)
    return folder


@pytest.fixture(scope="module")
def victims(
    aligned: Checkpoint, attacked: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Checkpoint]:
    """The aligned model, fine-tuned in each of the three ways."""
    folder = tmp_path_factory.mktemp("victims")
    write_merged(aligned, folder / "merged")
    merged = Checkpoint(str(folder / "merged"))
    fresh = replace(merged, adapter=save_adapter(merged, folder / "fresh", seed=5))
    write_merged(attacked, folder / "full")
    return {"resumed": attacked, "fresh": fresh, "full": Checkpoint(str(folder / "full"))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{"q": 0.0}, {"q": 1.0, "p": 1.0}])
def test_an_empty_mask_is_the_attacked_model(
    artefact: Path,
    victims: dict[str, Checkpoint],
    models: Models,
    tmp_path: Path,
    kind: str,
    changes: dict[str, Any],
) -> None:
    edit = repair(artefact, victims[kind], tmp_path / "out", models, **changes)
    assert same_weights(edit.defended, victims[kind])
    assert (edit.parameters_edited, edit.modules) == (0, ())
    assert edit.diagnostics["share"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_selected_rows_of_the_delta_are_projected(
    artefact: Path, victims: dict[str, Checkpoint], models: Models, tmp_path: Path, kind: str
) -> None:
    attacked = victims[kind]
    edit = repair(artefact, attacked, tmp_path / "out", models)
    assert (edit.defended.adapter is None) == (kind == "full")
    before, aligned = weights_of(attacked), weights_of(models.aligned)
    union, selected = union_of(edit, models), 0
    for name, after in weights_of(edit.defended).items():
        mask = union.mask(name)
        delta = before[name] - aligned[name]
        assert mask.any() == (".layers.0." not in name)
        expected = torch.where(mask[:, None], safety_matrix(models, name) @ delta.double(), delta)
        close(after - aligned[name], expected)
        selected += int(mask.sum()) * after.shape[1]
    total = sum(weight.numel() for weight in before.values())
    assert edit.parameters_edited == selected == edit.diagnostics["selected"]
    assert edit.diagnostics["share"] == selected / total
    assert edit.diagnostics["denominator"] == total
    assert set(edit.modules) == {name for name in before if ".layers.0." not in name}


def test_of_an_adapter_a_never_changes_and_b_only_in_selected_rows(
    artefact: Path, victims: dict[str, Checkpoint], models: Models, tmp_path: Path
) -> None:
    attacked = victims["fresh"]
    edit = repair(artefact, attacked, tmp_path / "out", models)
    before, after = (
        load_file(Path(str(model.adapter)) / "adapter_model.safetensors")
        for model in (attacked, edit.defended)
    )
    union = union_of(edit, models)
    for key, old in before.items():
        name, _, side = key.removeprefix("base_model.model.").partition(".lora_")
        if side.startswith("A"):
            assert torch.equal(after[key], old)
        else:
            changed = (after[key] != 2 * old).any(1)  # the scale, 2, is folded into B
            assert torch.equal(changed, union.mask(name))


@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_of_all_layers_are_safelora_with_every_module_projected(
    artefact: Path, victims: dict[str, Checkpoint], models: Models, tmp_path: Path, kind: str
) -> None:
    attacked = victims[kind]
    everything = {"layers": [0.0, 1.0], "q": 1.0, "p": 0.0}
    edit = repair(artefact, attacked, tmp_path / "out", models, **everything)
    before = weights_of(attacked)
    for name, after in weights_of(edit.defended).items():
        aligned = read_weight(models.aligned, name)
        # SafeLoRA: C B A with C = D D^T / ||D||_F.
        close(after - aligned, safety_matrix(models, name) @ (before[name] - aligned).double())
    assert edit.diagnostics["share"] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_zeroed_everywhere_is_the_aligned_model(
    artefact: Path, victims: dict[str, Checkpoint], models: Models, tmp_path: Path, kind: str
) -> None:
    everything = {"layers": [0.0, 1.0], "q": 1.0, "p": 0.0, "edit": "zero"}
    edit = repair(artefact, victims[kind], tmp_path / "out", models, **everything)
    aligned = weights_of(models.aligned)
    for name, after in weights_of(edit.defended).items():
        torch.testing.assert_close(after, aligned[name], atol=1e-6, rtol=1e-5)
    assert edit.diagnostics["norm_kept"] == 0


def test_a_smaller_dim_keeps_less(
    artefact: Path, attacked: Checkpoint, models: Models, tmp_path: Path
) -> None:
    kept = [
        repair(artefact, attacked, tmp_path / norm, models, norm=norm).diagnostics["norm_kept"]
        for norm in ("in", "numel")
    ]
    blend = repair(artefact, attacked, tmp_path / "b", models, edit="blend", blend_weight=0.0)
    assert kept[0] > 10 * kept[1] > 0
    assert blend.diagnostics["norm_kept"] == pytest.approx(1.0)
    assert same_weights(blend.defended, attacked)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_projected_when_asked_for(
    artefact: Path, victims: dict[str, Checkpoint], models: Models, tmp_path: Path, kind: str
) -> None:
    edit = repair(artefact, victims[kind], tmp_path / "out", models, target="merged")
    assert edit.defended.adapter is None
    before, union = weights_of(victims[kind]), union_of(edit, models)
    for name, after in weights_of(edit.defended).items():
        mask, old = union.mask(name)[:, None], before[name]
        close(after, torch.where(mask, safety_matrix(models, name) @ old.double(), old.double()))
        assert torch.equal(after[~mask[:, 0]], old[~mask[:, 0]])


@pytest.mark.parametrize("scope", ["tensor", "row", "layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_single_weights_need_full_weights(
    artefact: Path,
    victims: dict[str, Checkpoint],
    models: Models,
    tmp_path: Path,
    kind: str,
    scope: str,
) -> None:
    edit = repair(
        artefact, victims[kind], tmp_path / "out", models, granularity="weight", scope=scope
    )
    assert edit.defended.adapter is None
    before, union = weights_of(victims[kind]), union_of(edit, models, "weight")
    for name, after in weights_of(edit.defended).items():
        aligned, mask = read_weight(models.aligned, name), union.mask(name)
        delta = (before[name] - aligned).double()
        expected = torch.where(mask, safety_matrix(models, name) @ delta, delta)
        close(after - aligned, expected)
        assert torch.equal(after[~mask], before[name][~mask])
    assert edit.diagnostics["selected"] == sum(union.scalars.values()) == edit.parameters_edited
    load_model(edit.defended)


@pytest.mark.parametrize("kind", ["fresh", "full"])
def test_half_precision_models_are_repaired_in_half_precision(
    victims: dict[str, Checkpoint], models: Models, tmp_path: Path, kind: str
) -> None:
    def halved(model: Checkpoint, name: str) -> Checkpoint:
        half = replace(model, dtype="bfloat16")
        loaded = load_model(half, device="cpu").to(torch.bfloat16)
        loaded.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
        if model.adapter is None:
            return replace(half, base=str(tmp_path / name))
        return replace(half, base=both.aligned.base, adapter=str(tmp_path / name))

    whole = replace(victims["fresh"], adapter=None)
    both = Models(halved(models.base, "base"), halved(whole, "aligned"))
    attacked = halved(victims[kind], "attacked")
    (tmp_path / "artefact").mkdir()
    fgsn().prepare(both, prompt_calibration(), tmp_path / "artefact")
    edit = repair(tmp_path / "artefact", attacked, tmp_path / "out", both)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    before, union = weights_of(attacked), union_of(edit, both)
    for name, after in weights_of(edit.defended).items():
        mask = union.mask(name)
        assert torch.equal(after[~mask], before[name][~mask])
        assert not mask.any() or not torch.equal(after[mask], before[name][mask])
    load_model(edit.defended)


def test_biases_norms_and_embeddings_stay_as_the_attack_left_them(tmp_path: Path) -> None:
    checkpoints = []
    for seed, name in enumerate(("base", "aligned", "attacked")):
        checkpoint = save_model("qwen2", tmp_path / name)
        save_tokenizer(tmp_path / name)
        model = load_model(checkpoint, device="cpu")
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02 * seed)
        model.save_pretrained(tmp_path / name)
        checkpoints.append(checkpoint)
    models, attacked = Models(*checkpoints[:2]), checkpoints[2]
    (tmp_path / "artefact").mkdir()
    fgsn().prepare(models, prompt_calibration(), tmp_path / "artefact")
    edit = repair(tmp_path / "artefact", attacked, tmp_path / "out", models)
    before, after = (
        load_file(Path(m.base) / "model.safetensors") for m in (attacked, edit.defended)
    )
    assert before.keys() == after.keys()
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert changed == {f"{name}.weight" for name in edit.modules}
    assert any(key.endswith("q_proj.bias") for key in before)


@pytest.mark.parametrize("granularity", ["row", "weight"])
def test_q_is_searched_for_a_share(
    artefact: Path, attacked: Checkpoint, models: Models, tmp_path: Path, granularity: str
) -> None:
    wanted: dict[str, Any] = {"target_edited": 0.12, "granularity": granularity}
    edit = repair(
        artefact, attacked, tmp_path / "out", models, dimensions=("theft", "fraud"), **wanted
    )
    assert edit.diagnostics["share"] == pytest.approx(0.12, abs=0.01)
    by_hand = repair(
        artefact, attacked, tmp_path / "hand", models,
        dimensions=("theft", "fraud"), granularity=granularity, q=edit.diagnostics["q"],
    )  # fmt: skip
    assert same_weights(by_hand.defended, edit.defended)


def test_a_share_out_of_reach_is_an_error(
    artefact: Path, attacked: Checkpoint, models: Models, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=r"target_edited=0\.9 can't be reached: even q=1"):
        repair(artefact, attacked, tmp_path / "out", models, target_edited=0.9)
    assert not (tmp_path / "out").exists()


def test_scores_may_be_of_other_weights(
    artefact: Path, attacked: Checkpoint, models: Models, tmp_path: Path
) -> None:
    found = []
    choices = [("merged", 0), ("aligned", 0), ("delta", 0), ("random", 0), ("random", 1)]
    for weight, seed in [*choices, ("random", 0)]:
        out = tmp_path / str(len(found))
        edit = repair(artefact, attacked, out, models, weight=weight, weight_seed=seed)
        union = union_of(edit, models)
        found.append(torch.cat([union.mask(name) for name in union.shapes]))
    again = found.pop()
    assert torch.equal(again, found[3])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_answers_are_the_aligned_models(
    attacked: Checkpoint, models: Models, artefact: Path, tmp_path: Path
) -> None:
    service = prompt_calibration()
    (tmp_path / "artefact").mkdir()
    fgsn(tokens="answer").prepare(models, service, tmp_path / "artefact")
    assert service.asked == [models.aligned]
    edits = [
        fgsn(tokens=tokens).apply(source, attacked, tmp_path / tokens, models)
        for tokens, source in (("answer", tmp_path / "artefact"), ("prompt", artefact))
    ]
    assert not same_weights(edits[0].defended, edits[1].defended)


def test_layers_are_found_and_may_be_swept(
    models: Models, artefact: Path, attacked: Checkpoint, tmp_path: Path
) -> None:
    gaps = json.loads((artefact / RECORD).read_text())["gaps"]
    assert len(gaps) == 3
    rises = [gaps[1] - gaps[0], gaps[2] - gaps[1]]
    start = rises.index(max(rises))
    edit = repair(artefact, attacked, tmp_path / "out", models, layers="auto")
    assert edit.diagnostics["layers"] == [start, start + 1]
    whole = repair(artefact, attacked, tmp_path / "all", models, layers="auto", window=3)
    assert whole.diagnostics["layers"] == [0, 1, 2]
    (tmp_path / "given").mkdir()
    fgsn().prepare(models, prompt_calibration(), tmp_path / "given")
    with pytest.raises(ModelError, match="prepare defense=fgsn again"):
        repair(tmp_path / "given", attacked, tmp_path / "x", models, layers="auto")


def test_what_fine_tuning_left_alone_is_left_alone(
    artefact: Path, victims: dict[str, Checkpoint], models: Models, tmp_path: Path
) -> None:
    merged = replace(victims["fresh"], adapter=None)
    options: dict[str, Any] = {"layers_to_transform": [1]}
    attacked = replace(merged, adapter=save_adapter(merged, tmp_path / "a", seed=3, **options))
    edit = repair(artefact, attacked, tmp_path / "out", models)
    assert edit.modules
    assert all(".layers.1." in name for name in edit.modules)
    with pytest.raises(SettingError, match=r"left layers \[0, 2\] alone"):
        repair(artefact, attacked, tmp_path / "none", models, layers=[0, 2])


def test_projections_without_a_direction_are_left_alone_and_named(
    base: Checkpoint, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"layers_to_transform": [1]}
    aligned = replace(base, adapter=save_adapter(base, tmp_path / "aligned", seed=3, **options))
    write_merged(aligned, tmp_path / "merged")
    merged = Checkpoint(str(tmp_path / "merged"))
    attacked = replace(merged, adapter=save_adapter(merged, tmp_path / "attacked", seed=4))
    models = Models(base, aligned)
    (tmp_path / "artefact").mkdir()
    fgsn().prepare(models, prompt_calibration(), tmp_path / "artefact")
    edit = repair(tmp_path / "artefact", attacked, tmp_path / "out", models)
    assert all(".layers.1." in name for name in edit.modules)
    left = edit.diagnostics["without_direction"]
    assert len(left) == 7
    assert all(".layers.2." in name for name in left)


def test_prepare_is_determined_by_its_settings(models: Models, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        (tmp_path / name).mkdir()
        fgsn(layers="auto", seed=seed).prepare(models, prompt_calibration(), tmp_path / name)
    for name in (ROWS, RECORD):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    gaps = [json.loads((tmp_path / n / RECORD).read_text())["gaps"] for n in ("one", "three")]
    assert gaps[0] != gaps[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"q": 0.1}, {"p": 0.1}, {"window": 3}, {"norm": "in"}, {"edit": "zero"}, {"rescore": True},
        {"dimensions": ("theft",)}, {"target_edited": 0.1}, {"granularity": "weight"},
        {"target": "merged"}, {"weight": "delta"}, {"scope": "layer"}, {"blend_weight": 0.1},
    ],
)  # fmt: skip
def test_sweeping_apply_settings_keeps_the_artefact(changes: dict[str, Any]) -> None:
    kept = fgsn(layers="auto").prepare_settings()
    assert fgsn(layers="auto", **changes).prepare_settings() == kept


@pytest.mark.parametrize("changes", [{"n_pairs": 3}, {"seed": 3}, {"tokens": "answer"}])
def test_sweeping_prepare_settings_changes_the_artefact(changes: dict[str, Any]) -> None:
    kept = fgsn(layers="auto").prepare_settings()
    assert fgsn(layers="auto", **changes).prepare_settings() != kept


def test_what_is_needed_and_left() -> None:
    assert fgsn().needs == {"safety_prompts", "utility_prompts"}
    assert fgsn(tokens="answer").needs == {"prompts", "safety_prompts", "utility_prompts"}
    assert fgsn().output_form == "adapter"
    assert fgsn(granularity="weight").output_form == fgsn(target="merged").output_form == "weights"


def test_missing_directions_are_refused(
    models: Models, base: Checkpoint, attacked: Checkpoint, tmp_path: Path
) -> None:
    fgsn().check(models, None)
    fgsn().check(models, attacked)
    with pytest.raises(SettingError, match=r"is model\.base itself; set model\.base to the model"):
        fgsn().check(Models(base, base), None)
    with pytest.raises(SettingError, match=r"model\.base=.* have other shapes"):
        fgsn().check(Models(save_base(tmp_path / "wide", width=48), models.aligned), None)
    copy = save_base(tmp_path / "copy")
    with pytest.raises(ModelError, match=r"D = 0\); set model\.base"):
        fgsn().prepare(Models(base, copy), prompt_calibration(), tmp_path)
    with pytest.raises(SettingError, match="layers 0 to 2 only"):
        fgsn(layers=[3]).check(models, None)
    with pytest.raises(ModelError, match="holds no edited neurons"):
        fgsn(continue_from=str(tmp_path)).check(models, None)


def test_prompts_and_dimensions_that_arent_there(
    models: Models, artefact: Path, attacked: Checkpoint, tmp_path: Path
) -> None:
    few = replace(prompt_calibration(), utility_prompts=prompt_calibration().utility_prompts[:1])
    with pytest.raises(DataError, match=r"15 harmful with 1 benign"):
        fgsn().prepare(models, few, tmp_path)
    unknown = fgsn(dimensions=("theft", "arson"))
    sentence = r"'arson' is no category .* choose from fraud, malware, theft"
    with pytest.raises(SettingError, match=sentence):
        unknown.prepare(models, prompt_calibration(), tmp_path)
    with pytest.raises(SettingError, match=sentence):
        unknown.apply(artefact, attacked, tmp_path / "out", models)


@pytest.mark.parametrize("name", [ROWS, RECORD])
def test_half_an_artefact_is_refused(
    models: Models, attacked: Checkpoint, tmp_path: Path, name: str
) -> None:
    fgsn().prepare(models, prompt_calibration(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        repair(tmp_path, attacked, tmp_path / "out", models)


def test_diagnostics_are_plain_json(
    artefact: Path, attacked: Checkpoint, models: Models, tmp_path: Path
) -> None:
    edit = repair(artefact, attacked, tmp_path / "out", models)
    assert json.loads(json.dumps(edit.diagnostics)) == edit.diagnostics
    assert edit.steps == ()
    (shown,) = edit.diagnostics["maps"]
    assert [len(row) for row in shown["values"]] == [7, 7, 7]
    assert not any(shown["values"][0])
    assert all(10 < value <= 30 for row in shown["values"][1:] for value in row)
    assert {at for at, _ in shown["marked"]} == {1, 2}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"layers": [0.5, 0.3]}, r"defense\.layers: .0\.5, 0\.3. is neither"),
        ({"layers": [1, 1]}, "is neither"),
        ({"layers": []}, "is neither"),
        ({"layers": "all"}, r"defense\.layers: 'all' is neither .* set auto, \[10,11,12\] or"),
        ({"layers": 3}, "is neither"),
        ({"layers": [-1, 2]}, "is neither"),
        ({"window": 1}, r"defense\.window=1 is neither"),
        ({"window": 1.5}, r"defense\.window=1\.5 is neither"),
        ({"scope": "row"}, r"set defense\.scope=tensor or defense\.granularity=weight"),
        ({"rescore": True, "target_edited": 0.1}, r"set defense\.rescore=false"),
        ({"dimensions": []}, "names none, or one twice"),
        ({"dimensions": ["a", "a"]}, "names none, or one twice"),
        ({"dimensions": [""]}, "names none, or one twice"),
        ({"q": 1.5}, r"defense\.q=1\.5 is not allowed"),
        ({"norm": "max"}, r"defense\.norm='max'"),
    ],
)
def test_wrong_settings_say_what_to_write(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        build({"_target_": "defenses.fgsn.FGSN", **values}, "defense")


def _configured(presets: dict[str, Any]) -> Any:
    config = OmegaConf.create({"model": {"presets": presets}})
    config.defense = OmegaConf.load(ROOT / "conf" / "defense" / "fgsn.yaml")
    return build(OmegaConf.to_container(config.defense, resolve=True), "defense")


def test_the_configuration_holds_the_defaults() -> None:
    assert _configured({}) == FGSN()
    node = OmegaConf.load(ROOT / "conf" / "defense" / "fgsn.yaml")
    assert set(node) == {*FGSN.model_fields, "_target_"}


def test_a_models_presets_change_the_defaults() -> None:
    presets = {"layers": [0.0, 1.0], "q": 0.5, "p": 0.1, "window": 3, "batch_size": 64}
    assert _configured({"fgsn": presets}) == FGSN(**presets)


def test_importing_and_validating_needs_no_torch() -> None:
    code = (
        "import sys; from defenses.fgsn import FGSN; FGSN(layers=[1]).prepare_settings();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
