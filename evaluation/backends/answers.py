"""Answers from token ids, as every backend reads them: rows, end tokens, the start of an answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from evaluation.base import Answer
from modeling.chat import PromptStyle
from settings import ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)

# What is recorded for an answer whose logits were not finite; every judge calls it degenerate.
BROKEN = Answer("", 0, False)


@dataclass(frozen=True, slots=True)
class PromptIds:
    """What the model goes on from: all its ids, and the start of the answer with its own ids."""

    ids: list[int]
    start: str = ""
    start_ids: list[int] = field(default_factory=list)


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    style: PromptStyle,
    prompts: Sequence[str],
    system: str | None,
    starts: Sequence[str] | None,
) -> list[PromptIds]:
    """Token ids of prompts and of the starts of their answers, as `Engine.generate` takes them.

    Raises:
        ModelError: The chat template refuses a prompt or its start.
    """
    starts = [""] * len(prompts) if starts is None else starts
    return [
        _encode(tokenizer, style, prompt, start, system)
        for prompt, start in zip(prompts, starts, strict=True)
    ]


def read_answer(
    tokenizer: PreTrainedTokenizerBase, row: PromptIds, generated: Sequence[int], ends: set[int]
) -> Answer:
    """The answer that generated token ids make, up to the first that ends it.

    One that adds nothing but white space to the start it was given is empty: the start isn't the
    model's own.

    Args:
        tokenizer: Decodes; special tokens are left out.
        row: What the model went on from.
        generated: What it added.
        ends: The tokens that end an answer.
    """
    end = next((index for index, token in enumerate(generated) if token in ends), None)
    tokens = len(generated) if end is None else end + 1
    content = list(generated[:end])
    text = _decode(tokenizer, content)
    if row.start:
        # Together with the start: decoded alone, some tokenizers drop the first word's space.
        before, both = (
            _decode(tokenizer, row.start_ids),
            _decode(tokenizer, [*row.start_ids, *content]),
        )
        added = both.removeprefix(before) if both.startswith(before) else text
        text = row.start + added if added.strip() else ""
    return Answer(text, tokens, truncated=end is None)


def end_tokens(
    generation: GenerationConfig | None,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> set[int]:
    """Every token that ends an answer: the tokenizer's and those of the model's own settings."""
    configured = None if generation is None else generation.eos_token_id
    if configured is None:
        configured = getattr(config, "eos_token_id", None)
    ends = set(configured) if isinstance(configured, list) else {configured}
    return {end for end in ends | {tokenizer.eos_token_id} if end is not None}


def check_context(rows: Sequence[Sequence[int]], max_new_tokens: int, limit: int | None) -> None:
    """Refuses prompts, as token ids, that don't fit the model's context with their answers.

    Raises:
        ModelError: They don't, and what to lower.
    """
    longest = max(map(len, rows), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise ModelError(
            f"the longest prompt has {longest} tokens and its answer up to {max_new_tokens}, "
            f"but the model's context holds {limit}; lower max_new_tokens or shorten prompts"
        )


def warn_broken(broken: int, of: int) -> None:
    """Tells how many answers came from logits that are not finite, if any did."""
    if broken:
        _LOG.warning(
            "%d of %d answers came from logits that are not finite and are recorded as empty",
            broken,
            of,
        )


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    style: PromptStyle,
    prompt: str,
    start: str,
    system: str | None,
) -> PromptIds:
    ids = style.encode_start(tokenizer, prompt, start, system)
    if not start:
        return PromptIds(ids)
    head = style.encode_prompt(tokenizer, prompt, system)
    return PromptIds(ids, start, ids[len(head) :])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
