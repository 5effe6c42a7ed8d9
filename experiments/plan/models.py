"""`Library`, where the models of a plan lie, what identifies them, and what must be fetched."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.config.model import ModelSettings
from experiments.pipeline.steps.base import Model
from experiments.plan.placeholder_weights import write_model
from experiments.plan.shapes import Shape, read_shape
from modeling.checkpoint import COPIES, MODEL_PATTERNS, Checkpoint, fingerprint_folder, resolve
from modeling.model_files import WEIGHTS, is_adapter, verify_folder
from settings import ModelError
from settings.hub import HUB_SECONDS

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Located:
    """A model as far as it is on this machine.

    Attributes:
        name: Folder or hub id, as it was given.
        folder: Where its config.json lies, and its weights if they are here.
        identity: What identifies its content, as in a run's stage keys.
        here: Whether its weights are on this machine.
        fetched: Whether a run would fetch its weights from the hub.
        download: Bytes to fetch, as the hub says; None where it wasn't asked.
        note: What isn't known of it, for the footer; "" for nothing.
    """

    name: str
    folder: Path
    identity: str
    here: bool
    fetched: bool = False
    download: int | None = None
    note: str = ""

    @property
    def has_tokenizer(self) -> bool:
        """Whether its tokenizer is on this machine."""
        return any((self.folder / name).is_file() for name in _TOKENIZERS)


class Library:
    """Looks each model up once; every job of a sweep shares it.

    Attributes:
        scratch: A folder for placeholders, which lives as long as the plan.
        located: Every model that was looked up, by name and revision.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.located: dict[tuple[str, str | None], Located] = {}
        self._by_folder: dict[str, Located] = {}
        self._shapes: dict[tuple[Path, bool], Shape] = {}
        self._fingerprints: dict[str, str] = {}

    def find_models(self, settings: ModelSettings) -> tuple[Model, Model | None]:
        """`pipeline.find_models` without a download: placeholders where weights lack.

        Raises:
            ModelError: As `locate`, or a model is damaged; one sentence.
        """
        base = self._model(settings, settings.base, settings.revision, "model.base")
        base = replace(base, style=settings.base_style)
        if settings.alignment == "own" or settings.aligned is None:
            return base, None
        if is_adapter(settings.aligned):
            verify_folder(settings.aligned, "model.aligned")
            identity = f"{base.key}+{self.fingerprint(settings.aligned)}"
            adapter = replace(base.checkpoint, adapter=settings.aligned)
            return base, Model(adapter, identity, settings.style)
        return base, self._model(
            settings, settings.aligned, settings.aligned_revision, "model.aligned"
        )

    def locate(self, name: str, revision: str | None, setting: str) -> Located:
        """Finds a model without downloading its weights.

        Raises:
            ModelError: Not even its config.json can be had; one sentence.
        """
        if (name, revision) not in self.located:
            local = Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1
            find = _locate_folder if local else _locate_hub
            self.located[name, revision] = find(name, revision, setting)
        return self.located[name, revision]

    def of(self, checkpoint: Checkpoint) -> Located:
        """The model whose files, or whose placeholder, a base or aligned checkpoint names."""
        return self._by_folder[checkpoint.base]

    def holds(self, base: str) -> bool:
        """Whether these are the full weights of a model that was looked up, and not of a stage."""
        return base in self._by_folder

    def shape(self, folder: Path, *, classifier: bool = False) -> Shape:
        """The shape of the model whose config.json lies in a folder."""
        key = (folder, classifier)
        if key not in self._shapes:
            self._shapes[key] = read_shape(folder, classifier=classifier)
        return self._shapes[key]

    def fingerprint(self, folder: str) -> str:
        """`fingerprint_folder`, once for each; the path itself of what isn't there yet."""
        if not Path(folder).is_dir() or Path(folder).is_relative_to(self.scratch):
            return folder
        if folder not in self._fingerprints:
            self._fingerprints[folder] = fingerprint_folder(folder)
        return self._fingerprints[folder]

    def real_name(self, text: str) -> str:
        """A message with the names that the user gave in place of the placeholders' folders."""
        for folder, located in self._by_folder.items():
            if folder != str(located.folder):
                text = text.replace(folder, located.name)
        return text

    def _model(
        self, settings: ModelSettings, name: str, revision: str | None, setting: str
    ) -> Model:
        located = self.locate(name, revision, setting)
        folder = located.folder
        if not located.here:
            folder = self.scratch / f"{name.replace('/', '--')}-{revision}-{settings.dtype}"
            if not folder.exists():
                shape = self.shape(located.folder)
                write_model(located.folder, shape, settings.dtype, folder)
        self._by_folder[str(folder)] = located
        checkpoint = Checkpoint(str(folder), dtype=settings.dtype)
        return Model(checkpoint, located.identity, settings.style)


