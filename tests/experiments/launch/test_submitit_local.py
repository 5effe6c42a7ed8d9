"""submitit's processes on this machine: the same launcher as Slurm's, with its requeueing."""

from __future__ import annotations

import signal

import pytest

from tests.experiments.launch.conftest import Launch, until

# CI runs the same of a real Slurm.
pytestmark = pytest.mark.slow


def test_one_is_killed_one_is_queued_again_and_all_are_waited_for(launch: Launch) -> None:
    sweep = launch("submitit_local", "defense=none,reset", "seed=4")
    first = sweep.running(0).parent()
    assert first is not None
    first.kill()
    until(lambda: sweep.reached(1, "attack"))
    again = sweep.running(1)
    worker = again.parent()
    assert worker is not None
    worker.send_signal(signal.SIGUSR2)  # As Slurm does before it takes the machine away.
    assert sweep.end() == 1
    assert "sweep: 1 done, 1 failed" in sweep.out, sweep.out
    assert "it was killed before it ended" in sweep.out
    assert "Traceback" not in sweep.out
    assert [sweep.status(job)["status"] for job in range(2)] == ["running", "done"]
    assert sweep.status(1)["pid"] != again.pid
    assert all(stage["reused"] for stage in sweep.stages(1, "attack"))
