"""The base of every backend's engine: prompts become token ids here, a subclass runs the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evaluation.backends.answers import PromptIds, check_context, encode_rows
from evaluation.base import Answer
from modeling.chat import PromptStyle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenEngine(ABC):
    """An `evaluation.base.Engine`, which describes its methods, of a model that reads token ids.

    An answer whose logits are not finite at some step is recorded as the empty text, which every
    judge calls degenerate, and a warning tells how many there were.  So is one that adds nothing
    but white space to the start it was given: the start isn't the model's own.

    Every method raises a ModelError where a row doesn't fit the model's context, or the model
    fails, as for want of memory.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        style: PromptStyle,
        ends: set[int],
        context: int | None,
    ) -> None:
        """Takes what tokenising needs.

        Args:
            tokenizer: The model's.
            style: How prompts are rendered.
            ends: Tokens that end an answer.
            context: As `Engine.context`.
        """
        self.tokenizer = tokenizer
        self.context = context
        self._style = style
        self._ends = ends

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        system: str | None = None,
        starts: Sequence[str] | None = None,
    ) -> list[Answer]:
        rows = encode_rows(self.tokenizer, self._style, prompts, system, starts)
        return self._checked_answers(rows, max_new_tokens)

    def complete(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        return self._checked_answers([PromptIds(list(row)) for row in ids], max_new_tokens)

    def logprobs(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        rows = [list(row) for row in ids]
        check_context(rows, 0, self.context)
        return self._token_logprobs(rows)

    def next_logprobs(
        self, ids: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> list[list[float]]:
        rows = [list(row) for row in ids]
        check_context(rows, 1, self.context)
        return self._candidate_logprobs(rows, list(candidates))

    def _checked_answers(self, rows: list[PromptIds], max_new_tokens: int) -> list[Answer]:
        check_context([row.ids for row in rows], max_new_tokens, self.context)
        return self._answers(rows, max_new_tokens)

    @abstractmethod
    def _answers(self, rows: list[PromptIds], max_new_tokens: int) -> list[Answer]: ...

    @abstractmethod
    def _token_logprobs(self, rows: list[list[int]]) -> list[list[float]]: ...

    @abstractmethod
    def _candidate_logprobs(
        self, rows: list[list[int]], candidates: list[int]
    ) -> list[list[float]]: ...
