"""The command line that makes a run again."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.config.jobs import expand
from experiments.results.command_line import command_line


@pytest.mark.parametrize(
    ("overrides", "more", "line"),
    [
        ([], [], ""),
        (["defense=nlsr", "seed=1"], [], "defense=nlsr seed=1"),
        (["+prompts.a.name=it's"], [], """'+prompts.a.name=it'"'"'s'"""),
        (["experiment=organism", "seed=1"], [], "experiment=organism seed=1 hydra.mode=RUN"),
        (["evaluation.split=validation"], ["evaluation.split=test"], "evaluation.split=test"),
    ],
)
def test_the_line(overrides: list[str], more: list[str], line: str) -> None:
    assert command_line(overrides, *more) == f"python -m experiments.run {line}".strip()


def test_the_configuration_folder_is_named_again(tmp_path: Path) -> None:
    sources = [
        {"path": "hydra.conf", "schema": "pkg", "provider": "hydra"},
        {"path": "/my conf", "schema": "file", "provider": "command-line"},
    ]
    (tmp_path / ".hydra").mkdir()
    kept = OmegaConf.create({"hydra": {"runtime": {"config_sources": sources}}})
    OmegaConf.save(kept, tmp_path / ".hydra" / "hydra.yaml")
    line = command_line(["defense=clip", "plugins=['a b']"], folder=tmp_path)
    words = ["--config-dir=/my conf", "defense=clip", "plugins=['a b']"]
    assert shlex.split(line) == ["python", "-m", "experiments.run", *words]


def test_a_job_of_an_experiment_is_one_job_again() -> None:
    own = ["defense=nlsr", "attack.poison_ratio=0.05", "seed=1", "experiment=organism_table"]
    words = shlex.split(command_line(own))[3:]
    (job,) = expand(words, multirun=False)
    assert job.labels["defense"] == "nlsr"
    assert job.seed == 1
