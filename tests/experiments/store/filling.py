"""Runs the main command on a full disk, and again on one that has room.

`unshare -rm python -m tests.experiments.store.filling FOLDER SIZE FILLER OVERRIDES`: FOLDER becomes
a disk of SIZE with a file of FILLER bytes; after the first run that file goes and the disk grows.
It prints both exit codes. FOLDER-first and FOLDER-second are copies of the disk after each run, and
FOLDER-first.err and FOLDER-second.err what each said of errors.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from tests.experiments.store.forks import forked


def main() -> None:
    """Runs twice."""
    folder, size, filler, *overrides = sys.argv[1:]
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, f"size={size}", "tmpfs", folder], check=True)
    filling = Path(folder, "filler")
    filling.write_bytes(bytes(int(filler)))
    _run(f"{folder}-first", folder, overrides)
    filling.unlink()
    subprocess.run([*mount, "remount,size=1g", folder], check=True)
    _run(f"{folder}-second", folder, overrides)


def _run(name: str, folder: str, overrides: list[str]) -> None:
    print(forked(overrides, partial(_say_errors_to, Path(f"{name}.err"))))
    shutil.copytree(folder, name)


def _say_errors_to(path: Path) -> None:
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)


if __name__ == "__main__":
    main()
