"""Leases of GPUs: locks and one environment variable, with real processes and no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from experiments.config.experiment import PROJECT
from experiments.config.runtime import Runtime
from settings import SettingError

# Leases, says what it sees, and keeps it until its stdin ends.
HOLDER = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from experiments.config.runtime import Runtime
gpus = [int(gpu) for gpu in sys.argv[1].split(",")]
Runtime(gpus=tuple(gpus), gpus_per_job=int(sys.argv[2])).prepare(None)
print("has", os.environ["CUDA_VISIBLE_DEVICES"], "torch" in sys.modules, flush=True)
sys.stdin.read()
"""

Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    started: list[subprocess.Popen[str]] = []
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}

    def start(gpus: str, per_job: int = 1, **more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, gpus, str(per_job)],
            cwd=PROJECT,
            env=environment | {"TMPDIR": str(tmp_path)} | more,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str], word: str) -> str:
    """The process's first line that begins with `word`."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(word):
            return line.strip()
    raise AssertionError("".join(lines))


def test_each_process_has_its_own_and_the_next_waits_for_a_killed_one(hold: Hold) -> None:
    first = hold("3,5")
    assert said(first, "has") == "has 3 False"
    second = hold("3,5")
    assert said(second, "has") == "has 5 False"
    third = hold("3,5")
    assert said(third, "waiting") == "waiting for 1 of the GPUs 3, 5 to be free"
    first.kill()
    assert said(third, "has") == "has 3 False"


def test_two_that_want_two_of_three_do_not_take_one_each(hold: Hold) -> None:
    first = hold("0,1,2", 2)
    assert said(first, "has") == "has 0,1 False"
    second = hold("0,1,2", 2)
    said(second, "waiting")
    third = hold("0,1,2")
    assert said(third, "has") == "has 2 False"
    first.kill()
    assert said(second, "has") == "has 0,1 False"


def test_a_list_that_names_what_is_hidden_is_refused(hold: Hold) -> None:
    process = hold("0,3", CUDA_VISIBLE_DEVICES="2,3")
    line = said(process, "settings.errors.SettingError")
    assert "runtime.gpus names 0, which CUDA_VISIBLE_DEVICES=2,3 hides" in line


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"gpus": (0, 1, 0)}, "runtime.gpus names 0 twice"),
        ({"gpus": (0, 1), "gpus_per_job": 3}, "runtime.gpus_per_job=3 is more than the 2"),
        ({"gpus": (-1,)}, "should hold indices or UUIDs"),
        ({"gpus_per_job": 0}, "runtime.gpus_per_job=0 is not allowed"),
        ({"gpu": (0,)}, "runtime.gpu is not a setting"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingError, match=sentence):
        Runtime.validated(values, "runtime")
