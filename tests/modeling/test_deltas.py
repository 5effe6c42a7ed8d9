"""Differences between models, and edits of them, against dense formulas on PEFT's own merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling.checkpoint import Checkpoint, fingerprint_folder
from modeling.deltas import alignment, fine_tuning, frobenius, safety_times, write_edited
from modeling.loading import load_model
from modeling.model_files import verify_folder
from modeling.projections import Factored, open_pairing, projections, read_weight
from modeling.rewrite import rewrite_weights
from modeling.shards import write_tensors
from settings import ModelError
from tests.modeling.tiny_models import MODELS, PROJECTIONS, logits, save_model

QUERY, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
SCALED = {"use_rslora": True, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}
RANKED = {"r": 6, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 5}}
FEWER = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]}


@dataclass(frozen=True)
class Trio:
    """As `defenses.base.Models`, with the attacked model beside them."""

    base: Checkpoint
    aligned: Checkpoint
    attacked: Checkpoint


def _adapter(base: Checkpoint, folder: Path, seed: int, **options: Any) -> Checkpoint:
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, **options}
    dtype = given.pop("dtype", None)
    model = get_peft_model(load_model(base, device="cpu"), LoraConfig(**given))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    if dtype is not None:
        path = folder / "adapter_model.safetensors"
        save_file({k: t.to(dtype) for k, t in load_file(path).items()}, path)
    return Checkpoint(base.base, str(folder), dtype=base.dtype)


def _merged(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    load_model(checkpoint, device="cpu").merge_and_unload().save_pretrained(folder)
    return Checkpoint(str(folder), dtype=checkpoint.dtype)


def _trained(source: Checkpoint, folder: Path, shard: str = "1GB") -> Checkpoint:
    """Every weight moved a little, embeddings, norms and biases too, and some nearly to zero."""
    torch.manual_seed(5)
    model = load_model(source, device="cpu")
    if source.adapter is not None:
        model = model.merge_and_unload()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
            parameter[-1] *= 1e-3
    model.save_pretrained(folder, max_shard_size=shard)
    return Checkpoint(str(folder), dtype=source.dtype)


def _dense(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The state dict that runs, the adapter merged by PEFT in float32."""
    model = load_model(replace(checkpoint, dtype="float32"), device="cpu")
    if checkpoint.adapter is not None:
        model = model.merge_and_unload()
    return dict(model.state_dict())


def _files(folder: str | Path) -> dict[str, Tensor]:
    paths = sorted(Path(folder).glob("*.safetensors"))
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def _close(found: Factored | Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    dense = found.b @ found.a if isinstance(found, Factored) else found
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense, expected, rtol=0, atol=tolerance)


def _run(checkpoint: Checkpoint) -> Tensor:
    return torch.cat(logits(load_model(checkpoint, device="cpu").eval()))


def _run_with(source: Checkpoint, weights: dict[str, Tensor]) -> Tensor:
    """The logits of a model some of whose weights are others."""
    model = load_model(source, device="cpu").eval()
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.load_state_dict({f"{name}.weight": tensor for name, tensor in weights.items()}, False)
    return torch.cat(logits(model))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_model("qwen2", tmp_path_factory.mktemp("base"), shard="20KB")


