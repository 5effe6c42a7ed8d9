"""Checkpoints: what a model on disk is, how it is checked, identified and loaded."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from settings import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
ADAPTER_WEIGHTS = "adapter_model.safetensors"
HUB_SECONDS = 10.0
FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
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


def device_name() -> str:
    """The device that models run on: the first CUDA device where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def is_adapter(folder: str | Path) -> bool:
    """Whether this is a local PEFT adapter folder."""
    return (Path(folder) / "adapter_config.json").is_file()


def verify_folder(folder: str | Path, setting: str) -> None:
    """Checks that a local model or adapter folder is complete before anything is loaded.

    Reads only headers: each safetensors file must be as long as its own header says.

    Args:
        folder: A Hugging Face model folder or PEFT adapter folder.
        setting: The setting that named the folder, for the message.

    Raises:
        ModelError: The folder, its config or its weights are missing or cut short.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"{setting}={str(folder)!r} is not a folder; give a model folder")
    if not is_adapter(folder) and not (folder / "config.json").is_file():
        raise ModelError(f"{setting}={str(folder)!r} has no config.json; give a model folder")
    names = [ADAPTER_WEIGHTS] if is_adapter(folder) else weight_files(folder, setting)
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ModelError(
                f"{setting}={str(folder)!r} holds no weights ({name} is missing); "
                "save or download the model again"
            )
        _verify_safetensors(path, setting)


def weight_files(folder: Path, setting: str) -> list[str]:
    """Names of the safetensors files of a full model: one, or the shards of its index.

    Raises:
        ModelError: There is neither.
    """
    index = folder / WEIGHTS[1]
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if not (folder / WEIGHTS[0]).is_file():
        raise ModelError(
            f"{setting}={str(folder)!r} holds no weights ({WEIGHTS[0]} is missing); "
            "save or download the model again, as safetensors"
        )
    return [WEIGHTS[0]]


def _verify_safetensors(path: Path, setting: str) -> None:
    size = path.stat().st_size
    damaged = ModelError(
        f"{setting}: {str(path)!r} is truncated or damaged; save or download it again"
    )
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise damaged
        (length,) = struct.unpack("<Q", head)
        if length > size - 8:
            raise damaged
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise damaged from None
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if 8 + length + max(ends, default=0) != size:
        raise damaged


def fingerprint_folder(folder: str | Path) -> str:
    """SHA-256 over the names and contents of a folder's files (16 hex digits).

    An adapter's `base_model_name_or_path` is left out: it says where, not what.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if not path.is_file() or path.name in {"README.md", "stage.json"}:
            continue
        digest.update(path.name.encode())
        if path.name == "adapter_config.json":
            config = json.loads(path.read_text())
            config.pop("base_model_name_or_path", None)
            digest.update(json.dumps(config, sort_keys=True).encode())
            continue
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def identify(
    checkpoint: Checkpoint, known: Mapping[str, str] | None = None
) -> dict[str, str | None]:
    """Identities of a model's full weights ("base") and of its adapter, wherever they lie.

    Args:
        checkpoint: The model.
        known: {base: identity} of what need not be read again.
    """
    adapter = None if checkpoint.adapter is None else fingerprint_folder(checkpoint.adapter)
    base = (known or {}).get(checkpoint.base)
    if base is None:
        base = resolve(checkpoint.base, checkpoint.revision, "model.base")[1]
    return {"base": base, "adapter": adapter}


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer beside the base weights, left-padded, with a padding token."""
    from transformers import AutoTokenizer

    # Where mistral_common is installed, as vLLM installs it, a Mistral's tekken.json would be read
    # in place of its tokenizer.json, and with it no chat template.
    tokenizer = AutoTokenizer.from_pretrained(
        checkpoint.base, revision=checkpoint.revision, mistral_format=False
    )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    checkpoint: Checkpoint, *, trainable_adapter: bool = False, device: str | None = None
) -> PreTrainedModel:
    """Loads the weights, the adapter on top (a `PeftModel` then), and the steering's hooks.

    Args:
        checkpoint: What to load.
        trainable_adapter: Whether the adapter's parameters require gradients.
        device: Where to put it; `device_name()` by default.

    Raises:
        ModelError: The weights or the steering can't be read, or don't fit each other.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.base, revision=checkpoint.revision, dtype=getattr(torch, checkpoint.dtype)
        )
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the model {checkpoint.base!r} can't be loaded: {error}") from error
    if checkpoint.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, checkpoint.adapter, is_trainable=trainable_adapter)
    model = model.to(device or device_name())
    if checkpoint.steering is not None:
        from modeling.steering import load_steering, steer

        steer(model, load_steering(checkpoint.steering))
    return model


def local_folder(checkpoint: Checkpoint) -> Path:
    """The folder of a checkpoint's base weights on this machine; a hub id is downloaded.

    Raises:
        ModelError: The base weights can't be found.
    """
    if checkpoint.is_local:
        return Path(checkpoint.base)
    return Path(resolve(checkpoint.base, checkpoint.revision, "model.base")[0])


def resolve(base: str, revision: str | None, setting: str) -> tuple[str, str]:
    """Where a model's files lie, and what identifies them.

    Args:
        base: Local folder, or hub id such as "meta-llama/Llama-2-7b-hf".
        revision: Hub revision asked for, or None for the newest.
        setting: The setting that named it, for the message.

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
    return _resolve_hub(base, revision, setting)


def _resolve_hub(base: str, revision: str | None, setting: str) -> tuple[str, str]:
    from huggingface_hub import is_offline_mode, snapshot_download

    commit = revision if is_offline_mode() else _commit(base, revision, setting)
    try:
        folder = snapshot_download(
            base, revision=commit, allow_patterns=list(FILES), ignore_patterns=list(COPIES)
        )
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(
                f"the disk is too full to download {setting}={base!r}; free some space or set "
                "HF_HOME to another disk"
            ) from error
        raise ModelError(
            f"{setting}={base!r} is not in the hub cache and HF_HUB_OFFLINE is set; unset it, or "
            f"set {setting} to a model folder"
        ) from error
    verify_folder(folder, setting)
    return folder, f"{base}@{Path(folder).name}"


def _commit(base: str, revision: str | None, setting: str) -> str | None:
    """The commit that `revision` stands for; asks the hub once, with a short time limit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return HfApi().model_info(base, revision=revision, timeout=HUB_SECONDS).sha
    except GatedRepoError:
        raise ModelError(
            f"{setting}={base!r} is gated; accept its licence on its hub page, then set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{setting}={base!r} has no revision {revision!r}; set model.revision to one it has"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{setting}={base!r} is neither a folder nor a hub model that this machine may read; "
            "correct it, or set HF_TOKEN if the model is private"
        ) from None
    except HfHubHTTPError as error:
        raise ModelError(f"the hub refused {setting}={base!r}: {error}; try again") from error
    except Exception as error:
        # What the hub's HTTP library raises without a network is no error of the hub's own.
        raise ModelError(
            f"the weights of {setting}={base!r} are not on this machine and the hub can't be "
            f"reached; connect to a network (and set HF_TOKEN if the model is gated), set "
            f"{setting} to a model folder, or set HF_HUB_OFFLINE=1 if they are in the hub cache"
        ) from error