def _locate_folder(name: str, revision: str | None, setting: str) -> Located:
    folder = Path(name)
    if not (folder / "config.json").is_file() or any((folder / each).is_file() for each in WEIGHTS):
        place, identity = resolve(name, revision, setting)
        return Located(name, Path(place), identity, here=True)
    note = f"{name} holds no weights, so that all that is made of it counts as to run"
    return Located(name, folder, f"unseen:{name}", here=False, note=note)


def _locate_hub(name: str, revision: str | None, setting: str) -> Located:
    hub = _Hub(name, revision, setting)
    if hub.cached is not None and hub.complete:
        return Located(name, hub.cached, f"{name}@{hub.cached.name}", here=True)
    folder = hub.folder_with_config()
    if hub.commit is None:
        note = f"the hub can't be asked for {name}, so that all that is made of it counts as to run"
        return Located(name, folder, f"unseen:{name}", here=False, fetched=True, note=note)
    identity = f"{name}@{hub.commit}"
    return Located(name, folder, identity, here=False, fetched=True, download=hub.size)


@dataclass(frozen=True)
class _Hub:
    """A hub model: what the cache holds of it, and what the hub says, asked once."""

    name: str
    revision: str | None
    setting: str

    @cached_property
    def info(self) -> Any:
        """The hub's answer, or None where it can't be asked."""
        from huggingface_hub import HfApi, is_offline_mode
        from huggingface_hub.errors import RepositoryNotFoundError

        if is_offline_mode():
            return None
        try:
            return HfApi().model_info(
                self.name, revision=self.revision, timeout=HUB_SECONDS, files_metadata=True
            )
        except RepositoryNotFoundError:
            raise ModelError(
                f"{self.setting}={self.name!r} is neither a folder nor a hub model that this "
                "machine may read; correct it, or set HF_TOKEN if the model is private"
            ) from None
        except Exception:
            # What the hub's HTTP library raises without a network is no error of the hub's own.
            return None

    @property
    def commit(self) -> str | None:
        """The commit that a run would take; None where that isn't known."""
        return None if self.info is None else self.info.sha

    @property
    def size(self) -> int | None:
        """Bytes that a run would fetch."""
        if self.info is None:
            return None
        files = [
            each
            for each in self.info.siblings or []
            if any(fnmatch.fnmatch(each.rfilename, pattern) for pattern in MODEL_PATTERNS)
            and not any(fnmatch.fnmatch(each.rfilename, pattern) for pattern in COPIES)
        ]
        return sum(each.size or 0 for each in files)

    @cached_property
    def cached(self) -> Path | None:
        """The snapshot in the hub cache, complete or not."""
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(
                    self.name, revision=self.commit or self.revision, local_files_only=True
                )
            )
        except (OSError, ValueError):
            return None

    @property
    def complete(self) -> bool:
        """Whether the cached snapshot holds the weights."""
        if self.cached is None:
            return False
        index = self.cached / WEIGHTS[1]
        if not index.is_file():
            return (self.cached / WEIGHTS[0]).is_file()
        shards = set(json.loads(index.read_text())["weight_map"].values())
        return all((self.cached / shard).is_file() for shard in shards)

    def folder_with_config(self) -> Path:
        """A folder with the model's config.json, and its tokenizer where the cache holds it."""
        if self.cached is not None and (self.cached / "config.json").is_file():
            return self.cached
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import GatedRepoError

        try:
            file = hf_hub_download(
                self.name,
                "config.json",
                revision=self.commit or self.revision,
                local_files_only=self.info is None,
            )
        except GatedRepoError:
            raise ModelError(
                f"{self.setting}={self.name!r} is gated; accept its licence on its hub page, then "
                "set HF_TOKEN"
            ) from None
        except Exception as error:
            # As above.
            raise ModelError(
                f"the config.json of {self.setting}={self.name!r} is neither in the hub cache nor "
                f"can the hub be reached for it; set {self.setting} to a folder that holds the "
                "model's config.json (its weights aren't needed for a plan)"
            ) from error
        return Path(file).parent
