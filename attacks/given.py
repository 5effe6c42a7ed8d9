"""A model that somebody has fine-tuned already, in the place of an attack of ours."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from attacks.base import Attack


class Given(Attack):
    """Takes the model that is there; nothing is trained, and on what it was isn't known.

    Attributes:
        task: The task that is scored, an option of `conf/task`; None for none.
        model: Folder or hub id: full weights, or a LoRA adapter on the base or the aligned model.
        revision: Hub revision of `model`; None for the newest.
        base: Folder or hub id of the weights that the adapter sits on, where its own config
            doesn't say it.
    """

    needs_task: ClassVar[bool] = False
    # It resumes no adapter of ours, so that a published aligned model may be one or not.
    needs_full_weights: ClassVar[bool] = True

    task: str | None = None
    model: str = Field(min_length=1)
    revision: str | None = None
    base: str | None = None
