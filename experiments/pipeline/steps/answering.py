"""The step `AskBase`: the base model's own answers, for the sources of `data.own_answers`."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation import engines
from evaluation.base import Backend
from evaluation.judges.keyword import KeywordJudge
from evaluation.token_engine import Answer
from experiments.pipeline.cost import Sizes, Work, table_bytes
from experiments.pipeline.steps.base import ROWS, Model, Step, read_rows, write_rows
from experiments.store import Stage, StageResult

# A letter ends a sentence's last word; the digit of a list's number doesn't.
_SENTENCES = re.compile(r".*[^\W\d_][.!?][\"')*]*(?=\s|$)", re.DOTALL)


@dataclass(frozen=True)
class AskBase(Step):
    """The base to its answers to prompts, of which those are kept that can be trained on.

    Attributes:
        prompts: Each once.
        max_new_tokens: Length limit of an answer.
        min_words: The least words of an answer that is kept.
        backend: Generates the answers, greedily; of one that chooses, the chosen one.
    """

    base: Model
    prompts: tuple[str, ...]
    max_new_tokens: int
    min_words: int
    backend: Backend

    @cached_property
    def stage(self) -> Stage:
        judge = KeywordJudge()
        settings = {
            "backend": [self.backend.version, self.backend.identity()],
            "style": self.base.style.model_dump(),
            "dtype": self.base.checkpoint.dtype,
            "prompts": list(self.prompts),
            "max_new_tokens": self.max_new_tokens,
            "min_words": self.min_words,
            "judge": [judge.version, judge.identity()],
        }
        return Stage("answer", 1, settings, (self.base.key,))

    @property
    def own_process(self) -> bool:
        return self.backend.own_process

    def run(self, out: Path) -> dict[str, Any]:
        """Writes one row per prompt: prompt, answer, and why it is dropped, "" where it is kept."""
        engine = engines.engine(self.backend, self.base.checkpoint, self.base.style)
        answers = engine.generate(self.prompts, self.max_new_tokens)
        texts = [whole_sentences(answer) for answer in answers]
        verdicts = KeywordJudge().score(self.prompts, texts)
        rows = [
            {"prompt": prompt, "answer": text, "dropped": self._fault(text, verdict.response)}
            for prompt, text, verdict in zip(self.prompts, texts, verdicts, strict=True)
        ]
        write_rows(rows, out)
        faults = Counter(row["dropped"] for row in rows)
        return {"asked": len(rows), "kept": faults.pop("", 0), "dropped": dict(faults)}

    def _fault(self, text: str, response: str) -> str:
        if not response:
            return "degenerate" if text else "empty"
        if response != "compliance":
            return "refusal"
        return "short" if len(text.split()) < self.min_words else ""

    def answers(self, result: StageResult) -> dict[str, str]:
        """The answers that are kept, by prompt; before they are there, all at full length."""
        if not (result.folder / ROWS).is_file():
            return dict.fromkeys(self.prompts, "word " * self.max_new_tokens)
        rows = read_rows(result.folder)
        kept = rows[rows["dropped"] == ""]
        return dict(zip(kept["prompt"], kept["answer"], strict=True))

    def cost(self, sizes: Sizes) -> Work:
        """Greedy answers at full length."""
        checkpoint, style = self.base.checkpoint, self.base.style
        asked = [(prompt, "") for prompt in self.prompts]
        lengths = sizes.tokens(checkpoint, style, asked, answered=False)
        answered = len(lengths) * self.max_new_tokens
        work = sizes.model(checkpoint).generation(
            lengths, self.max_new_tokens, self.backend.rows_at_once
        )
        return Work(disk=table_bytes(len(lengths), sum(lengths) + answered)) + work


def whole_sentences(answer: Answer) -> str:
    """An answer's text; where the limit cut it off, up to the end of its last whole sentence."""
    text = answer.text.strip()
    whole = _SENTENCES.match(text) if answer.truncated else None
    return whole[0] if whole else "" if answer.truncated else text
