"""What a checkpoint holds, from its headers alone: parameters, and names of its projections."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from modeling.checkpoint import Checkpoint, local_folder
from modeling.model_files import ADAPTER_WEIGHTS, read_header, stored_tensors
from settings import SettingError


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
