"""Checkpoints: the models that stages exchange, where their files lie and what identifies them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from modeling.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    is_adapter,
    read_header,
    stored_tensors,
    verify_folder,
)
from settings import ModelError, SettingError
from settings.hub import HubRepository

Dtype = Literal["float32", "float16", "bfloat16"]
"""The dtypes that settings may name."""

MODEL_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
# Second copies of the same weights in their makers' own formats, as in Mistral's and Llama's.
COPIES = ("consolidated*", "original/*")
# A name, or an owner's.
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as stages exchange it: a Hugging Face folder or hub id, plus at most one adapter.

    Attributes:
        base: Local folder or hub id of the full weights.
        adapter: Local PEFT adapter folder on top of `base`, or None.
        revision: Hub revision of `base`; None for local folders.
        dtype: Name of the torch dtype that the weights are loaded in.
        steering: Local folder of vectors that hooks add to the attention heads while the model
            runs (`modeling.steering.save_steering` writes it), or None.
    """

    base: str
    adapter: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    steering: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether `base` is a folder on this machine."""
        return Path(self.base).is_dir()


def fingerprint_folder(folder: str | Path) -> str:
    """SHA-256 over the names and contents of a folder's files (16 hex digits).

    An adapter's `base_model_name_or_path` is left out: it says where, not what.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if not path.is_file() or path.name in {"README.md", "stage.json"}:
            continue
        digest.update(path.name.encode())
        if path.name == ADAPTER_CONFIG:
            config = json.loads(path.read_text())
            config.pop("base_model_name_or_path", None)
            digest.update(json.dumps(config, sort_keys=True).encode())
            continue
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def identify(
    checkpoint: Checkpoint, identities: Mapping[str, str] | None = None
) -> dict[str, str | None]:
    """Identities of a model's full weights ("base") and of its adapter, wherever they lie.

    `identities` are {base: identity} of what need not be read again.
    """
    adapter = None if checkpoint.adapter is None else fingerprint_folder(checkpoint.adapter)
    base = (identities or {}).get(checkpoint.base)
    if base is None:
        base = resolve(checkpoint.base, checkpoint.revision, "model.base")[1]
    return {"base": base, "adapter": adapter}


def local_folder(checkpoint: Checkpoint) -> Path:
    """The folder of a checkpoint's base weights on this machine; a hub id is downloaded."""
    if checkpoint.is_local:
        return Path(checkpoint.base)
    return Path(resolve(checkpoint.base, checkpoint.revision, "model.base")[0])


def resolve(base: str, revision: str | None, setting: str) -> tuple[str, str]:
    """Where the files of a local folder or hub id lie, and what identifies them.

    Returns:
        The folder of the files and an identity: content hash of a local folder, or
        "id@commit" of a hub snapshot.

    Raises:
        ModelError: One sentence that says what is missing and how to get it.
    """
    hub = on_hub(base, revision, setting)
    if hub is None:
        verify_folder(base, setting)
        return base, fingerprint_folder(base)
    folder = hub.fetch(MODEL_PATTERNS, COPIES)
    verify_folder(folder, setting)
    return str(folder), f"{base}@{folder.name}"


@cache
def holds_adapter(name: str, revision: str | None, setting: str) -> bool:
    """Whether a local folder or hub id is a PEFT adapter, as its files' names say.

    What isn't on this machine while the hub can't be asked is taken for full weights.

    Raises:
        ModelError: There is no such folder or hub id; one sentence.
    """
    hub = on_hub(name, revision, setting)
    if hub is None:
        verify_folder(name, setting)
        return is_adapter(name)
    return hub.holds(ADAPTER_CONFIG)


def on_hub(name: str, revision: str | None, setting: str) -> HubRepository | None:
    """The hub's repository of this name; None where a local folder has it.

    Raises:
        ModelError: It is neither a folder nor can it be a hub id.
    """
    called = f"{setting}={name!r}"
    if not name.strip():
        raise ModelError(f"{called} is empty; give a model folder or a hub id")
    if Path(name).is_dir():
        return None
    identifier, at, version = name.partition("@")
    if at and _HUB_ID.fullmatch(identifier):
        raise ModelError(
            f"{called} is no hub id; set {setting} to {identifier!r} and its revision to "
            f"{version!r}"
        )
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"{called} is not a folder; give a model folder or a hub id")
    return HubRepository(
        name, revision, called, f"{setting} to a model folder", ModelError, "model"
    )


def count_parameters(checkpoint: Checkpoint) -> int:
    """How many scalars a checkpoint stores, its adapter's included; tied weights count once.

    Raises:
        ModelError: The base weights can't be found.
    """
    shapes = [tensor.shape for tensor in stored_tensors(local_folder(checkpoint)).values()]
    if checkpoint.adapter is not None:
        header, _ = read_header(Path(checkpoint.adapter) / ADAPTER_WEIGHTS)
        shapes += [entry["shape"] for entry in header.values()]
    return sum(map(math.prod, shapes))


def check_target_modules(names: Sequence[str], checkpoint: Checkpoint, setting: str) -> None:
    """Refuses names of projections that the model doesn't have; PEFT would ignore them.

    Raises:
        SettingError: One sentence that lists the model's own.
    """
    own = _projection_names(checkpoint)
    unknown = [name for name in names if name not in own]
    if unknown or not names:
        raise SettingError(
            f"{setting}: {unknown[0] if unknown else 'an empty list'} is no projection of "
            f"{checkpoint.base!r}; choose from {', '.join(own)}"
        )


def _projection_names(checkpoint: Checkpoint) -> list[str]:
    """Last names of the matrices in a model's blocks, sorted, e.g. ["down_proj", "gate_proj"]."""
    names = {
        key.split(".")[-2]
        for key, tensor in stored_tensors(local_folder(checkpoint)).items()
        if len(tensor.shape) == 2 and re.search(r"\.\d+\..*\.weight$", key)
    }
    return sorted(names)
