"""Engines and classifiers as the evaluator sees them, over a worker process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evaluation.backends.vllm import pool
from evaluation.backends.vllm.pool import WarmEngine
from evaluation.token_engine import Answer, Engine, PromptIds, check_context
from modeling.chat import PromptStyle
from settings import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Lease:
    """The use of a running engine, which is this one's alone until `close`."""

    def __init__(self, running: WarmEngine) -> None:
        self._running: WarmEngine | None = running

    @property
    def usable(self) -> bool:
        return self._running is not None and self._running.worker.is_alive

    def close(self) -> None:
        """Puts the engine to rest: a GPU's memory is given back, the process stays."""
        if self._running is not None:
            pool.rest(self._running)
            self._running = None

    def discard(self) -> None:
        """Ends the engine, so that no other checkpoint is put into it."""
        if self._running is not None:
            pool.discard(self._running)
            self._running = None

    def _ask(self, name: str, rows: list[list[int]], **arguments: Any) -> Any:
        if self._running is None:
            raise ModelError("this vLLM engine is closed; open the model again")
        try:
            return self._running.worker.ask(name, ids=rows, **arguments) if rows else []
        finally:
            if not self.usable:
                self.discard()


class VLLMEngine(_Lease, Engine):
    """A model that vLLM serves, with the prompts tokenised in this process."""

    def __init__(
        self,
        running: WarmEngine,
        tokenizer: PreTrainedTokenizerBase,
        style: PromptStyle,
        ends: set[int],
        context: int | None,
    ) -> None:
        """Wraps a running engine; `context` is how many positions the model has, or None."""
        _Lease.__init__(self, running)
        context = min(running.context, context or running.context)
        Engine.__init__(self, tokenizer, style, ends, context)

    def _token_logprobs(self, rows: list[list[int]]) -> list[list[float]]:
        # A row of one token has nothing to score.
        scored = iter(self._ask("logprobs", [row for row in rows if len(row) > 1]))
        return [next(scored) if len(row) > 1 else [] for row in rows]

    def _candidate_logprobs(
        self, rows: list[list[int]], candidates: list[int]
    ) -> list[list[float]]:
        return self._ask("next_logprobs", rows, candidates=candidates)

    def _answers(self, rows: list[PromptIds], max_new_tokens: int) -> list[Answer]:
        generated = self._ask(
            "generate",
            [row.ids for row in rows],
            max_new_tokens=max_new_tokens,
            ends=sorted(self._ends),
        )
        return self._read(rows, generated)


class VLLMClassifier(_Lease):
    """A sequence classifier with independent labels that vLLM serves."""

    def __init__(
        self,
        running: WarmEngine,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
    ) -> None:
        super().__init__(running)
        self.tokenizer = tokenizer
        self.labels = labels
        self.context = running.context

    def probabilities(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        import torch

        rows = [list(row) for row in ids]
        check_context(rows, 0, self.context)
        # From logits, since vLLM takes a softmax wherever the config names no problem_type.
        logits = self._ask("classify", rows)
        return [torch.sigmoid(torch.tensor(row, dtype=torch.float32)).tolist() for row in logits]
