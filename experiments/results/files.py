"""Files that appear whole or not at all: a job's status, the report's page, W&B's ids."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place and moves it there, so that a kill leaves no half of it.

    Args:
        path: The file; its folder is made where there is none.
        text: What it will hold, in UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
