"""Where FGSN looks for neurons in one attacked model: layers, their projections, and shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from defenses.base import Models
from defenses.fgsn.layers import by_layer, named_layers, safety_layers, window_size
from defenses.fgsn.project import Projection
from modeling.checkpoint import Checkpoint
from modeling.projections import open_pairing
from settings import ModelError, SettingError

if TYPE_CHECKING:
    from defenses.fgsn import FGSN


@dataclass(frozen=True, slots=True)
class EditPlan:
    """The settings, and what they come to on one model.

    Attributes:
        layers: {layer: projections} in which neurons are looked for.
        shapes: {projection: (d_out, d_in)} of all projections in the model's blocks; their
            scalars are the denominator of every share.
    """

    settings: FGSN
    layers: Mapping[int, list[str]]
    shapes: Mapping[str, tuple[int, int]]

    @property
    def scalars(self) -> int:
        """The denominator: scalars of all projections in the model's blocks."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def projection(self) -> Projection:
        """What becomes of a selected neuron."""
        settings = self.settings
        return Projection(settings.edit, settings.norm, settings.blend_weight)


def plan_edit(
    settings: FGSN, models: Models, attacked: Checkpoint, gaps: Sequence[float] | None
) -> EditPlan:
    """The plan for one attacked model; `gaps` are the layers', None unless `layers` is "auto".

    Raises:
        ModelError: The artefact has no gaps, or the models can't be compared.
        SettingError: The fine-tuning left these layers alone.
    """
    pairing = open_pairing(models.aligned, attacked)
    shapes = pairing.attacked.shapes
    members = by_layer(shapes)
    if settings.layers != "auto":
        window = named_layers(settings.layers, len(members))
    elif gaps is not None:
        window = safety_layers(gaps, window_size(settings.window, len(gaps)))
    else:
        raise ModelError("the artefact holds no gaps of the layers; prepare defense=fgsn again")
    touched = set(pairing.touched if settings.target == "delta" else shapes)
    layers = {at: [name for name in members[at] if name in touched] for at in window}
    if not any(layers.values()):
        raise SettingError(
            f"defense.layers: the fine-tuning left layers {window} alone, so that there is "
            "nothing to project in them; choose others"
        )
    return EditPlan(settings, {at: names for at, names in layers.items() if names}, shapes)
