"""A sweep's progress: real multiruns, on a terminal and off it, and the estimate as a function."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.launch.progress.state import SweepState, time_left
from experiments.launch.progress.view import snapshot
from experiments.progress import main as progress
from experiments.results import events
from experiments.results.record import Record
from experiments.store import Stage, Store
from tests.experiments.conftest import ENVIRONMENT, SHORT, SMALL, Command

COLUMNS, LINES = 140, 30


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = progress(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def unique(stages: list[dict[str, object]]) -> Counter[tuple[object, str]]:
    """How many stages of each name a record has made and reused, each key once."""
    first: dict[object, dict[str, object]] = {}
    for stage in stages:
        first.setdefault(stage["key"], stage)
    kinds = ((each["name"], "reused" if each["reused"] else "made") for each in first.values())
    return Counter(kinds)


def test_off_a_terminal_a_sweep_says_a_line_per_job(command: Command) -> None:
    run = command("-m", *SHORT, "defense=none,reset", "attack.poison_ratio=0.25,1.5")
    assert run.code == 1
    assert "\x1b" not in run.out
    lines = [line for line in run.out.splitlines() if re.match(r"\[\d+/4\] ", line)]
    assert [line.partition("]")[0] for line in lines] == ["[1/4", "[2/4", "[3/4", "[4/4"]
    labels = [
        f"defense={defense} attack.poison_ratio={ratio}"
        for defense, ratio in product(("none", "reset"), ("0.25", "1.5"))
    ]
    assert [line.partition("] ")[2].partition(":")[0] for line in lines] == labels
    ends = [line.partition(": ")[2].split()[0] for line in lines]
    assert ends == ["done", "failed", "done", "failed"]
    assert run.err.count("error: attack.poison_ratio=1.5 is not allowed") == 2
    assert "attacked -> reset: HS" in lines[2]
    assert "attack reused" in lines[2]
    assert "left" not in lines[3]
    assert "made in" not in run.out, "a job's own log is left to its file"
    assert "made in" in (run.folder / "0" / "run.log").read_text() or "attack reused" in lines[0]

    sweep = SweepState(run.folder)
    sweep.refresh()
    assert sweep.ended
    assert [job.status for job in sweep.jobs.values()] == ["done", "failed", "done", "failed"]
    for number in (0, 2):
        counts = sweep.jobs[number].counts
        seen = Counter({(n, how): count for n, of in counts.items() for how, count in of.items()})
        assert seen == unique(Record.read(run.folder / str(number)).stages)
    said = [json.loads(line) for line in (run.folder / "0" / events.EVENTS).open()]
    assert [said[0]["event"], said[0]["status"]] == ["job", "running"]
    assert [said[-1]["event"], said[-1]["status"]] == ["job", "done"]


def test_off_a_terminal_a_run_says_which_stage_of_how_many_it_makes(command: Command) -> None:
    run = command(*SHORT, "defense=reset", "attack.poison_ratio=0.75")
    assert run.code == 0, run.err
    stages = Record.read(run.folder).stages
    said = re.findall(r"stage (\d+) of (\d+): (\w+)", run.out)
    assert {of for _, of, _ in said} == {str(len(stages))}
    made = [(str(at), each["name"]) for at, each in enumerate(stages, 1) if not each["reused"]]
    assert [(at, name) for at, _, name in said] == made
    seen = SweepState(run.folder)
    seen.refresh()
    assert seen.ended
    lines = list(snapshot(seen))
    assert "1 jobs: 1 done, 0 failed, 0 running, 0 not started" in lines
    assert any("attack made" in line for line in lines)


def test_a_job_says_all_of_it_where_progress_is_off(command: Command) -> None:
    run = command("-m", *SHORT, "defense=none", "attack.poison_ratio=0.25", "runtime.progress=off")
    assert run.code == 0, run.err
    assert "[1/1]" not in run.out
    assert run.out.count("attacked -> none: HS") == 1
    assert (run.folder / events.EVENTS).is_file(), "another terminal may still ask"


def test_an_unknown_kind_of_progress_is_one_sentence(command: Command) -> None:
    run = command("runtime.progress=loud")
    assert run.code == 1
    assert run.err.startswith("error: runtime.progress=")
    assert "Traceback" not in run.err


def arguments(store: Path, sweep: Path, *more: str) -> list[str]:
    line = [sys.executable, "-m", "experiments.run", "-m", *SMALL]
    return [*line, f"store.root={store}", f"hydra.sweep.dir={sweep}", *more]


def environment() -> dict[str, str]:
    return {**ENVIRONMENT, "TERM": "xterm"}


@contextmanager
def on_a_terminal(line: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process whose output is a terminal of COLUMNS x LINES; gives the terminal's other end."""
    leader, follower = pty.openpty()
    size = {"COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    process = subprocess.Popen(
        line, stdin=follower, stdout=follower, stderr=follower, env={**environment(), **size}
    )
    os.close(follower)
    try:
        yield process, leader
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def written(leader: int) -> bytes:
    """All that is written to a terminal until its last process has closed it."""
    parts = []
    with suppress(OSError):  # What Linux says at the end.
        while part := os.read(leader, 65536):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param((), id="serial"),
        pytest.param(
            ("hydra/launcher=joblib", "hydra.launcher.n_jobs=1"),
            id="joblib",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_on_a_terminal_a_sweep_has_one_view_and_leaves_a_clean_screen(
    launcher: tuple[str, ...], store: Path, tmp_path: Path
) -> None:
    # Of its own, so that there are bars that a training or an answering would draw.
    overrides = (
        "defense=none",
        "attack.poison_ratio=1.5,0.2,2.5",
        f"attack.n={40 + len(launcher)}",
    )
    line = arguments(store, tmp_path / "sweep", *overrides, *launcher)
    with on_a_terminal(line) as (process, leader):
        raw = written(leader)
        assert process.wait(60) == 1
    assert b"queued" in raw
    assert re.search(rb"\x1b\[\d*A", raw), "it is drawn over"
    screen = pyte.HistoryScreen(COLUMNS, LINES, history=10_000)
    pyte.ByteStream(screen).feed(raw)
    top = ["".join(line[x].data for x in range(COLUMNS)) for line in screen.history.top]
    shown = [line.rstrip() for line in [*top, *screen.display] if line.strip()]
    jobs = [line.partition(" in ")[0].partition(" after ")[0] for line in shown[:5]]
    assert jobs == [
        "[1/3] attack.poison_ratio=1.5: failed",
        "error: attack.poison_ratio=1.5 is not allowed; it should be less than or equal to 1",
        "[2/3] attack.poison_ratio=0.2: done",
        "[3/3] attack.poison_ratio=2.5: failed",
        "error: attack.poison_ratio=2.5 is not allowed; it should be less than or equal to 1",
    ]
    assert shown[5].startswith("shares in %")
    assert "queued" not in "\n".join(shown), "nothing of the view is left"
    assert "sweep: 1 done, 2 failed" in shown


@pytest.mark.slow
def test_a_single_run_names_its_stages_on_a_terminal_and_there_alone(
    store: Path, tmp_path: Path, command: Command
) -> None:
    fresh = ["defense=none", "seed=7", f"hydra.run.dir={tmp_path / 'run'}"]
    line = [each for each in arguments(store, tmp_path / "none", *fresh) if each != "-m"]
    line[1:1] = ["-m"]
    with on_a_terminal(line) as (process, leader):
        raw = written(leader).decode()
        assert process.wait(60) == 0
    assert re.search(r"stage \d+ of \d+: attack", raw)
    assert re.search(r"stage \d+ of \d+: generate", raw)
    again = command(*SMALL, "defense=none", "seed=7", toy=False)
    assert "stage 1" not in again.out
    assert "\x1b" not in again.out


def until(reached: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_another_process_sees_a_sweep_run_and_sees_it_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    line = arguments(tmp_path / "store", folder, "defense=none", "seed=0,1,2")
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    sweep = SweepState(folder)

    def attacks() -> bool:
        sweep.refresh()
        return bool(sweep.counts().get("attack"))

    try:
        until(attacks)
        os.kill(process.pid, signal.SIGSTOP)
        code, out, _ = say(capsys, str(folder), "--once")
        assert code == 0
        assert "3 jobs: 0 done, 0 failed, 1 running, 2 queued" in out
        assert "running: seed=0: makes attack" in out or "running: seed=0: after attack" in out
        assert "time left is not known yet" in out
    finally:
        process.kill()
        process.wait()
    code, out, _ = say(capsys, str(folder))
    assert code == 0, "it doesn't wait for a sweep that nobody goes on with"
    assert "3 jobs: 0 done, 0 failed, 1 killed, 0 running, 2 not started" in out
    assert "killed: seed=0" in out
    assert "attack unfinished" in out or "attack made" in out


def test_a_folder_that_is_no_sweep_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        code, out, err = say(capsys, str(folder), "--once")
        assert (code, out) == (1, "")
        assert err.startswith(f"error: {folder} is neither a run nor a sweep; give the folder")


def sweep_of(folder: Path, jobs: int) -> SweepState:
    """A sweep of this process, of which nothing has run."""
    known = {"total": jobs, "varies": ["seed"], "numbers": None}
    here = {"host": os.uname().nodename, "pid": os.getpid()}
    folder.mkdir(exist_ok=True)
    events.append(folder, "sweep", "started", **here, **known)
    return SweepState(folder)


def test_a_job_that_a_queue_starts_again_is_seen_from_its_beginning(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, 2)
    job = tmp_path / "0"
    job.mkdir()
    events.append(job, "job", "running")
    events.append(job, "stage", "running", name="attack", key="k")
    sweep.refresh()
    assert sweep.counts() == {"attack": {"running": 1}}
    events.append(job, "job", "running")
    events.append(job, "stage", "waiting", name="attack", key="k")
    events.append(job, "stage", "reused", name="attack", key="k", seconds=3.0)
    sweep.refresh()
    assert sweep.counts() == {"attack": {"reused": 1}}


def test_a_sweep_of_which_no_job_ended_since_it_was_run_again_has_no_length(tmp_path: Path) -> None:
    job = tmp_path / "0"
    job.mkdir()
    content = {"status": "done", "overrides": [], "host": "elsewhere", "pid": 1, "time": 1000.0}
    (job / "status.json").write_text(json.dumps(content))
    started = {"total": 2, "varies": [], "numbers": [1], "host": "elsewhere", "pid": 1}
    events.append(tmp_path, "sweep", "started", **started)
    events.append(tmp_path, "sweep", "ended")
    sweep = SweepState(tmp_path)
    sweep.refresh()
    assert list(snapshot(sweep))[-1] == "ended"


def test_a_sweep_that_was_run_again_took_what_all_its_goes_took(tmp_path: Path) -> None:
    here = {"varies": [], "host": "elsewhere", "pid": 1, "total": 2}
    happened = [
        ("", {"event": "sweep", "status": "started", "numbers": None, "time": 1000.0, **here}),
        ("", {"event": "sweep", "status": "ended", "time": 1060.0}),
        ("", {"event": "sweep", "status": "started", "numbers": [1], "time": 5000.0, **here}),
        ("1", {"event": "job", "status": "running", "time": 5000.0}),
        ("", {"event": "sweep", "status": "ended", "time": 5030.0}),
    ]
    (tmp_path / "1").mkdir()
    for folder, event in happened:
        with (tmp_path / folder / events.EVENTS).open("a") as file:
            file.write(json.dumps(event) + "\n")
    status = {"status": "done", "overrides": [], "host": "elsewhere", "pid": 1, "time": 5030.0}
    (tmp_path / "1" / "status.json").write_text(json.dumps(status))
    sweep = SweepState(tmp_path)
    sweep.refresh()
    assert list(snapshot(sweep))[-1] == "ended after 90 s, 30 s of it when jobs ran again"


def test_a_full_disk_costs_events_and_nothing_else(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, 1)
    job = tmp_path / "0"
    job.mkdir()
    (job / events.EVENTS).symlink_to("/dev/full")
    events.append(job, "job", "running")
    (job / events.EVENTS).unlink()
    with (job / events.EVENTS).open("w") as file:
        file.write('{"event": "stage", "stat\n')
    events.append(job, "stage", "made", name="attack", key="k", seconds=1.0)
    with (job / events.EVENTS).open("a") as file:
        file.write('{"event": "stage", "status": "ma')
    sweep.refresh()
    assert sweep.counts() == {"attack": {"made": 1}}


def test_a_stage_that_another_makes_is_waited_for_aloud(tmp_path: Path) -> None:
    stage, waits = Stage("attack", 1, {}), threading.Event()

    def make(out: Path) -> None:
        begun.set()
        assert waits.wait(60)

    begun = threading.Event()
    store = Store(tmp_path)
    other = threading.Thread(target=store.run, args=(stage, make))
    other.start()
    assert begun.wait(60)
    assert store.run(stage, make, waiting=waits.set).reused
    other.join()


def test_a_sweep_of_before_there_were_events_is_shown(tmp_path: Path) -> None:
    for number, status in enumerate(("done", "failed")):
        (tmp_path / str(number)).mkdir()
        content = {"status": status, "overrides": [f"seed={number}", "a=1"], "reason": "why"}
        (tmp_path / str(number) / "status.json").write_text(json.dumps(content))
    sweep = SweepState(tmp_path)
    sweep.refresh()
    lines = list(snapshot(sweep))
    assert lines[1] == "2 jobs: 1 done, 1 failed, 0 running"
    assert lines[2] == "failed: seed=1: why"
    assert lines[-1] == "ended"


def test_the_time_left_is_the_mean_of_recent_jobs_for_each_that_is_to_come() -> None:
    assert time_left([], [], 3, 1) is None
    assert time_left([9.0], [], 0, 1) == 0.0
    assert time_left([9.0], [], 2, 1) is None, "the first made what all share"
    assert time_left([9.0, 4.0], [], 2, 1) == 8.0
    assert time_left([9.0, 100.0, 1.0, 2.0, 3.0, 4.0, 5.0], [], 1, 1) == 3.0
    assert time_left([9.0, 4.0], [1.0, 6.0], 2, 1) == 11.0
    assert time_left([9.0, 4.0], [1.0, 6.0], 2, 2) == 5.5
    assert time_left([9.0, 4.0], [], 1, 8) == 4.0, "no job is shared among processes"


@given(st.lists(st.floats(0.1, 1000), min_size=2, max_size=9), st.integers(0, 9), st.integers(1, 4))
def test_the_time_left_lies_between_that_of_the_shortest_and_of_the_longest_job(
    seconds: list[float], queued: int, at_once: int
) -> None:
    left = time_left(seconds, [], queued, at_once)
    assert left is not None
    assert queued * min(seconds) <= at_once * left + 1e-6
    assert left <= queued * max(seconds) + 1e-6
