"""Harmful fine-tuning: a customer's task rows with a share of harmful ones among them.

Setting of Qi et al. 2023 and of NLSR's section 4: n rows, int(n p) of them poison.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from attacks.base import Attack, AttackData
from data.mixture import check, mix
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint, load_tokenizer
from modeling.headers import check_target_modules
from modeling.training import LoraSettings, TrainSettings, open_for_training, save, train_sft


class HarmfulFT(Attack):
    """Fine-tunes the aligned model on task rows mixed with harmful ones.

    Attributes:
        task: Name of the task, an option of `conf/task`.
        n: Rows in all.
        poison_ratio: Share p of harmful rows.
        adapter: "resume" goes on training the alignment adapter (NLSR needs it), "fresh" trains
            a new LoRA on the merged aligned model, "full" trains all weights.
        lora: The fresh adapter; read only by `adapter=fresh`.
        train: The training phase.
    """

    n: int = Field(1000, ge=1)
    poison_ratio: float = Field(0.05, ge=0, le=1)
    adapter: Literal["resume", "fresh", "full"] = "resume"
    lora: LoraSettings = LoraSettings()
    train: TrainSettings

    @property
    def needs_poison(self) -> bool:
        return self.poison_ratio > 0

    @property
    def needs_full_weights(self) -> bool:
        return self.adapter != "resume"

    def check(self, base: Checkpoint, data: AttackData) -> None:
        check(len(data.task), len(data.poison), self.n, self.poison_ratio)
        if self.adapter == "fresh":
            check_target_modules(self.lora.target_modules, base, "attack.lora.target_modules")

    def run(
        self,
        aligned: Checkpoint,
        data: AttackData,
        style: PromptStyle,
        seed: int,
        out: Path,
        scratch: Path,
    ) -> dict[str, Any]:
        rows = mix(data.task, data.poison, self.n, self.poison_ratio, seed)
        tokenizer = load_tokenizer(aligned)
        lora = self.lora if self.adapter == "fresh" else None
        model = open_for_training(aligned, lora, seed)
        pairs = [(row.prompt, row.response) for row in rows]
        curve = train_sft(model, tokenizer, pairs, style, self.train, seed, scratch)
        save(model, tokenizer, out, aligned.base)
        harmful = sum(row.kind == "harmful" for row in rows)
        return {
            "rows": {"task": len(rows) - harmful, "harmful": harmful},
            "leaked_rows_dropped": data.leaked,
            "loss": curve,
        }
