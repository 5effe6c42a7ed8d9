"""FGSN's continual projection: dimensions one after another, and runs that go on from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from defenses.base import Models
from defenses.fgsn import FGSN
from defenses.fgsn.union import FOLDER
from modeling.checkpoint import Checkpoint
from settings import ModelError, SettingError
from tests.defenses.fgsn_runs import (
    CATEGORIES,
    fgsn,
    prompt_calibration,
    repair,
    same_weights,
    union_of,
    weights_of,
)


@pytest.fixture(scope="module")
def artefact(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact")
    fgsn(layers="auto").prepare(models, prompt_calibration(), folder)
    return folder


@pytest.mark.parametrize("granularity", ["row", "weight"])
def test_the_result_depends_on_the_union_alone(
    artefact: Path, attacked: Checkpoint, models: Models, tmp_path: Path, granularity: str
) -> None:
    orders = [CATEGORIES, CATEGORIES[::-1], (*CATEGORIES[1:], CATEGORIES[0])]
    edits = [
        repair(
            artefact, attacked, tmp_path / str(at), models,
            dimensions=order, granularity=granularity, q=0.2,
        )
        for at, order in enumerate(orders if granularity == "row" else orders[:2])
    ]  # fmt: skip
    for other in edits[1:]:
        assert same_weights(other.defended, edits[0].defended)
        assert other.parameters_edited == edits[0].parameters_edited
    shares = [[step["share"] for step in edit.diagnostics["steps"]] for edit in edits]
    assert len({tuple(share) for share in shares}) > 1


@pytest.mark.parametrize("rescore", [False, True])
def test_steps_edit_new_neurons_alone(
    artefact: Path, attacked: Checkpoint, models: Models, tmp_path: Path, rescore: bool
) -> None:
    out = tmp_path / "out"
    edit = repair(artefact, attacked, out, models, dimensions=CATEGORIES, rescore=rescore)
    assert [step.name for step in edit.steps] == list(CATEGORIES)
    folders = [Path(str(step.checkpoint.adapter)) for step in edit.steps]
    assert folders == [out / "steps" / "0-theft", out / "steps" / "1-fraud", out]
    assert edit.steps[-1].checkpoint == edit.defended
    assert sum(step.parameters_edited for step in edit.steps) == edit.parameters_edited
    models_in_order = [weights_of(step.checkpoint) for step in edit.steps]
    seen = {name: torch.zeros(len(w), dtype=torch.bool) for name, w in models_in_order[0].items()}
    previous = weights_of(attacked)
    for step, weights in zip(edit.steps, models_in_order, strict=True):
        scalars = 0
        for name, weight in weights.items():
            changed = ~torch.isclose(weight, previous[name], atol=1e-6, rtol=0).all(1)
            assert not (changed & seen[name]).any()
            seen[name] |= changed
            scalars += int(changed.sum()) * weight.shape[1]
        assert scalars == step.parameters_edited
        previous = weights
    union = union_of(edit, models)
    assert all(torch.equal(union.mask(name), mask) for name, mask in seen.items())


def test_rescoring_scores_and_edits_the_model_of_the_step_before(
    artefact: Path, attacked: Checkpoint, models: Models, tmp_path: Path
) -> None:
    one, two = CATEGORIES[:2]
    both = repair(
        artefact, attacked, tmp_path / "both", models, dimensions=(one, two), rescore=True
    )
    first = repair(artefact, attacked, tmp_path / "first", models, dimensions=(one,))
    then: dict[str, Any] = {"dimensions": (two,), "continue_from": str(tmp_path / "first")}
    second = repair(artefact, first.defended, tmp_path / "second", models, **then)
    assert same_weights(both.defended, second.defended)
    fixed = repair(artefact, attacked, tmp_path / "fixed", models, dimensions=(one, two))
    assert not same_weights(both.defended, fixed.defended)
    # Continued on the very model that the earlier run repaired, it goes on from the repaired one.
    resumed = repair(artefact, attacked, tmp_path / "resumed", models, **then, rescore=True)
    assert same_weights(resumed.defended, both.defended)
    assert resumed.parameters_edited == both.parameters_edited


@pytest.mark.parametrize("inside", [".", FOLDER])
def test_a_later_run_continues(
    artefact: Path, attacked: Checkpoint, models: Models, tmp_path: Path, inside: str
) -> None:
    one, two, three = CATEGORIES
    whole = repair(artefact, attacked, tmp_path / "whole", models, dimensions=CATEGORIES)
    repair(artefact, attacked, tmp_path / "first", models, dimensions=(one, two))
    continued = repair(
        artefact, attacked, tmp_path / "second", models,
        dimensions=(three,), continue_from=str(tmp_path / "first" / inside),
    )  # fmt: skip
    assert same_weights(continued.defended, whole.defended)
    assert continued.parameters_edited == whole.parameters_edited
    last = whole.diagnostics["steps"][-1]
    assert continued.diagnostics["steps"] == [last]


def test_a_second_pass_over_the_union_changes_nothing(
    artefact: Path, attacked: Checkpoint, models: Models, tmp_path: Path
) -> None:
    first = repair(artefact, attacked, tmp_path / "first", models)
    again = {"continue_from": str(tmp_path / "first")}
    same = repair(artefact, attacked, tmp_path / "same", models, **again)
    assert same_weights(same.defended, first.defended)
    assert same.diagnostics["selected"] == 0
    # On the repaired model other neurons may score high; with all of them taken there are none.
    everything = {"q": 1.0, "p": 0.0}
    full = repair(artefact, attacked, tmp_path / "full", models, **everything)
    pass_two = repair(
        artefact, full.defended, tmp_path / "two", models,
        **everything, continue_from=str(tmp_path / "full"),
    )  # fmt: skip
    assert same_weights(pass_two.defended, full.defended)
    assert pass_two.parameters_edited == 0


def test_continuing_the_same_model_needs_the_same_projection(
    artefact: Path, attacked: Checkpoint, models: Models, tmp_path: Path
) -> None:
    repair(artefact, attacked, tmp_path / "first", models)
    with pytest.raises(SettingError, match=r"with norm=fro; set defense\.norm to that"):
        repair(
            artefact, attacked, tmp_path / "second", models,
            norm="in", continue_from=str(tmp_path / "first"),
        )  # fmt: skip
    (tmp_path / "first" / FOLDER).rename(tmp_path / FOLDER)
    with pytest.raises(ModelError, match=r"holds none; set defense\.continue_from"):
        repair(
            artefact, attacked, tmp_path / "third", models,
            rescore=True, continue_from=str(tmp_path / FOLDER),
        )  # fmt: skip


def test_what_is_continued_from_counts_by_its_content(
    artefact: Path, attacked: Checkpoint, models: Models, tmp_path: Path
) -> None:
    dumped = []
    for q in (0.2, 0.4):
        repair(artefact, attacked, tmp_path / str(q), models, q=q)
        (tmp_path / str(q)).rename(tmp_path / "model")
        settings = fgsn(continue_from=str(tmp_path / "model"))
        dumped.append(settings.model_dump(mode="json")["continue_from"])
        (tmp_path / "model").rename(tmp_path / str(q))
    assert dumped[0] != dumped[1]
    assert FGSN().model_dump()["continue_from"] is None
