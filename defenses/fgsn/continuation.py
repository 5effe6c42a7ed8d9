"""FGSN's `continue_from`: where a later run starts when an earlier one has edited neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defenses.fgsn.plan import EditPlan
from defenses.fgsn.union import Union, load_union, union_folder
from modeling.checkpoint import Checkpoint
from settings import ModelError, SettingError

if TYPE_CHECKING:
    from defenses.fgsn import FGSN


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run of continual projection starts.

    Attributes:
        model: The model to edit.
        union: U, the neurons that aren't edited again.
        missing: The neurons of U that are to be projected in `model`, which lacks that edit.
        edited: How many scalars were edited before.
    """

    model: Checkpoint
    union: Union
    missing: Union
    edited: int = 0


def projection_settings(settings: FGSN) -> dict[str, Any]:
    """The settings of the projection, which runs on one model must share."""
    names = ("edit", "blend_weight", "norm", "target", "rescore")
    return {name: getattr(settings, name) for name in names}


def find_start(
    plan: EditPlan, attacked: Checkpoint, identity: Mapping[str, Any], aligned: Mapping[str, Any]
) -> Start:
    """The start of a run, from `continue_from` where that is set.

    A model that isn't the one that the earlier run edited is taken to hold that edit.

    Raises:
        ModelError: What `continue_from` names is damaged or doesn't fit.
        SettingError: The earlier run edited this very model in another way.
    """
    settings = plan.settings
    empty = Union(settings.granularity, plan.shapes)
    folder = settings.continue_from
    if folder is None:
        return Start(attacked, empty, empty)
    union, record = load_union(folder, aligned, settings.granularity, plan.shapes)
    if record["attacked"] != identity:
        return Start(attacked, union, empty)
    edited = record["parameters_edited"]
    if settings.rescore:
        return Start(_model_in(union_folder(folder).parent, attacked), union, empty, edited)
    for name, value in projection_settings(settings).items():
        if record["projection"][name] != value:
            raise SettingError(
                f"defense.continue_from={folder!r} repaired this very model with "
                f"{name}={record['projection'][name]}; set defense.{name} to that"
            )
    return Start(attacked, union, union, edited)


def _model_in(folder: Path, attacked: Checkpoint) -> Checkpoint:
    """The model that an earlier run wrote for the same attacked model."""
    if (folder / "adapter_config.json").is_file():
        return replace(attacked, adapter=str(folder))
    if (folder / "config.json").is_file():
        return Checkpoint(str(folder), dtype=attacked.dtype)
    raise ModelError(
        f"defense.rescore=true goes on from the model that was defended, and {str(folder)!r} holds "
        "none; set defense.continue_from to the folder of that model"
    )
