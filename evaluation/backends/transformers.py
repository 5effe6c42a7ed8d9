"""Models run with transformers: batched, longest first; generation greedy and left-padded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from evaluation.base import Backend
from evaluation.token_engine import Answer, Engine, PromptIds, end_tokens
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.inspection import load_weights
from modeling.loading import device_name, load_model, load_tokenizer
from settings import ModelError
from settings.progress import Progress

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


class TransformersEngine(Engine):
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
        self._model = None
        free_memory()

    @property
    def usable(self) -> bool:
        return self._model is not None

    def _answers(self, rows: list[PromptIds]) -> list[Answer]:
        # A batch goes on until its longest answer has ended, so one limit at a time.
        answers: dict[int, Answer] = {}
        for limit in sorted({row.limit for row in rows}, reverse=True):
            at = [index for index, row in enumerate(rows) if row.limit == limit]
            read = partial(self._generate_batch, max_new_tokens=limit)
            alike = [rows[index] for index in at]
            made = in_batches(alike, self._batch_size, "answers", read, lambda row: len(row.ids))
            answers.update(zip(at, made, strict=True))
        return [answers[index] for index in range(len(rows))]

    def _token_logprobs(self, rows: list[list[int]]) -> list[list[float]]:
        longest = max(map(len, rows), default=1)
        fitting = _MOST_LOGITS // (self._model.config.vocab_size * longest)
        size = max(1, min(self._batch_size, fitting))
        return in_batches(rows, size, "log-probabilities", self._of_tokens)

    def _candidate_logprobs(
        self, rows: list[list[int]], candidates: list[int]
    ) -> list[list[float]]:
        read = partial(self._of_next, candidates=candidates)
        return in_batches(rows, self._batch_size, "log-probabilities", read)

    def _of_tokens(self, rows: list[list[int]]) -> list[list[float]]:
        import torch

        # Padded on the right: what follows a row changes nothing before it.
        ids = self._padded(rows, "right")["input_ids"]
        with inference(self._batch_size):
            logits = self._model(input_ids=ids).logits[:, :-1]
            chosen = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, 1:, None])
        logprobs = chosen[..., 0].tolist()
        return [line[: len(row) - 1] for line, row in zip(logprobs, rows, strict=True)]

    def _of_next(self, rows: list[list[int]], candidates: list[int]) -> list[list[float]]:
        import torch

        batch = self._padded(rows, "left")
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with inference(self._batch_size):
            logits = self._model(**batch, position_ids=positions, logits_to_keep=1).logits[:, -1]
            logprobs = torch.log_softmax(logits.float(), dim=-1)[:, candidates]
        return logprobs.tolist()

    def _generate_batch(self, rows: list[PromptIds], max_new_tokens: int) -> list[Answer]:
        from transformers import LogitsProcessorList

        batch = self._padded([row.ids for row in rows], "left")
        guard = _NonFiniteGuard(self._ends)
        with inference(self._batch_size):
            output = self._model.generate(
                **batch,
                generation_config=self._greedy(max_new_tokens),
                logits_processor=LogitsProcessorList([guard]),
            )
        finite = (~guard.broken).tolist()
        generated = output[:, batch["input_ids"].shape[1] :].tolist()
        return self._read(rows, list(zip(generated, finite, strict=True)))

    def _padded(self, rows: list[list[int]], side: str) -> Any:
        """Ids and attention mask, both (batch, longest), by the model's names for them."""
        batch = self.tokenizer.pad(
            {"input_ids": rows}, padding_side=side, return_attention_mask=True, return_tensors="pt"
        )
        return batch.to(self._model.device)

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

    broken: torch.Tensor
    _ended: torch.Tensor | None = None

    def __init__(self, ends: set[int]) -> None:
        self._ends = sorted(ends)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        import torch

        bad = (torch.isnan(scores) | torch.isposinf(scores)).any(dim=-1)
        if self._ended is None:
            self.broken, self._ended = bad, torch.zeros_like(bad)
        else:
            last = input_ids[:, -1]
            self._ended |= torch.isin(last, torch.tensor(self._ends, device=last.device))
            # A row that has ended runs on over padding, and what it computes there is not used.
            self.broken |= bad & ~self._ended
        replacement = torch.zeros_like(scores)
        replacement[:, self._ends] = 1.0
        return torch.where(bad[:, None], replacement, scores)


