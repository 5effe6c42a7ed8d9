"""The dashboard over HTTP: W&B's own libraries against a server on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb

from experiments.config.experiment import PROJECT
from experiments.dashboard import main
from experiments.tracking.wandb_tracker import WandbTracker
from tests.experiments.tracking.wandb_server import ENTITY, WandbServer
from tests.records import ATTACKED, GOOD, measured, rewrite, write_run

_KEY = "a" * 40

SECRETS = {"prompt": "what nobody is told of asking", "answer": "what nobody is told of answers"}

Dashboard = Callable[..., tuple[int, str, str]]


def access(server: WandbServer | None) -> dict[str, str]:
    """The environment of a command: a key where there is a server."""
    known = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": _KEY} if server else {}
    return {"HF_HUB_OFFLINE": "1", "WANDB_ERROR_REPORTING": "false", **known}


@pytest.fixture
def dashboard(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Dashboard]:
    """`python -m experiments.dashboard ...`: its exit code, and what it says and of errors."""

    def call(*arguments: str, server: WandbServer | None = None) -> tuple[int, str, str]:
        # It would keep the settings of an earlier server, and names its service to whoever comes.
        wandb.teardown()
        for name in [each for each in os.environ if each.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        for name, value in access(server).items():
            monkeypatch.setenv(name, value)
        capfd.readouterr()
        code = main(list(arguments))
        return code, *capfd.readouterr()

    yield call
    wandb.teardown()


@pytest.fixture(scope="module")
def tracked_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two jobs that was tracked offline."""
    folder = tmp_path_factory.mktemp("sweeps") / "two ratios"
    for job, ratio in (("0", 0.0), ("1", 0.05)):
        write_run(folder / job, {"attack.poison_ratio": ratio}, GOOD, ATTACKED, defense="reset")
        rows = pd.read_parquet(folder / job / "rows.parquet").assign(**SECRETS)
        rewrite(folder / job, rows)
        tracker = WandbTracker(mode="offline")
        tracker.track(measured(folder / job), rows, folder / job, folder.name)
    return folder


@pytest.fixture
def sweep(tracked_sweep: Path, tmp_path: Path) -> Path:
    """A copy of it, to do anything with."""
    return Path(shutil.copytree(tracked_sweep, tmp_path / tracked_sweep.name))


@pytest.fixture
def server() -> Iterator[WandbServer]:
    """A W&B server on loopback."""
    started = WandbServer()
    yield started
    started.close()


