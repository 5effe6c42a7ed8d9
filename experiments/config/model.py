"""Settings of the model that an experiment is about, the `model` section; read by every stage."""

from __future__ import annotations

import logging
from typing import Any, Literal

from pydantic import Field

from modeling.chat import PromptStyle
from modeling.checkpoint import Dtype, holds_adapter
from modeling.training import PROJECTIONS
from settings import SettingError, Settings

_LOG = logging.getLogger(__name__)


class ModelSettings(Settings):
    """Which model the experiment is about.

    Attributes:
        name: A short name for tables.
        base: Local folder or hub id of the model before alignment (W_0).
        aligned: The published aligned model: an adapter folder on `base`, a full model (folder
            or hub id), or None where there is none.
        revision: Hub revision of `base`; None for the newest.
        aligned_revision: Hub revision of `aligned`; None for the newest.
        alignment: "published" takes `aligned`, "own" makes the aligned model by the `align`
            stage, "auto" does so where there is no published one, or where the attack goes on
            training the alignment's adapter and the published one is no adapter.
        prompt: How prompts of the published aligned model are rendered.
        base_prompt: How prompts of the base model are, and of what our own alignment makes of it;
            None: as `prompt` says.
        lora_targets: The projections that a fresh LoRA adapts, read by the YAML files of attacks
            and alignments.
        gradient_checkpointing: Whether training computes activations twice to save memory, read
            by the same files.
        task: The attack's task by default.
        max_new_tokens: Length limit of answers to instructions.
        moderation: Folder or hub id of the moderation classifier.
        safe_system: The system line that asks for safety; `evaluation.safe_system` switches it on.
        presets: Settings of methods that are this model's own, read by their YAML files.
    """

    name: str
    base: str
    aligned: str | None = None
    revision: str | None = None
    aligned_revision: str | None = None
    alignment: Literal["auto", "published", "own"] = "auto"
    dtype: Dtype = "float32"
    prompt: PromptStyle = PromptStyle()
    base_prompt: PromptStyle | None = None
    lora_targets: tuple[str, ...] = PROJECTIONS
    gradient_checkpointing: bool = False
    task: str
    max_new_tokens: int = Field(512, ge=1)
    moderation: str
    safe_system: str | None = None
    presets: dict[str, Any] = Field(default_factory=dict)

    @property
    def base_style(self) -> PromptStyle:
        """How the base model's prompts are rendered."""
        return self.base_prompt or self.prompt

    @property
    def style(self) -> PromptStyle:
        """How the prompts of the aligned model, and of all that is made from it, are rendered."""
        return self.base_style if self.alignment == "own" else self.prompt

    def resolved(self, resumes: bool) -> ModelSettings:
        """These settings with `alignment` decided.

        `resumes` is whether the attack goes on training the alignment's adapter.

        Raises:
            SettingError: A published model was asked for and there is none.
            ModelError: `aligned` is neither a model folder nor a hub id.
        """
        if self.alignment == "published" and self.aligned is None:
            raise SettingError(
                "model.alignment=published needs model.aligned; set it, or model.alignment=own"
            )
        if self.alignment != "auto":
            return self
        own = self.aligned is None or (
            resumes and not holds_adapter(self.aligned, self.aligned_revision, "model.aligned")
        )
        if own and self.aligned is not None:
            _LOG.warning(
                "model.aligned=%r isn't used: the attack goes on training an adapter, and it is "
                "full weights, so that the align stage makes the aligned model; to attack it, set "
                "attack.adapter=fresh or full",
                self.aligned,
            )
        return self.model_copy(update={"alignment": "own" if own else "published"})
