"""`TokenCounts`, tokens of rows as a model gets them: exact where its tokenizer is here."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

from experiments.pipeline.cost import CHARACTERS_PER_TOKEN
from modeling.chat import PromptStyle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a chat template writes around one turn, role names and marks.
_TOKENS_PER_TURN = 6


class TokenCounts:
    """Counts each distinct set of rows once.

    Attributes:
        exact: Whether a tokenizer counts, and not the number of characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[Hashable, list[int]] = {}
        self.exact = tokenizer is not None

    def prompts(
        self,
        style: PromptStyle,
        texts: Sequence[str],
        system: str | None,
        starts: Sequence[str] | None,
    ) -> list[int]:
        """Tokens of each rendered prompt, the given start of its answer included."""
        begun = tuple(zip(texts, starts or [""] * len(texts), strict=True))
        key = (style.model_dump_json(), system, begun)
        return self._once(
            key, lambda: [self._start(style, text, start, system) for text, start in begun]
        )

    def pairs(
        self, style: PromptStyle, rows: Sequence[tuple[str, str]], *, training: bool
    ) -> list[int]:
        """Tokens of each prompt with its answer and the end token."""
        key = (style.model_dump_json(), training, tuple(rows))
        return self._once(key, lambda: [self._pair(style, row, training) for row in rows])

    def _once(self, key: Hashable, count: Callable[[], list[int]]) -> list[int]:
        if key not in self._known:
            self._known[key] = count()
        return self._known[key]

    def _start(self, style: PromptStyle, prompt: str, start: str, system: str | None) -> int:
        if self._tokenizer is None:
            return _guess(style, prompt, start, system)
        return len(style.encode_start(self._tokenizer, prompt, start, system))

    def _pair(self, style: PromptStyle, row: tuple[str, str], training: bool) -> int:
        prompt, answer = row
        if self._tokenizer is None:
            return _guess(style, prompt, answer, None) + 1
        head = style.encode_prompt(self._tokenizer, prompt, training=training)
        return len(head) + len(style.encode_answer(self._tokenizer, prompt, answer))


def _guess(style: PromptStyle, prompt: str, answer: str, system: str | None) -> int:
    """Tokens by the number of characters, with room for a chat template's marks."""
    if style.style == "alpaca":
        texts, marks = [style.render_alpaca(prompt, system)], 0
    else:
        texts = [turn["content"] for turn in style.messages(prompt, system=system)]
        marks = _TOKENS_PER_TURN * (len(texts) + 1)
    return marks + sum(-(-len(text) // CHARACTERS_PER_TOKEN) for text in (*texts, answer))
