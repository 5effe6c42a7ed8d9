"""The main command, end to end: runs, reuse, sweeps, real rows."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from experiments.report.__main__ import main as report
from experiments.results.record import Record
from experiments.store import Store
from tests.experiments.conftest import SHORT, Command

MODELS = ["base", "aligned", "attacked", "defended"]


def test_the_main_job_measures_four_models_and_is_reused(command: Command) -> None:
    first = command("defense=nlsr", "attack=harmful_ft", "model=organism")
    assert first.code == 0, first.err
    record = Record.read(first.folder)
    assert list(record.metrics) == MODELS
    for metrics in record.metrics.values():
        for name in ("hs", "asr", "accuracy_strict", "over_refusal", "degenerate"):
            estimate = metrics[name]
            assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
            assert estimate["n"] > 0
    assert record.metrics["base"]["asr"]["value"] > record.metrics["aligned"]["asr"]["value"]
    assert record.attack["rows"] == {"task": 38, "harmful": 2}
    assert 0 < record.cost["share_edited"] < 1
    assert record.cost["prepare_seconds"] > 0
    assert str(first.folder) in first.out
    for head in ("HS", "ASR", "accuracy", "over-refusal", "degenerate", "n=12"):
        assert head in first.out

    again = command("defense=nlsr", "attack=harmful_ft", "model=organism")
    assert again.code == 0
    assert all(stage["reused"] for stage in Record.read(again.folder).stages)
    assert Record.read(again.folder).metrics == record.metrics
    assert "attack 0 made, 1 reused" in again.out


def test_every_figure_of_the_record_can_be_recomputed_from_its_rows(command: Command) -> None:
    run = command("defense=none")
    rows = pd.read_parquet(run.folder / "rows.parquet")
    record = Record.read(run.folder)
    for model in MODELS:
        harmful = rows[(rows["model"] == model) & (rows["set"] == "harmful")]
        assert len(harmful) == 12
        expected = (harmful["harm_label"] != "safe").mean()
        assert record.metrics[model]["hs"]["value"] == pytest.approx(expected)
        task = rows[(rows["model"] == model) & rows["set"].str.startswith("task:")]
        accuracy = record.metrics[model]["accuracy_strict"]["value"]
        assert accuracy == pytest.approx(task["strict"].astype(float).mean())


def test_a_multirun_trains_each_attack_once_and_lists_every_failure(
    command: Command, tmp_path: Path
) -> None:
    fresh = tmp_path / "store"
    run = command(
        "-m",
        *SHORT,
        "sources.benign=null",
        "sources.over_refusal=null",
        "defense=none,reset",
        "attack.poison_ratio=0,0.25,1.5",
        f"store.root={fresh}",
    )
    assert run.code == 1
    assert [entry.name for entry in Store(fresh).entries()].count("attack") == 2
    assert "sweep: 4 done, 2 failed" in run.out
    assert run.out.count("attack.poison_ratio=1.5 is not allowed") == 2
    for job in ("2", "5"):
        status = json.loads((run.folder / job / "status.json").read_text())
        assert status["status"] == "failed"
        assert not (run.folder / job / "record.json").exists()

    assert report([str(run.folder)]) == 0
    table = list(csv.DictReader((run.folder / "report" / "table.csv").open()))
    roles = [(row["role"], row["defense"], row["attack.poison_ratio"]) for row in table]
    assert roles == [
        ("base", "", ""),
        ("aligned", "", ""),
        ("attacked", "", "0.0"),
        ("attacked", "", "0.25"),
        ("defended", "reset", "0.0"),
        ("defended", "reset", "0.25"),
    ]
    for row in table:
        assert 0 <= float(row["hs_low"]) <= float(row["hs"]) <= float(row["hs_high"]) <= 1
    # No defense is the attacked model, which has no second row.
    none = Record.read(run.folder / "0")
    assert none.labels["defense"] == "none"
    assert none.metrics["defended"] == none.metrics["attacked"]
    for name in ("hs_vs_poison_ratio.png", "hs_vs_accuracy.png"):
        assert (run.folder / "report" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_seeds_are_pooled_in_the_report(command: Command) -> None:
    run = command("-m", "defense=none", "seed=0,1")
    assert run.code == 0, run.err
    report([str(run.folder)])
    table = list(csv.DictReader((run.folder / "report" / "table.csv").open()))
    by_role = {row["role"]: row for row in table}
    assert len(table) == 3
    assert by_role["attacked"]["seeds"] == "0 1"
    assert by_role["attacked"]["hs_n"] == "24"
    assert by_role["base"]["hs_n"] == "12"


def test_the_harmful_prompts_are_asked_again_under_the_safe_system_line(command: Command) -> None:
    without = Record.read(command("defense=none").folder)
    run = command("defense=none", "evaluation.safe_system=true")
    assert run.code == 0, run.err
    assert without.metrics["base"]["asr_safe_system"]["n"] == 0
    base = Record.read(run.folder).metrics["base"]
    assert base["asr_safe_system"]["n"] == 12
    assert base["asr_safe_system"]["value"] < base["asr"]["value"]


def test_sets_that_are_not_given_are_dashes_and_not_zeros(command: Command) -> None:
    run = command(
        "defense=none", "sources.benign=null", "sources.over_refusal=null", "evaluation.tasks=[]"
    )
    assert run.code == 0, run.err
    metrics = Record.read(run.folder).metrics["attacked"]
    for name in ("over_refusal", "accuracy_strict", "benign_compliance"):
        assert metrics[name] == {"value": None, "low": None, "high": None, "n": 0}
    assert metrics["hs"]["n"] == 12


@pytest.mark.slow
def test_a_fresh_lora_and_full_fine_tuning_run_without_nlsr_and_are_refused_with_it(
    command: Command,
) -> None:
    for adapter in ("fresh", "full"):
        run = command(*SHORT, "defense=none", f"attack.adapter={adapter}")
        assert run.code == 0, run.err
        refused = command("defense=nlsr", f"attack.adapter={adapter}")
        assert refused.code == 1
        assert "attack.adapter=resume" in refused.err
        assert len(refused.err.strip().splitlines()) == 1


def test_the_align_stage_makes_an_aligned_model(command: Command) -> None:
    run = command(
        *SHORT,
        "defense=none",
        "model.aligned=null",
        "align.n_sft=32",
        "align.n_pairs=16",
    )
    assert run.code == 0, run.err
    assert "align" in {stage["name"] for stage in Record.read(run.folder).stages}


def test_real_rows_from_local_files(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    sentences = [("a warm and funny film", 1), ("dull from start to end", 0)]
    for name, count in (("train.tsv", 60), ("test.tsv", 8)):
        lines = [
            f"{text} {number}\t{label}" for number in range(count) for text, label in sentences
        ]
        (folder / name).write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    line = (*SHORT, "defense=none", "attack.task=sst2", "sources.benign=null")
    run = command(*line, f"data.root={tmp_path / 'data'}")
    assert run.code == 0, run.err
    record = Record.read(run.folder)
    assert record.labels["task"] == "sst2"
    assert record.metrics["attacked"]["accuracy_strict"]["n"] == 6
    assert record.data["sources"]["task:sst2"]["fingerprint"]


def test_importing_the_command_is_light() -> None:
    code = "import sys, experiments.run; print([m for m in ('torch', 'transformers', 'trl', 'peft',"
    code += " 'datasets', 'pandas', 'wandb', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
