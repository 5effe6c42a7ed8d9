"""The stage store: content-addressed folders that appear complete or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.store import resource_errors
from experiments.store.manifest import MANIFEST, examine, fsync, write_manifest
from settings import RelockError

log = logging.getLogger("relock")

_TEMPORARY, _LOCKS = ".making", ".locks"
# Other folders that lie in a root, given by mistake perhaps, are nobody's stages.
_KEY = re.compile("[0-9a-f]{20}")


@dataclass(frozen=True, slots=True)
class Stage:
    """What identifies a stage's output.

    Attributes:
        name: Which kind of step makes it, "attack" for example.
        version: Raised when the stage's code changes what it writes.
        settings: Resolved, JSON-serialisable settings that the output depends on.
        inputs: Keys of the stages and identities of the files it reads.
    """

    name: str
    version: int
    settings: Mapping[str, Any]
    inputs: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """SHA-256 of all of the above (20 hex digits)."""
        canonical = json.dumps(
            [self.name, self.version, self.settings, list(self.inputs)],
            sort_keys=True,
            separators=(",", ":"),
        )
        return hashlib.sha256(canonical.encode()).hexdigest()[:20]


@dataclass(frozen=True, slots=True)
class StageResult:
    """A finished stage."""

    name: str
    key: str
    folder: Path
    report: dict[str, Any]
    seconds: float
    reused: bool


class Store:
    """A folder of finished stages, `root/<name>/<key>`, shared by any number of processes."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()

    def folder(self, stage: Stage) -> Path:
        """Where the stage's output is, or will be."""
        return self.root / stage.name / stage.key

    def find(self, stage: Stage) -> StageResult | None:
        """The stage's output if it is there and whole; nothing is made, nothing discarded."""
        return self._read(self.folder(stage), stage.name, stage.key, discard=False)

    def run(
        self,
        stage: Stage,
        make: Callable[[Path], dict[str, Any] | None],
        stale: Callable[[StageResult], bool] = lambda result: False,
        waiting: Callable[[], None] = lambda: None,
    ) -> StageResult:
        """Returns the stage's output, making it only if it isn't there, or is `stale`.

        `make` gets an empty folder beside the store and returns the stage's report. The folder is
        fsynced and renamed into place when `make` has returned; if it raises, or the process
        dies, the store is as it was. Two processes that want the same stage make it once; the one
        that comes second calls `waiting`, and waits. What is there may lie where nobody may write.

        Raises:
            RelockError: The disk is full or can't be written, or memory gave out.
        """
        found = self.find(stage)
        if found is not None and not stale(found):
            return found
        self._check_writable(stage)
        with (
            self._of_another_user(),
            resource_errors.named(stage.name, self.root),
            self._locked(stage, waiting),
        ):
            result = self._read(self.folder(stage), stage.name, stage.key)
            if result is not None and not stale(result):
                return result
            return self._make(stage, make)

    def entries(self) -> Iterator[StageResult]:
        """Every finished stage, by name and key; damaged ones are left out."""
        for folder in self._folders():
            result = self._read(folder, folder.parent.name, folder.name, discard=False)
            if result is not None:
                yield result

    def damaged(self) -> Iterator[tuple[Path, str]]:
        """Folders whose files aren't what was written, each with the file at fault.

        Every file is hashed, whatever its size and time of change say.
        """
        for folder in self._folders():
            _, wrong = examine(folder, every=True)
            if wrong is not None:
                yield folder, wrong

    def remove(self, name: str, key: str) -> bool:
        """Removes one stage; False if another process is using its lock right now.

        Raises:
            RelockError: It is another user's.
        """
        from filelock import FileLock, Timeout

        try:
            with self._of_another_user(), FileLock(self._lock_path(name, key), timeout=0):
                self._discard(self.root / name / key)
        except Timeout:
            return False
        return True

    def remove_leftovers(self) -> int:
        """Removes what killed processes left half made; returns how many folders that were."""
        from filelock import FileLock, Timeout

        count = 0
        for folder in (self.root / _TEMPORARY).glob("*"):
            key = folder.name.rpartition("-")[0]
            for lock in (self.root / _LOCKS).glob(f"*-{key}.lock"):
                with suppress(Timeout), FileLock(lock, timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
                    count += 1
        return count

    def _make(self, stage: Stage, make: Callable[[Path], dict[str, Any] | None]) -> StageResult:
        making = self.root / _TEMPORARY
        for leftover in making.glob(f"{stage.key}-*"):
            # We hold the lock, so whoever made it is dead.
            shutil.rmtree(leftover, ignore_errors=True)
        folder = making / f"{stage.key}-{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        try:
            start = time.perf_counter()
            report = make(folder) or {}
            seconds = time.perf_counter() - start
            settings = {"settings": stage.settings, "inputs": list(stage.inputs)}
            identity = {"stage": stage.name, "key": stage.key, "version": stage.version}
            _share(folder)
            write_manifest(folder, identity | settings, report, seconds)
            target = self.folder(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._discard(target)  # What is stale stays until there is something in its place.
            folder.rename(target)
            fsync(target.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return StageResult(stage.name, stage.key, target, report, seconds, reused=False)

    def _read(self, folder: Path, name: str, key: str, discard: bool = True) -> StageResult | None:
        if not folder.is_dir():
            return None
        manifest, wrong = examine(folder)
        if wrong is None:
            return StageResult(
                name, key, folder, manifest["report"], manifest["seconds"], reused=True
            )
        if discard:
            log.warning("%s %s: %s is damaged; the stage is made again", name, key, wrong)
            self._discard(folder)
        return None

    def _folders(self) -> Iterator[Path]:
        for folder in sorted(self.root.glob("*/*")):
            if _KEY.fullmatch(folder.name) and folder.is_dir() and folder.parent.name[0] != ".":
                yield folder

    def _discard(self, folder: Path) -> None:
        if not folder.is_dir():
            return
        grave = self.root / _TEMPORARY / f"{folder.name}-{uuid.uuid4().hex[:8]}"
        grave.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(grave)  # A kill halfway through the removal leaves no half stage.
        shutil.rmtree(grave, ignore_errors=True)

    def _lock_path(self, name: str, key: str) -> Path:
        return self.root / _LOCKS / f"{name}-{key}.lock"

    @contextmanager
    def _locked(self, stage: Stage, waiting: Callable[[], None]) -> Iterator[None]:
        from filelock import FileLock, Timeout

        path = self._lock_path(stage.name, stage.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s %s is being made by another process; waiting", stage.name, stage.key)
            waiting()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _of_another_user(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            if not str(error.filename).startswith(f"{self.root}{os.sep}"):
                raise
            raise RelockError(
                f"{error.filename!r} is another user's and can't be written; whoever shares the "
                f"store should set umask 002, and once run: chmod -R g+rwX {self.root}"
            ) from error

    def _check_writable(self, stage: Stage) -> None:
        with suppress(OSError):
            self.root.mkdir(parents=True, exist_ok=True)
        if not (self.root.is_dir() and os.access(self.root, os.W_OK)):
            raise RelockError(
                f"store.root={str(self.root)!r} is no folder that can be written, and it doesn't "
                f"hold stage {stage.name} {stage.key} of this run; set store.root elsewhere"
            )


def _share(folder: Path) -> None:
    """Gives files the rights that this process' umask leaves: some libraries keep theirs to one."""
    probe = folder / MANIFEST
    probe.touch()
    rights = probe.stat().st_mode & 0o666
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | rights)
