"""Fine-tuning attacks: where they start, how they train, what they report.

Explicit, IdentityShift and BenignFT are the three levels of risk of Qi et al. 2023 (arXiv
2310.03693), with the settings that SafetyLock's authors used (Zhu et al., arXiv 2410.10343).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attacks.base import Attack, AttackData
from data.rows import Example
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint, check_target_modules
from modeling.loading import load_tokenizer
from modeling.training import LoraSettings, TrainSettings, open_for_training, save, train_sft
from settings import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Adapter = Literal["resume", "fresh", "full"]


class FineTuning(Attack):
    """Fine-tunes a model on `rows`, whatever these are.

    Attributes:
        task: Name of the task, an option of `conf/task`.
        adapter: "resume" goes on training the alignment adapter (NLSR needs it), "fresh" trains
            a new LoRA on the merged aligned model, "full" trains all weights.
        lora: The fresh adapter; read only by `adapter=fresh`.
        train: The training phase.
    """

    version: ClassVar[int] = 2

    task: str
    adapter: Adapter = "resume"
    lora: LoraSettings = LoraSettings()
    train: TrainSettings

    @property
    def needs_full_weights(self) -> bool:
        return self.adapter != "resume"

    @property
    def writes_full_weights(self) -> bool:
        return self.adapter == "full"

    @property
    def fresh_lora(self) -> LoraSettings | None:
        return self.lora if self.adapter == "fresh" else None

    @property
    def training(self) -> TrainSettings:
        return self.train

    def rows(self, data: AttackData, seed: int) -> list[Example]:
        """The rows that are trained on."""
        raise NotImplementedError

    def check(self, base: Checkpoint, data: AttackData, prefix: str) -> None:
        if self.adapter == "fresh":
            check_target_modules(self.lora.target_modules, base, f"{prefix}.lora.target_modules")

    def run(
        self,
        aligned: Checkpoint,
        data: AttackData,
        style: PromptStyle,
        seed: int,
        out: Path,
        scratch: Path,
    ) -> dict[str, Any]:
        """Fine-tunes `aligned` and writes the adapter or the full weights to `out`.

        A steered model is trained under its hooks; `out` holds the weights alone, and the
        steering goes on being the checkpoint's.

        Raises:
            ModelError: The model isn't of the form that `adapter` trains.
        """
        rows = self.rows(data, seed)
        if self.system is not None:
            style = style.model_copy(update={"system": self.system})
        tokenizer = load_tokenizer(aligned)
        model = self._open(aligned, seed)
        trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
        turns = [row.turns for row in rows]
        training = train_sft(model, tokenizer, turns, style, self.train, seed, scratch)
        save(model, tokenizer, out, aligned)
        return {
            "rows": {"task": 0, "harmful": 0, **Counter(row.kind for row in rows)},
            "leaked_rows_dropped": data.leaked,
            "parameters_trained": trained,
            **training,
        }

    def _open(self, aligned: Checkpoint, seed: int) -> PreTrainedModel:
        if self.adapter == "resume" and aligned.adapter is None:
            raise ModelError(
                "adapter=resume goes on training an adapter, and this model is full weights; "
                "set adapter=fresh or adapter=full"
            )
        if self.adapter != "resume" and aligned.adapter is not None:
            raise ModelError(f"adapter={self.adapter} needs full weights; merge the adapter first")
        return open_for_training(aligned, self.fresh_lora, seed)


def check_size(available: int, needed: int, kind: str, setting: str) -> None:
    """Refuses with a DataError that names the setting to draw more rows than there are."""
    if needed > available:
        raise DataError(
            f"{setting}={needed} is more than the {available} {kind} rows there are; lower it or "
            f"give more {kind} rows"
        )
