"""Real multiruns in processes of their own, at a size of seconds, under every launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiments.config.experiment import PROJECT
from tests.experiments.conftest import SMALL

DEADLINE_SECONDS = 300


@dataclass
class Sweep:
    """A multirun that runs, or has ended."""

    folder: Path
    process: subprocess.Popen[str]
    out: str = field(default="")

    def end(self) -> int:
        """Waits for it; returns its exit code."""
        self.out = self.process.communicate(timeout=DEADLINE_SECONDS)[0]
        return self.process.returncode

    def status(self, job: int) -> dict[str, Any]:
        """What the job's status says; empty before it has one."""
        path = self.folder / str(job) / "status.json"
        content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return content

    def stages(self, job: int, name: str) -> list[dict[str, Any]]:
        """The job's stages of a name, as its record has them."""
        record = json.loads((self.folder / str(job) / "record.json").read_text())
        return [stage for stage in record["stages"] if stage["name"] == name]

    def running(self, job: int) -> psutil.Process:
        """The job's process, once it runs."""
        until(lambda: self.status(job).get("status") == "running")
        return psutil.Process(self.status(job)["pid"])

    def reached(self, job: int, stage: str) -> bool:
        """Whether the job has finished a stage of that name."""
        log = self.folder / str(job) / "run.log"
        return log.is_file() and f"] {stage} " in log.read_text()


Launch = Callable[..., Sweep]


def until(condition: Callable[[], Any]) -> None:
    """Polls until `condition` holds."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def made_once(sweep: Sweep, jobs: range, stage: str) -> bool:
    """Whether one of the jobs made a stage that all of them needed, and the others took it."""
    entries = [entry for job in jobs for entry in sweep.stages(job, stage)]
    return (
        len({entry["key"] for entry in entries}) == 1
        and [entry["reused"] for entry in entries].count(False) == 1
    )


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all; a seed of its own gives each test an attack of its own."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def launch(store: Path, tmp_path: Path) -> Iterator[Launch]:
    """`python -m experiments.run -m hydra/launcher=NAME ...`, started and not waited for."""
    started: list[subprocess.Popen[str]] = []

    def start(launcher: str, *overrides: str, **environment: str) -> Sweep:
        folder = tmp_path / "sweep"
        places = [f"store.root={store}", f"hydra.sweep.dir={folder}"]
        command = [sys.executable, "-m", "experiments.run", "-m", f"hydra/launcher={launcher}"]
        process = subprocess.Popen(
            [*command, *SMALL, *places, *overrides],
            cwd=PROJECT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Also where the tests run in a shell's background, which ignores interrupts.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return Sweep(folder, process)

    yield start
    for process in started:
        process.kill()
        process.communicate()
