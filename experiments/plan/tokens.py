"""Tokens of the rows of a plan: exact where the tokenizer is on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from modeling.chat import PromptStyle

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# English text under the tokenizers of the models here; only where there is no tokenizer.
CHARACTERS_PER_TOKEN = 4
# What a chat template writes around one turn, role names and marks.
TOKENS_PER_TURN = 6


class Tokens:
    """Counts the tokens of prompts and answers, each distinct set once.

    Attributes:
        exact: Whether a tokenizer counts, and not the number of characters.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self.exact = tokenizer is not None

    def prompts(
        self,
        style: PromptStyle,
        prompts: Sequence[str],
        system: str | None = None,
        *,
        starts: Sequence[str] | None = None,
        training: bool = False,
    ) -> list[int]:
        """Tokens of each prompt as it is rendered, the given start of its answer included."""
        if starts is not None:
            return [
                self._start(style, prompt, start, system)
                for prompt, start in zip(prompts, starts, strict=True)
            ]
        if self._tokenizer is None:
            return [_guess(_rendered(style, prompt, system)) for prompt in prompts]
        return [
            len(style.encode_prompt(self._tokenizer, prompt, system, training=training))
            for prompt in prompts
        ]

    def answers(
        self, style: PromptStyle, prompts: Sequence[str], answers: Sequence[str]
    ) -> list[int]:
        """Tokens of each answer with its end token."""
        if self._tokenizer is None:
            return [_guess(answer) + 1 for answer in answers]
        return [
            len(style.encode_answer(self._tokenizer, prompt, answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _start(self, style: PromptStyle, prompt: str, start: str, system: str | None) -> int:
        if self._tokenizer is None:
            return _guess(_rendered(style, prompt, system) + start)
        return len(style.encode_start(self._tokenizer, prompt, start, system))


def _rendered(style: PromptStyle, prompt: str, system: str | None) -> str:
    """The prompt's text, with room for a chat template's marks."""
    if style.style == "alpaca":
        return style.render_alpaca(prompt, system)
    turns = style.messages(prompt, system=system)
    marks = " " * (TOKENS_PER_TURN * CHARACTERS_PER_TOKEN)
    return "".join(turn["content"] + marks for turn in turns) + marks


def _guess(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)
