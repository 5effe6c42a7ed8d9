"""Lengths of the rows that stages read, counted once for all models of one tokenizer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.plan.forms import Forms
from experiments.plan.tokens import Tokens
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import load_tokenizer


@dataclass
class Lengths:
    """Tokens of rows as a model gets them.

    Attributes:
        forms: Says which tokenizer a model has.
        guessed: Names of models whose tokens are guessed from characters.
    """

    forms: Forms
    guessed: set[str] = field(default_factory=set)
    _tokens: dict[Path, Tokens] = field(default_factory=dict)
    _known: dict[Hashable, list[int]] = field(default_factory=dict)

    def prompts(
        self,
        checkpoint: Checkpoint,
        style: PromptStyle,
        texts: Sequence[str],
        system: str | None = None,
        starts: Sequence[str] | None = None,
    ) -> list[int]:
        """Tokens of each rendered prompt, with the start of its answer where one is given."""
        tokens, place = self._tokenizer(checkpoint)
        given = None if starts is None else tuple(starts)
        key = ("asked", place, style.model_dump_json(), tuple(texts), system, given)
        if key not in self._known:
            self._known[key] = tokens.prompts(style, texts, system, starts=starts)
        return self._known[key]

    def answered(
        self,
        checkpoint: Checkpoint,
        style: PromptStyle,
        rows: Sequence[tuple[str, str]],
        *,
        training: bool = False,
    ) -> list[int]:
        """Tokens of each prompt with its answer."""
        tokens, place = self._tokenizer(checkpoint)
        key = ("answered", place, style.model_dump_json(), tuple(rows), training)
        if key not in self._known:
            prompts, answers = [row[0] for row in rows], [row[1] for row in rows]
            heads = tokens.prompts(style, prompts, training=training)
            tails = tokens.answers(style, prompts, answers)
            self._known[key] = [head + tail for head, tail in zip(heads, tails, strict=True)]
        return self._known[key]

    def _tokenizer(self, checkpoint: Checkpoint) -> tuple[Tokens, Path]:
        located = self.forms.located(checkpoint)
        if located.folder not in self._tokens:
            place = Checkpoint(str(located.folder))
            known = load_tokenizer(place) if located.has_tokenizer else None
            self._tokens[located.folder] = Tokens(known)
        if not self._tokens[located.folder].exact:
            self.guessed.add(located.name)
        return self._tokens[located.folder], located.folder
