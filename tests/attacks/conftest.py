"""The organism's aligned model in every form an attack may start from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from modeling.checkpoint import Checkpoint
from modeling.heads import head_layout
from modeling.steering import save_steering
from modeling.training import write_merged
from organism.make import WEIGHTS
from tests.modeling.tiny_models import random_steering

BASE = Checkpoint(str(WEIGHTS / "base"))
ALIGNED = Checkpoint(str(WEIGHTS / "base"), str(WEIGHTS / "aligned"))


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The aligned model as full weights."""
    folder = tmp_path_factory.mktemp("merged")
    write_merged(ALIGNED, folder)
    return Checkpoint(str(folder))


@pytest.fixture(scope="session")
def forms(merged: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """By name: an adapter and full weights, plain and locked by hooks."""
    steering = tmp_path_factory.mktemp("steering")
    save_steering(random_steering(head_layout(BASE), [(1, 0), (3, 2)], 2.0), steering)
    return {
        "adapter": ALIGNED,
        "weights": merged,
        "locked adapter": replace(ALIGNED, steering=str(steering)),
        "locked weights": replace(merged, steering=str(steering)),
    }
