"""Places that results go to, looked at before there is work to lose."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from settings.errors import SettingError


def check_folder(folder: Path, setting: str, *, new: bool = False) -> None:
    """Refuses a place where no folder can be made and written to; leaves it as it is.

    Args:
        folder: Where files will go.
        setting: What gave it, e.g. "--out".
        new: Whether it may hold nothing yet.

    Raises:
        SettingError: It can't be written, or holds something.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
        if new and any(folder.iterdir()):
            raise SettingError(
                f"{setting}={str(folder)!r} holds something; give a folder that doesn't exist"
            )
    except OSError as error:
        raise SettingError(
            f"{setting}={str(folder)!r} can't be made a folder that is written to "
            f"({error.strerror}); give another place"
        ) from error
    finally:
        for each in missing:
            with suppress(OSError):
                each.rmdir()


def check_file(file: Path, setting: str) -> None:
    """Refuses (SettingError) a place where no file can be written."""
    if file.is_dir():
        raise SettingError(f"{setting}={str(file)!r} is a folder; give a file in it")
    check_folder(file.parent, f"the folder of {setting}")
