"""The Hugging Face hub: revisions and files of its repositories, with errors in one sentence."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from settings.errors import RelockError, first_line

HUB_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A repository as a setting names it.

    Attributes:
        name: Hub id, such as "meta-llama/Llama-2-7b-hf".
        revision: Branch, tag or commit; None for the newest.
        called: What messages call it, such as "model.base='meta-llama/Llama-2-7b-hf'".
        instead: What they say to set instead.
        error: What is raised.
        kind: "model" or "dataset".
    """

    name: str
    revision: str | None
    called: str
    instead: str
    error: type[RelockError]
    kind: str

    def commit(self) -> str | None:
        """The commit that the revision stands for; None offline, where the cache alone says.

        Without a network the hub's clients retry for half a minute per file; this one request of
        `HUB_SECONDS` goes first, so that a machine that is offline hears of it at once.
        """
        from huggingface_hub import HfApi, is_offline_mode

        if is_offline_mode():
            return None
        with self._sentences():
            return (
                HfApi()
                .repo_info(
                    self.name, revision=self.revision, repo_type=self.kind, timeout=HUB_SECONDS
                )
                .sha
            )

    def holds(self, file: str) -> bool:
        """Whether the repository has a file; without a network, whether the cache has it."""
        from huggingface_hub import HfApi, errors, is_offline_mode, try_to_load_from_cache

        if not is_offline_mode():
            try:
                with self._sentences():
                    info: Any = HfApi().repo_info(
                        self.name, revision=self.revision, repo_type=self.kind, timeout=HUB_SECONDS
                    )
                return file in {each.rfilename for each in info.siblings or ()}
            except self.error as error:
                known = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
                if isinstance(error.__cause__, known):
                    raise
        cached = try_to_load_from_cache(
            self.name, file, revision=self.revision, repo_type=self.kind
        )
        return isinstance(cached, str)

    def fetch(self, files: Sequence[str], ignored: Sequence[str] = ()) -> Path:
        """The folder, named by the commit, that holds files in the hub's cache.

        Args:
            files: Patterns of the files that are fetched.
            ignored: Patterns of those that aren't.
        """
        from huggingface_hub import snapshot_download

        commit = self.commit() or self.revision
        with self._sentences():
            folder = snapshot_download(
                self.name,
                revision=commit,
                repo_type=self.kind,
                allow_patterns=list(files),
                ignore_patterns=list(ignored),
            )
        return Path(folder)

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        from huggingface_hub import errors, is_offline_mode

        try:
            yield
        except Exception as error:
            if isinstance(error, errors.GatedRepoError):
                said = (
                    f"{self.called} is gated; accept its terms on its hub page, then set HF_TOKEN"
                )
            elif isinstance(error, errors.RevisionNotFoundError):
                said = f"{self.called} has no revision {self.revision!r}; set one that it has"
            elif isinstance(error, errors.RepositoryNotFoundError):
                said = (
                    f"the hub has no {self.kind} for {self.called} that this machine may read; "
                    f"correct it, set HF_TOKEN if it is private, or set {self.instead}"
                )
            elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
                said = (
                    f"the disk is too full to download {self.called}; free some space or set "
                    "HF_HOME to another disk"
                )
            elif is_offline_mode():
                said = (
                    f"{self.called} is not in the hub cache and HF_HUB_OFFLINE is set; unset it, "
                    f"or set {self.instead}"
                )
            elif isinstance(error, errors.HfHubHTTPError):
                said = (
                    f"the hub refused {self.called} ({first_line(error)}); try again, or set "
                    f"{self.instead}"
                )
            else:
                # What the hub's HTTP library raises without a network is no error of the hub's.
                said = (
                    f"the hub can't be reached for {self.called} ({type(error).__name__}); connect "
                    f"to a network (and set HF_TOKEN if it is gated), set {self.instead}, or set "
                    "HF_HUB_OFFLINE=1 if it is in the hub cache"
                )
            raise self.error(said) from error
