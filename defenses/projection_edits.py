"""What the defenses that edit projections share: their checks, their report, needing no data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from defenses.base import Calibration, Defense, Edit, Models
from modeling.checkpoint import Checkpoint
from settings import SettingError

if TYPE_CHECKING:
    from modeling.rewrite import EditCount

Variant = Literal["default", "official"]
Rounding = Literal["nearest", "down"]
# Fields of the defenses whose official codes round otherwise.  Stage keys hold them only where they
# are given: the first keys were without them.
VARIANT: Any = Field("default", exclude_if=lambda value: value == "default")
LATER: Any = Field(None, exclude_if=lambda value: value is None)


def resolve_rounding(variant: Variant, rounding: Rounding | None) -> Rounding:
    """The rounding given, or the variant's."""
    return rounding or ("nearest" if variant == "default" else "down")


class ProjectionDefense(Defense):
    """A defense that edits linear projections of the decoder blocks."""

    def check(self, models: Models, attacked: Checkpoint | None) -> None:
        """Refuses an aligned model that is no decoder of plain weights, with LoRA at most."""
        from modeling.projections import projections

        projections(models.aligned)


class DataFreeDefense(Defense):
    """A defense that reads all it needs from the models; nothing is prepared."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def prepare_settings(self) -> dict[str, Any]:
        return {}

    def prepare(self, models: Models, calibration: Calibration, out: Path) -> dict[str, Any]:
        return {}


def require_unaligned_base(models: Models, purpose: str) -> None:
    """Refuses (SettingError) a base that is the aligned model; `purpose` begins the sentence."""
    base, aligned = (
        (each.base, each.adapter, each.revision) for each in (models.base, models.aligned)
    )
    if base == aligned:
        raise SettingError(
            f"{purpose}, but model.aligned is model.base itself; set model.base to the model "
            "before its alignment"
        )


def describe_edit(
    count: EditCount,
    attacked: Checkpoint,
    diagnostics: dict[str, Any] | None = None,
    modules: tuple[str, ...] | None = None,
) -> Edit:
    """The report of an edit of effective weights, a share of the full model's scalars.

    Without `modules`, those in which something changed count as touched.
    """
    from modeling.checkpoint import count_parameters

    return Edit(
        defended=count.defended,
        parameters_edited=count.changed,
        parameters_total=count_parameters(replace(attacked, adapter=None)),
        modules=count.modules if modules is None else modules,
        diagnostics=diagnostics or {},
    )