@pytest.fixture(scope="module")
def aligned(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return _adapter(base, tmp_path_factory.mktemp("aligned"), 1)


@pytest.fixture(params=["resumed", "fresh", "full"])
def trio(
    request: pytest.FixtureRequest, base: Checkpoint, aligned: Checkpoint, tmp_path: Path
) -> Trio:
    attacked = {
        "resumed": lambda: _adapter(base, tmp_path / "attacked", 2, r=6, lora_alpha=4),
        "fresh": lambda: _adapter(_merged(aligned, tmp_path / "merged"), tmp_path / "attacked", 2),
        "full": lambda: _trained(aligned, tmp_path / "attacked", "15KB"),
    }[request.param]()
    return Trio(base, aligned, attacked)


class TestProjections:
    @pytest.mark.parametrize("name", list(MODELS))
    def test_are_the_linear_layers_of_the_blocks(self, name: str, tmp_path: Path) -> None:
        checkpoint = save_model(name, tmp_path, shard="20KB")
        model = load_model(checkpoint, device="cpu")
        expected = {
            path: tuple(module.weight.shape)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in path
        }
        found = projections(checkpoint)
        assert found == expected
        blocks = [int(path.split(".")[2]) for path in found]
        assert blocks == sorted(blocks)

    def test_blocks_are_in_numerical_order(self, tmp_path: Path) -> None:
        checkpoint = save_model("llama", tmp_path, num_hidden_layers=11)
        blocks = [int(path.split(".")[2]) for path in projections(checkpoint)]
        assert blocks == [block for block in range(11) for _ in range(7)]

    def test_weights_are_merged(self, base: Checkpoint, tmp_path: Path) -> None:
        for number, options in enumerate((SCALED, RANKED, FEWER)):
            checkpoint = _adapter(base, tmp_path / str(number), 3, **options)
            expected = _dense(checkpoint)
            for name in projections(checkpoint):
                _close(read_weight(checkpoint, name), expected[f"{name}.weight"])

    def test_unknown_names_are_refused(self, base: Checkpoint) -> None:
        with pytest.raises(ModelError, match="no projection lm_head"):
            read_weight(base, "lm_head")

    def test_quantised_weights_are_refused(self, tmp_path: Path) -> None:
        checkpoint = save_model("llama", tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights[f"{QUERY}.weight"] = weights[f"{QUERY}.weight"].to(torch.int8)
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=r"q_proj\.weight.*not quantised"):
            projections(checkpoint)

    def test_adapters_beyond_the_projections_are_refused(
        self, base: Checkpoint, tmp_path: Path
    ) -> None:
        with_head = _adapter(base, tmp_path / "head", 1, target_modules=["lm_head", "q_proj"])
        path = tmp_path / "head" / "adapter_model.safetensors"
        save_file({key: t for key, t in load_file(path).items() if "lora_" in key}, path)
        with pytest.raises(ModelError, match="use an adapter trained on this model"):
            projections(with_head)
        biased = _adapter(base, tmp_path / "bias", 1, bias="all")
        with pytest.raises(ModelError, match=r"more than LoRA.*train it as plain LoRA$"):
            projections(biased)


class TestDifferences:
    @pytest.mark.parametrize("options", [{}, SCALED, RANKED, FEWER])
    def test_alignment_by_an_adapter(
        self, options: dict[str, Any], base: Checkpoint, tmp_path: Path
    ) -> None:
        models = Trio(base, _adapter(base, tmp_path, 1, **options), base)
        before, after = _dense(base), _dense(models.aligned)
        for name in projections(base):
            found = alignment(models, name, "cpu")
            assert isinstance(found, Factored)
            _close(found, after[f"{name}.weight"] - before[f"{name}.weight"])

    def test_alignment_of_all_weights(self, base: Checkpoint, tmp_path: Path) -> None:
        models = Trio(base, _trained(base, tmp_path), base)
        before, after = _dense(base), _dense(models.aligned)
        for name in projections(base):
            found = alignment(models, name, "cpu")
            assert isinstance(found, Tensor)
            _close(found, after[f"{name}.weight"] - before[f"{name}.weight"])

    def test_alignment_on_a_copy_of_the_base_is_dense(
        self, aligned: Checkpoint, base: Checkpoint, tmp_path: Path
    ) -> None:
        copy = save_model("qwen2", tmp_path)
        models = Trio(copy, aligned, base)
        found = alignment(models, QUERY, "cpu")
        assert isinstance(found, Tensor)
        same = alignment(Trio(base, aligned, base), QUERY, "cpu")
        assert isinstance(same, Factored)
        _close(found, same.b @ same.a)

    def test_every_kind(self, trio: Trio) -> None:
        kind = open_pairing(trio.aligned, trio.attacked).kind
        one, two = _dense(trio.aligned), _dense(trio.attacked)
        for name in projections(trio.base):
            found = fine_tuning(trio.aligned, trio.attacked, name, "cpu")
            assert isinstance(found, Tensor) == (kind == "full")
            _close(found, two[f"{name}.weight"] - one[f"{name}.weight"])

    def test_a_fresh_adapter_on_given_weights(self, base: Checkpoint, tmp_path: Path) -> None:
        attacked = _adapter(base, tmp_path, 2)
        assert open_pairing(base, attacked).kind == "fresh"
        assert write_edited(base, attacked, tmp_path / "out", lambda *_: None).changed == 0

    def test_merging_may_round(self, base: Checkpoint, tmp_path: Path) -> None:
        aligned = _adapter(base, tmp_path / "aligned", 1, lora_alpha=0.1)
        merged = _merged(replace(aligned, dtype="bfloat16"), tmp_path / "merged")
        attacked = _adapter(merged, tmp_path / "attacked", 2)
        count = write_edited(aligned, attacked, tmp_path / "out", lambda *_: None)
        assert count.total == sum(a * b for a, b in projections(base).values())

    def test_one_folder_under_two_names_is_one_base(
        self, base: Checkpoint, aligned: Checkpoint, tmp_path: Path
    ) -> None:
        (tmp_path / "link").symlink_to(base.base)
        attacked = _adapter(base, tmp_path / "attacked", 2)
        moved = replace(attacked, base=str(tmp_path / "link"))
        assert open_pairing(aligned, moved).kind == "resumed"


class TestRefusals:
    def _refused(self, aligned: Checkpoint, attacked: Checkpoint, out: Path, match: str) -> None:
        with pytest.raises(ModelError, match=match):
            write_edited(aligned, attacked, out, lambda *_: None)
        assert not out.exists()

    def test_other_shapes(self, aligned: Checkpoint, tmp_path: Path) -> None:
        other = save_model("llama_wide_heads", tmp_path / "other")
        self._refused(aligned, other, tmp_path / "out", r"differ in .*fine-tuned from the aligned")

    def test_fewer_layers(self, aligned: Checkpoint, tmp_path: Path) -> None:
        other = save_model("qwen2", tmp_path / "other", num_hidden_layers=2)
        self._refused(aligned, other, tmp_path / "out", r"layers\.2.*None")

    def test_hooks(self, aligned: Checkpoint, tmp_path: Path) -> None:
        steered = replace(aligned, steering=str(tmp_path))
        self._refused(aligned, steered, tmp_path / "out", "without steering")
        with pytest.raises(ModelError, match="without steering"):
            rewrite_weights(steered, tmp_path / "out", lambda *_: None)

    def test_an_adapter_on_other_weights(self, aligned: Checkpoint, tmp_path: Path) -> None:
        other = _trained(aligned, tmp_path / "other")
        attacked = _adapter(other, tmp_path / "attacked", 2)
        self._refused(aligned, attacked, tmp_path / "out", "isn't the aligned model")

    def test_an_adapter_on_a_copy_of_the_base(self, base: Checkpoint, tmp_path: Path) -> None:
        aligned = _adapter(base, tmp_path / "aligned", 1, lora_alpha=0.01)
        copy = save_model("qwen2", tmp_path / "copy")
        attacked = _adapter(copy, tmp_path / "attacked", 2)
        self._refused(aligned, attacked, tmp_path / "out", "on the same base folder")

    def test_edits_of_an_adapters_a(self, base: Checkpoint, tmp_path: Path) -> None:
        attacked = _adapter(base, tmp_path / "attacked", 2)

        def other_a(_: str, delta: Factored | Tensor) -> Factored:
            assert isinstance(delta, Factored)
            return Factored(2 * delta.a, delta.b)

        for edit in (other_a, lambda _, delta: delta.b @ delta.a):
            with pytest.raises(ValueError, match="b alone"):
                write_edited(base, attacked, tmp_path / "out", edit)
            assert not (tmp_path / "out").exists()

    def test_a_folder_in_use(self, trio: Trio, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "note").touch()
        with pytest.raises(ModelError, match="isn't empty"):
            write_edited(trio.aligned, trio.attacked, tmp_path / "out", lambda *_: None)

    def test_results_that_are_not_finite(self, trio: Trio, tmp_path: Path) -> None:
        def explode(_: str, delta: Factored | Tensor) -> Factored | Tensor:
            if isinstance(delta, Factored):
                return Factored(delta.a, delta.b * float("inf"))
            return delta * float("inf")

        with pytest.raises(ModelError, match="isn't finite"):
            write_edited(trio.aligned, trio.attacked, tmp_path / "out", explode)
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]

    def test_unknown_names_and_dtypes(self, base: Checkpoint, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no projection lm_head"):
            rewrite_weights(base, tmp_path / "out", lambda _, w: w, names=["lm_head"])
        double = replace(base, dtype="float64")
        with pytest.raises(ModelError, match=r"model\.dtype=float64.*float32, bfloat16"):
            rewrite_weights(double, tmp_path / "out", lambda _, w: w)


sizes = st.integers(1, 6)


class TestAlgebra:
    @settings(deadline=None, max_examples=60)
    @given(sizes, sizes, st.integers(0, 4), sizes, st.integers(0, 2**31))
    def test_safety_times_is_the_dense_formula(
        self, d_out: int, d_in: int, rank: int, n: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        d = Factored(torch.randn(rank, d_in), torch.randn(d_out, rank))
        x = torch.randn(d_out, n)
        dense = d.b @ d.a
        expected = ((dense @ dense.T).double() @ x.double()).float()
        for form in (d, dense):
            torch.testing.assert_close(safety_times(form, x), expected, rtol=1e-3, atol=1e-3)
            own = x.clone()
            assert safety_times(form, own, out=own) is own
            torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
        assert frobenius(d) == pytest.approx(float(dense.double().norm()), rel=1e-4, abs=1e-5)
        assert frobenius(dense) == pytest.approx(float(dense.double().norm()), rel=1e-6)

    def test_blocks_of_columns_and_rows_join_up(self) -> None:
        torch.manual_seed(0)
        d, x = torch.randn(3, 1 << 21), torch.randn(3, 5)
        torch.testing.assert_close(safety_times(d, x), (d @ d.T) @ x, rtol=1e-3, atol=1)
        assert frobenius(d) == pytest.approx(float(d.double().norm()), rel=1e-9)

    def test_no_square_of_an_output_is_formed(self) -> None:
        """A matrix (d_out, d_out) would take 640 GB here."""
        torch.manual_seed(0)
        d = Factored(torch.randn(2, 7), torch.randn(400_000, 2))
        x = torch.randn(400_000, 3)
        found = safety_times(d, x)
        torch.testing.assert_close(safety_times(d.b @ d.a, x), found, rtol=1e-3, atol=1)


ROWS = torch.tensor([0, 3, 14])


def _shrunk(_: str, delta: Factored | Tensor) -> Factored | Tensor:
    """Three rows of Delta at a quarter of their size."""
    target = (delta.b if isinstance(delta, Factored) else delta).clone()
    target[ROWS] *= 0.25
    return Factored(delta.a, target) if isinstance(delta, Factored) else target


def _gone(_: str, delta: Factored | Tensor) -> Factored | Tensor:
    if isinstance(delta, Factored):
        return Factored(delta.a, torch.zeros_like(delta.b))
    return delta.zero_()


class TestWriteEdited:
    def test_edited_rows_follow_the_dense_formula(self, trio: Trio, tmp_path: Path) -> None:
        count = write_edited(trio.aligned, trio.attacked, tmp_path / "out", _shrunk)
        verify_folder(tmp_path / "out", "out")
        one, two = _dense(trio.aligned), _dense(trio.attacked)
        wanted = {}
        for name in projections(trio.base):
            expected = two[f"{name}.weight"].clone()
            drift = expected - one[f"{name}.weight"]
            expected[ROWS] = one[f"{name}.weight"][ROWS] + 0.25 * drift[ROWS]
            _close(read_weight(count.defended, name), expected)
            wanted[name] = expected
        assert (_run(count.defended) - _run_with(trio.attacked, wanted)).abs().max() < 1e-4
        assert (_run(count.defended) - _run(trio.attacked)).abs().max() > 1e-2

    def test_counts(self, trio: Trio, tmp_path: Path) -> None:
        shapes = projections(trio.base)

        def edit(name: str, delta: Factored | Tensor) -> Factored | Tensor | None:
            return _shrunk(name, delta) if name in (QUERY, DOWN) else None

        count = write_edited(trio.aligned, trio.attacked, tmp_path / "out", edit)
        assert count.modules == (QUERY, DOWN)
        assert count.changed == len(ROWS) * (shapes[QUERY][1] + shapes[DOWN][1])
        assert count.total == sum(d_out * d_in for d_out, d_in in shapes.values())

    @pytest.mark.parametrize(
        "edit",
        [
            lambda _, delta: None,
            lambda _, delta: delta,
            lambda _, d: Factored(d.a, d.b.clone()) if isinstance(d, Factored) else d.clone(),
        ],
    )
    def test_no_change_is_the_attacked_model(
        self, edit: Callable[..., Any], trio: Trio, tmp_path: Path
    ) -> None:
        count = write_edited(trio.aligned, trio.attacked, tmp_path / "out", edit)
        assert (count.changed, count.modules) == (0, ())
        for name in projections(trio.base):
            # The scale 2/3 of the resumed adapter is folded into B, which rounds.
            expected = read_weight(trio.attacked, name)
            torch.testing.assert_close(
                read_weight(count.defended, name), expected, rtol=0, atol=1e-7
            )
        if trio.attacked.adapter is None:
            before, after = _files(trio.attacked.base), _files(tmp_path / "out")
            assert before.keys() == after.keys()
            assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())

    def test_no_fine_tuning_left_is_the_aligned_model(self, trio: Trio, tmp_path: Path) -> None:
        count = write_edited(trio.aligned, trio.attacked, tmp_path / "out", _gone)
        for name in projections(trio.base):
            _close(read_weight(count.defended, name), read_weight(trio.aligned, name), 1e-6)

    def test_inputs_are_only_read(self, trio: Trio, tmp_path: Path) -> None:
        folders = [trio.base.base, trio.attacked.base, trio.aligned.adapter, trio.attacked.adapter]
        before = [fingerprint_folder(folder) for folder in folders if folder]
        write_edited(trio.aligned, trio.attacked, tmp_path / "out", _gone)
        assert [fingerprint_folder(folder) for folder in folders if folder] == before

    def test_full_weights_keep_all_but_the_edited_scalars(
        self, aligned: Checkpoint, tmp_path: Path
    ) -> None:
        attacked = _trained(aligned, tmp_path / "attacked", "15KB")
        count = write_edited(aligned, attacked, tmp_path / "out", _shrunk)
        before, after = _files(attacked.base), _files(count.defended.base)
        assert before.keys() == after.keys()
        names = projections(attacked)
        for key, tensor in before.items():
            differs = (after[key] != tensor).nonzero()
            if key.removesuffix(".weight") in names and not key.endswith("bias"):
                assert set(differs[:, 0].tolist()) == set(ROWS.tolist()), key
            else:
                assert differs.numel() == 0, key
        assert sum(key.endswith("_proj.bias") for key in after) == 9
        files = [sorted(p.name for p in Path(f.base).iterdir()) for f in (attacked, count.defended)]
        assert files[0] == files[1]

    @pytest.mark.parametrize("form", ["factored", "dense"])
    def test_a_dense_difference_may_become_a_product(
        self, form: str, aligned: Checkpoint, tmp_path: Path
    ) -> None:
        attacked = _trained(aligned, tmp_path / "attacked")

        def edit(name: str, delta: Factored | Tensor) -> Factored | Tensor:
            torch.manual_seed(len(name))
            d_out, d_in = delta.shape
            product = Factored(torch.randn(2, d_in), torch.randn(d_out, 2))
            return product if form == "factored" else product.b @ product.a

        count = write_edited(aligned, attacked, tmp_path / "out", edit)
        for name in (QUERY, DOWN):
            added = edit(name, read_weight(aligned, name))
            dense = added.b @ added.a if isinstance(added, Factored) else added
            _close(read_weight(count.defended, name), read_weight(aligned, name) + dense, 1e-5)


class TestAdapters:
    @pytest.mark.parametrize(
        ("before", "options"),
        [({}, SCALED), (SCALED, RANKED), (FEWER, {}), ({}, FEWER), (FEWER, FEWER)],
    )
    def test_ranks_and_scales(
        self, before: dict[str, Any], options: dict[str, Any], base: Checkpoint, tmp_path: Path
    ) -> None:
        aligned = _adapter(base, tmp_path / "aligned", 1, **before)
        attacked = _adapter(base, tmp_path / "attacked", 2, **options)
        assert open_pairing(aligned, attacked).kind == "resumed"
        count = write_edited(aligned, attacked, tmp_path / "out", _shrunk)
        one, two = _dense(aligned), _dense(attacked)
        found = _dense(count.defended)
        for name in projections(base):
            key = f"{name}.weight"
            delta = fine_tuning(aligned, attacked, name, "cpu")
            assert isinstance(delta, Factored)
            _close(delta, two[key] - one[key])
            expected = two[key].clone()
            expected[ROWS] = one[key][ROWS] + 0.25 * (two[key] - one[key])[ROWS]
            _close(found[key], expected)
        _assert_scale_one(count.defended)

    def test_a_stays_and_only_edited_rows_of_b_differ(
        self, base: Checkpoint, aligned: Checkpoint, tmp_path: Path
    ) -> None:
        attacked = _adapter(base, tmp_path / "attacked", 2)
        write_edited(aligned, attacked, tmp_path / "out", _shrunk)
        before, other, after = (
            _files(str(folder)) for folder in (attacked.adapter, aligned.adapter, tmp_path / "out")
        )
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            if "lora_A" in key:
                assert torch.equal(after[key], torch.cat([tensor, other[key]])), key
                continue
            unedited = torch.cat([2 * tensor, torch.zeros_like(other[key])], 1)
            rows = (after[key] != unedited).any(1).nonzero().flatten()
            assert torch.equal(rows, ROWS), key

    def test_untouched_projections_cost_no_rank(
        self, base: Checkpoint, aligned: Checkpoint, tmp_path: Path
    ) -> None:
        attacked = _adapter(base, tmp_path / "attacked", 2)

        def edit(name: str, delta: Factored | Tensor) -> Factored | Tensor | None:
            return _shrunk(name, delta) if name == QUERY else None

        count = write_edited(aligned, attacked, tmp_path / "out", edit)
        ranks = {key: tensor.shape[0] for key, tensor in _files(tmp_path / "out").items()}
        a = {key: rank for key, rank in ranks.items() if "lora_A" in key}
        assert {key for key, rank in a.items() if rank == 8} == {
            f"base_model.model.{QUERY}.lora_A.weight"
        }
        assert set(a.values()) == {4, 8}
        verify_folder(tmp_path / "out", "out")
        _assert_scale_one(count.defended)

    def test_an_attack_that_dropped_projections(
        self, base: Checkpoint, aligned: Checkpoint, tmp_path: Path
    ) -> None:
        """What only the aligned adapter had comes back, and stays away where it isn't edited."""
        attacked = _adapter(base, tmp_path / "attacked", 2, **FEWER)

        def edit(name: str, delta: Factored | Tensor) -> Factored | Tensor | None:
            return _gone(name, delta) if name == DOWN else None

        count = write_edited(aligned, attacked, tmp_path / "out", edit)
        assert count.modules == (DOWN,)
        one, two, found = (_dense(model) for model in (aligned, attacked, count.defended))
        for name in projections(base):
            key = f"{name}.weight"
            _close(found[key], (one if name == DOWN else two)[key])
        _assert_scale_one(count.defended)

    @pytest.mark.parametrize(
        ("attacked", "aligned", "expected"),
        [
            ({"dtype": torch.bfloat16}, {"dtype": torch.bfloat16}, torch.bfloat16),
            ({"dtype": torch.float16}, {"dtype": torch.float16}, torch.float16),
            ({"dtype": torch.bfloat16}, {}, torch.float32),
            # 3 / 4 isn't a power of two: B times it would be rounded.
            ({"dtype": torch.bfloat16, "lora_alpha": 3}, {"dtype": torch.bfloat16}, torch.float32),
        ],
    )
    def test_dtypes(
        self,
        attacked: dict[str, Any],
        aligned: dict[str, Any],
        expected: torch.dtype,
        base: Checkpoint,
        tmp_path: Path,
    ) -> None:
        one = _adapter(base, tmp_path / "aligned", 1, **aligned)
        two = _adapter(base, tmp_path / "attacked", 2, **attacked)
        count = write_edited(one, two, tmp_path / "out", _shrunk)
        assert {tensor.dtype for tensor in _files(tmp_path / "out").values()} == {expected}
        tolerance = {torch.bfloat16: 4e-3, torch.float16: 1e-3}.get(expected, 1e-6)
        for name in projections(base):
            weight, drift = read_weight(two, name), fine_tuning(one, two, name, "cpu")
            assert isinstance(drift, Factored)
            found = read_weight(count.defended, name)
            _close(found[ROWS], weight[ROWS] - 0.75 * drift.rows(ROWS), tolerance)
            rest = torch.ones(len(weight), dtype=torch.bool).index_fill(0, ROWS, False)
            _close(found[rest], weight[rest], 1e-6)

    def test_the_config_keeps_what_it_need_not_change(
        self, base: Checkpoint, aligned: Checkpoint, tmp_path: Path
    ) -> None:
        attacked = _adapter(base, tmp_path / "attacked", 2, lora_alpha=6, use_rslora=True)
        write_edited(aligned, attacked, tmp_path / "out", _shrunk)
        old, new = (
            json.loads((tmp_path / folder / "adapter_config.json").read_text())
            for folder in ("attacked", "out")
        )
        changed = {key for key in old | new if old.get(key) != new.get(key)}
        assert changed == {"r", "lora_alpha", "use_rslora"}
        assert (new["r"], new["lora_alpha"], new["use_rslora"]) == (8, 8, False)


def _assert_scale_one(checkpoint: Checkpoint) -> None:
    """By PEFT's rules, and by those of engines that know neither patterns nor rslora."""
    model: Any = load_model(checkpoint, device="cpu")
    config = json.loads((Path(str(checkpoint.adapter)) / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    held = {key.split(".lora_")[0] for key in _files(str(checkpoint.adapter))}
    assert len(layers) == len(held) > 0
    for layer in layers:
        assert layer.scaling["default"] == 1
        assert layer.r["default"] <= config["r"]


class TestRewriteWeights:
    @pytest.mark.parametrize("name", ["qwen2", "llama_tied", "gemma2", "llama_biased"])
    def test_edited_weights_and_nothing_else(self, name: str, tmp_path: Path) -> None:
        source = save_model(name, tmp_path / "source", shard="20KB")

        def edit(module: str, weight: Tensor) -> Tensor | None:
            if module == DOWN:
                return None
            weight[1] = 0
            return weight

        count = rewrite_weights(source, tmp_path / "out", edit, names=[QUERY, DOWN])
        before, after = _files(source.base), _files(tmp_path / "out")
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            expected = tensor.clone()
            if key == f"{QUERY}.weight":
                expected[1] = 0
            assert torch.equal(after[key], expected), key
        assert count.modules == (QUERY,)
        assert count.changed == before[f"{QUERY}.weight"].shape[1]
        shapes = projections(source)
        assert count.total == sum(a * b for a, b in (shapes[QUERY], shapes[DOWN]))
        assert isinstance(load_model(count.defended), PreTrainedModel)

    def test_the_adapter_is_merged(self, aligned: Checkpoint, tmp_path: Path) -> None:
        count = rewrite_weights(aligned, tmp_path / "out", lambda *_: None)
        assert count.changed == 0
        assert count.defended == Checkpoint(str(tmp_path / "out"))
        assert (_run(count.defended) - _run(aligned)).abs().max() < 1e-5
        doubled = rewrite_weights(aligned, tmp_path / "twice", lambda _, weight: 2 * weight)
        assert doubled.changed == doubled.total
        for name in projections(aligned):
            _close(read_weight(doubled.defended, name), 2 * read_weight(aligned, name))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_low_precision(self, dtype: str, tmp_path: Path) -> None:
        saved = save_model("llama", tmp_path / "source")
        source = _adapter(replace(saved, dtype=dtype), tmp_path / "adapter", 1)
        count = rewrite_weights(source, tmp_path / "out", lambda _, weight: weight + 1e-6)
        kind = getattr(torch, dtype)
        after = _files(tmp_path / "out")
        assert {tensor.dtype for tensor in after.values()} == {kind}
        changed = 0
        for name in projections(source):
            weight = read_weight(source, name)
            assert torch.equal(after[f"{name}.weight"], (weight + 1e-6).to(kind))
            changed += int(((weight + 1e-6).to(kind) != weight.to(kind)).sum())
        assert 0 < count.changed == changed < count.total
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config["dtype"], config["torch_dtype"]) == (dtype, dtype)
        assert load_model(count.defended).dtype == kind

    def test_tokenizer_and_generation_config_come_along(self, tmp_path: Path) -> None:
        source = save_model("llama", tmp_path / "source")
        (tmp_path / "source" / "tokenizer.json").write_text("{}")
        (tmp_path / "source" / "training_args.bin").write_text("{}")
        rewrite_weights(source, tmp_path / "out", lambda *_: None)
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
        }

    def test_blocks_of_rows_join_up(self, tmp_path: Path) -> None:
        """A down_proj of more than one block of rows, merged and edited."""
        shape: dict[str, Any] = {
            "hidden_size": 160,
            "intermediate_size": 30_000,
            "num_hidden_layers": 1,
        }
        base = save_model("llama", tmp_path / "base", **shape)
        source = _adapter(base, tmp_path / "adapter", 1, target_modules=["down_proj"])
        name = "model.layers.0.mlp.down_proj"
        expected = _dense(source)[f"{name}.weight"]
        assert expected.numel() > 4 << 20
        _close(read_weight(source, name), expected)

        def negate(_: str, weight: Tensor) -> Tensor:
            return weight.neg_()

        count = rewrite_weights(source, tmp_path / "out", negate, names=[name])
        assert count.changed == int((expected != 0).sum())
        _close(_files(tmp_path / "out")[f"{name}.weight"], -expected)


class TestStream:
    """A safetensors file whose shapes are known only once it is written."""

    def test_smaller_and_missing_tensors(self, tmp_path: Path) -> None:
        bounds = {f"tensor{i}": (10**6, 10**6) for i in range(20)}
        given = {"tensor3": torch.randn(4, 3), "tensor17": torch.randn(2, 5)}
        write_tensors(tmp_path / "file", bounds, "float32", given.items())
        found = load_file(tmp_path / "file")
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in given.items())

    @pytest.mark.parametrize("shape", [(4, 4), (5, 3), (4,)])
    def test_larger_tensors_are_refused(self, shape: tuple[int, ...], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"not \(4, 3\)"):
            write_tensors(tmp_path / "file", {"a": (4, 3)}, "float32", [("a", torch.ones(shape))])
