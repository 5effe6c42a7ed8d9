"""Engines and classifiers as the evaluator sees them, over a worker process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evaluation.backends.answers import (
    BROKEN,
    Row,
    check_context,
    encode_rows,
    read_answer,
    warn_broken,
)
from evaluation.backends.vllm import pool
from evaluation.backends.vllm.pool import Running
from evaluation.base import Answer
from modeling.chat import PromptStyle
from settings import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class VLLMEngine:
    """A model that vLLM serves, with the prompts tokenised in this process."""

    def __init__(
        self,
        running: Running,
        keep: int,
        tokenizer: PreTrainedTokenizerBase,
        style: PromptStyle,
        ends: set[int],
        context: int | None,
    ) -> None:
        """Wraps a running engine.

        Args:
            running: The engine, which is this one's alone until `close`.
            keep: How many engines stay at rest.
            tokenizer: The model's.
            style: How prompts are rendered.
            ends: Tokens that end an answer.
            context: How many positions the model has, or None.
        """
        self._lease = _Lease(running, keep)
        self._tokenizer = tokenizer
        self._style = style
        self._ends = ends
        self._context = min(running.context, context or running.context)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self._context

    @property
    def usable(self) -> bool:
        """Whether its process runs and it wasn't closed."""
        return self._lease.holds

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        system: str | None = None,
        starts: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Greedy answers, in the order of the prompts.

        An answer with a log-probability that is not finite is recorded as the empty text, which
        every judge calls degenerate, and a warning tells how many there were.

        Args:
            prompts: The users' turns, unrendered.
            max_new_tokens: Length limit in tokens, the end token included and the start not.
            system: A system line before every prompt; the style's own by default.
            starts: How each answer begins, "" for none; None for none at all.

        Raises:
            ModelError: A prompt doesn't fit the model's context, or vLLM fails.
        """
        rows = encode_rows(self._tokenizer, self._style, prompts, system, starts)
        return self._answers(rows, max_new_tokens)

    def complete(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        """Greedy continuations of token ids; not finite logits as in `generate`.

        Raises:
            ModelError: A sequence doesn't fit the model's context, or vLLM fails.
        """
        return self._answers([Row(list(row)) for row in ids], max_new_tokens)

    def logprobs(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Natural log-probability of every token but the first, given those before it.

        Raises:
            ModelError: A sequence doesn't fit the model's context, or vLLM fails.
        """
        rows = [list(row) for row in ids]
        check_context(_longest(rows), 0, self._context)
        # A row of one token has nothing to score.
        scored = iter(self._lease.ask("logprobs", [row for row in rows if len(row) > 1]))
        return [next(scored) if len(row) > 1 else [] for row in rows]

    def next_logprobs(
        self, ids: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> list[list[float]]:
        """Natural log-probability of each candidate, 128 at most, as the next token.

        Raises:
            ModelError: A sequence doesn't fit the model's context, or vLLM fails.
        """
        rows = [list(row) for row in ids]
        check_context(_longest(rows), 1, self._context)
        return self._lease.ask("next_logprobs", rows, candidates=list(candidates))

    def close(self) -> None:
        """Puts the engine to rest: a GPU's memory is given back, the process stays."""
        self._lease.end()

    def discard(self) -> None:
        """Ends the engine, so that no other checkpoint is put into it."""
        self._lease.discard()

    def _answers(self, rows: Sequence[Row], max_new_tokens: int) -> list[Answer]:
        ids = [row.ids for row in rows]
        check_context(_longest(ids), max_new_tokens, self._context)
        made = self._lease.ask(
            "generate", ids, max_new_tokens=max_new_tokens, ends=sorted(self._ends)
        )
        warn_broken(sum(not is_finite for _, is_finite in made), len(rows))
        return [
            read_answer(self._tokenizer, row, tokens, self._ends) if is_finite else BROKEN
            for row, (tokens, is_finite) in zip(rows, made, strict=True)
        ]


class VLLMClassifier:
    """A sequence classifier with independent labels that vLLM serves."""

    def __init__(
        self,
        running: Running,
        keep: int,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
    ) -> None:
        """Wraps a running engine.

        Args:
            running: The engine, which is this one's alone until `close`.
            keep: How many engines stay at rest.
            tokenizer: The classifier's.
            labels: What its logits stand for.
        """
        self._lease = _Lease(running, keep)
        self._tokenizer = tokenizer
        self._labels = labels
        self._context = running.context

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The classifier's tokenizer, padding and truncating on the right."""
        return self._tokenizer

    @property
    def labels(self) -> Sequence[str]:
        """What the columns of `probabilities` stand for."""
        return self._labels

    @property
    def context(self) -> int:
        """How many tokens a text may have."""
        return self._context

    @property
    def usable(self) -> bool:
        """Whether its process runs and it wasn't closed."""
        return self._lease.holds

    def probabilities(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Sigmoid scores in float32, one row of `len(labels)` per sequence.

        Raises:
            ModelError: A sequence doesn't fit the context, or vLLM fails.
        """
        import torch

        rows = [list(row) for row in ids]
        check_context(_longest(rows), 0, self._context)
        # From logits, since vLLM takes a softmax wherever the config names no problem_type.
        logits = self._lease.ask("classify", rows)
        return [torch.sigmoid(torch.tensor(row, dtype=torch.float32)).tolist() for row in logits]

    def close(self) -> None:
        """Puts the engine to rest."""
        self._lease.end()

    def discard(self) -> None:
        """Ends the engine, so that no other classifier is put into it."""
        self._lease.discard()


class _Lease:
    """The use of a running engine until it is given back."""

    def __init__(self, running: Running, keep: int) -> None:
        self._running: Running | None = running
        self._keep = keep

    @property
    def holds(self) -> bool:
        return self._running is not None and self._running.worker.is_alive

    def ask(self, name: str, rows: list[list[int]], **arguments: Any) -> Any:
        if self._running is None:
            raise ModelError("this vLLM engine is closed; open the model again")
        try:
            return self._running.worker.ask(name, ids=rows, **arguments) if rows else []
        finally:
            if not self.holds:
                self.discard()

    def end(self) -> None:
        if self._running is not None:
            pool.rest(self._running, self._keep)
            self._running = None

    def discard(self) -> None:
        if self._running is not None:
            pool.discard(self._running)
            self._running = None


def _longest(rows: Sequence[Sequence[int]]) -> int:
    return max(map(len, rows), default=0)
