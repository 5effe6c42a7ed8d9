"""Peak memory of a step on a CPU."""

from __future__ import annotations

import pytest
import torch

from modeling.measure import measured

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="measures the process's memory")

MIB = 2**20


def peak() -> int:
    """Bytes that a step took at most which holds 64 MiB in pieces that the heap keeps when free."""
    with measured() as cost:
        pieces = [torch.ones(4096) for _ in range(4096)]
    assert len(pieces) == 4096
    return cost.peak_bytes


def test_a_step_costs_the_same_whatever_was_freed_before() -> None:
    first, second = peak(), peak()
    assert 60 * MIB < first < 80 * MIB
    assert abs(first - second) < 4 * MIB


def test_a_step_that_holds_nothing_new_costs_hardly_anything() -> None:
    before = [torch.ones(4096) for _ in range(4096)]
    with measured() as cost:
        assert sum(len(piece) for piece in before) == 4096**2
    assert cost.peak_bytes < 4 * MIB
    assert cost.seconds > 0
