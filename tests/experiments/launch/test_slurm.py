"""A real Slurm of one node: arrays, one GPU per job, and a job that is queued again."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import psutil
import pytest

from tests.experiments.launch import slurm
from tests.experiments.launch.conftest import Launch, made_once, until

pytestmark = pytest.mark.slurm

ONE_CORE = ("hydra.launcher.partition=debug", "hydra.launcher.cpus_per_task=1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    reason = slurm.why_not()
    if reason is not None:
        pytest.skip(reason)
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def _gone(process: psutil.Process) -> bool:
    """Whether Slurm has killed it. Slurm lets a job go on for seconds before, and this one not."""
    try:
        process.suspend()
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_an_array_with_a_job_that_is_queued_again(launch: Launch, cluster: dict[str, str]) -> None:
    sweep = launch("submitit_slurm", *ONE_CORE, "defense=none,reset", "seed=5", **cluster)
    until(lambda: sweep.reached(1, "attack"))
    process = sweep.running(1)
    process.suspend()
    [submitted] = sweep.folder.glob(".submitit/*_1/*_submitted.pkl")
    job = submitted.name.removesuffix("_submitted.pkl")
    command = ["scontrol", "requeue", job]
    subprocess.run(command, env=os.environ | cluster, check=True, timeout=60)
    until(lambda: _gone(process))
    assert sweep.end() == 0, sweep.out
    assert "sweep: 2 done, 0 failed" in sweep.out
    assert [sweep.status(number)["status"] for number in range(2)] == ["done", "done"]
    assert sweep.status(1)["pid"] != process.pid
    assert all(stage["reused"] for stage in sweep.stages(1, "attack"))


def test_a_killed_worker_is_told_without_accounting(
    launch: Launch, cluster: dict[str, str]
) -> None:
    sweep = launch("submitit_slurm", *ONE_CORE, "defense=none,reset", "seed=8", **cluster)
    worker = sweep.running(0).parent()
    assert worker is not None
    worker.kill()
    assert sweep.end() == 1
    assert "sweep: 1 done, 1 failed" in sweep.out, sweep.out
    assert "it was killed before it ended" in sweep.out
    assert "the launcher lost a worker" in sweep.out
    assert "sacct" not in sweep.out
    assert "Traceback" not in sweep.out
    assert [sweep.status(job)["status"] for job in range(2)] == ["running", "done"]


def test_an_interrupted_command_leaves_the_array_to_slurm(
    launch: Launch, cluster: dict[str, str]
) -> None:
    sweep = launch("submitit_slurm", *ONE_CORE, "defense=none,reset", "seed=9", **cluster)
    sweep.running(0)
    sweep.process.send_signal(signal.SIGINT)
    assert sweep.end() == 130
    [array] = {path.name.partition("_")[0] for path in sweep.folder.glob(".submitit/[0-9]*_*")}
    assert f"Slurm's array {array} goes on (scancel {array} ends it)" in sweep.out, sweep.out
    asked = ["squeue", "--noheader"]
    environment = os.environ | cluster
    until(lambda: not subprocess.check_output(asked, env=environment, timeout=60))
    assert [sweep.status(job)["status"] for job in range(2)] == ["done", "done"]


def test_each_job_of_an_array_has_a_gpu_of_its_own(launch: Launch, cluster: dict[str, str]) -> None:
    sweep = launch(
        "submitit_slurm",
        *ONE_CORE,
        "hydra.launcher.gpus_per_node=1",
        "hydra.launcher.setup=[env]",  # Into the job's output.
        "defense=none,reset",
        "seed=6",
        **cluster,
    )
    assert sweep.end() == 0, sweep.out
    assert made_once(sweep, range(2), "attack")
    for output in sweep.folder.glob(".submitit/*/*_log.out"):
        lines = output.read_text().splitlines()
        [visible] = [line for line in lines if line.startswith("CUDA_VISIBLE_DEVICES=")]
        assert visible.partition("=")[2] in ("0", "1")
