"""A judge runs on the evaluation's backend, or on one of its own that the command line names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from evaluation.backends.auto import AutoBackend
from evaluation.backends.transformers import TransformersBackend
from evaluation.base import Judge
from settings import build

CONF = Path(__file__).parents[2] / "conf"
OWN = "+backend@evaluation.{role}.backend=transformers"
JUDGES = ("moderation", "harmbench", "llama_guard", "wildguard", "strongreject")
NAMED = ("rubric_local", "xstest_local")


def built(role: str, name: str, *overrides: str) -> Judge:
    judge = [f"judge@evaluation.{role}={name}", "model.moderation=a-classifier"]
    named = [f"evaluation.{role}.model=a-model"] if name in NAMED else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [*judge, *named, *overrides])
    node = OmegaConf.to_container(config.evaluation[role], resolve=True)
    return build(node, f"evaluation.{role}", (), Judge)


@pytest.mark.parametrize("name", [*JUDGES, *NAMED])
def test_none_is_named_and_one_can_be(name: str) -> None:
    assert built("harm_judge", name).backend is None
    batch = "evaluation.harm_judge.backend.batch_size=8"
    own = built("harm_judge", name, OWN.format(role="harm_judge"), batch)
    assert own.backend == TransformersBackend(batch_size=8)


def test_the_refusal_judge_too_and_with_one_that_holds_others() -> None:
    own = built("refusal_judge", "wildguard", "+backend@evaluation.refusal_judge.backend=auto")
    assert isinstance(own.backend, AutoBackend)
