"""Which models an experiment loads: where they lie, what identifies them, what must be fetched."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation.base import Judge
from experiments.config.model import ModelSettings
from experiments.pipeline.steps import Model
from experiments.plan.placeholder_weights import stand_in_model
from experiments.plan.shape import Shape, read_shape
from modeling.checkpoint import Checkpoint, fingerprint_folder, resolve
from modeling.hub import COPIES, HUB_SECONDS, MODEL_PATTERNS
from modeling.model_files import WEIGHTS, is_adapter, verify_folder
from settings import ModelError, Settings

_ADAPTER = "adapter_config.json"
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


class Unseen(Judge):
    """Stands for a judge whose weights aren't here: all that it would judge counts as to run.

    Attributes:
        given: The judge's class.
        settings: Its settings.
    """

    given: str
    settings: Settings

    def score(self, prompts: Any, answers: Any) -> Any:
        raise NotImplementedError


def runs_here(judge: Any) -> bool:
    """Whether a judge's model is run on this machine, and isn't words or somebody's endpoint."""
    return hasattr(judge, "backend") and isinstance(getattr(judge, "model", None), str)


class Library:
    """Looks each model up once; every job of a sweep shares it.

    Attributes:
        scratch: A folder for stand-ins, which lives as long as the plan.
        located: Every model that was looked up, by name and revision.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.located: dict[tuple[str, str | None], Located] = {}
        self._shapes: dict[tuple[Path, bool], Shape] = {}
        self._stand_ins: dict[tuple[Path, str], Path] = {}
        self._fingerprints: dict[str, str] = {}

    def find_models(self, settings: ModelSettings) -> tuple[Model, Model | None]:
        """`pipeline.find_models` without a download: stand-ins where weights lack."""
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

    def judge(self, judge: Judge, setting: str) -> Judge:
        """The judge itself, or a stand-in where its weights aren't on this machine."""
        if not runs_here(judge):
            return judge
        found = self.of_judge(judge, f"{setting}.model")
        return judge if found.here else Unseen(given=type(judge).__name__, settings=judge)

    def of_judge(self, judge: Any, setting: str) -> Located:
        """The full weights that a judge runs on: its own, or those that its adapter is put on.

        Raises:
            ModelError: As `locate`.
        """
        named = getattr(judge, "base", None) or _base_of(judge.model, judge.revision)
        if named is not None:
            return self.locate(named, None, setting)
        return self.locate(judge.model, judge.revision, setting)

    def fingerprint(self, folder: str) -> str:
        """`fingerprint_folder`, once for each; the path itself where there is no such folder."""
        if folder not in self._fingerprints:
            there = Path(folder).is_dir()
            self._fingerprints[folder] = fingerprint_folder(folder) if there else folder
        return self._fingerprints[folder]

    def shape(self, located: Located, *, classifier: bool = False) -> Shape:
        """The shape of a model that was located."""
        key = (located.folder, classifier)
        if key not in self._shapes:
            self._shapes[key] = read_shape(located.folder, classifier=classifier)
        return self._shapes[key]

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
        """The model whose files, or whose stand-in, a base or aligned checkpoint names."""
        return self._places[checkpoint.base]

    def holds(self, base: str) -> bool:
        """Whether these are the full weights of a model that was looked up, and not of a stage."""
        return base in self._places

    @property
    def _places(self) -> dict[str, Located]:
        return {
            str(folder): located
            for located in self.located.values()
            for folder in (located.folder, *self._stand_ins_of(located))
        }

    def real_name(self, text: str) -> str:
        """A message with the names that the user gave in place of the stand-ins' folders."""
        for located in self.located.values():
            for stand_in in self._stand_ins_of(located):
                text = text.replace(str(stand_in), located.name)
        return text

    def _stand_ins_of(self, located: Located) -> list[Path]:
        return [to for (folder, _), to in self._stand_ins.items() if folder == located.folder]

    def _model(
        self, settings: ModelSettings, name: str, revision: str | None, setting: str
    ) -> Model:
        located = self.locate(name, revision, setting)
        folder = located.folder
        if not located.here:
            key = (folder, settings.dtype)
            if key not in self._stand_ins:
                self._stand_ins[key] = self.scratch / f"model-{len(self._stand_ins)}"
                stand_in_model(folder, self.shape(located), settings.dtype, self._stand_ins[key])
            folder = self._stand_ins[key]
        checkpoint = Checkpoint(str(folder), dtype=settings.dtype)
        return Model(checkpoint, located.identity, settings.style)


def _base_of(name: str, revision: str | None) -> str | None:
    """The base that an adapter names; None for full weights, and where it can't be looked up."""
    from huggingface_hub import hf_hub_download, is_offline_mode

    path = Path(name) / _ADAPTER
    if not Path(name).is_dir():
        try:
            found = hf_hub_download(
                name, _ADAPTER, revision=revision, local_files_only=is_offline_mode()
            )
        except Exception:
            # Most are no adapters; what the hub's HTTP library raises is no error of its own.
            return None
        path = Path(found)
    if not path.is_file():
        return None
    return str(json.loads(path.read_text())["base_model_name_or_path"])


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
