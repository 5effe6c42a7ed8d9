"""A stage's `stage.json`: what made it, what it reported, and how its files are known to be whole.

A file that is as long and was last changed when the manifest says is taken to be what was written;
one that was changed at another time is hashed. So a copy of a store is taken, and a file that was
written over is found out even where its length is the same. What a failing disk does to a file
shows neither: `python -m experiments.store verify` hashes everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MANIFEST = "stage.json"

# Files of other times than their manifests say, found whole in this process, with that time.
_hashed: dict[Path, int] = {}


def write_manifest(
    folder: Path, identity: Mapping[str, Any], report: Mapping[str, Any], seconds: float
) -> None:
    """Hashes and fsyncs everything in `folder`, and describes it in `stage.json`."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        fsync(path)
        status = path.stat()
        files[path.relative_to(folder).as_posix()] = {
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": _sha256(path),
        }
    manifest = {
        **identity,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 3),
        "files": files,
        "report": report,
    }
    path = folder / MANIFEST
    path.write_text(json.dumps({**manifest, "sha256": _own_hash(manifest)}, indent=1) + "\n")
    fsync(path)
    for directory in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        fsync(directory)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `stage.json` says.

    Raises:
        OSError: It isn't there.
        ValueError: It isn't what was written.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict) or not {"files", "report", "seconds"} <= manifest.keys():
        raise ValueError("it lacks what a manifest has")
    # Stores of earlier versions have none.
    expected = manifest.pop("sha256", None)
    if expected not in (None, _own_hash(manifest)):
        raise ValueError("it was changed")
    return manifest


def examine(folder: Path, every: bool = False) -> tuple[dict[str, Any], str | None]:
    """What a stage's manifest says, and the first of its files that isn't what was written.

    `every` hashes all of its files, and not just those of another time than the manifest's.

    Returns:
        The manifest, empty where it is damaged itself; the file's name, or None if all are whole.
    """
    try:
        manifest = read_manifest(folder)
    except (OSError, ValueError):
        return {}, MANIFEST
    files = manifest["files"].items()
    damaged = (name for name, entry in files if not _is_whole(folder / name, entry, every))
    return manifest, next(damaged, None)


def _is_whole(path: Path, entry: Mapping[str, Any], every: bool) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    if status.st_size != entry["bytes"]:
        return False
    # Stores of earlier versions have no time: each of their files is hashed once in a process.
    known = entry.get("mtime_ns")
    if not every and status.st_mtime_ns in (known, _hashed.get(path)):
        return True
    if _sha256(path) != entry["sha256"]:
        return False
    _hashed[path] = status.st_mtime_ns
    if known is not None:
        # The next process needn't hash the copy; a store that can't be written stays as it is.
        with suppress(OSError):
            os.utime(path, ns=(status.st_atime_ns, known))
    return True


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own hash, as it is after it was written and read."""
    canonical = json.dumps(json.loads(json.dumps(manifest)), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
