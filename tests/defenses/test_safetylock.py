"""SafetyLock as a defense: the lock, the locked model, and the laws that tie them together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from defenses.artefacts import ROWS
from defenses.base import Edit, Models
from defenses.safetylock import LOCK, SafetyLock
from defenses.safetylock.activations import encode_pairs, head_outputs
from defenses.safetylock.lock import PROVENANCE, Lock, load_lock
from experiments.pipeline.steps.base import checkpoint_at, place
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint, fingerprint_folder
from modeling.heads import HeadLayout, head_layout, output_projections
from modeling.loading import load_model, load_tokenizer
from settings import DataError, ModelError, SettingError
from tests.defenses.tiny_lora_models import NumberCalibration, number_pairs, save_base

PAIRS = number_pairs(24)
PROBE = torch.tensor([[3, 8, 12, 5, 9, 30], [2, 2, 7, 33, 14, 6]])


def _lock(**changes: Any) -> SafetyLock:
    values: dict[str, Any] = {"n_pairs": 16, "last_tokens": 3, "k": 4, "alpha": 5.0}
    return SafetyLock(**{**values, **changes})


def _calibration() -> NumberCalibration:
    return NumberCalibration(prompts=(), safety_pairs=PAIRS)


@pytest.fixture(scope="module")
def artefact(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact")
    _lock().prepare(models, _calibration(), folder)
    return folder


def _apply(artefact: Path, attacked: Checkpoint, out: Path, **changes: Any) -> Edit:
    return _lock(**changes).apply(artefact, attacked, out, Models(attacked, attacked))


@torch.no_grad()
def _logits(checkpoint: Checkpoint) -> torch.Tensor:
    return load_model(checkpoint).eval()(input_ids=PROBE).logits


def test_baked_and_hooked_agree(artefact: Path, attacked: Checkpoint, tmp_path: Path) -> None:
    baked = _apply(artefact, attacked, tmp_path / "baked")
    hooked = _apply(artefact, attacked, tmp_path / "hooked", form="hooked")
    plain = _logits(attacked)
    torch.testing.assert_close(_logits(baked.defended), _logits(hooked.defended), atol=1e-4, rtol=0)
    assert (_logits(hooked.defended) - plain).abs().max() > 0.1
    assert baked.defended.adapter is None
    assert hooked.defended == replace(attacked, steering=str(tmp_path / "hooked"))
    assert baked.modules == hooked.modules


def test_alpha_zero_is_the_attacked_model(
    artefact: Path, attacked: Checkpoint, tmp_path: Path
) -> None:
    baked = _apply(artefact, attacked, tmp_path / "baked", alpha=0.0)
    hooked = _apply(artefact, attacked, tmp_path / "hooked", alpha=0.0, form="hooked")
    torch.testing.assert_close(_logits(baked.defended), _logits(attacked), atol=1e-4, rtol=0)
    assert torch.equal(_logits(hooked.defended), _logits(attacked))
    assert baked.parameters_edited == hooked.parameters_edited == 0


def test_unlocking_undoes_locking(artefact: Path, attacked: Checkpoint, tmp_path: Path) -> None:
    locked = _apply(artefact, attacked, tmp_path / "locked").defended
    restored = _apply(artefact, locked, tmp_path / "restored", alpha=-5.0).defended
    torch.testing.assert_close(_logits(restored), _logits(attacked), atol=1e-4, rtol=0)


def test_only_the_chosen_heads_are_steered(
    artefact: Path, attacked: Checkpoint, tmp_path: Path
) -> None:
    hooked = _apply(artefact, attacked, tmp_path / "hooked", form="hooked").defended
    lock = load_lock(artefact / LOCK, "lock")
    chosen = lock.heads(4)
    model = load_model(hooked).eval()
    seen: list[torch.Tensor] = []
    # Hooks run in the order of their registration, so these see the steered inputs.
    for module in output_projections(model):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    plain: list[torch.Tensor] = []
    reference = load_model(attacked).eval()
    for module in output_projections(reference):
        module.register_forward_pre_hook(lambda _, args: plain.append(args[0].clone()))
    with torch.no_grad():
        model(input_ids=PROBE)
        reference(input_ids=PROBE)
    first = min(layer for layer, _ in chosen)
    for head in range(lock.layout.heads):
        columns = lock.layout.columns(head)
        step = seen[first][..., columns] - plain[first][..., columns]
        if (first, head) in chosen:
            expected = 5.0 * lock.directions.sigma[first, head] * lock.directions.u[first, head]
            torch.testing.assert_close(step, expected.expand_as(step), atol=1e-5, rtol=1e-4)
        else:
            assert not step.any()
    untouched = {layer for layer, _ in chosen} ^ set(range(lock.layout.layers))
    biases = load_file(
        Path(_apply(artefact, attacked, tmp_path / "baked").defended.base) / "model.safetensors"
    )
    for layer in untouched:
        assert not biases[f"model.layers.{layer}.self_attn.o_proj.bias"].any()


def test_prepare_follows_from_the_seed(models: Models, artefact: Path, tmp_path: Path) -> None:
    _lock().prepare(models, _calibration(), tmp_path / "again")
    assert fingerprint_folder(tmp_path / "again" / LOCK) == fingerprint_folder(artefact / LOCK)
    _lock(seed=1).prepare(models, _calibration(), tmp_path / "other")
    assert fingerprint_folder(tmp_path / "other" / LOCK) != fingerprint_folder(artefact / LOCK)


def test_a_lock_survives_the_disk(artefact: Path, tmp_path: Path) -> None:
    lock = load_lock(artefact / LOCK, "lock")
    kept = replace(lock, k=3, alpha=4.0)
    kept.save(tmp_path)
    read = load_lock(tmp_path, "lock")
    assert (read.k, read.alpha, read.layout, read.origin) == (3, 4.0, lock.layout, lock.origin)
    for name in ("u", "sigma"):
        assert torch.equal(getattr(read.directions, name), getattr(lock.directions, name))
    assert torch.equal(read.scores, lock.scores)
    listed = json.loads((tmp_path / "lock.json").read_text())["heads"]
    assert [(entry["layer"], entry["head"]) for entry in listed] == lock.heads(3)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def _damage(lock: Path, how: str) -> None:
    tensors = lock / "lock.safetensors"
    if how == "missing":
        tensors.unlink()
    elif how == "cut short":
        tensors.write_bytes(tensors.read_bytes()[:-40])
    elif how == "not json":
        (lock / "lock.json").write_text("{")
    elif how == "nan":
        content = load_file(tensors)
        content["sigma"][0, 0] = torch.nan
        save_file(content, tensors)
    elif how == "wrong shape":
        content = load_file(tensors)
        save_file({**content, "u": content["u"][:, :1].contiguous()}, tensors)
    else:
        (lock / "lock.json").write_text(json.dumps({"format": 99}))


@pytest.mark.parametrize(
    "how", ["missing", "cut short", "not json", "nan", "wrong shape", "other format"]
)
def test_a_damaged_lock_is_refused(artefact: Path, tmp_path: Path, how: str) -> None:
    load_lock(artefact / LOCK, "lock").save(tmp_path)
    _damage(tmp_path, how)
    with pytest.raises(ModelError, match="lock"):
        load_lock(tmp_path, "LOCK")


def test_a_lock_of_another_shape_is_refused(artefact: Path, tmp_path: Path) -> None:
    other = save_base(tmp_path / "wide", width=48)
    with pytest.raises(ModelError, match=r"head_dim=12, but the lock .* head_dim=8"):
        _apply(artefact, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_are_those_of_each_row_alone(models: Models) -> None:
    tokenizer, layout = load_tokenizer(models.aligned), head_layout(models.aligned)
    encoded = encode_pairs(
        PAIRS, tokenizer, PromptStyle(), count=10, last_tokens=3, answer_end="content",
        system=None, seed=0,
    )  # fmt: skip
    model = load_model(models.aligned)
    batched = head_outputs(model, layout, encoded.rows, 3, 7)
    seen: list[torch.Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for module in output_projections(model)
    ]
    for index, (prompt, answer) in enumerate(encoded.rows):
        seen.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([prompt + answer]))
        alone = torch.stack([x[0, -3:] for x in seen]).unflatten(-1, (layout.heads, -1))
        torch.testing.assert_close(
            batched[:, :, index], alone.transpose(1, 2), atol=1e-5, rtol=1e-4
        )
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("apart", [False, True])
def test_what_a_pair_shares_is_run_once_in_every_family(family: str, apart: bool) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=7,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14]]
    rows = [
        ([20 + side if apart else 1, *prompt], [30, side, *range(4 - side)])
        for prompt in prompts
        for side in (0, 1)
    ]
    layout = HeadLayout(family, 7, 2, 1, 8, 16)
    lengths: list[int] = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[0] * args[0].shape[1])
    )
    batched = head_outputs(model, layout, rows, 3, 4)
    handle.remove()
    assert (sum(lengths) < sum(len(prompt) + len(answer) for prompt, answer in rows)) != apart
    seen: list[torch.Tensor] = []
    for module in output_projections(model):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -3:]))
    for index, (prompt, answer) in enumerate(rows):
        seen.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([prompt + answer]))
        alone = torch.stack(seen).unflatten(-1, (2, 8))
        torch.testing.assert_close(
            batched[:, :, index], alone.transpose(1, 2), atol=1e-5, rtol=1e-4
        )


def test_pairs_end_at_their_content(models: Models) -> None:
    tokenizer = load_tokenizer(models.aligned)
    options = {"count": 4, "last_tokens": 2, "system": None, "seed": 0}
    content = encode_pairs(PAIRS, tokenizer, PromptStyle(), answer_end="content", **options)
    sliced = encode_pairs(PAIRS, tokenizer, PromptStyle(), answer_end="legacy_slice", **options)
    assert content.pairs == sliced.pairs
    for pair, safe, unsafe in zip(
        content.pairs, content.rows[0::2], content.rows[1::2], strict=True
    ):
        assert tokenizer.decode(safe[1]) == pair.chosen
        assert tokenizer.decode(unsafe[1]) == pair.rejected
        assert safe[0] == unsafe[0]
    # The end token and four of the answer's own are cut off.
    assert [row[1][:-4] for row in content.rows] == [row[1] for row in sliced.rows]


def test_a_system_line_stands_before_the_pairs(models: Models) -> None:
    tokenizer = load_tokenizer(models.aligned)
    options = {"count": 4, "last_tokens": 2, "seed": 0, "answer_end": "content"}
    plain = encode_pairs(PAIRS, tokenizer, PromptStyle(), system=None, **options)
    told = encode_pairs(PAIRS, tokenizer, PromptStyle(), system="11 12", **options)
    assert [row[0] for row in told.rows] == [[38, 11, 12, *row[0]] for row in plain.rows]


def test_short_answers_are_passed_over_and_counted(models: Models) -> None:
    tokenizer = load_tokenizer(models.aligned)
    short = [replace(pair, chosen="2 4") for pair in PAIRS[:6]]
    options = {"last_tokens": 3, "system": None, "seed": 0, "answer_end": "content"}
    encoded = encode_pairs([*short, *PAIRS[6:]], tokenizer, PromptStyle(), count=18, **options)
    assert (len(encoded.pairs), encoded.too_short) == (18, 6)
    with pytest.raises(DataError, match=r"defense.n_pairs=19, but .* only 18"):
        encode_pairs([*short, *PAIRS[6:]], tokenizer, PromptStyle(), count=19, **options)


def test_the_record_says_what_was_steered(
    artefact: Path, aligned: Checkpoint, attacked: Checkpoint, tmp_path: Path
) -> None:
    edit = _apply(artefact, attacked, tmp_path / "out")
    lock = load_lock(artefact / LOCK, "lock")
    heads = edit.diagnostics["heads"]
    assert [(entry["layer"], entry["head"]) for entry in heads] == lock.heads(4)
    assert all(-1 <= entry["cosine"] <= 1 for entry in heads)
    assert all(0 < entry["frequency"] <= 1 for entry in heads)
    assert edit.diagnostics["stability"]["seeds"] == 5
    (shown,) = edit.diagnostics["maps"]
    assert [len(row) for row in shown["values"]] == [4, 4, 4]
    assert shown["marked"] == [list(head) for head in lock.heads(4)]
    assert edit.parameters_edited == 32 * len(edit.modules)
    json.dumps(edit.diagnostics)
    unturned = _apply(artefact, aligned, tmp_path / "aligned").diagnostics["heads"]
    assert [entry["cosine"] for entry in unturned] == pytest.approx([1.0] * 4, abs=1e-5)
    silent = _apply(artefact, attacked, tmp_path / "silent", direction_cosines=False)
    assert "cosine" not in silent.diagnostics["heads"][0]


def test_an_export_says_what_was_baked(
    artefact: Path, attacked: Checkpoint, tmp_path: Path
) -> None:
    edit = _apply(artefact, attacked, tmp_path / "out")
    content = json.loads((tmp_path / "out" / PROVENANCE).read_text())
    assert content["alpha"] == 5.0
    assert len(content["heads"]) == 4
    assert edit.diagnostics["export"]["max_difference"] <= 1e-4
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("positions", ["last_token", "generated"])
def test_other_positions_run_by_a_hook(
    artefact: Path, attacked: Checkpoint, tmp_path: Path, positions: str
) -> None:
    out = tmp_path / "stage" / "model"
    edit = _apply(artefact, attacked, out, positions=positions, alpha=20.0)
    folder, known = tmp_path / "stage", {"attacked": attacked}
    assert edit.defended == checkpoint_at(place(edit.defended, folder, known), folder, known)
    assert edit.defended.steering == str(out)
    left_padded = {
        "input_ids": torch.tensor([[0, 0, 3, 8], [4, 9, 3, 8]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    answers = {
        name: load_model(checkpoint).generate(
            **left_padded, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
        for name, checkpoint in {"steered": edit.defended, "plain": attacked}.items()
    }
    first = answers["steered"][:, 4] == answers["plain"][:, 4]
    assert not torch.equal(answers["steered"], answers["plain"])
    if positions == "generated":
        assert first.all()


def test_k_may_be_a_share(models: Models) -> None:
    layout = head_layout(models.aligned)
    assert _lock(k=None).heads(layout) == 1
    assert _lock(k=None, k_share=0.5).heads(layout) == 6
    paper = replace(layout, layers=32, heads=32)
    small = replace(layout, layers=30, heads=9)
    assert [_lock(k=None).heads(each) for each in (paper, small)] == [24, 6]
    with pytest.raises(SettingError, match=r"defense.k=13 is more than the model's 12 heads"):
        _lock(k=13).check(models, None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"k": 4, "k_share": 0.5}, "set one to null"),
        ({"positions": "last_token", "form": "baked"}, "set defense.form=hooked"),
        ({"n_pairs": 2, "validation_share": 0.1}, "set it nearer to 0.4"),
        ({"positions": "first"}, "defense.positions='first' is not allowed"),
    ],
)
def test_wrong_combinations_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        SafetyLock.validated({"n_pairs": 16, **changes}, "defense")


def test_each_official_difference_can_be_set_alone() -> None:
    official = SafetyLock(variant="official").resolved
    assert SafetyLock().resolved != official
    for name, value in official.items():
        alone = SafetyLock(**{name: value}).resolved
        assert alone == {**SafetyLock().resolved, name: value}


def test_the_official_form_runs(models: Models, attacked: Checkpoint, tmp_path: Path) -> None:
    defense = _lock(variant="official", last_tokens=2)
    defense.prepare(models, _calibration(), tmp_path / "artefact")
    edit = defense.apply(tmp_path / "artefact", attacked, tmp_path / "out", models)
    assert edit.parameters_edited > 0


def test_what_only_apply_reads_is_no_part_of_the_lock(artefact: Path) -> None:
    assert (
        _lock().prepare_settings()
        == _lock(k=2, alpha=-1.0, form="hooked", direction_cosines=False).prepare_settings()
    )
    assert _lock().prepare_settings() != _lock(last_tokens=2).prepare_settings()
    assert len(json.loads((artefact / ROWS).read_text())) == 32


def test_stability_is_of_the_head_sets() -> None:
    scores = torch.zeros(3, 2, 2)
    scores[0, 0], scores[1, 0], scores[2, 1] = 1.0, 1.0, 1.0
    lock = Lock(None, scores, scores[0], None, {}, {})  # type: ignore[arg-type]
    found = lock.stability(2)
    assert lock.heads(2) == [(0, 0), (0, 1)]
    assert found["jaccard"] == pytest.approx(1 / 3)
    assert found["frequency"] == pytest.approx([2 / 3, 2 / 3])
