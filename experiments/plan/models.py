"""`Library`, where the models of a plan lie, what identifies them, and what must be fetched."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from experiments.config.model import ModelSettings
from experiments.pipeline.given import Resolve
from experiments.pipeline.pipeline import find_models
from experiments.pipeline.steps.base import Model
from experiments.plan.shapes import read_shape, write_model
from modeling.checkpoint import COPIES, MODEL_PATTERNS, Checkpoint, fingerprint_folder, resolve
from modeling.model_files import WEIGHTS, weight_files
from settings import ModelError
from settings.hub import HUB_SECONDS


@dataclass(frozen=True)
class Located:
    """A model as far as it is on this machine.

    Attributes:
        folder: Where its config.json lies, and its weights if they are here.
        identity: What identifies its content, as in a run's stage keys.
        fetched: Whether a run would fetch its weights from the hub.
        download: Bytes to fetch, as the hub says; None where it wasn't asked.
    """

    name: str
    folder: Path
    identity: str
    here: bool
    fetched: bool = False
    download: int | None = None
    note: str = ""


class Library:
    """Looks each model up once; every job of a sweep shares it."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.located: dict[tuple[str, str | None], Located] = {}
        self._by_folder: dict[str, Located] = {}
        self._fingerprint = cache(fingerprint_folder)

    def find_models(self, settings: ModelSettings) -> tuple[Model, Model | None]:
        """`pipeline.find_models` without a download: placeholders where weights lack.

        Raises:
            ModelError: As `locate`, or a model is damaged; one sentence.
        """
        return find_models(settings, self.resolver(settings))

    def resolver(self, settings: ModelSettings) -> Resolve:
        """As `modeling.checkpoint.resolve`, without a download."""
        return partial(self._place, settings.dtype)

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

    def fingerprint(self, folder: str) -> str:
        """`fingerprint_folder`, once for each; the path itself of what isn't there yet."""
        if not Path(folder).is_dir() or Path(folder).is_relative_to(self.scratch):
            return folder
        return self._fingerprint(folder)

    def real_name(self, text: str) -> str:
        """A message with the names that the user gave in place of the placeholders' folders."""
        for folder, located in self._by_folder.items():
            if folder != str(located.folder):
                text = text.replace(folder, located.name)
        return text

    def _place(self, dtype: str, name: str, revision: str | None, setting: str) -> tuple[str, str]:
        located = self.locate(name, revision, setting)
        folder = located.folder
        if not located.here:
            folder = self.scratch / f"{name.replace('/', '--')}-{revision}-{dtype}"
            if not folder.exists():
                write_model(located.folder, read_shape(located.folder), dtype, folder)
        self._by_folder[str(folder)] = located
        return str(folder), located.identity


def _locate_folder(name: str, revision: str | None, setting: str) -> Located:
    folder = Path(name)
    if not (folder / "config.json").is_file() or any((folder / each).is_file() for each in WEIGHTS):
        place, identity = resolve(name, revision, setting)
        return Located(name, Path(place), identity, here=True)
    note = f"{name} holds no weights, so that all that is made of it counts as to run"
    return Located(name, folder, f"unseen:{name}", here=False, note=note)


def _locate_hub(name: str, revision: str | None, setting: str) -> Located:
    info = _ask_hub(name, revision, setting)
    commit = revision if info is None else info.sha
    folder = _cached(name, commit)
    if folder is not None and _holds_weights(folder):
        return Located(name, folder, f"{name}@{folder.name}", here=True)
    if folder is None or not (folder / "config.json").is_file():
        folder = _fetch_config(name, commit, setting, offline=info is None)
    if info is None:
        note = f"the hub can't be asked for {name}, so that all that is made of it counts as to run"
        return Located(name, folder, f"unseen:{name}", here=False, fetched=True, note=note)
    size = fetched_bytes(info)
    return Located(name, folder, f"{name}@{commit}", here=False, fetched=True, download=size)


def _ask_hub(name: str, revision: str | None, setting: str) -> Any:
    """What the hub says of a model, or None where it can't be asked."""
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import RepositoryNotFoundError

    if is_offline_mode():
        return None
    try:
        return HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS, files_metadata=True)
    except RepositoryNotFoundError:
        raise ModelError(
            f"{setting}={name!r} is neither a folder nor a hub model that this machine may read; "
            "correct it, or set HF_TOKEN if the model is private"
        ) from None
    except Exception:
        # What the hub's HTTP library raises without a network is no error of the hub's own.
        return None


def fetched_bytes(info: Any) -> int:
    """Bytes that a run would fetch of what the hub says that a model has."""

    def matches(name: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    return sum(
        each.size or 0
        for each in info.siblings or []
        if matches(each.rfilename, MODEL_PATTERNS) and not matches(each.rfilename, COPIES)
    )


def _cached(name: str, revision: str | None) -> Path | None:
    """The snapshot in the hub cache, complete or not."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _holds_weights(folder: Path) -> bool:
    try:
        return all((folder / name).is_file() for name in weight_files(folder))
    except ModelError:
        return False


def _fetch_config(name: str, revision: str | None, setting: str, *, offline: bool) -> Path:
    """A folder with a hub model's config.json."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    try:
        file = hf_hub_download(name, "config.json", revision=revision, local_files_only=offline)
    except GatedRepoError:
        raise ModelError(
            f"{setting}={name!r} is gated; accept its licence on its hub page, then set HF_TOKEN"
        ) from None
    except Exception as error:
        # As above.
        raise ModelError(
            f"the config.json of {setting}={name!r} is neither in the hub cache nor can the hub be "
            f"reached for it; set {setting} to a folder that holds the model's config.json (its "
            "weights aren't needed for a plan)"
        ) from error
    return Path(file).parent
