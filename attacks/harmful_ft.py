"""Harmful fine-tuning: a customer's task rows with a share of harmful ones among them.

Setting of Qi et al. 2023 and of NLSR's section 4: n rows, int(n p) of them poison.
"""

from __future__ import annotations

from pydantic import Field

from attacks.base import AttackData
from attacks.fine_tuning import FineTuning
from data.mixture import Count, DrawOrder, check, mix
from data.rows import Example
from modeling.checkpoint import Checkpoint


class HarmfulFT(FineTuning):
    """Fine-tunes the aligned model on task rows mixed with harmful ones.

    Attributes:
        n: Rows in all.
        poison_ratio: Share p of harmful rows.
        count: How the harmful rows are counted, see `data.mixture.poison_count`.
        order: Which rows of the sources are taken: "seeded" or the "first" ones.
    """

    n: int = Field(1000, ge=1)
    poison_ratio: float = Field(0.05, ge=0, le=1)
    count: Count = "exact"
    order: DrawOrder = "seeded"

    @property
    def needs_poison(self) -> bool:
        return self.poison_ratio > 0

    def check(self, base: Checkpoint, data: AttackData, prefix: str) -> None:
        check(len(data.task), len(data.poison), self.n, self.poison_ratio, self.count, prefix)
        super().check(base, data, prefix)

    def rows(self, data: AttackData, seed: int) -> list[Example]:
        return mix(
            data.task,
            data.poison,
            self.n,
            self.poison_ratio,
            seed,
            count=self.count,
            order=self.order,
        )
