"""Models run with transformers: batched, longest first; generation greedy and left-padded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from evaluation.backends.answers import BROKEN, PromptIds, end_tokens, read_answer, warn_broken
from evaluation.backends.batches import free_memory, in_batches, inference
from evaluation.backends.token_engine import TokenEngine
from evaluation.backends.transformers_classifier import TransformersClassifier
from evaluation.base import Answer, Backend
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Logits of one pass over whole sequences: a GiB in float32.
_MOST_LOGITS = 2**28


class TransformersBackend(Backend):
    """Runs models with the transformers library, on the GPU where there is one.

    Attributes:
        batch_size: Rows per batch.
    """

    version: ClassVar[int] = 2

    batch_size: int = Field(default=64, ge=1)

    @property
    def rows_at_once(self) -> int:
        """Rows per batch."""
        return self.batch_size

    def open(
        self, checkpoint: Checkpoint, style: PromptStyle, reference: Checkpoint | None = None
    ) -> TransformersEngine:
        """Loads the checkpoint; an adapter stays an adapter and isn't merged.

        What is loaded is what was asked for, so there is nothing to compare with `reference`.

        Raises:
            ModelError: The weights can't be read.
        """
        model = load_model(checkpoint).eval()
        return TransformersEngine(model, load_tokenizer(checkpoint), style, self.batch_size)

    def classifier(self, folder: str, dtype: str) -> TransformersClassifier:
        """Loads a sequence classifier.

        Raises:
            ModelError: It lacks trained weights, labels, or a padding token of its own.
        """
        return TransformersClassifier(folder, dtype, self.batch_size)


class TransformersEngine(TokenEngine):
    """A loaded model that answers batches of prompts greedily."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        style: PromptStyle,
        batch_size: int,
    ) -> None:
        # An adapter wraps the model whose generation settings count.
        inner: Any = getattr(model, "get_base_model", lambda: model)()
        ends = end_tokens(inner.generation_config, inner.config, tokenizer)
        context = getattr(inner.config, "max_position_embeddings", None)
        super().__init__(tokenizer, style, ends, context)
        self._model: Any = model
        self._batch_size = batch_size
        # Sampling and penalty settings that a checkpoint ships would warn, or change the answers:
        # `generate` fills in from them whatever its own settings leave open.
        for holder in (self._model, inner):
            holder.generation_config = self._greedy(max_new_tokens=1)

    def close(self) -> None:
        """Gives the model's memory back."""
        self._model = None
        free_memory()

    @property
    def usable(self) -> bool:
        """Whether it wasn't closed."""
        return self._model is not None

    def _answers(self, rows: list[PromptIds], max_new_tokens: int) -> list[Answer]:
        def read(batch: list[PromptIds]) -> list[Answer]:
            return self._generate_batch(batch, max_new_tokens)

        return in_batches(rows, [row.ids for row in rows], self._batch_size, "answers", read)

    def _token_logprobs(self, rows: list[list[int]]) -> list[list[float]]:
        longest = max(map(len, rows), default=1)
        fitting = _MOST_LOGITS // (self._model.config.vocab_size * longest)
        size = max(1, min(self._batch_size, fitting))
        return in_batches(rows, rows, size, "log-probabilities", self._of_tokens)

    def _candidate_logprobs(
        self, rows: list[list[int]], candidates: list[int]
    ) -> list[list[float]]:
        def read(batch: list[list[int]]) -> list[list[float]]:
            return self._of_next(batch, candidates)

        return in_batches(rows, rows, self._batch_size, "log-probabilities", read)

    def _of_tokens(self, rows: list[list[int]]) -> list[list[float]]:
        import torch

        # Padded on the right: what follows a row changes nothing before it.
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        padded = [row + [pad] * (width - len(row)) for row in rows]
        ids = torch.tensor(padded, device=self._model.device)
        with inference(self._batch_size):
            logits = self._model(input_ids=ids).logits[:, :-1]
            chosen = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, 1:, None])
        logprobs = chosen[..., 0].tolist()
        return [line[: len(row) - 1] for line, row in zip(logprobs, rows, strict=True)]

    def _of_next(self, rows: list[list[int]], candidates: list[int]) -> list[list[float]]:
        import torch

        ids, mask = self._left_padded(rows)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with inference(self._batch_size):
            logits = self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1
            ).logits[:, -1]
            logprobs = torch.log_softmax(logits.float(), dim=-1)[:, candidates]
        return logprobs.tolist()

    def _generate_batch(self, rows: list[PromptIds], max_new_tokens: int) -> list[Answer]:
        from transformers import LogitsProcessorList

        ids, mask = self._left_padded([row.ids for row in rows])
        guard = _NonFiniteGuard(self._ends)
        with inference(self._batch_size):
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._greedy(max_new_tokens),
                logits_processor=LogitsProcessorList([guard]),
            )
        broken = [] if guard.broken is None else guard.broken.tolist()
        warn_broken(sum(broken), len(rows))
        generated = output[:, ids.shape[1] :].tolist()
        return [
            BROKEN if is_broken else read_answer(self.tokenizer, row, tokens, self._ends)
            for tokens, row, is_broken in zip(generated, rows, broken, strict=True)
        ]

    def _left_padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, both (batch, longest); positions follow from the mask."""
        import torch

        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = [[pad] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        device = self._model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _greedy(self, max_new_tokens: int) -> GenerationConfig:
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )


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
