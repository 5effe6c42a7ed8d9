"""Places that can't be written are refused before work starts, and looking leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from settings import SettingError
from settings.places import check_file, check_folder


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    check_folder(tmp_path / "a" / "b" / "c", "--out", new=True)
    check_folder(tmp_path / "full", "--out")
    check_file(tmp_path / "a" / "plan.json", "--json")
    assert sorted(tmp_path.rglob("*")) == before


def test_other_places_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/x")):
        with pytest.raises(SettingError, match=r"^--out='/.*' can't be made a folder .*; give"):
            check_folder(place, "--out")
    with pytest.raises(SettingError, match=r"^--out='/.*' holds something; give a folder that"):
        check_folder(tmp_path, "--out", new=True)
    with pytest.raises(SettingError, match=r"^--json='/.*' is a folder; give a file in it"):
        check_file(tmp_path, "--json")
    with pytest.raises(SettingError, match=r"^the folder of --json="):
        check_file(tmp_path / "file" / "plan.json", "--json")
