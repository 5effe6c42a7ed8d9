"""The base of every backend's engine: prompts become token ids here, and token ids answers."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile, islice
from typing import TYPE_CHECKING

from modeling.chat import THOUGHTS, PromptStyle
from settings import ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer.

    Attributes:
        text: The decoded answer, without special tokens; it begins with the start it was given,
            and is empty where nothing was added to one.
        tokens: How many tokens were generated, the end token included.
        truncated: Whether the length limit cut it off (no end token was generated).
    """

    text: str
    tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True)
class Questions:
    """Prompts that are asked alike.

    Attributes:
        prompts: The users' turns, unrendered.
        max_new_tokens: Length limit in tokens, the end token included and the start not.
        system: A system line before every prompt; the style's own by default.
        starts: How each answer begins, "" for none, which the model is made to go on from;
            None for none at all.
    """

    prompts: Sequence[str]
    max_new_tokens: int
    system: str | None = None
    starts: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class PromptIds:
    """What the model goes on from: all its ids, and the start of the answer with its own ids.

    `limit` is how many tokens the answer may have beyond its start.
    """

    ids: list[int]
    limit: int
    start: str = ""
    start_ids: list[int] = field(default_factory=list)


class Engine(ABC):
    """A loaded model that answers batches; closing it gives its memory back.

    An answer whose logits are not finite at some step is recorded as the empty text, which every
    judge calls degenerate, and a warning tells how many there were.  So is one that adds nothing
    but white space to the start it was given: the start isn't the model's own.

    Every method raises a ModelError where a row doesn't fit the model's context, or the model
    fails, as for want of memory.

    Attributes:
        tokenizer: The model's.
        context: How many tokens a prompt and its answer may have together; None where nothing says.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        style: PromptStyle,
        ends: set[int],
        context: int | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self._style = style
        self._ends = ends

    @property
    @abstractmethod
    def usable(self) -> bool:
        """Whether it answers; one whose process died, or that was closed, doesn't."""

    @abstractmethod
    def close(self) -> None: ...

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        system: str | None = None,
        starts: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Greedy answers, in the order of the prompts; the arguments are those of `Questions`."""
        return self.generate_sets([Questions(prompts, max_new_tokens, system, starts)])[0]

    def generate_sets(self, sets: Sequence[Questions]) -> list[list[Answer]]:
        """Greedy answers to several sets of prompts in one pass, set by set."""
        rows = [row for questions in sets for row in self._encoded(questions)]
        answers = iter(self._checked_answers(rows))
        return [list(islice(answers, len(questions.prompts))) for questions in sets]

    def complete(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        """Greedy continuations of token ids as they are given, in their order."""
        return self._checked_answers([PromptIds(list(row), max_new_tokens) for row in ids])

    def logprobs(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Natural log-probability of every token but the first, given those before it.

        One list of len(sequence) - 1 floats per sequence; what isn't finite is passed on as it is.
        """
        check_context(ids, 0, self.context)
        return self._token_logprobs([list(row) for row in ids])

    def next_logprobs(
        self, ids: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> list[list[float]]:
        """Natural log-probability, over the whole vocabulary, of each candidate as the next token.

        One list of len(candidates) floats, 128 at most, per sequence.
        """
        check_context(ids, 1, self.context)
        return self._candidate_logprobs([list(row) for row in ids], list(candidates))

    def _encoded(self, questions: Questions) -> Iterator[PromptIds]:
        limit, system, prompts = questions.max_new_tokens, questions.system, questions.prompts
        starts = [""] * len(prompts) if questions.starts is None else questions.starts
        for prompt, start in zip(prompts, starts, strict=True):
            ids = self._style.encode_start(self.tokenizer, prompt, start, system)
            head = self._style.encode_prompt(self.tokenizer, prompt, system) if start else ids
            yield PromptIds(ids, limit, start, ids[len(head) :])

    def _checked_answers(self, rows: list[PromptIds]) -> list[Answer]:
        for limit in {row.limit for row in rows}:
            check_context([row.ids for row in rows if row.limit == limit], limit, self.context)
        return self._answers(rows)

    def _read(self, rows: list[PromptIds], generated: list[tuple[list[int], bool]]) -> list[Answer]:
        """Answers of generated token ids, each with whether it came of finite logits."""
        broken = sum(not is_finite for _, is_finite in generated)
        if broken:
            _LOG.warning(
                "%d of %d answers came from logits that are not finite and are recorded as empty",
                broken,
                len(rows),
            )
        return [
            self._answer(row, tokens) if is_finite else Answer("", 0, False)
            for row, (tokens, is_finite) in zip(rows, generated, strict=True)
        ]

    def _answer(self, row: PromptIds, generated: list[int]) -> Answer:
        """The answer up to the first token that ends it."""
        end = next((index for index, token in enumerate(generated) if token in self._ends), None)
        content = self._after_thoughts(row.ids, generated[:end])
        text = self._decoded(content)
        if row.start:
            # Together with the start: decoded alone, some tokenizers drop the first word's space.
            before, both = self._decoded(row.start_ids), self._decoded([*row.start_ids, *content])
            added = both.removeprefix(before) if both.startswith(before) else text
            text = row.start + added if added.strip() else ""
        return Answer(text, len(generated) if end is None else end + 1, truncated=end is None)

    def _after_thoughts(self, prompt: list[int], ids: list[int]) -> list[int]:
        """Generated ids without the thoughts before the answer; none where these don't end."""
        if not self._style.thinking:
            return ids
        start, end = (self.tokenizer.convert_tokens_to_ids(mark) for mark in THOUGHTS)

        def is_blank(token: int) -> bool:
            return token not in (start, end) and not self._decoded([token]).strip()

        around = [next(dropwhile(is_blank, each), None) for each in (reversed(prompt), ids)]
        if start == end or start not in around:
            return ids
        return list(dropwhile(is_blank, ids[ids.index(end) + 1 :])) if end in ids else []

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @abstractmethod
    def _answers(self, rows: list[PromptIds]) -> list[Answer]: ...

    @abstractmethod
    def _token_logprobs(self, rows: list[list[int]]) -> list[list[float]]: ...

    @abstractmethod
    def _candidate_logprobs(
        self, rows: list[list[int]], candidates: list[int]
    ) -> list[list[float]]: ...


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
