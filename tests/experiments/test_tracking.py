"""A real offline W&B run, read back with W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.record import Record
from tests.experiments.conftest import Command


def read_back(folder: Path) -> list[dict[str, Any]]:
    """Every record of the one offline run under `folder`."""
    (path,) = folder.rglob("run-*.wandb")
    done = subprocess.run(
        [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", path],
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def merged(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The last value of every key among the records of one kind."""
    values: dict[str, Any] = {}
    for record in records:
        if record["type"] == kind:
            values |= record[kind].get("update", record[kind].get("item", {}))
    return values


def test_an_offline_run_holds_config_metrics_timings_tables_and_figures(command: Command) -> None:
    run = command("tracker=wandb", "defense=none")
    assert run.code == 0, run.err
    assert "wandb sync" in run.out
    record, records = Record.read(run.folder), read_back(run.folder)
    started = next(r["run"] for r in records if r["type"] == "run")
    config = started["config"]["update"]
    assert config["attack"]["poison_ratio"] == 0.05
    assert config["labels"]["defense"] == "none"
    assert set(started["tags"]) == {
        "model:organism", "attack:harmful_ft", "task:arithmetic", "defense:none",
        "protocol:default",
    }  # fmt: skip
    summary = merged(records, "summary")
    for model, metrics in record.metrics.items():
        assert summary[f"{model}/hs"] == pytest.approx(metrics["hs"]["value"])
    assert summary["cost/prepare_seconds"] == pytest.approx(record.cost["prepare_seconds"])
    assert summary["seconds/attack"] > 0
    history = json.dumps([r for r in records if r["type"] == "history"])
    for logged in ("attack/loss", "results", "stages", "figures/hs_vs_accuracy"):
        assert logged in history


def test_answers_stay_local_unless_asked_for(command: Command) -> None:
    local = command("tracker=wandb", "defense=none")
    (answer,) = pd.read_parquet(local.folder / "rows.parquet")["answer"].head(1)
    uploaded = list((local.folder / "wandb").rglob("*.table.json"))
    assert uploaded
    assert not any(answer in path.read_text() for path in uploaded)


def test_answers_are_logged_when_asked_for(command: Command) -> None:
    run = command("tracker=wandb", "defense=none", "tracker.upload_answers=true")
    (answer,) = pd.read_parquet(run.folder / "rows.parquet")["answer"].head(1)
    tables = list((run.folder / "wandb").rglob("*.table.json"))
    assert any(json.dumps(answer)[1:-1] in path.read_text() for path in tables)


def test_runs_of_a_sweep_share_a_group(command: Command) -> None:
    run = command("-m", "tracker=wandb", "defense=none", "attack.poison_ratio=0,0.05")
    groups = set()
    for job in ("0", "1"):
        records = read_back(run.folder / job)
        groups.add(next(r["run"]["run_group"] for r in records if r["type"] == "run"))
    assert groups == {run.folder.name}
