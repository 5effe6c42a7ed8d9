"""A disk that is really full: a small tmpfs in a mount namespace of the test's own."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from experiments.results.record import Record
from experiments.store import Store
from tests.experiments.conftest import ENVIRONMENT, SMALL, made


@cache
def namespaces() -> bool:
    try:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"],
            capture_output=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return False
    return done.returncode == 0


pytestmark = pytest.mark.skipif(not namespaces(), reason="no tmpfs may be mounted here")


def run_twice(folder: Path, size: str, filler: int, *overrides: str) -> list[str]:
    """What the command says of errors on a full disk; as `tests.experiments.store.filling` runs it.

    The disk's content is copied to `folder`-first and `folder`-second.
    """
    folder.mkdir()
    filling = [sys.executable, "-m", "tests.experiments.store.filling"]
    line = [*filling, str(folder), size, str(filler), *SMALL, *overrides]
    done = subprocess.run(
        ["unshare", "-rm", *line], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    first, second = (Path(f"{folder}-{name}.err").read_text() for name in ("first", "second"))
    assert done.stdout.split() == ["1", "0"], (done.stderr, first, second)
    return first.strip().splitlines()


def test_a_full_store_is_one_sentence_and_what_was_finished_stays(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    places = (f"store.root={disk / 'store'}", f"hydra.run.dir={tmp_path / 'run'}")
    (error,) = run_twice(disk, "1m", 0, "defense=none", *places)
    assert error.startswith("error: stage attack: the disk of")
    assert "is full; free some space (python -m experiments.store prune --older-than 7d)" in error
    first = Store(Path(f"{disk}-first") / "store")
    assert [entry.name for entry in first.entries()] == ["prepare"]
    assert list(first.damaged()) == []
    assert not list((first.root / ".making").iterdir())
    assert made(tmp_path / "run").keys() == {
        "attack", "apply", "generate", "likelihood", "judge", "score",
    }  # fmt: skip


@pytest.mark.slow
def test_a_full_run_folder_is_one_sentence_and_no_record(tmp_path: Path, store: Path) -> None:
    disk = tmp_path / "disk"
    places = (f"store.root={store}", f"hydra.run.dir={disk / 'run'}")
    # Room for Hydra's own files, but not for the rows.
    errors = run_twice(disk, "128k", 81920, "defense=none", *places)
    assert any("is full; free some space" in line for line in errors), errors
    assert not any("Traceback" in line for line in errors), errors
    assert not list(Path(f"{disk}-first").rglob("*record.json"))
    assert not list(Path(f"{disk}-first").rglob("*rows.parquet"))
    assert Record.read(Path(f"{disk}-second") / "run").metrics["attacked"]["hs"]["n"] == 4
