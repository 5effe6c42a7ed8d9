"""Where the models that steps make lie: their folders, and how a report names them.

A stage's report says by `place` where its models' files are, so that `checkpoint_at` has them again
when the store has moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from defenses.base import Defense, Models
from modeling.checkpoint import Checkpoint
from modeling.model_files import is_adapter
from settings import ModelError

MODEL = "model"

_PARTS = ("base", "adapter", "steering")


def model_in(folder: Path, parent: Checkpoint, *, adapter: bool) -> Checkpoint:
    """The model in `folder/model` that a step makes of `parent`, whose steering goes on.

    Args:
        folder: The stage's folder.
        parent: The model that it was made of.
        adapter: Whether it is an adapter, where it isn't there yet to be looked at.
    """
    path = folder / MODEL
    if is_adapter(path) if path.is_dir() else adapter:
        return replace(parent, adapter=str(path))
    return Checkpoint(str(path), dtype=parent.dtype, steering=parent.steering)


def model_after(defense: Defense, attacked: Checkpoint, folder: Path) -> Checkpoint:
    """The model that a defense will write to `folder`, as far as `output_form` tells its form."""
    if defense.is_identity:
        return attacked
    if defense.output_form == "hooks":
        return replace(attacked, steering=str(folder))
    if attacked.adapter is not None and defense.output_form in ("same", "adapter"):
        return replace(attacked, adapter=str(folder))
    return Checkpoint(str(folder), dtype=attacked.dtype, steering=attacked.steering)


def known_models(models: Models, attacked: Checkpoint) -> dict[str, Checkpoint]:
    """The models that a defense gets by name, whose files its results may go on using."""
    return {"attacked": attacked, "aligned": models.aligned, "base": models.base}


def place(
    checkpoint: Checkpoint, folder: Path, known: Mapping[str, Checkpoint]
) -> dict[str, str | None]:
    """Where a checkpoint's files lie, whatever the store's own place is.

    Args:
        checkpoint: A model that a stage made.
        folder: The stage's folder.
        known: The models that the stage was given, by name.

    Returns:
        For weights, adapter and steering: None, a path in the folder ("model/steps/1"), or a
        known model's that has the same ("attacked:").

    Raises:
        ModelError: It is none of these.
    """
    places: dict[str, str | None] = {}
    for part in _PARTS:
        path = getattr(checkpoint, part)
        owner = next((name for name, model in known.items() if getattr(model, part) == path), None)
        if path is None:
            places[part] = None
        elif Path(path).is_relative_to(folder):
            places[part] = Path(path).relative_to(folder).as_posix()
        elif owner is not None:
            places[part] = f"{owner}:"
        else:
            raise ModelError(
                f"the defense's {part} {path!r} lies neither in its own folder nor with a model "
                "that it was given; write it to the folder that `apply` gets"
            )
    return places


def checkpoint_at(
    places: Mapping[str, str | None], folder: Path, known: Mapping[str, Checkpoint]
) -> Checkpoint:
    """The checkpoint that `place` described, its stage's folder being `folder` now."""
    paths: dict[str, str | None] = {}
    revision = None
    for part, location in places.items():
        owner = known.get(location.removesuffix(":")) if location and location[-1] == ":" else None
        if owner is not None:
            paths[part] = getattr(owner, part)
            revision = owner.revision if part == "base" else revision
        else:
            paths[part] = None if location is None else str(folder / location)
    dtype = known["attacked"].dtype
    return Checkpoint(str(paths["base"]), paths["adapter"], revision, dtype, paths["steering"])
