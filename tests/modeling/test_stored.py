"""Tensors on their way from file to file: read by rows, copied, linked, or computed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling.checkpoint import Checkpoint
from modeling.deltas import write_edited
from modeling.export import export_with_biases
from modeling.model_files import StoredTensor, read_header, stored_tensors
from modeling.rewrite import rewrite_weights
from modeling.shards import write_tensors
from modeling.stored import behind, copy_bytes, copy_file, linking, read_rows, read_tensor
from settings import ModelError
from tests.modeling.tiny_models import LAYERS, save_adapter, save_model


def _stored(path: Path, tensors: dict[str, Tensor]) -> dict[str, StoredTensor]:
    save_file(tensors, path, {"format": "pt"})
    header, start = read_header(path)
    return {
        name: StoredTensor(
            path, start + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"])
        )
        for name, entry in header.items()
    }


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (7, 3), (5, 2, 3)])
def test_blocks_of_rows_join_up(
    shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling.stored.BLOCK", 6)
    tensors = {"before": torch.randn(9), "one": torch.randn(shape).bfloat16()}
    stored = _stored(tmp_path / "file", tensors)["one"]
    assert torch.equal(read_tensor(stored), tensors["one"])
    blocks = [rows for rows, _ in read_rows(stored)]
    assert sum(rows.stop - rows.start for rows in blocks) == (shape or (1,))[0]


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    stored = _stored(tmp_path / "file", {"one": torch.randn(8)})["one"]
    os.truncate(tmp_path / "file", stored.start + 8)
    with pytest.raises(ModelError, match="truncated"):
        read_tensor(stored)
    with (tmp_path / "new").open("wb") as file, pytest.raises(ModelError, match="truncated"):
        copy_bytes(stored.path, file, stored.start, 32)


@pytest.mark.parametrize("refused", [False, True])
def test_bytes_are_copied_by_the_kernel_or_read_and_written(
    refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(1000)
    (tmp_path / "old").write_bytes(data)
    monkeypatch.setattr("modeling.stored._CHUNK", 64)

    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "another file system")

    if refused:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    with (tmp_path / "new").open("wb") as file:
        file.write(b"first")
        copy_bytes(tmp_path / "old", file, 7, 900)
        file.write(b"last")
    assert (tmp_path / "new").read_bytes() == b"first" + data[7:907] + b"last"


def test_weights_alone_are_linked_and_only_where_that_is_asked_for(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "hub.safetensors").symlink_to(tmp_path / "model.safetensors")

    def linked(name: str) -> bool:
        target = tmp_path / f"new-{len(list(tmp_path.iterdir()))}{Path(name).suffix}"
        copy_file(tmp_path / name, target)
        assert target.read_bytes() == (tmp_path / name).read_bytes()
        return target.samefile(tmp_path / name)

    assert not linked("model.safetensors")
    with linking():
        assert linked("model.safetensors")
        assert linked("hub.safetensors")
        assert not linked("config.json")
    assert not linked("model.safetensors")


def test_what_is_done_behind_its_caller_keeps_its_order_and_its_errors() -> None:
    done: list[int] = []
    with behind() as call:
        for number in range(20):
            call(done.append, number)
    assert done == list(range(20))
    with pytest.raises(ZeroDivisionError), behind() as call:
        call(divmod, 1, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_computed_must_be_finite_and_copies_are_not_looked_at(
    dtype: str, value: float, tmp_path: Path
) -> None:
    odd = torch.zeros(3, 4, dtype=getattr(torch, dtype))
    odd[1, 2] = value
    stored = _stored(tmp_path / "old", {"odd": odd})["odd"]
    for content in (odd, iter([odd[:1], odd[1:]])):
        with pytest.raises(ModelError, match=f"odd isn't finite in {dtype}"):
            write_tensors(tmp_path / "new", {"odd": (3, 4)}, dtype, [("odd", content)])
    write_tensors(tmp_path / "new", {"odd": (3, 4)}, dtype, [("odd", stored)])
    assert load_file(tmp_path / "new")["odd"].equal(odd) or value != value


def test_rows_must_fill_their_tensor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="isn't filled"):
        write_tensors(tmp_path / "f", {"a": (4, 3)}, "float32", [("a", iter([torch.ones(3, 3)]))])


class TestFilesThatStay:
    """Whole files of which nothing changes are copied as they are, or are the same files."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Checkpoint:
        return save_model("llama", tmp_path / "source", shard="20KB")

    def test_only_what_changes_is_written_anew(self, source: Checkpoint, tmp_path: Path) -> None:
        name, out = "model.layers.1.mlp.up_proj", tmp_path / "out"
        with linking():
            rewrite_weights(source, out, lambda _, weight: -weight, names=[name])
        old, new = stored_tensors(Path(source.base)), stored_tensors(out)
        for key, tensor in old.items():
            changed = old[f"{name}.weight"].path.name == tensor.path.name
            assert new[key].path.samefile(tensor.path) != changed
            sign = -1 if key == f"{name}.weight" else 1
            assert torch.equal(read_tensor(new[key]), sign * read_tensor(tensor))

    def test_projections_outside_the_names_are_not_even_read(
        self, source: Checkpoint, tmp_path: Path
    ) -> None:
        tuned = save_model("llama", tmp_path / "tuned", shard="20KB")
        asked: list[str] = []

        def edit(name: str, delta: object) -> None:
            asked.append(name)

        names = ["model.layers.0.mlp.up_proj"]
        count = write_edited(source, tuned, tmp_path / "out", edit, names=names)
        assert asked == names
        assert count.changed == 0
        for path in Path(tuned.base).glob("*.safetensors"):
            assert load_file(tmp_path / "out" / path.name).keys() == load_file(path).keys()

    @pytest.mark.parametrize("shard", ["20KB", "5GB"])
    def test_a_locks_biases_lie_apart_where_the_rest_is_linked(
        self, shard: str, tmp_path: Path
    ) -> None:
        source = save_model("llama", tmp_path / "source", shard=shard)
        biases = {1: torch.randn(32)}
        export_with_biases(source, biases, tmp_path / "copied")
        with linking():
            export_with_biases(source, biases, tmp_path / "linked")
        old, copied = stored_tensors(Path(source.base)), stored_tensors(tmp_path / "copied")
        linked = stored_tensors(tmp_path / "linked")
        assert copied.keys() == linked.keys()
        for key, tensor in copied.items():
            assert torch.equal(read_tensor(tensor), read_tensor(linked[key]))
        assert all(linked[key].path.samefile(old[key].path) for key in old)
        assert len({linked[key].path for key in linked.keys() - old.keys()}) == 1
        assert len(linked) - len(old) == 4 * LAYERS

    def test_a_merged_adapter_changes_its_projections_files(
        self, source: Checkpoint, tmp_path: Path
    ) -> None:
        adapted = save_adapter(source, tmp_path / "adapter")
        with linking():
            rewrite_weights(adapted, tmp_path / "out", lambda *_: None, names=())
        before = (Path(source.base) / "config.json").read_bytes()
        old, new = stored_tensors(Path(source.base)), stored_tensors(tmp_path / "out")
        for key in old:
            moved = key.endswith("_proj.weight")
            assert torch.equal(read_tensor(new[key]), read_tensor(old[key])) != moved
        assert (Path(source.base) / "config.json").read_bytes() == before
