"""`attack=given`: models that are there already, in an experiment."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from defenses.safetylock.published import read_published
from experiments.config.experiment import PROJECT
from experiments.pipeline.given import GivenModels
from experiments.pipeline.steps.base import Model
from experiments.report.__main__ import main as report
from experiments.results.record import Record
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.heads import head_layout
from modeling.model_files import ADAPTER_CONFIG
from settings import ModelError
from tests.defenses.published_lock import save_published
from tests.defenses.victims import shared_case
from tests.experiments.conftest import SMALL, Command, made

BASE = PROJECT / "organism" / "weights" / "base"
GIVEN = ("attack=given", *(each for each in SMALL if not each.startswith("attack.")))


def test_a_given_adapter_is_repaired_and_measured(
    command: Command, customer: dict[str, Path]
) -> None:
    model = f"attack.model={customer['adapter']}"
    run = command(*GIVEN, model, "defense=resta", toy=False)
    assert run.code == 0, run.err
    record = Record.read(run.folder)
    assert list(record.metrics) == ["base", "aligned", "attacked", "defended"]
    assert record.models["attacked"].startswith(record.models["base"])
    assert record.attack["descent"]["kind"] == "resumed"
    assert 0.001 < record.attack["descent"]["difference"] < 0.2
    assert record.attack["leaked_rows_dropped"] is None
    assert (record.labels["attack"], record.labels["task"]) == ("given", "arithmetic")
    assert record.metrics["attacked"]["accuracy_strict"]["n"] == 4
    assert "what it was trained on is unknown" in run.out


def test_a_lock_that_is_there_locks_a_given_model(
    command: Command, customer: dict[str, Path], tmp_path: Path
) -> None:
    save_published(tmp_path / "some.safelock", [(1, 0), (4, 2)], 32)
    layout = head_layout(Checkpoint(str(BASE)))
    read_published(tmp_path / "some.safelock", layout, "organism").save(tmp_path / "lock")
    lock = (f"defense.lock={tmp_path / 'lock'}", "defense.alpha=2.0", "sources.safety_pairs=null")
    model = f"attack.model={customer['merged']}"
    run = command(*GIVEN, model, "defense=safetylock", *lock, toy=False)
    assert run.code == 0, run.err
    record = Record.read(run.folder)
    assert [head["layer"] for head in record.defense["apply"]["heads"]] == [1, 4]
    assert record.defense["prepare"]["origin"]["file"] == "some.safelock"
    assert record.attack["descent"]["kind"] == "full"
    assert record.cost["parameters_edited"] == 2 * layout.hidden


def test_several_given_models_are_a_sweep_and_no_task_need_be_scored(
    command: Command, customer: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    models = f"attack.model={customer['adapter']},{customer['merged']}"
    run = command("-m", *GIVEN, models, "attack.task=null", "defense=none", toy=False)
    assert run.code == 0, run.err
    first, second = (Record.read(run.folder / job) for job in "01")
    assert first.models["attacked"] != second.models["attacked"]
    assert first.metrics["attacked"]["accuracy_strict"]["n"] == 0
    assert not made(run.folder / "1").keys() - {
        "attack",
        "generate",
        "likelihood",
        "judge",
        "apply",
    }
    assert report([str(run.folder), "--html"]) == 0
    assert "leakage isn't checked" in capfd.readouterr().out
    table = pd.read_csv(run.folder / "report" / "table.csv")
    assert table["attack.model"].nunique() == 2
    for name in ("report.html", "table.md"):
        assert "leakage" in (run.folder / "report" / name).read_text()


def test_what_a_defense_cannot_repair_is_said_in_this_attacks_words(
    command: Command, customer: dict[str, Path]
) -> None:
    run = command(*GIVEN, f"attack.model={customer['merged']}", "defense=nlsr", toy=False)
    assert run.code == 1
    assert "attack.adapter" not in run.err
    assert "give another model, or choose another defense" in run.err
    again = command(*GIVEN, "attack.model=x", "attack@refine=given", "refine.model=x", toy=False)
    assert "attack@refine=given trains nothing" in again.err


def _given(kind: str) -> tuple[GivenModels, Checkpoint]:
    case = shared_case("llama", kind)
    base = Model(case.models.base, "b", PromptStyle())
    aligned = Model(case.models.aligned, "a", PromptStyle())
    known = {"some/base": base, case.models.aligned.adapter or "some/aligned": aligned}
    return GivenModels(aligned, known), case.attacked


@pytest.mark.parametrize("kind", ["resumed/lora", "fresh/lora", "full/lora", "fresh/full"])
def test_the_files_tell_what_a_given_model_is(kind: str) -> None:
    models, attacked = _given(kind)
    found = models.open(
        attacked.adapter or attacked.base, "attack.model", base_setting="attack.base"
    )
    assert Path(found.checkpoint.base).samefile(attacked.base)
    assert found.checkpoint.adapter == attacked.adapter


def test_an_adapter_whose_base_is_elsewhere_says_so(tmp_path: Path) -> None:
    models, attacked = _given("fresh/full")
    adapter = Path(shutil.copytree(str(attacked.adapter), tmp_path / "adapter"))
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())

    def opened(named: str, **options: str) -> Checkpoint:
        written = json.dumps({**config, "base_model_name_or_path": named})
        (adapter / ADAPTER_CONFIG).write_text(written)
        found = models.open(
            str(adapter), "attack.model", base_setting="attack.base", **options
        ).checkpoint
        assert found.adapter == str(adapter)
        return replace(found, adapter=None)

    plain = replace(attacked, adapter=None)
    assert opened("some/aligned") == plain
    assert opened("/elsewhere/merged", base=plain.base) == plain
    assert opened("some/base") == Checkpoint(models.known["some/base"].checkpoint.base)
    with pytest.raises(ModelError, match=r"adapter on 'other/model'.*set attack.base"):
        opened("other/model")
