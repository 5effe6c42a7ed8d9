"""Fixtures of the tiny models."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from defenses.base import Models
from modeling.checkpoint import Checkpoint
from tests.defenses.tiny_lora_models import (
    NumberCalibration,
    number_prompts,
    save_adapter,
    save_base,
    save_resumed,
)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def aligned(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("aligned")
    return Checkpoint(base.base, save_adapter(base, folder, seed=1))


@pytest.fixture(scope="session")
def attacked(aligned: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("attacked")
    base = Checkpoint(aligned.base)
    return Checkpoint(aligned.base, save_resumed(base, str(aligned.adapter), folder))


@pytest.fixture(scope="session")
def models(base: Checkpoint, aligned: Checkpoint) -> Models:
    return Models(base, aligned)


@pytest.fixture
def calibration() -> Callable[..., NumberCalibration]:
    """Builds a calibration service of `count` prompts, some of them unsafe."""

    def make(count: int = 12, unsafe: int = 0) -> NumberCalibration:
        prompts = number_prompts(count)
        return NumberCalibration(prompts, frozenset(p.text for p in prompts[:unsafe]))

    return make
