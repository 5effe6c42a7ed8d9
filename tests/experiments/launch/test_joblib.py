"""joblib: parallel jobs on one machine, and what becomes of the others when one dies."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from tests.experiments.launch.conftest import Launch, made_once


def test_jobs_at_once_make_the_attack_once_and_a_killed_one_fails_alone(launch: Launch) -> None:
    sweep = launch("joblib", "hydra.launcher.n_jobs=2", "defense=none,reset,safelora", "seed=1")
    sweep.running(2).kill()
    assert sweep.end() == 1
    assert "sweep: 2 done, 1 failed" in sweep.out, sweep.out
    assert "its process was killed by SIGKILL, most often for want of memory" in sweep.out
    assert f"python -m experiments.rerun --failed {sweep.folder}" in sweep.out
    assert "Traceback" not in sweep.out
    assert [sweep.status(job)["status"] for job in range(3)] == ["done", "done", "failed"]
    assert made_once(sweep, range(2), "attack")


def test_a_killed_worker_ends_the_sweep_with_its_summary(launch: Launch) -> None:
    sweep = launch("joblib", "defense=none,reset", "seed=3", "attack.poison_ratio=0.25,1.5")
    worker = sweep.running(0).parent()
    assert worker is not None
    worker.kill()
    assert sweep.end() == 1
    assert "it was killed before it ended" in sweep.out, sweep.out
    assert "the launcher lost a worker" in sweep.out
    assert "Traceback" not in sweep.out


@pytest.mark.slow
def test_trials_of_a_search_run_at_once(launch: Launch) -> None:
    sweep = launch(
        "joblib",
        "hydra/sweeper=optuna",
        "hydra.sweeper.direction=minimize",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=2",
        "objective=hs_within_accuracy",
        "defense=none",
        "seed=choice(1)",
    )
    assert sweep.end() == 0, sweep.out
    found = OmegaConf.load(sweep.folder / "optimization_results.yaml")
    assert found.best_params == {"seed": 1}
    assert [sweep.status(job)["status"] for job in range(2)] == ["done", "done"]
    assert sweep.status(0)["pid"] != sweep.status(1)["pid"]
