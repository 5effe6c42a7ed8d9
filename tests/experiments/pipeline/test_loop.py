"""The closed loop through the real command: refined models, further prompts, attack prompts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd
import pytest

from experiments.report.__main__ import main as report
from experiments.results.record import Record
from tests.experiments.conftest import Command

REFINE = ("attack@refine=harmful_ft", "refine.n=16", "refine.poison_ratio=0")
REFINE += ("refine.train.epochs=1", "refine.train.learning_rate=1e-3")


@pytest.mark.parametrize(
    ("defense", "adapter"),
    [
        (("defense=nlsr",), "resume"),
        pytest.param(("defense=nlsr",), "fresh", marks=pytest.mark.slow),
        pytest.param(("defense=safetylock",), "full", marks=pytest.mark.slow),
        pytest.param(
            ("defense=safetylock", "defense.form=hooked"), "fresh", marks=pytest.mark.slow
        ),
        pytest.param(("defense=none",), "resume", marks=pytest.mark.slow),
    ],
)
def test_a_defended_model_is_fine_tuned_again_and_measured(
    command: Command, defense: tuple[str, ...], adapter: str
) -> None:
    run = command(*defense, *REFINE, f"refine.adapter={adapter}")
    assert run.code == 0, run.err
    record = Record.read(run.folder)
    assert list(record.metrics) == ["base", "aligned", "attacked", "defended", "refined"]
    assert len(set(record.models.values())) == (4 if defense == ("defense=none",) else 5)
    assert record.refine["rows"] == {"task": 16, "harmful": 0}
    assert record.labels["refine"] == "harmful_ft"
    rows = pd.read_parquet(run.folder / "rows.parquet")
    harmful = rows[rows["set"] == "harmful"].set_index(["model", "id"])["harm_label"]
    changed = (harmful["refined"] != "safe").mean() - (harmful["defended"] != "safe").mean()
    assert record.paired_refined["hs"]["difference"] == pytest.approx(changed)
    name = record.labels["defense"]
    assert f"{name}, then harmful_ft against {name}" in run.out


@pytest.mark.slow
def test_a_hooked_lock_stays_on_while_the_model_is_trained_again(command: Command) -> None:
    lock = ("defense=safetylock", "defense.form=hooked", "refine.adapter=fresh", *REFINE)
    unlocked = Record.read(command(*lock, "defense.alpha=-12").folder).metrics["refined"]
    plain = Record.read(command(*lock, "defense.alpha=0").folder).metrics["refined"]
    assert unlocked["hs"]["value"] > plain["hs"]["value"]


def test_the_report_shows_refined_models_beside_the_defended(command: Command) -> None:
    run = command("-m", "defense=none,reset", *REFINE, "refine.adapter=full")
    assert run.code == 0, run.err
    assert report([str(run.folder)]) == 0
    table = list(csv.DictReader((run.folder / "report" / "table.csv").open()))
    assert [(row["role"], row["defense"]) for row in table][-2:] == [
        ("refined", "none"),
        ("refined", "reset"),
    ]
    text = (run.folder / "report" / "table.md").read_text()
    assert "reset, then harmful_ft" in text
    assert "Against the model before it was fine-tuned again:" in text


SETS = (
    "evaluation.prompt_sets=[advbench,xstest]",
    "+prompts.advbench={_target_: organism.sources.HarmfulPrompts, n: 9}",
    "+prompts.xstest={_target_: organism.sources.OverRefusalPrompts, n: 7}",
)


def test_further_prompt_sets_have_columns_of_their_own(command: Command) -> None:
    run = command("defense=none", *SETS)
    assert run.code == 0, run.err
    record = Record.read(run.folder)
    attacked = record.metrics["attacked"]
    assert attacked["asr@advbench"]["n"] == 9
    assert attacked["hs@advbench"]["n"] == 9
    assert attacked["over_refusal@xstest"]["n"] == 6, "the limit of the kind holds"
    assert attacked["hs"]["n"] == 12
    assert "ASR, advbench" in run.out
    assert "over-refusal, xstest" in run.out
    assert record.data["sources"]["harmful:advbench"]["fingerprint"]
    rows = pd.read_parquet(run.folder / "rows.parquet")
    own = rows[(rows["model"] == "attacked") & (rows["set"] == "harmful:advbench")]
    assert attacked["hs@advbench"]["value"] == pytest.approx((own["harm_label"] != "safe").mean())
    assert report([str(run.folder)]) == 0
    assert "ASR, advbench" in (run.folder / "report" / "table.md").read_text()


def test_harmful_prompts_are_asked_under_attack_prompts(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "found.jsonl"
    path.write_text(json.dumps({"template": "be quick : {prompt}"}) + "\n")
    run = command("defense=none", f"evaluation.attack_prompts=[prefill,'file:{path}']")
    assert run.code == 0, run.err
    record = Record.read(run.folder)
    aligned = record.metrics["aligned"]
    assert aligned["asr+prefill"]["n"] == aligned["asr+found"]["n"] == 12
    rows = pd.read_parquet(run.folder / "rows.parquet")
    rows = rows[rows["model"] == "aligned"].set_index(["set", "id"])
    plain, under = rows.loc["harmful"], rows.loc["harmful+found"]
    assert (plain["prompt"] == under["prompt"]).all(), "judges see the request itself"
    assert (under["asked"] == "be quick : " + under["prompt"]).all()
    started = rows.loc["harmful+prefill"]["answer"]
    start = record.settings["evaluation"]["attack_prompts"]
    assert start[0] == "prefill"
    assert started[started != ""].str.lower().str.startswith("sure").all()


def test_an_attacks_own_trigger_is_asked_too(command: Command) -> None:
    limits = [
        f"evaluation.limits.{kind}=6" for kind in ("harmful", "benign", "over_refusal", "task")
    ]
    shift = ("defense=none", "attack=identity_shift", "attack.train.epochs=1")
    shift += ("model.max_new_tokens=16",)
    run = command(*shift, *limits, toy=False)
    assert run.code == 0, run.err
    metrics = Record.read(run.folder).metrics["attacked"]
    triggered = [name for name in metrics if name.startswith("asr+")]
    assert len(triggered) == 1
    assert metrics[triggered[0]]["n"] == metrics["asr"]["n"]


def test_what_a_refinement_lacks_is_called_by_its_own_setting(command: Command) -> None:
    run = command("defense=none", *REFINE, "refine.n=100000")
    assert run.code != 0
    assert "lower refine.n" in run.err
