"""The authors' published Meta-SafetyLocks, read without running what a pickle may hold.

Such a file is a zip archive of torch's with one pickle: {"model.layers.L.self_attn.head_out":
[(head, direction, sigma), ...]}, a numpy int64, a float16 array (head_dim,) and a float16 for each
of the K heads.  It says neither alpha nor which model, template or settings it was made with.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from defenses.safetylock.directions import Directions
from defenses.safetylock.lock import Lock
from modeling.heads import HeadLayout
from settings import ModelError

_LAYER = re.compile(r"model\.layers\.(\d+)\.self_attn\.head_out")
# Published ones have some 14 KB.
_LARGEST = 1 << 26


def _encode(text: str, _: str = "latin1") -> bytes:
    return text.encode("latin1")


def _empty(*_: Any) -> np.ndarray[Any, Any]:
    """An array to be filled; the pickle's own words of type and shape may say anything."""
    return np.ndarray(0)


# All that a published lock names; numpy 2 calls the module numpy._core.multiarray.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # Named as a type alone, so that it needn't be one that is called.
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "scalar"): np.float16().__reduce__()[0],
    ("numpy.core.multiarray", "_reconstruct"): _empty,
    ("_codecs", "encode"): _encode,
}


class _Reader(pickle.Unpickler):
    """Reads what published locks hold and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]


def read_published(file: Path, layout: HeadLayout, model: str) -> Lock:
    """Our lock of a published one, for a model of this layout.

    Args:
        file: The .safelock.
        layout: The heads of the model that it is for.
        model: The folder or hub id that the user says it is for; it can't be verified.

    Raises:
        ModelError: It is no such file, names what no published lock does, or doesn't fit.
    """
    content = _load(file)
    u = torch.zeros(layout.layers, layout.heads, layout.head_dim)
    sigma, chosen = torch.zeros(u.shape[:2]), torch.zeros(1, *u.shape[:2])
    for key, entries in content.items():
        match = _LAYER.fullmatch(str(key))
        for entry in entries if match and isinstance(entries, list) else [None]:
            head, direction, deviation = _entry(entry, file)
            layer = int(match[1]) if match else 0
            if layer >= layout.layers or head >= layout.heads or len(direction) != layout.head_dim:
                raise ModelError(
                    f"{str(file)!r} steers head {head} of layer {layer}, {len(direction)} wide, "
                    f"and {model!r} has {layout.layers} layers of {layout.heads} heads, "
                    f"{layout.head_dim} wide; give the model that the lock was published for"
                )
            u[layer, head], sigma[layer, head] = torch.from_numpy(direction), deviation
            chosen[0, layer, head] = 1
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Lock(
        Directions(u, sigma),
        chosen,
        None,
        layout,
        {
            "base": None,
            "adapter": None,
            "chat_template": None,
            "file": file.name,
            "sha256": digest,
            "for": f"{model}, as its user says: the file names no model to verify",
        },
        {"published": True},
        int(chosen.sum()),
    )


def _load(file: Path) -> dict[Any, Any]:
    if not file.is_file():
        raise ModelError(f"{str(file)!r} is no file; give a published .safelock")
    try:
        with zipfile.ZipFile(file) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            if archive.getinfo(name).file_size > _LARGEST:
                raise pickle.UnpicklingError(f"it has more than {_LARGEST >> 20} MB")
            content = _Reader(BytesIO(archive.read(name))).load()
    except Exception as error:  # What a damaged pickle raises may be anything.
        raise ModelError(
            f"{str(file)!r} is no published lock ({error}), and nothing of it was run; give a "
            ".safelock as its authors publish them"
        ) from error
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{str(file)!r} holds no heads; give a .safelock as published")
    return content


def _entry(entry: Any, file: Path) -> tuple[int, np.ndarray[Any, Any], float]:
    """Head, direction and standard deviation, of nothing but finite numbers."""
    sound = isinstance(entry, tuple) and len(entry) == 3
    head, direction, sigma = entry if sound else (None, None, None)
    if not (
        isinstance(head, int | np.integer)
        and head >= 0
        and isinstance(direction, np.ndarray)
        and direction.ndim == 1
        and direction.dtype.kind == "f"
        and isinstance(sigma, float | np.floating)
        and np.isfinite(direction).all()
        and np.isfinite(sigma)
    ):
        raise ModelError(
            f"{str(file)!r} has an entry that is no (head, direction, sigma); give a .safelock as "
            "published"
        )
    return int(head), direction.astype(np.float32), float(sigma)
