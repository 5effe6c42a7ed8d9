"""Checkpoints: the models that stages exchange, where their files lie and what identifies them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from modeling.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    read_header,
    stored_tensors,
    verify_folder,
)
from settings import ModelError, SettingError
from settings.hub import HubRepository

MODEL_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
# Second copies of the same weights in their makers' own formats, as in Mistral's and Llama's.
COPIES = ("consolidated*", "original/*")


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
    if Path(base).is_dir():
        verify_folder(base, setting)
        return base, fingerprint_folder(base)
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise ModelError(f"{setting}={base!r} is not a folder; give a model folder or a hub id")
    called, instead = f"{setting}={base!r}", f"{setting} to a model folder"
    hub = HubRepository(base, revision, called, instead, ModelError, "model")
    folder = hub.fetch(MODEL_PATTERNS, COPIES)
    verify_folder(folder, setting)
    return str(folder), f"{base}@{folder.name}"


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