def load_classifier_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """A classifier's tokenizer, padding and truncating on the right."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, padding_side="right", truncation_side="right")


def read_labels(folder: str, config: Any) -> list[str]:
    """What the columns of a classifier's scores stand for, by its transformers config.

    Raises:
        ModelError: It has none.
    """
    names = config.id2label
    if not names:
        raise ModelError(f"the classifier {folder!r} has no labels; take a moderation model")
    return [str(names[index]) for index in sorted(names)]


class TransformersClassifier:
    """A loaded sequence classifier with independent labels."""

    def __init__(self, folder: str, dtype: str, batch_size: int, device: str | None = None) -> None:
        self.tokenizer = load_classifier_tokenizer(folder)
        self._batch_size = batch_size
        model = load_weights(
            Checkpoint(folder, dtype=dtype),
            f"the classifier {folder!r}",
            classifier=True,
            problem_type="multi_label_classification",
        )
        self._check_padding(folder, model.get_input_embeddings().num_embeddings)
        # The pooled token is the last one that isn't padding, so the model must know which is.
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self._device = device or device_name()
        self._model: Any = model.to(self._device).eval()
        self.labels = read_labels(folder, model.config)

    @property
    def usable(self) -> bool:
        return self._model is not None

    def probabilities(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """As `Classifier.probabilities`, in float32.

        Raises:
            ModelError: The model returns scores of another shape, or memory runs out.
        """
        rows = [list(row) for row in ids]
        return in_batches(rows, self._batch_size, "verdicts", self._sigmoids)

    def close(self) -> None:
        self._model = None
        free_memory()

    def _sigmoids(self, rows: list[list[int]]) -> list[list[float]]:
        import torch

        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        with inference(self._batch_size):
            logits: torch.Tensor = self._model(**batch.to(self._device)).logits
        if logits.shape != (len(rows), len(self.labels)):
            raise ModelError(
                f"the classifier returned scores of shape {tuple(logits.shape)} for {len(rows)} "
                f"rows and {len(self.labels)} labels; take a sequence classifier"
            )
        return torch.sigmoid(logits.float()).cpu().tolist()

    def _check_padding(self, folder: str, embeddings: int) -> None:
        pad = self.tokenizer.pad_token_id
        if pad is None or pad == self.tokenizer.eos_token_id or pad >= embeddings:
            raise ModelError(
                f"the classifier {folder!r} has no padding token of its own, without which it "
                "would read the wrong position; add one to its tokenizer and embeddings"
            )


def in_batches(
    rows: list[Any],
    batch_size: int,
    what: str,
    read: Callable[[list[Any]], list[Any]],
    length: Callable[[Any], int] = len,
) -> list[Any]:
    """What `read` makes of each row, in their order, batch by batch.

    Longest first, so that running out of memory shows in the first batch.
    """
    order = sorted(range(len(rows)), key=lambda index: -length(rows[index]))
    results: dict[int, Any] = {}
    with Progress(len(order), what, "rows") as progress:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            results.update(zip(batch, read([rows[index] for index in batch]), strict=True))
            progress.advance(len(batch))
    return [results[index] for index in range(len(rows))]


@contextmanager
def inference(batch_size: int) -> Iterator[None]:
    """Computes without gradients, and names the setting to lower where memory runs out.

    Raises:
        ModelError: The device ran out of memory.
    """
    import torch

    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the device ran out of memory with {batch_size} rows at once; lower the batch_size of "
            "the transformers backend (evaluation.backend.transformers.batch_size)"
        ) from error


def free_memory() -> None:
    """Gives back what no object holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
