"""The authors' published locks: read without running anything, and told from our own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from defenses.safetylock.lock import load_lock
from defenses.safetylock.published import read_published
from modeling.heads import HeadLayout
from settings import ModelError
from tests.defenses.published_lock import save_pickle, save_published

LAYOUT = HeadLayout("llama", layers=3, heads=4, kv_heads=2, head_dim=8, hidden=32)
HEADS = [(0, 3), (2, 0), (2, 1)]


def test_a_published_lock_becomes_ours_and_says_where_it_came_from(tmp_path: Path) -> None:
    directions = save_published(tmp_path / "some.safelock", HEADS, 8)
    read_published(tmp_path / "some.safelock", LAYOUT, "some/model").save(tmp_path / "lock")
    lock = load_lock(tmp_path / "lock", "lock")
    assert sorted(lock.heads(3)) == HEADS
    assert lock.k == 3
    assert (lock.accuracy, lock.alpha, lock.origin["base"]) == (None, None, None)
    assert lock.origin["file"] == "some.safelock"
    assert "the file names no model to verify" in str(lock.origin["for"])
    for (layer, head), direction in directions.items():
        assert lock.directions.u[layer, head].numpy() == pytest.approx(direction)
        assert lock.directions.sigma[layer, head] == 0.5
    deltas = lock.deltas(lock.heads(3), 6.0)
    assert sorted(deltas) == [0, 2]
    assert deltas[0][24:].numpy() == pytest.approx(3.0 * directions[0, 3], rel=1e-3)
    assert deltas[0][:24].abs().max() == 0


class Evil:
    """Would make a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_nothing_that_a_file_names_is_run(tmp_path: Path) -> None:
    key, file, ran = "model.layers.0.self_attn.head_out", tmp_path / "x.safelock", tmp_path / "ran"
    evil = (np.int64(0), Evil(ran), np.float16(1))
    for content in (Evil(ran), {key: [evil]}, {key: [print]}, {key: [np.zeros]}):
        save_pickle(file, content)
        with pytest.raises(ModelError, match=r"it names .*nothing of it was run"):
            read_published(file, LAYOUT, "some/model")
    assert not ran.exists()


def test_what_does_not_fit_or_is_no_lock_is_refused(tmp_path: Path) -> None:
    file, key = tmp_path / "x.safelock", "model.layers.0.self_attn.head_out"
    whole = np.zeros(8, np.float16)
    contents: dict[str, object] = {
        "steers head 4 of layer 0": {key: [(np.int64(4), whole, np.float16(1))]},
        "steers head 0 of layer 3": {
            key.replace("0", "3"): [(np.int64(0), whole, np.float16(1))],
        },
        "9 wide": {key: [(np.int64(0), np.zeros(9, np.float16), np.float16(1))]},
        "no (head, direction, sigma)": {key: [(np.int64(0), whole)]},
        "is no (head, direction": {key: [(np.int64(0), whole * np.nan, np.float16(1))]},
        "has an entry": {"other": [(np.int64(0), whole, np.float16(1))]},
        "holds no heads": {},
    }
    for sentence, content in contents.items():
        save_pickle(file, content)
        with pytest.raises(ModelError) as error:
            read_published(file, LAYOUT, "some/model")
        assert sentence in str(error.value)
    file.write_bytes(b"no archive")
    with pytest.raises(ModelError, match="is no published lock"):
        read_published(file, LAYOUT, "some/model")
    with pytest.raises(ModelError, match="is no file"):
        read_published(tmp_path / "none", LAYOUT, "some/model")