def panels(specification: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The settings of all panels of one kind in a workspace's or a report's specification."""
    found = []
    todo: list[Any] = [specification]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            if node.get("viewType") == kind:
                found.append(node["config"])
            todo += node.values()
        elif isinstance(node, list):
            todo += node
    return found


def check(specification: dict[str, Any], group: str) -> None:
    """That a specification is of this sweep, and has every kind of panel."""
    written = json.dumps(specification)
    wanted = {"key": {"section": "run", "name": "group"}, "op": "=", "value": group}
    assert json.dumps(wanted)[:-1] in written
    bars = {bar["metrics"][0] for bar in panels(specification, "Bar Chart")}
    for metric in ("worst_hs", "hs", "asr", "accuracy_strict"):
        assert f"summary_metrics.defended/{metric}" in bars
    assert "summary_metrics.cost/apply_seconds" in bars
    scatters = {(s["xAxis"], s["yAxis"]) for s in panels(specification, "Scatter Plot")}
    assert scatters == {
        ("summary:defended/accuracy_strict", "summary:defended/worst_hs"),
        ("config:attack/poison_ratio.value", "summary:defended/worst_hs"),
    }
    media = [key for panel in panels(specification, "Media Browser") for key in panel["mediaKeys"]]
    assert {"report", "figures/hs_vs_poison_ratio"} <= set(media)
    (table,) = panels(specification, "Weave")
    assert table["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"] == "pooled"


def test_without_a_key_it_says_what_to_do_and_makes_nothing(
    sweep: Path, dashboard: Dashboard
) -> None:
    code, out, err = dashboard(str(sweep))
    assert (code, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert f"wandb sync '{sweep}'/*/wandb/offline-run-*" in line
    assert f"python -m experiments.dashboard '{sweep}'" in line
    assert "WANDB_API_KEY" in line
    assert not (sweep / "report").exists()
    assert not (sweep / "wandb").exists()


def test_a_dry_run_writes_what_would_be_sent(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sweep), "--dry-run", "--entity", "nobody"]) == 0
    written = {Path(line).name: Path(line) for line in capsys.readouterr().out.splitlines()}
    for name in ("wandb_workspace.json", "wandb_report.json"):
        check(json.loads(written[name].read_text()), sweep.name)
    page = written["report.html"].read_text()
    assert "figures/hs_vs_poison_ratio" in written["wandb_report.json"].read_text()
    assert all(path.is_file() for path in written.values())
    assert sweep.name in page
    for place in (str(sweep.parent), str(PROJECT)):
        assert place not in page, "the page leaves this machine"


def test_after_the_sync_that_it_names_it_makes_all_and_again_updates_it(
    sweep: Path, server: WandbServer, dashboard: Dashboard
) -> None:
    code, _, err = dashboard(str(sweep), server=server)
    assert code == 1
    assert "wandb sync" in err
    runs = [str(path) for path in sweep.glob("*/wandb/offline-run-*")]
    sync = [sys.executable, "-m", "wandb", "sync", *runs]
    subprocess.run(sync, cwd=sweep.parent, env=os.environ | access(server), check=True)
    code, made, err = dashboard(str(sweep), server=server)
    assert code == 0, err
    stored = server.stored
    assert sorted(run["jobType"] for run in stored.runs.values()) == ["reset", "reset", "summary"]
    assert {run["groupName"] for run in stored.runs.values()} == {sweep.name}
    assert len(stored.views) == 2
    for view in stored.views.values():
        assert (view["entityName"], view["projectName"]) == (ENTITY, "relock")
        check(json.loads(view["spec"]), sweep.name)
    first = set(stored.views)
    for kind in ("/media/table/pooled", "/media/html/report", "/media/images/figures/hs_vs"):
        assert any(kind in path for path in stored.files)
    texts = b"".join(stored.texts)
    assert not [text for text in SECRETS.values() if text.encode() in texts]

    code, again, err = dashboard(str(sweep), server=server)
    assert code == 0, err
    assert again == made
    assert len(stored.runs) == 3
    assert set(stored.views) == first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--project", "elsewhere"], f"no project {ENTITY}/elsewhere"),
        ([], "no runs of the group"),
    ],
)
def test_a_place_without_the_runs_is_one_sentence(
    sweep: Path, server: WandbServer, dashboard: Dashboard, arguments: list[str], said: str
) -> None:
    for folder in sweep.glob("*/wandb/offline-run-*"):
        (marker,) = folder.glob("*.wandb")
        marker.with_name(f"{marker.name}.synced").touch()
    code, _, err = dashboard(str(sweep), *arguments, server=server)
    assert code == 1
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert said in line
    assert not server.stored.views
    assert not server.stored.runs


def test_runs_that_were_never_tracked_can_be_tracked_later(
    sweep: Path, server: WandbServer, dashboard: Dashboard
) -> None:
    for folder in sweep.glob("*/wandb"):
        shutil.rmtree(folder)
    assert "--track" in dashboard(str(sweep), server=server)[2]
    code, _, err = dashboard(str(sweep), "--track", "--report", server=server)
    assert code == 0, err
    jobs = [run for run in server.stored.runs.values() if run["jobType"] == "reset"]
    assert len(jobs) == 2
    assert [view["type"] for view in server.stored.views.values()] == ["runs"]


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_is_one_sentence(
    sweep: Path, server: WandbServer, dashboard: Dashboard
) -> None:
    server.close()
    for folder in sweep.glob("*/wandb/offline-run-*"):
        (marker,) = folder.glob("*.wandb")
        marker.with_name(f"{marker.name}.synced").touch()
    code, _, err = dashboard(str(sweep), server=server)
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "can't be reached" in line


def test_a_folder_without_runs_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 1
    assert "no record.json" in capsys.readouterr().err
