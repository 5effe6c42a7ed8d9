"""What the defenses that edit projections share: their checks, their report, needing no data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from defenses.base import Calibration, Defense, Edit, Models
from modeling.checkpoint import Checkpoint
from settings import SettingError

if TYPE_CHECKING:
    from modeling.rewrite import EditCount


class ProjectionDefense(Defense):
    """A defense that edits linear projections of the decoder blocks."""

    def check(self, models: Models, attacked: Checkpoint | None) -> None:
        """Refuses an aligned model whose projections, and so its fine-tunes', can't be read.

        Raises:
            ModelError: It isn't a decoder of plain weights, or its adapter more than LoRA.
        """
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
    """Refuses a base that is the aligned model itself.

    Args:
        models: Base and aligned.
        purpose: The defense and what it does with alignment's change, for the message.

    Raises:
        SettingError: One sentence.
    """
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

    Args:
        count: What was written and what changed.
        attacked: The model that was edited.
        diagnostics: The method's own figures.
        modules: The modules touched; None: those in which something changed.
    """
    from modeling.checkpoint import count_parameters

    return Edit(
        defended=count.defended,
        parameters_edited=count.changed,
        parameters_total=count_parameters(replace(attacked, adapter=None)),
        modules=count.modules if modules is None else modules,
        diagnostics=diagnostics or {},
    )
