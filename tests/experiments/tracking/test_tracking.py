"""A real offline W&B run, read back with W&B's own reader."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb

from evaluation.statistics import PairedTest
from experiments.config.experiment import PROJECT
from experiments.dashboard import main as dashboard
from experiments.report.pool import Collected, Run
from experiments.results.record import Record
from experiments.tracking import wandb_tracker
from experiments.tracking.wandb_fields import public, shareable, summary
from experiments.tracking.wandb_tracker import WandbTracker, sweep_name
from settings import RelockError
from tests.experiments.conftest import Command
from tests.records import ATTACKED, GOOD, measured, write_run


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
    assert config["attack/poison_ratio"] == 0.05
    assert (config["attack"], config["defense"]) == ("harmful_ft", "none")
    nested = [name for name, value in config.items() if isinstance(value, dict | list)]
    assert nested == ["_wandb"]
    assert started["job_type"] == "none"
    assert set(started["tags"]) == {
        "model:organism", "attack:harmful_ft", "task:arithmetic", "defense:none",
        "protocol:default",
    }  # fmt: skip
    values = merged(records, "summary")
    for model, metrics in record.metrics.items():
        assert values[f"{model}/hs"] == pytest.approx(metrics["hs"]["value"])
        known = {k for k, v in metrics.items() if k.startswith("hs/") and v["n"]}
        assert {key for key in values if key.startswith(f"{model}/hs/") and "_" not in key} == {
            f"{model}/{name}" for name in known
        }
    assert values["difference/hs"] == pytest.approx(record.paired["hs"]["difference"])
    assert values["stages/made"] + values["stages/reused"] == len(
        {stage["key"] for stage in record.stages}
    )
    assert values["cost/prepare_seconds"] == pytest.approx(record.cost["prepare_seconds"])
    assert values["seconds/attack"] > 0
    history = json.dumps([r for r in records if r["type"] == "history"])
    for logged in ("attack/loss", "results", "stages", "figures/hs_vs_accuracy"):
        assert logged in history


def test_answers_stay_local_unless_asked_for(command: Command) -> None:
    local = command("tracker=wandb", "defense=none")
    rows = pd.read_parquet(local.folder / "rows.parquet")
    told = "".join(json.dumps(record) for record in read_back(local.folder))
    tables = list((local.folder / "wandb").rglob("*.table.json"))
    assert tables
    told += "".join(path.read_text() for path in tables)
    texts = {text for name in ("prompt", "answer") for text in rows[name] if len(text) > 20}
    assert texts
    assert not [text for text in texts if json.dumps(text)[1:-1] in told]


def test_nothing_of_the_machine_is_told(
    command: Command, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-never-to-be-recorded")
    run = command("tracker=wandb", "defense=none", "model.safe_system=" + "be kind " * 40)
    assert run.code == 0, run.err
    records = read_back(run.folder)
    started = next(r["run"] for r in records if r["type"] == "run")
    told = json.dumps([started, *(r for r in records if r["type"] in ("summary", "history"))])
    for secret in ("sk-never", "be kind be kind", str(store), str(PROJECT), str(run.folder)):
        assert secret not in told
    assert socket.gethostname() != started.get("host")
    assert started["config"]["update"]["model/base"] == "organism/weights/base"


def test_answers_are_logged_when_asked_for(command: Command) -> None:
    run = command("tracker=wandb", "defense=none", "tracker.upload_answers=true")
    (answer,) = pd.read_parquet(run.folder / "rows.parquet")["answer"].head(1)
    tables = list((run.folder / "wandb").rglob("*.table.json"))
    assert any(json.dumps(answer)[1:-1] in path.read_text() for path in tables)


def test_a_run_that_is_tracked_again_takes_the_place_of_a_half_written_one(
    command: Command,
) -> None:
    first = command("tracker=wandb", "defense=none")
    (half,) = first.folder.rglob("run-*.wandb")
    half.write_bytes(half.read_bytes()[:3000])
    before = half.name
    command("tracker=wandb", "defense=none")
    (again,) = first.folder.rglob("run-*.wandb")
    assert again.name == before
    kinds = {record["type"] for record in read_back(first.folder)}
    assert {"run", "summary", "history", "exit"} <= kinds


def test_runs_of_a_sweep_share_a_group_and_differ_in_id_and_job(command: Command) -> None:
    run = command("-m", "tracker=wandb", "defense=none", "attack.poison_ratio=0,0.05")
    started = [
        next(r["run"] for r in read_back(run.folder / job) if r["type"] == "run")
        for job in ("0", "1")
    ]
    assert {each["run_group"] for each in started} == {run.folder.name}
    assert len({each["run_id"] for each in started}) == 2
    assert [each["config"]["update"]["job"] for each in started] == ["0", "1"]


def test_the_headline_is_what_the_defended_model_is_worst_under(command: Command) -> None:
    record = Record.read(command("defense=none").folder)
    plain = summary(record)
    assert plain["worst_hs_under"] == "plain prompts"
    assert plain["defended/worst_hs"] == plain["defended/hs"]
    assert plain["broken"] == "no"
    looping = {
        **record.metrics["defended"],
        "degenerate": {"value": 0.45, "low": 0, "high": 1, "n": 9},
    }
    ruined = replace(
        record,
        metrics={**record.metrics, "defended": looping},
        cost={**record.cost, "parameters_edited": 1},
        paired={"accuracy_strict": asdict(PairedTest(0.0, 1.0, 0, 0, 9))},
    )
    assert summary(ruined)["broken"] == "degenerate 45 %"
    trigger: dict[str, float | None] = {"value": 1.0, "low": 0.9, "high": 1.0, "n": 9}
    metrics = {
        model: {**of_model, "hs": {**of_model["hs"], "value": 0.02}}
        for model, of_model in record.metrics.items()
    }
    for model in ("attacked", "defended"):
        metrics[model]["hs+identity_shift"] = trigger
    shown = summary(replace(record, metrics=metrics))
    assert shown["worst_hs_under"] == "identity_shift"
    assert [shown[f"{model}/worst_hs"] for model in ("attacked", "defended")] == [1.0, 1.0]
    assert shown["defended/worst_hs_n"] == 9
    assert "aligned/worst_hs" not in shown, "it wasn't asked under the trigger"


def test_command_lines_leave_without_places(command: Command) -> None:
    run = command("defense=none")
    overrides = ["a=/home/someone/x", "b=[/home/someone/y,3]", "c={d:file:///home/someone/z}"]
    overrides += ["e=https://host.example/v1", "f=data/rows.jsonl"]
    record = replace(Record.read(run.folder), overrides=overrides)
    collected = shareable(Collected([Run(run.folder, record)], []))
    assert collected.runs[0].record.overrides == [
        "a=x", "b=[y,3]", "c={d:z}", "e=https://host.example/v1", "f=data/rows.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "shown"),
    [
        (f"{PROJECT}/organism/weights/base", "organism/weights/base"),
        ("/home/someone/models/llama", "llama"),
        ("~/models/llama", "llama"),
        (["/home/someone/a.jsonl", 3], "[a.jsonl,3]"),
        ("https://name:word@judge.example/v1", "https://judge.example/v1"),
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-chat-hf"),
        (0.05, 0.05),
        (True, True),
    ],
)
def test_settings_leave_without_places_and_logins(setting: object, shown: object) -> None:
    assert public(setting) == shown


def test_texts_leave_as_fingerprints_that_tell_them_apart() -> None:
    first, second = public("tell me a story " * 20), public("tell me a story " * 19 + "now")
    assert "story" not in first
    assert first != second
    assert "story" not in public("a story\nof two lines")


def test_a_sweep_named_by_the_time_has_the_day_in_its_group() -> None:
    assert sweep_name(Path("/x/sweeps/2026-02-03/04-05-06-7")) == "2026-02-03_04-05-06-7"
    assert sweep_name(Path("/x/sweeps/table6")) == "table6"


def test_a_project_that_wandb_would_refuse_stops_the_run_before_it_starts(command: Command) -> None:
    run = command("tracker=wandb", "tracker.project=a/b", "defense=none")
    assert run.code == 1
    assert "tracker.project" in run.err
    assert not (run.folder / "record.json").exists()


def test_a_key_that_cannot_be_one_leaves_the_run_offline(
    command: Command, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    run = command("tracker=wandb", "defense=none")
    assert run.code == 0, run.err
    assert "wandb sync" in run.out
    assert dashboard([str(run.folder)]) == 1
    assert "refuses the API key" in capfd.readouterr().err


@pytest.mark.parametrize("server", ["none", "broken"])
def test_without_a_network_the_run_is_tracked_offline_within_seconds(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "http://127.0.0.1:9"
    http = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # Answers 501 to everything.
    if server == "broken":
        threading.Thread(target=http.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{http.server_port}"
    monkeypatch.setattr(wandb_tracker, "_START_SECONDS", 3.0)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    wandb.teardown()  # What an earlier test's settings were.
    write_run(tmp_path, {}, GOOD, ATTACKED)
    record, rows = measured(tmp_path), pd.read_parquet(tmp_path / "rows.parquet")
    try:
        assert "wandb sync" in WandbTracker().track(record, rows, tmp_path, None)
        assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
        with pytest.raises(RelockError, match="can't be reached"):
            WandbTracker(mode="online").track(record, rows, tmp_path, None)
    finally:
        wandb.teardown()
        if server == "broken":
            http.shutdown()
        http.server_close()
