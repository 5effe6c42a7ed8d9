"""A file is whole or as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.results.files import write_whole


def test_a_file_and_its_folder_are_written(tmp_path: Path) -> None:
    write_whole(tmp_path / "folder" / "file.json", "älter\n")
    write_whole(tmp_path / "folder" / "file.json", "neu\n")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file.json"]
    assert (tmp_path / "folder" / "file.json").read_text(encoding="utf-8") == "neu\n"


def test_what_can_not_be_written_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="file"):
        write_whole(tmp_path / "file", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
