"""Data sets of the Hugging Face hub, with their resolved revision and errors in one sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.local import Row
from settings import DataError, first_line

HUB_SECONDS = 10.0

_GATED = "the data set {!r} is gated; accept its terms on the hub, then set HF_TOKEN"


def load_split(
    dataset: str, config: str | None, split: str, revision: str | None, instead: str
) -> tuple[list[Row], str | None]:
    """Loads one split of a hub data set.

    Without a network the hub's client retries for half a minute per file; one request of
    `HUB_SECONDS` goes first, so that a machine that is offline hears of it at once.

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
    resolved = _resolve(dataset, revision, instead)
    rows, cached = _load(dataset, config, split, resolved or revision, instead)
    resolved = resolved or cached
    if revision and re.fullmatch("[0-9a-f]{40}", revision) and resolved not in (revision, None):
        raise DataError(
            f"the cache holds {dataset} at {resolved}, not at the revision {revision} asked for; "
            "unset HF_HUB_OFFLINE to fetch it"
        )
    return rows, resolved


def fetch_files(
    dataset: str, files: Sequence[str], revision: str | None, instead: str
) -> tuple[list[Path], str | None]:
    """Fetches files of a hub data set as they are, for layouts that no split can be made of.

    Args:
        dataset: Hub id.
        files: Paths inside the repository.
        revision: Branch, tag or commit; None for the newest.
        instead: What to set to use a local file, for the message.

    Returns:
        The files' places in the cache, in the order asked for, and the commit they come from.

    Raises:
        DataError: The data set can't be reached, isn't cached, is gated, or lacks a file.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    resolved = _resolve(dataset, revision, instead)
    paths = []
    for file in files:
        try:
            fetched = hf_hub_download(
                dataset, file, repo_type="dataset", revision=resolved or revision
            )
        except GatedRepoError:
            raise DataError(_GATED.format(dataset)) from None
        except (OSError, ValueError) as error:
            # The hub's HTTP and cache errors are OSErrors; a malformed id is a ValueError.
            raise DataError(
                f"{file!r} of {dataset!r} can't be fetched ({first_line(error)}); set {instead}, "
                "or connect to a network"
            ) from error
        paths.append(Path(fetched))
    cached = re.search("/snapshots/([0-9a-f]{40})/", paths[0].as_posix())
    return paths, resolved or (cached.group(1) if cached else None)


def _resolve(dataset: str, revision: str | None, instead: str) -> str | None:
    """The commit that `revision` stands for; None offline, where the cache alone says."""
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if is_offline_mode():
        return None
    try:
        return HfApi().dataset_info(dataset, revision=revision, timeout=HUB_SECONDS).sha
    except GatedRepoError:
        raise DataError(_GATED.format(dataset)) from None
    except RevisionNotFoundError:
        raise DataError(f"the data set {dataset!r} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise DataError(
            f"the hub has no data set {dataset!r} that this machine may read; set HF_TOKEN if it "
            f"is private, or set {instead}"
        ) from None
    except HfHubHTTPError as error:
        raise DataError(
            f"the hub refused {dataset!r}: {error}; try again or set {instead}"
        ) from error
    except Exception as error:
        # The client's HTTP library is its own affair and changed twice; whatever it raises for a
        # network that isn't there is neither a hub error nor an OSError that could be named here.
        raise DataError(
            f"the hub can't be reached for {dataset!r} ({type(error).__name__}); set {instead}, "
            "or connect to a network, or set HF_HUB_OFFLINE=1 if the data set is in the hub cache"
        ) from error


def _load(
    dataset: str, config: str | None, split: str, revision: str | None, instead: str
) -> tuple[list[Row], str | None]:
    import datasets

    try:
        loaded: Any = datasets.load_dataset(dataset, config, split=split, revision=revision)
    except (OSError, ValueError) as error:
        # ConnectionError and FileNotFoundError are OSErrors; an unknown split is a ValueError.
        raise DataError(
            f"the split {split!r} of {dataset!r} can't be loaded ({first_line(error)}); "
            f"set {instead}, or connect to a network"
        ) from error
    return loaded.to_list(), _recorded_commit(loaded)


def _recorded_commit(loaded: Any) -> str | None:
    for url in loaded.info.download_checksums or {}:
        if match := re.search("@([0-9a-f]{40})/", url):
            return match.group(1)
    return None
