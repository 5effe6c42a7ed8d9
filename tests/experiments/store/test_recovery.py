"""Kills, damaged files, removed folders, want of memory: what is made again, and what isn't."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from hydra.experimental.callback import Callback

from defenses.base import Calibration, Models
from defenses.none import NoDefense
from experiments.config.experiment import PROJECT
from experiments.results.record import Record
from experiments.store import Store
from tests.experiments.conftest import ENVIRONMENT, SMALL, Command, made

# A run in which every stage there is is made.
WHOLE = (
    *SMALL,
    "model.aligned=null",
    "align.n_sft=16",
    "align.n_pairs=8",
    "attack.adapter=full",
    "defense=safelora",
    "attack@refine=harmful_ft",
    "refine.adapter=full",
    "refine.n=16",
    "refine.train.epochs=1",
)


def python(*arguments: str) -> subprocess.Popen[str]:
    """A real process of this interpreter."""
    command = [sys.executable, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def rows_of(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "rows.parquet")


KILLED = ("attack", "generate", "rows.parquet", "record.json")
KILLED_EVERYWHERE = (
    "align", "prepare", "merge", "attack", "apply", "attack", "generate", "likelihood",
    "judge", "score", "rows.parquet", "record.json",
)  # fmt: skip


@pytest.mark.parametrize(
    ("killed", "overrides"),
    [
        pytest.param(KILLED, ("defense=none", *SMALL), id="some stages"),
        pytest.param(KILLED_EVERYWHERE, WHOLE, id="every stage", marks=pytest.mark.slow),
    ],
)
def test_sigkill_in_a_stage_and_in_the_record_loses_nothing_that_was_finished(
    killed: tuple[str, ...], overrides: tuple[str, ...], tmp_path: Path
) -> None:
    points = ",".join([*killed, "end", "undisturbed"])
    process = python("-m", "tests.experiments.store.killing", str(tmp_path), points, *overrides)
    out, err = process.communicate()
    endings = [int(code) for code in out.split()]
    assert endings == [-signal.SIGKILL] * len(killed) + [0, 0], err

    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    undisturbed = [key for place, _, key in lines if int(place) > len(killed)]
    disturbed = Counter(key for place, _, key in lines if int(place) <= len(killed))
    # Of each run the last stage that it made is the one that it was killed in.
    died_in = {int(place): key for place, _, key in lines}
    again = {died_in[place] for place, point in enumerate(killed) if "." not in point}
    assert len(again) == sum("." not in point for point in killed)
    assert disturbed == {key: 1 + (key in again) for key in undisturbed}

    assert not made(tmp_path / "run")
    assert not list((tmp_path / "store" / ".making").iterdir())
    assert list(Store(tmp_path / "store").damaged()) == []
    pd.testing.assert_frame_equal(
        rows_of(tmp_path / "run"), rows_of(tmp_path / "undisturbed" / "run")
    )
    assert (
        Record.read(tmp_path / "run").metrics
        == Record.read(tmp_path / "undisturbed" / "run").metrics
    )


@pytest.fixture
def finished(command: Command, store: Path, tmp_path: Path) -> tuple[Path, pd.DataFrame]:
    """A store of the test's own in which a run has finished, and that run's rows."""
    run = command("defense=none", *SMALL, toy=False)
    assert run.code == 0, run.err
    record = Record.read(run.folder)
    own = tmp_path / "own"
    for stage in record.stages:
        place = Path(stage["name"], stage["key"])
        shutil.copytree(store / place, own / place, dirs_exist_ok=True)
    return own, rows_of(run.folder)


def again(command: Command, own: Path) -> Path:
    run = command("defense=none", *SMALL, f"store.root={own}", toy=False)
    assert run.code == 0, run.err
    return run.folder


def flip(path: Path) -> None:
    """Changes one byte in the middle of a file, and nothing about its size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_only_stages_with_a_flipped_byte_are_made_again(
    command: Command, finished: tuple[Path, pd.DataFrame]
) -> None:
    own, rows = finished
    flip(next(own.glob("attack/*/model/*.safetensors")))
    flip(next(own.glob("generate/*/rows.parquet")))
    flip(next(own.glob("judge/*/stage.json")))
    assert len(list(Store(own).damaged())) == 3
    folder = again(command, own)
    assert made(folder) == {"attack": 1, "generate": 1, "judge": 1}
    pd.testing.assert_frame_equal(rows_of(folder), rows)
    assert list(Store(own).damaged()) == []


