"""Data sets of the Hugging Face hub, with the commit that they come from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.local import Row
from settings import DataError, first_line
from settings.hub import HubRepository


def load_split(
    dataset: str, config: str | None, split: str, revision: str | None, instead: str
) -> tuple[list[Row], str | None]:
    """Loads one split of a hub data set.

    Args:
        dataset: Hub id, e.g. "stanfordnlp/sst2".
        config: Name of the subset, or None where there is one only.
        split: Name of the split.
        revision: Branch, tag or commit; None for the newest.
        instead: What to set to use a local file, for the message.

    Returns:
        The rows in the hub's order, and the commit they come from (None if it isn't recorded).

    Raises:
        DataError: The data set can't be reached, isn't cached, is gated, or has no such split.
    """
    import datasets

    resolved = _repository(dataset, revision, instead).commit()
    try:
        loaded: Any = datasets.load_dataset(
            dataset, config, split=split, revision=resolved or revision
        )
    except (OSError, ValueError) as error:
        # ConnectionError and FileNotFoundError are OSErrors; an unknown split is a ValueError.
        raise DataError(
            f"the split {split!r} of {dataset!r} can't be loaded ({first_line(error)}); "
            f"set {instead}, or connect to a network"
        ) from error
    if resolved is None:
        recorded = " ".join(loaded.info.download_checksums or ())
        cached = re.search("@([0-9a-f]{40})/", recorded)
        resolved = cached and cached[1]
    if revision and re.fullmatch("[0-9a-f]{40}", revision) and resolved not in (revision, None):
        raise DataError(
            f"the cache holds {dataset} at {resolved}, not at the revision {revision} asked for; "
            "unset HF_HUB_OFFLINE to fetch it"
        )
    return loaded.to_list(), resolved


def fetch_files(
    dataset: str, files: Sequence[str], revision: str | None, instead: str
) -> tuple[list[Path], str | None]:
    """Fetches files of a hub data set as they are, for layouts that no split can be made of.

    The arguments are those of `load_split`; `files` are paths inside the repository.

    Returns:
        The files' places in the cache, in the order asked for, and the commit they come from.

    Raises:
        DataError: The data set can't be reached, isn't cached, is gated, or lacks a file.
    """
    folder = _repository(dataset, revision, instead).fetch(files)
    lacking = next((file for file in files if not (folder / file).is_file()), None)
    if lacking is not None:
        raise DataError(f"{dataset!r} at {folder.name} lacks {lacking!r}; set {instead}")
    return [folder / file for file in files], folder.name


def _repository(dataset: str, revision: str | None, instead: str) -> HubRepository:
    return HubRepository(dataset, revision, repr(dataset), instead, DataError, "dataset")
