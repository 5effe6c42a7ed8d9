"""A real Ray on loopback; its plugin has an environment of its own (make test-ray)."""

from __future__ import annotations

import pytest

from tests.experiments.launch.conftest import Launch, made_once

pytestmark = pytest.mark.ray


def test_jobs_at_once_make_the_attack_once_and_a_killed_one_fails_alone(launch: Launch) -> None:
    sweep = launch(
        "ray", "hydra.launcher.ray.remote.num_cpus=1", "defense=none,reset,safelora", "seed=7"
    )
    sweep.running(2).kill()
    assert sweep.end() == 1
    assert "sweep: 2 done, 1 failed" in sweep.out, sweep.out
    assert "its process was killed by SIGKILL" in sweep.out
    assert "Traceback" not in sweep.out
    assert made_once(sweep, range(2), "attack")
