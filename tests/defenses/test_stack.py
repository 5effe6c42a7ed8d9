"""Stacks: what the parts together do, what their order may be, what their keys depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defenses.base import Calibration, Defense, Edit, Models, OutputForm
from defenses.nlsr import NLSR
from defenses.none import NoDefense
from defenses.safetylock import SafetyLock
from defenses.stack import Stack
from modeling.checkpoint import Checkpoint
from modeling.lora import LoraAdapter, LoraPair, open_adapter, rewrite_adapter
from settings import ModelError, SettingError
from tests.defenses.tiny_lora_models import NumberCalibration


class Scale(Defense):
    """Multiplies B by what its own `prepare` wrote."""

    needs: ClassVar[frozenset[str]] = frozenset({"safety_prompts"})

    factor: float
    extra: int = 0

    def prepare_settings(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        (out / "factor").write_text(str(self.factor))
        return {"factor": self.factor}

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        factor = float((artefact / "factor").read_text())
        victim = open_adapter(str(attacked.adapter), "the attacked model")

        def edit(name: str, pair: LoraPair) -> LoraPair:
            return replace(pair, b=pair.b * factor)

        rewrite_adapter(victim, out, edit)
        # What a part keeps of its own steps is no part of a stack's result.
        (out / "steps" / "inner").mkdir(parents=True)
        (out / "steps" / "inner" / "weights").write_text("large")
        edited = sum(pair.b.numel() for _, pair in victim.pairs())
        shown = {"name": "heat", "values": [[factor]]}
        return Edit(
            replace(attacked, adapter=str(out)),
            edited,
            edited * 10,
            ("q_proj", f"times-{factor}"),
            {"factor": factor, "maps": [shown]},
            diagnostic_seconds=0.25,
        )


class Other(Scale):
    """The same settings in another class."""


class Merges(NoDefense):
    output_form: ClassVar[OutputForm] = "weights"


class Turns(NoDefense):
    output_form: ClassVar[OutputForm] = "adapter"


def stack(*parts: Defense) -> Stack:
    names = tuple(type(part).__name__.lower() for part in parts)
    built = Stack.validated({"order": names, "parts": parts}, "defense")
    assert isinstance(built, Stack)
    return built


def matrices(adapter: LoraAdapter) -> dict[str, torch.Tensor]:
    return {name: pair.b for name, pair in adapter.pairs()}


@pytest.fixture
def applied(
    models: Models,
    attacked: Checkpoint,
    calibration: Callable[..., NumberCalibration],
    tmp_path: Path,
) -> Callable[..., Edit]:
    def run(*parts: Defense) -> Edit:
        together = stack(*parts)
        (tmp_path / "artefact").mkdir()
        together.prepare(models, calibration(), tmp_path / "artefact")
        return together.apply(tmp_path / "artefact", attacked, tmp_path / "out", models)

    return run


def test_each_part_edits_what_the_one_before_left(
    applied: Callable[..., Edit], attacked: Checkpoint, tmp_path: Path
) -> None:
    edit = applied(Scale(factor=2.0), NoDefense(), Other(factor=-3.0))
    assert edit.defended == replace(attacked, adapter=str(tmp_path / "out"))
    before = matrices(open_adapter(str(attacked.adapter), "attacked"))
    for step, factor in zip(edit.steps, (2, 2, -6), strict=True):
        left = matrices(open_adapter(str(step.checkpoint.adapter), "step"))
        assert left.keys() == before.keys()
        for name, b in before.items():
            assert torch.equal(left[name], b * factor)
    assert [step.name for step in edit.steps] == ["scale", "nodefense", "other"]
    assert edit.steps[0].checkpoint == edit.steps[1].checkpoint
    assert edit.steps[-1].checkpoint == edit.defended


def test_the_edit_tells_the_parts_apart(applied: Callable[..., Edit], tmp_path: Path) -> None:
    edit = applied(Scale(factor=2.0), Scale(factor=3.0))
    once = edit.steps[0].parameters_edited
    assert (edit.parameters_edited, edit.parameters_total) == (2 * once, 10 * once)
    assert edit.modules == ("q_proj", "times-2.0", "times-3.0")
    first, second = edit.diagnostics["parts"]
    assert first["diagnostics"] == {"factor": 2.0}
    assert second["modules"] == ["q_proj", "times-3.0"]
    assert [shown["name"] for shown in edit.diagnostics["maps"]] == ["1-scale_heat", "2-scale_heat"]
    assert edit.diagnostic_seconds == 0.5
    assert not list((tmp_path / "out").rglob("inner"))


def test_a_stack_of_nothing_is_the_attacked_model(
    applied: Callable[..., Edit], attacked: Checkpoint
) -> None:
    edit = applied(NoDefense(), NoDefense())
    assert edit.defended == attacked
    assert [step.checkpoint for step in edit.steps] == [attacked, attacked]


@given(st.permutations([NLSR(), SafetyLock(), NoDefense(), Scale(factor=1.0), Scale(factor=2.0)]))
def test_the_refused_orders_are_those_with_an_adapters_repair_after_merging(
    parts: list[Defense],
) -> None:
    if parts.index(NLSR()) < parts.index(SafetyLock()):
        assert stack(*parts).needs == {"prompts", "safety_pairs", "safety_prompts"}
        return
    with pytest.raises(SettingError) as caught:
        stack(*parts)
    names = str(caught.value).partition("write defense.order=[")[2].rstrip("]").split(",")
    assert sorted(names) == sorted(type(part).__name__.lower() for part in parts)
    assert names.index("nlsr") < names.index("safetylock")


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ((), "defense.order is empty"),
        ((Turns(), NLSR()), r"adapter in other coordinates; write defense.order=\[nlsr,turns\]"),
        ((Merges(), NoDefense(), NLSR()), r"full weights; write .*=\[nlsr,merges,nodefense\]"),
        (
            (SafetyLock(form="hooked"), Scale(factor=1.0)),
            r"hooks steer, which scale can't edit any further; write .*=\[scale,safetylock\]",
        ),
        ((NoDefense(), stack(NoDefense())), "can't hold a stack"),
    ],
    ids=["empty", "coordinates", "merged", "hooked", "nested"],
)
def test_orders_that_cannot_work_are_refused(parts: tuple[Defense, ...], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        stack(*parts)


def test_what_a_part_cannot_work_on_is_refused_where_only_apply_shows_it(
    models: Models, attacked: Checkpoint, tmp_path: Path
) -> None:
    class Surprises(NoDefense):
        output_form: ClassVar[None] = None

        def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
            return Edit(models.base, 1, 1)

    together = stack(Surprises(), NLSR())
    with pytest.raises(SettingError, match="put nlsr before surprises"):
        together.apply(tmp_path, attacked, tmp_path / "out", models)


def test_a_part_that_returns_no_edit_is_named(
    models: Models, attacked: Checkpoint, tmp_path: Path
) -> None:
    class Forgets(NoDefense):
        def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
            return None  # type: ignore[return-value]

    with pytest.raises(ModelError, match=r"Forgets\.apply returned None; return a defenses\.base"):
        stack(Forgets()).apply(tmp_path, attacked, tmp_path / "out", models)


def test_a_stack_leaves_what_its_last_change_of_form_left() -> None:
    assert stack(NLSR(), SafetyLock(), NoDefense()).output_form == "weights"
    assert stack(NLSR(), NoDefense()).output_form == "same"
    assert stack(Scale(factor=1.0)).output_form is None
    assert stack(NLSR(), NoDefense()).needs_resumed_adapter
    assert not stack(SafetyLock(), NoDefense()).needs_resumed_adapter


def test_a_stacks_settings_hold_its_parts_classes_and_settings() -> None:
    different = [
        stack(Scale(factor=1.0)),
        stack(Scale(factor=2.0)),
        stack(Other(factor=1.0)),
        stack(Scale(factor=1.0), Other(factor=1.0)),
        stack(Other(factor=1.0), Scale(factor=1.0)),
    ]
    for dump in (lambda s: s.model_dump(mode="json")["parts"], lambda s: s.prepare_settings()):
        assert len({repr(dump(built)) for built in different}) == len(different)


def test_what_only_a_parts_apply_reads_is_no_part_of_what_is_prepared() -> None:
    one, other = (stack(NLSR(), Scale(factor=1.0, extra=extra)) for extra in (0, 1))
    assert one.prepare_settings() == other.prepare_settings()
    assert one.model_dump() != other.model_dump()
