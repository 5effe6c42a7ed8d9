"""`python -m experiments.rerun`: which jobs of a sweep run again, where, and with what."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from experiments.rerun import main
from experiments.results.record import Record
from experiments.results.status import is_alive
from tests.experiments.conftest import ENVIRONMENT, SMALL, Command

WRONG = "attack.poison_ratio=1.5"


def overrides(job: Path) -> list[str]:
    return [str(each) for each in OmegaConf.load(job / ".hydra" / "overrides.yaml")]


def status(job: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((job / "status.json").read_text())
    return content


def say_running(job: Path, host: str, pid: int) -> None:
    """As a job that runs says it."""
    content = status(job) | {"status": "running", "host": host, "pid": pid, "time": time.time()}
    (job / "status.json").write_text(json.dumps(content))


_kept: list[Path] = []


@pytest.fixture
def folder(command: Command, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder, of the tests' own: jobs 0 and 2 are done, 1 and 3 failed."""
    if not _kept:
        grid = ("defense=none,reset", "attack.poison_ratio=0.25,1.5")
        made = command("-m", *SMALL, *grid, toy=False).folder
        _kept.append(shutil.copytree(made, tmp_path_factory.mktemp("kept") / "sweep"))
    return shutil.copytree(_kept[0], tmp_path / "sweep", dirs_exist_ok=True)


@pytest.fixture
def rerun(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capfd.readouterr()

    return call


def test_failed_lost_and_unstarted_jobs_run_again_in_their_own_folders(
    folder: Path, rerun: Callable[..., tuple[int, str, str]]
) -> None:
    kept = status(folder / "2")
    wanted = overrides(folder / "3")
    say_running(folder / "0", socket.gethostname(), 2**22 + 1)
    shutil.rmtree(folder / "3")

    code, out, _ = rerun(folder)
    assert code == 0
    assert "job 0 (defense=none attack.poison_ratio=0.25): killed" in out
    assert "job 1 (defense=none attack.poison_ratio=1.5): failed: attack.poison_ratio=1.5 is" in out
    assert "job 3 (defense=reset attack.poison_ratio=1.5): never started" in out
    assert "1 of 4 jobs are done, 3 would run again" in out

    code, out, err = rerun("--failed", folder)
    assert code == 1
    assert "sweep: 2 done, 2 failed" in out
    assert "Traceback" not in err
    assert status(folder / "0")["status"] == "done"
    assert all(stage["reused"] for stage in Record.read(folder / "0").stages)
    assert status(folder / "2") == kept
    assert overrides(folder / "3") == wanted

    code, out, _ = rerun("--failed", folder, "attack.poison_ratio=0.25")
    assert code == 0
    assert "sweep: 4 done, 0 failed" in out
    assert overrides(folder / "3") == [*wanted[:-1], "attack.poison_ratio=0.25"]
    assert Record.read(folder / "3").labels["defense"] == "reset"

    code, out, _ = rerun("--failed", folder)
    assert (code, out.strip()) == (0, "nothing to do: 4 of 4 jobs are done")


def test_jobs_that_run_are_left_alone(
    folder: Path, rerun: Callable[..., tuple[int, str, str]]
) -> None:
    fix = "attack.poison_ratio=0.25"
    with subprocess.Popen(["sleep", "600"]) as process:
        say_running(folder / "1", socket.gethostname(), process.pid)
        say_running(folder / "3", "another-machine", 1)
        code, out, _ = rerun("--failed", folder, fix)
        process.kill()
    assert code == 0
    assert "job 1 (defense=none attack.poison_ratio=1.5) still runs" in out
    assert "job 3 (defense=reset attack.poison_ratio=1.5) still runs" in out
    assert "if that machine is gone, add --lost" in out
    assert "nothing to do: 2 of 4 jobs are done" in out
    code, out, _ = rerun("--failed", "--lost", folder, fix)
    assert (code, status(folder / "3")["status"]) == (0, "done"), out


def test_a_process_that_nobody_collected_does_not_live() -> None:
    with subprocess.Popen(["true"]) as process:
        found = psutil.Process(process.pid)
        deadline = time.time() + 60
        while found.status() != psutil.STATUS_ZOMBIE:
            assert time.time() < deadline
            time.sleep(0.01)
        assert not is_alive({"pid": process.pid, "time": time.time()})


def test_wrong_overrides_are_one_sentence(
    folder: Path, rerun: Callable[..., tuple[int, str, str]]
) -> None:
    for override, message in {
        "defens=none": "job 0 can't be run again with its settings: defens is not a setting",
        "defense=none,reset": "would make more jobs of one; give one value",
        "hydra.sweep.dir=elsewhere": "hydra.sweep.dir is the sweep's own; leave it out",
    }.items():
        code, _, err = rerun(folder, "--all", override)
        assert code == 1
        assert message in err
        assert len(err.strip().splitlines()) == 1


def test_a_folder_that_is_no_sweep_is_one_sentence(
    tmp_path: Path, rerun: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = rerun(tmp_path, "--failed")
    assert code == 1
    assert "is no sweep's folder: it has no multirun.yaml and no jobs" in err


def test_a_sweep_whose_process_was_killed_is_finished(
    tmp_path: Path, store: Path, rerun: Callable[..., tuple[int, str, str]]
) -> None:
    folder, making = tmp_path / "sweep", store / ".making"
    before = set(making.glob("*"))
    line = [sys.executable, "-m", "experiments.run", "-m", *SMALL, "defense=none,reset"]
    line += [f"store.root={store}", f"hydra.sweep.dir={folder}"]
    with subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        deadline = time.time() + 300
        while not (folder / "0" / "status.json").is_file():
            assert time.time() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert status(folder / "0")["status"] == "running"
    assert not (folder / "1").exists()
    code, out, _ = rerun("--failed", folder)
    assert code == 0, out
    assert [Record.read(folder / n).labels["defense"] for n in ("0", "1")] == ["none", "reset"]
    assert set(making.glob("*")) <= before
