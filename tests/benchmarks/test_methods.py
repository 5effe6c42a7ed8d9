"""The benchmark of the methods runs both sides on what they say they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import literal, ours
from benchmarks.inputs import Inputs, Sizes, make_inputs
from benchmarks.methods import cost_of, works
from defenses.fgsn.project import Projection, edit_neurons
from defenses.nlsr.masks import load_masks
from modeling.lora import open_adapter


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    sizes = Sizes(width=128, blocks=1, rank=8, rows=4, length=8, pairs=4)
    return make_inputs(tmp_path_factory.mktemp("inputs"), sizes, None)


def test_every_row_has_a_step_that_runs(inputs: Inputs) -> None:
    for name, work in works().items():
        if not name.startswith("SafetyLock"):
            assert cost_of(work.ours, inputs, 1).seconds > 0, name
        if work.literal is not None:
            assert cost_of(work.literal, inputs, 1).seconds > 0, name
        assert (work.official is None) == (work.literal is not None), name


def test_masks_and_matrices_are_those_of_the_inputs(inputs: Inputs) -> None:
    reference = open_adapter(inputs.folder / "reference", "the reference")
    name = reference.names[0]
    a, b = load_masks(inputs.folder / "masks.safetensors", reference, [name], "cpu")
    assert torch.equal(a[0], inputs.masks()[name][0])
    assert torch.equal(b[0], inputs.masks()[name][1])
    d, delta, mask = ours.matrices(inputs, ("LoRA", "dense"))
    new = edit_neurons(lambda: d, delta, mask, Projection("project", "fro"))
    dense = d.b @ d.a
    expected = torch.where(mask[:, None], dense @ dense.T / dense.norm() @ delta, delta)
    torch.testing.assert_close(new, expected, rtol=1e-3, atol=1e-3)
    assert literal.fgsn(inputs, ("LoRA", "dense"))() is None


def test_a_clone_that_lacks_a_file_is_named(inputs: Inputs, tmp_path: Path) -> None:
    from benchmarks import official

    asked = Inputs(inputs.folder, inputs.sizes, tmp_path)
    with pytest.raises(SystemExit, match=r"has no model\.py; clone SafeLoRA there"):
        official.safelora(asked, 16, 0.0)
