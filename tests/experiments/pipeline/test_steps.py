"""Repairs in several steps through the real command: measured, recorded, reused, tracked."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest

from defenses.base import Calibration, Defense, Edit, EditStep, Models
from defenses.reset import Reset
from defenses.stack import Stack
from evaluation.judges.keyword import KeywordJudge
from experiments.config.experiment import PROJECT
from experiments.pipeline.steps.base import Model, checkpoint_at, identity, known_models, place
from experiments.pipeline.steps.defense import Apply
from experiments.pipeline.steps.measuring import JudgeAnswers
from experiments.report.__main__ import main as report
from experiments.results.record import Record
from experiments.store import StageResult
from experiments.tracking.wandb_fields import summary
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from settings import ModelError, SettingError, source
from tests.experiments.composing import composed
from tests.experiments.conftest import SHORT, Command

LABEL = "step 1: nlsr"


class Roundabout(Defense):
    """Goes by the attacked and the aligned model to a copy of the aligned adapter."""

    needs: ClassVar[frozenset[str]] = frozenset()

    outside: bool = False
    unfinished: bool = False
    absent: bool = False

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        return {}

    def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
        folder = out.parent.parent / "elsewhere" if self.outside else out
        if self.absent:
            return Edit(Checkpoint(str(out / "nothing")), 0, 1000)
        shutil.copytree(str(models.aligned.adapter), folder, dirs_exist_ok=True)
        defended = replace(attacked, adapter=str(folder))
        last = attacked if self.unfinished else defended
        steps = (
            EditStep("wait", attacked, 0),
            EditStep("go back", models.aligned, 40),
            EditStep("end", last, 2),
        )
        return Edit(defended, 42, 1000, steps=steps)


ROUNDABOUT = (
    "defense=none",
    "plugins=[tests]",
    "defense._target_=tests.experiments.pipeline.test_steps.Roundabout",
)


def test_every_part_of_a_stack_is_measured(command: Command) -> None:
    run = command("defense=stack", "defense.order=[nlsr,safetylock]")
    assert run.code == 0, run.err
    record = Record.read(run.folder)
    assert list(record.metrics) == ["base", "aligned", "attacked", LABEL, "defended"]
    first, second = record.steps
    assert (first["name"], first["model"]) == ("nlsr", LABEL)
    assert (second["name"], second["model"]) == ("safetylock", "defended")
    total = record.cost["parameters_total"]
    assert first["share"] == first["parameters_edited"] / total > 0
    assert record.cost["parameters_edited"] == sum(s["parameters_edited"] for s in record.steps)
    parts = record.defense["apply"]["parts"]
    assert [part["name"] for part in parts] == ["nlsr", "safetylock"]
    assert "similarity" in parts[0]["diagnostics"]
    assert all(part["seconds"] > 0 for part in parts)

    rows = pd.read_parquet(run.folder / "rows.parquet")
    harmful = rows[(rows["model"] == LABEL) & (rows["set"] == "harmful")]
    assert len(harmful) == 12
    for category, group in harmful.groupby("category"):
        expected = (group["harm_label"] != "safe").mean()
        assert record.metrics[LABEL][f"hs/{category}"]["value"] == pytest.approx(expected)
    tracked = summary(record)
    assert tracked[f"{LABEL}/hs"] == record.metrics[LABEL]["hs"]["value"]
    assert tracked["steps/1/share"] == first["share"]

    for line in ("newly edited", "0: attacked", "1: nlsr", "2: safetylock"):
        assert line in run.out
    assert report([str(run.folder)]) == 0
    assert len(pd.read_csv(run.folder / "report" / "steps.csv")) == 3
    drawn = (run.folder / "report" / "steps_stack.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")


def test_the_model_after_a_step_is_the_part_alone(command: Command) -> None:
    alone = Record.read(command("defense=nlsr").folder)
    together = Record.read(command("defense=stack", "defense.order=[nlsr,safetylock]").folder)
    step, defended = together.metrics[LABEL], alone.metrics["defended"]
    assert step.keys() == defended.keys()
    assert step == defended


@pytest.mark.slow
def test_steps_are_found_again_where_the_store_has_moved(command: Command, tmp_path: Path) -> None:
    order = (*SHORT, "defense=stack", "defense.order=[reset,safetylock]")
    order += ("sources.benign=null", "sources.over_refusal=null")
    hooked = "+defense.settings.safetylock.form=hooked"
    run = command(*order, hooked, f"store.root={tmp_path / 'store'}")
    assert run.code == 0, run.err
    first = Record.read(run.folder)
    (tmp_path / "store").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "generate")
    again = Record.read(command(*order, hooked, f"store.root={tmp_path / 'moved'}").folder)
    assert again.models == first.models
    assert again.metrics == first.metrics
    made = {stage["name"] for stage in again.stages if not stage["reused"]}
    assert made == {"generate"}
    # The hooks steer the repaired adapter, not the attacked one.
    apply = next((tmp_path / "moved" / "apply").iterdir())
    manifest = json.loads((apply / "stage.json").read_text())
    assert manifest["report"]["defended"] == {
        "base": "attacked:",
        "adapter": "model/steps/1-reset",
        "steering": "model",
    }


def test_a_model_that_a_step_left_as_it_was_is_not_measured_again(command: Command) -> None:
    run = command(*ROUNDABOUT)
    assert run.code == 0, run.err
    record = Record.read(run.folder)
    models, metrics = record.models, record.metrics
    assert models["step 1: wait"] == models["attacked"] != models["defended"]
    assert models["step 2: go back"] == models["aligned"]
    assert metrics["step 1: wait"] == metrics["attacked"]
    assert metrics["step 2: go back"] == metrics["aligned"] == metrics["defended"]
    assert [step["share"] for step in record.steps] == [0, 0.04, 0.002]


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [("outside", "lies neither in its own folder"), ("unfinished", "(end) isn't the model")],
)
def test_a_defense_whose_models_cannot_be_kept_is_told_so(
    command: Command, flag: str, sentence: str
) -> None:
    run = command(*ROUNDABOUT, f"+defense.{flag}=true")
    assert run.code == 1
    assert sentence in run.err
    assert run.err.count("\n") == 1


def test_a_model_that_is_not_there_is_not_kept(command: Command) -> None:
    for _ in range(2):
        run = command(*ROUNDABOUT, "+defense.absent=true")
        assert run.code == 1
        assert "Roundabout.apply returned an Edit with a model whose base=" in run.err
        assert "is not a folder; give a model folder" in run.err


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (lambda out, models: None, "apply returned None; return a defenses.base.Edit"),
        (lambda out, models: Edit(out, 0, 1), "give a modeling.checkpoint.Checkpoint"),
        (
            lambda out, models: Edit(Checkpoint(copied(models, out)), 0, 1),
            "holds an adapter; give it as the checkpoint's adapter",
        ),
        (
            lambda out, models: Edit(replace(models.aligned, steering=str(out)), 0, 1),
            "is not a folder; write it by modeling.steering.save_steering",
        ),
    ],
)
def test_what_apply_returns_is_looked_at(
    returned: Callable[[Path, Models], Any], sentence: str, tmp_path: Path
) -> None:
    class Careless(Roundabout):
        def apply(self, artefact: Path, attacked: Checkpoint, out: Path, models: Models) -> Edit:
            return returned(out, models)

    organism = PROJECT / "organism" / "weights"
    base = Model(Checkpoint(str(organism / "base")), "b", PromptStyle())
    aligned = replace(base, checkpoint=replace(base.checkpoint, adapter=str(organism / "aligned")))
    prepared = StageResult("prepare", "p", tmp_path, {}, 0.0, reused=False)
    with pytest.raises(ModelError, match=re.escape(sentence)):
        Apply(Careless(), prepared, aligned, aligned, base).run(tmp_path)


def copied(models: Models, out: Path) -> str:
    return str(shutil.copytree(str(models.aligned.adapter), out))


def test_a_repair_in_one_step_has_no_steps_and_old_records_are_read(command: Command) -> None:
    run = command("defense=none")
    assert Record.read(run.folder).steps == []
    assert "newly edited" not in run.out
    path = run.folder / "record.json"
    content = json.loads(path.read_text())
    del content["steps"]
    path.write_text(json.dumps(content))
    assert Record.read(run.folder).steps == []
    assert report([str(run.folder)]) == 0
    assert not list((run.folder / "report").glob("steps*"))


@pytest.mark.parametrize(
    "checkpoint",
    [
        Checkpoint("hub/base", "/attacked", "main", "bfloat16"),
        Checkpoint("hub/base", "/stage/model", "main", "bfloat16"),
        Checkpoint("/stage/model/steps/1", None, None, "bfloat16", "/stage/model"),
        Checkpoint("hub/base", "/stage/model/steps/1", "main", "bfloat16", "/stage/model"),
        Checkpoint("hub/base", "/aligned", "main", "bfloat16", "/stage/model"),
        Checkpoint("hub/base", None, "main", "bfloat16"),
    ],
)
def test_a_place_leads_back_to_its_checkpoint(checkpoint: Checkpoint) -> None:
    base = Checkpoint("hub/base", None, "main", "bfloat16")
    known = known_models(
        Models(base, replace(base, adapter="/aligned")), replace(base, adapter="/attacked")
    )
    places = place(checkpoint, Path("/stage"), known)
    assert json.loads(json.dumps(places)) == places
    assert checkpoint_at(places, Path("/stage"), known) == checkpoint
    with pytest.raises(ModelError, match="neither"):
        place(replace(checkpoint, steering="/else"), Path("/stage"), known)


def test_a_stack_is_built_from_its_parts_files_presets_and_overrides() -> None:
    experiment = composed(
        "defense=stack", "defense.order=[nlsr,safetylock]", "+defense.settings.safetylock.alpha=2"
    )
    alone = composed("defense=safetylock", "defense.alpha=2").defense
    nlsr, lock = experiment.defense.parts
    assert nlsr == composed("defense=nlsr").defense
    assert lock == alone
    assert experiment.resolved["defense"]["settings"]["safetylock"]["alpha"] == 2
    assert experiment.resolved["defense"]["settings"]["nlsr"]["sparsity"] == 0.8
    changed = composed("defense=stack", "+defense.settings.safetylock.alpha=3").defense
    assert identity(changed) != identity(experiment.defense)
    assert changed.prepare_settings() == experiment.defense.prepare_settings()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["defense.order=[]"], "defense.order is empty"),
        (["defense.order=nlsr"], "write defense.order="),
        (["defense.order=[nlsr,safetylok]"], "'safetylok' is unknown; did you mean safetylock?"),
        (["defense.order=[nlsr,stack]"], "can't hold a stack"),
        (["defense.order=[safetylock,nlsr]"], "write defense.order=[nlsr,safetylock]"),
        (["+defense.settings.saftylock.alpha=1"], "did you mean safetylock?"),
        (
            ["+defense.settings.safetylock.alhpa=1"],
            "did you mean defense.settings.safetylock.alpha?",
        ),
        (["+defense.settings.safetylock.k=0"], "defense.settings.safetylock.k=0 is not allowed"),
        (["+defense.alpha=1"], "+defense.settings.NAME.alpha"),
    ],
)
def test_stacks_that_cannot_be_built_are_refused_in_a_sentence(
    overrides: list[str], sentence: str
) -> None:
    with pytest.raises(SettingError) as caught:
        composed("defense=stack", *overrides)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


class OutsideJudge(KeywordJudge):
    """A judge that isn't this project's."""


def test_keys_hold_the_code_of_classes_from_outside() -> None:
    made = StageResult("generate", "k", Path(), {}, 0.0, reused=False)
    model = Model(Checkpoint("base"), "m", PromptStyle())
    unread: Any = None

    def settings(defense: Defense, judge: KeywordJudge) -> list[Mapping[str, Any]]:
        apply = Apply(defense, made, model, model, model)
        return [apply.stage.settings, JudgeAnswers(judge, unread, made).stage.settings]

    outside = settings(Roundabout(), OutsideJudge())
    assert [each["source"] for each in outside] == [source(Roundabout())["source"]] * 2
    stacked = Stack(order=("reset", "mine"), parts=(Reset(), Roundabout()))
    assert settings(stacked, KeywordJudge())[0]["source"] == source(Roundabout())["source"]
    assert all("source" not in each for each in settings(Reset(), KeywordJudge()))
