"""Stages in child processes: results come back, errors keep their words, a kill is a sentence."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from experiments.pipeline.runner import in_child
from experiments.results.record import Record
from settings import DataError, RelockError
from tests.experiments.conftest import Command


def own_pid() -> int:
    return os.getpid()


def fail() -> None:
    raise DataError("rows are missing; give some")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_result_comes_from_another_process() -> None:
    assert in_child(own_pid, "stage") != os.getpid()


def test_an_error_keeps_its_sentence() -> None:
    with pytest.raises(DataError, match="rows are missing; give some"):
        in_child(fail, "stage")


def test_a_killed_stage_is_one_sentence() -> None:
    with pytest.raises(RelockError, match="the process of stage attack was killed"):
        in_child(die, "attack")


@pytest.mark.slow
def test_a_whole_run_in_child_processes(command: Command, tmp_path: Path) -> None:
    here = command("defense=nlsr", "attack.n=40")
    there = command("defense=nlsr", "attack.n=40", "runtime.isolate=true", f"store.root={tmp_path}")
    assert there.code == 0, there.err
    assert Record.read(there.folder).metrics == Record.read(here.folder).metrics
