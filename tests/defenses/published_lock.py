"""A file of the published Meta-SafetyLocks' form, with numbers of our own."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def save_published(
    file: Path, heads: Sequence[tuple[int, int]], head_dim: int, sigma: float = 0.5
) -> dict[tuple[int, int], np.ndarray[Any, Any]]:
    """Writes a lock of these (layer, head) and returns their unit directions."""
    generator = np.random.default_rng(0)
    directions = {}
    content: dict[str, list[Any]] = {}
    for layer, head in heads:
        direction = generator.normal(size=head_dim)
        direction = (direction / np.linalg.norm(direction)).astype(np.float16)
        directions[layer, head] = direction
        entry = (np.int64(head), direction, np.float16(sigma))
        content.setdefault(f"model.layers.{layer}.self_attn.head_out", []).append(entry)
    save_pickle(file, content)
    return directions


def save_pickle(file: Path, content: object) -> None:
    """Writes a torch archive of one pickle, as numpy 1 and torch wrote them."""
    data = pickle.dumps(content, protocol=2).replace(b"numpy._core.", b"numpy.core.")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("lock/data.pkl", data)
        archive.writestr("lock/version", "3\n")
