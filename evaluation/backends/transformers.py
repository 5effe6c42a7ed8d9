"""Greedy generation with transformers: batched, left-padded, longest prompts first."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from evaluation.base import Answer, Backend
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint, load_model, load_tokenizer
from settings import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)


class TransformersBackend(Backend):
    """Generates with the transformers library, on the GPU where there is one.

    Attributes:
        batch_size: Prompts per batch.
    """

    version: ClassVar[int] = 2

    batch_size: int = Field(default=64, ge=1)

    def open(self, checkpoint: Checkpoint, style: PromptStyle) -> TransformersEngine:
        """Loads the checkpoint; an adapter stays an adapter and isn't merged.

        Raises:
            ModelError: The weights can't be read.
        """
        model = load_model(checkpoint).eval()
        return TransformersEngine(model, load_tokenizer(checkpoint), style, self.batch_size)


class TransformersEngine:
    """A loaded model that answers batches of prompts greedily."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        style: PromptStyle,
        batch_size: int,
    ) -> None:
        self._model: Any = model
        self._tokenizer = tokenizer
        self._style = style
        self._batch_size = batch_size
        # An adapter wraps the model whose generation settings count.
        inner: Any = getattr(model, "get_base_model", lambda: model)()
        self._ends = _end_tokens(inner, tokenizer)
        # Sampling and penalty settings that a checkpoint ships would warn, or change the answers:
        # `generate` fills in from them whatever its own settings leave open.
        for holder in (self._model, inner):
            holder.generation_config = self._greedy(max_new_tokens=1)

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        system: str | None = None,
        starts: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Greedy answers, in the order of the prompts.

        An answer whose logits are not finite at some step is recorded as the empty text, which
        every judge calls degenerate, and a warning tells how many there were. So is one that adds
        nothing but white space to the start it was given: the start isn't the model's own.

        Args:
            prompts: The users' turns, unrendered.
            max_new_tokens: Length limit in tokens, the end token included and the start not.
            system: A system line before every prompt; the style's own by default.
            starts: How each answer begins, "" for none; None for none at all.

        Raises:
            ModelError: A prompt doesn't fit the model's context, or memory runs out.
        """
        from tqdm import tqdm

        starts = [""] * len(prompts) if starts is None else starts
        encoded = [
            self._encode(prompt, start, system)
            for prompt, start in zip(prompts, starts, strict=True)
        ]
        self._check_context(max((len(row.ids) for row in encoded), default=0), max_new_tokens)
        # Longest first, so that running out of memory shows in the first batch.
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index].ids))
        answers: dict[int, Answer] = {}
        with tqdm(total=len(order), desc="answers", disable=None, leave=False) as bar:
            for first in range(0, len(order), self._batch_size):
                batch = order[first : first + self._batch_size]
                rows = self._generate_batch([encoded[index] for index in batch], max_new_tokens)
                answers.update(zip(batch, rows, strict=True))
                bar.update(len(batch))
        return [answers[index] for index in range(len(encoded))]

    def close(self) -> None:
        """Gives the model's memory back."""
        import torch

        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _encode(self, prompt: str, start: str, system: str | None) -> _Row:
        ids = self._style.encode_start(self._tokenizer, prompt, start, system)
        if not start:
            return _Row(ids)
        head = self._style.encode_prompt(self._tokenizer, prompt, system)
        return _Row(ids, start, ids[len(head) :])

    def _generate_batch(self, rows: list[_Row], max_new_tokens: int) -> list[Answer]:
        import torch
        from transformers import LogitsProcessorList

        ids, mask = self._left_padded([row.ids for row in rows])
        guard = _NonFiniteGuard(self._ends)
        try:
            with torch.inference_mode():
                output = self._model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=self._greedy(max_new_tokens),
                    logits_processor=LogitsProcessorList([guard]),
                )
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"the device ran out of memory at evaluation.backend.batch_size="
                f"{self._batch_size}; lower it"
            ) from error
        broken = [] if guard.broken is None else guard.broken.tolist()
        if any(broken):
            _LOG.warning(
                "%d of %d answers came from logits that are not finite and are recorded as empty",
                sum(broken),
                len(rows),
            )
        generated = output[:, ids.shape[1] :].tolist()
        return [
            Answer("", 0, False) if is_broken else self._answer(made, row)
            for made, row, is_broken in zip(generated, rows, broken, strict=True)
        ]

    def _left_padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, both (batch, longest); positions follow from the mask."""
        import torch

        width = max(map(len, rows))
        pad = self._tokenizer.pad_token_id
        ids = [[pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        device = self._model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _answer(self, generated: list[int], row: _Row) -> Answer:
        end = next((i for i, token in enumerate(generated) if token in self._ends), None)
        tokens = len(generated) if end is None else end + 1
        text = self._decode(generated[:end])
        if row.start:
            # Together with the start: decoded alone, some tokenizers drop the first word's space.
            before, both = self._decode(row.given), self._decode([*row.given, *generated[:end]])
            added = both.removeprefix(before) if both.startswith(before) else text
            text = row.start + added if added.strip() else ""
        return Answer(text, tokens, truncated=end is None)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _greedy(self, max_new_tokens: int) -> GenerationConfig:
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self._tokenizer.pad_token_id,
        )

    def _check_context(self, longest: int, max_new_tokens: int) -> None:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit is not None and longest + max_new_tokens > limit:
            raise ModelError(
                f"the longest prompt has {longest} tokens and its answer up to {max_new_tokens}, "
                f"but the model's context holds {limit}; lower max_new_tokens or shorten prompts"
            )


@dataclass(frozen=True, slots=True)
class _Row:
    """What the model goes on from: all its ids, and the start of the answer with its own ids."""

    ids: list[int]
    start: str = ""
    given: list[int] = field(default_factory=list)


class _NonFiniteGuard:
    """Notes the rows whose logits hold a NaN or +inf, and ends those rows at once.

    A logits processor of `generate`. Taking the maximum of NaNs would yield some token, and a
    broken model would be read as one that answers.
    """

    def __init__(self, ends: set[int]) -> None:
        self._ends = sorted(ends)
        self._ended: torch.Tensor | None = None
        self.broken: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        bad = (torch.isnan(scores) | torch.isposinf(scores)).any(dim=-1)
        if self.broken is None or self._ended is None:
            self.broken, self._ended = bad, torch.zeros_like(bad)
        else:
            last = input_ids[:, -1]
            self._ended |= torch.isin(last, torch.tensor(self._ends, device=last.device))
            # A row that has ended runs on over padding, and what it computes there is not used.
            self.broken |= bad & ~self._ended
        replacement = torch.zeros_like(scores)
        replacement[:, self._ends] = 1.0
        return torch.where(bad[:, None], replacement, scores)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every token that ends an answer: the tokenizer's and those of the model's own settings."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    if configured is None:
        configured = model.config.eos_token_id
    ends = set(configured) if isinstance(configured, list) else {configured}
    return {end for end in ends | {tokenizer.eos_token_id} if end is not None}