def test_a_copied_store_is_taken_and_a_removed_stage_made_again(
    command: Command, finished: tuple[Path, pd.DataFrame]
) -> None:
    own, rows = finished
    for path in own.rglob("*"):
        os.utime(path, (1e9, 1e9))
    shutil.rmtree(own / "score")
    folder = again(command, own)
    assert made(folder).keys() == {"score"}
    pd.testing.assert_frame_equal(rows_of(folder), rows)


class RemoveStore(Callback):
    """Removes a folder when the first job of a sweep has ended."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_job_end(self, **kwargs: Any) -> None:
        if not self.folder.with_name("removed").exists():
            self.folder.rename(self.folder.with_name("removed"))


def test_a_store_removed_between_the_jobs_of_a_sweep_is_made_again(
    command: Command, finished: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    own, rows = finished
    callback = f"{{_target_: {__name__}.RemoveStore, folder: {own}}}"
    run = command(
        "-m", "defense=none", *SMALL, "seed=0,1", f"store.root={own}",
        f"+hydra.callbacks.remove={callback}", toy=False,
    )  # fmt: skip
    assert run.code == 0, run.out
    assert not made(run.folder / "0")
    assert made(run.folder / "1")["generate"] > 0
    pd.testing.assert_frame_equal(rows_of(run.folder / "0"), rows)


# Jobs of one sweep at once are a quicker test, of the launchers.
@pytest.mark.slow
def test_two_sweeps_at_once_make_each_stage_of_one_store_once(tmp_path: Path) -> None:
    line = ["-m", "experiments.run", "-m", *SMALL, f"store.root={tmp_path / 'store'}"]
    processes = [
        python(*line, f"defense={defenses}", f"hydra.sweep.dir={tmp_path / name}")
        for name, defenses in (("one", "none,reset"), ("two", "reset,none"))
    ]
    ended = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ended
    records = [Record.read(tmp_path / name / job) for name in ("one", "two") for job in ("0", "1")]
    times_made = Counter(
        key
        for record in records
        for key in {stage["key"] for stage in record.stages if not stage["reused"]}
    )
    assert set(times_made.values()) == {1}
    assert times_made.keys() == {entry.key for entry in Store(tmp_path / "store").entries()}


class Killed(NoDefense):
    """Is killed, as the kernel does for want of memory."""

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Greedy(NoDefense):
    """Asks torch for more memory than there is."""

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        import torch

        torch.empty(2**50)
        raise AssertionError


# What a killed stage says, and that a sweep goes on after a failure, are quicker tests each.
@pytest.mark.slow
def test_a_killed_stage_and_one_without_memory_fail_their_jobs_and_not_the_sweep(
    command: Command,
) -> None:
    targets = ",".join((f"{__name__}.Killed", f"{__name__}.Greedy", "defenses.none.NoDefense"))
    run = command(
        "-m", "defense=none", *SMALL, f"defense._target_={targets}", "plugins=[tests]",
        "runtime.isolate=true", toy=False,
    )  # fmt: skip
    assert run.code == 1
    statuses = [json.loads((run.folder / n / "status.json").read_text()) for n in "012"]
    assert [status["status"] for status in statuses] == ["failed", "failed", "done"]
    assert "the process of stage prepare was killed" in statuses[0]["reason"]
    assert "memory gave out in stage prepare; lower defense.batch_size" in statuses[1]["reason"]
    assert "Traceback" not in run.err


CALLS = """
from experiments.pipeline.runner import in_child
from tests.experiments.store.waiting import say_and_wait

if __name__ == "__main__":
    in_child(say_and_wait, "attack")
"""


def test_the_child_of_a_killed_run_ends_with_it(tmp_path: Path) -> None:
    script = tmp_path / "calls.py"
    script.write_text(CALLS)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
        child.wait(timeout=60)
