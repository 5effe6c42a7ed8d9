"""Models run with transformers: batched, longest first; generation greedy and left-padded."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import Field

from evaluation.backends.answers import (
    BROKEN,
    Row,
    check_context,
    encode_rows,
    end_tokens,
    read_answer,
    warn_broken,
)
from evaluation.base import Answer, Backend
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import device_name, load_model, load_tokenizer
from settings import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Logits of one pass over whole sequences: a GiB in float32.
_MOST_LOGITS = 2**28

_In = TypeVar("_In")
_Out = TypeVar("_Out")


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
        self, checkpoint: Checkpoint, style: PromptStyle, undefended: Checkpoint | None = None
    ) -> TransformersEngine:
        """Loads the checkpoint; an adapter stays an adapter and isn't merged.

        What is loaded is what was asked for, so there is nothing to compare with `undefended`.

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
        self._ends = end_tokens(inner.generation_config, inner.config, tokenizer)
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
        rows = encode_rows(self._tokenizer, self._style, prompts, system, starts)
        return self._answers(rows, max_new_tokens)

    def complete(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> list[Answer]:
        """Greedy continuations of token ids; not finite logits as in `generate`.

        Raises:
            ModelError: A sequence doesn't fit the model's context, or memory runs out.
        """
        return self._answers([Row(list(row)) for row in ids], max_new_tokens)

    def logprobs(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Natural log-probability of every token but the first, given those before it.

        Raises:
            ModelError: A sequence doesn't fit the model's context, or memory runs out.
        """

        rows = [list(row) for row in ids]
        longest = max(map(len, rows), default=0)
        self._check_context(longest, 0)
        fitting = _MOST_LOGITS // (self._model.config.vocab_size * max(longest, 1))
        size = max(1, min(self._batch_size, fitting))
        return in_batches(rows, rows, size, "log-probabilities", self._of_tokens)

    def next_logprobs(
        self, ids: Sequence[Sequence[int]], candidates: Sequence[int]
    ) -> list[list[float]]:
        """Natural log-probability of each candidate as the next token.

        Raises:
            ModelError: A sequence doesn't fit the model's context, or memory runs out.
        """
        rows = [list(row) for row in ids]
        self._check_context(max(map(len, rows), default=0), 1)

        def read(batch: list[list[int]]) -> list[list[float]]:
            return self._of_next(batch, list(candidates))

        return in_batches(rows, rows, self._batch_size, "log-probabilities", read)

    def close(self) -> None:
        """Gives the model's memory back."""
        self._model = None
        _collect()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def context(self) -> int | None:
        """How many tokens a prompt and its answer may have together."""
        return getattr(self._model.config, "max_position_embeddings", None)

    @property
    def usable(self) -> bool:
        """Whether it wasn't closed."""
        return self._model is not None

    def _answers(self, rows: Sequence[Row], max_new_tokens: int) -> list[Answer]:
        by_ids = [row.ids for row in rows]
        self._check_context(max(map(len, by_ids), default=0), max_new_tokens)

        def read(batch: list[Row]) -> list[Answer]:
            return self._generate_batch(batch, max_new_tokens)

        return in_batches(rows, by_ids, self._batch_size, "answers", read)

    def _of_tokens(self, rows: list[list[int]]) -> list[list[float]]:
        import torch

        # Padded on the right: what follows a row changes nothing before it.
        width, pad = max(map(len, rows)), self._tokenizer.pad_token_id
        padded = [row + [pad] * (width - len(row)) for row in rows]
        ids = torch.tensor(padded, device=self._model.device)
        with _memory(self._batch_size), torch.inference_mode():
            logits = self._model(input_ids=ids).logits[:, :-1]
            chosen = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[:, 1:, None])
        found = chosen[..., 0].tolist()
        return [line[: len(row) - 1] for line, row in zip(found, rows, strict=True)]

    def _of_next(self, rows: list[list[int]], candidates: list[int]) -> list[list[float]]:
        import torch

        ids, mask = self._left_padded(rows)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with _memory(self._batch_size), torch.inference_mode():
            logits = self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1
            ).logits[:, -1]
            found = torch.log_softmax(logits.float(), dim=-1)[:, candidates]
        return found.tolist()

    def _generate_batch(self, rows: list[Row], max_new_tokens: int) -> list[Answer]:
        import torch
        from transformers import LogitsProcessorList

        ids, mask = self._left_padded([row.ids for row in rows])
        guard = _NonFiniteGuard(self._ends)
        with _memory(self._batch_size), torch.inference_mode():
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
            BROKEN if is_broken else read_answer(self._tokenizer, row, made, self._ends)
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

    def _greedy(self, max_new_tokens: int) -> GenerationConfig:
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self._tokenizer.pad_token_id,
        )

    def _check_context(self, longest: int, max_new_tokens: int) -> None:
        check_context(longest, max_new_tokens, self.context)


class TransformersClassifier:
    """A loaded sequence classifier with independent labels."""

    def __init__(self, folder: str, dtype: str, batch_size: int, device: str | None = None) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(
            folder, padding_side="right", truncation_side="right"
        )
        self._batch_size = batch_size
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            problem_type="multi_label_classification",
            output_loading_info=True,
        )
        if loading["missing_keys"]:
            missing = ", ".join(sorted(loading["missing_keys"]))
            raise ModelError(
                f"the classifier {folder!r} lacks trained weights for {missing}; "
                "save or download it again"
            )
        self._check_padding(folder, model.get_input_embeddings().num_embeddings)
        # The pooled token is the last one that isn't padding, so the model must know which is.
        model.config.pad_token_id = self._tokenizer.pad_token_id
        self._device = device or device_name()
        self._model: Any = model.to(self._device).eval()
        names = model.config.id2label
        self._labels = [str(names[index]) for index in range(model.config.num_labels)]
        if not self._labels:
            raise ModelError(f"the classifier {folder!r} has no labels; take a moderation model")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The classifier's tokenizer, padding and truncating on the right."""
        return self._tokenizer

    @property
    def labels(self) -> Sequence[str]:
        """What the columns of `probabilities` stand for."""
        return self._labels

    @property
    def usable(self) -> bool:
        """Whether it wasn't closed."""
        return self._model is not None

    def probabilities(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Sigmoid scores in float32, one row of `len(labels)` per sequence.

        Raises:
            ModelError: The model returns scores of another shape, or memory runs out.
        """
        rows = [list(row) for row in ids]
        return in_batches(rows, rows, self._batch_size, "verdicts", self._sigmoids)

    def close(self) -> None:
        """Gives the classifier's memory back."""
        self._model = None
        _collect()

    def _sigmoids(self, rows: list[list[int]]) -> list[list[float]]:
        import torch

        batch = self._tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        with _memory(self._batch_size), torch.inference_mode():
            logits: torch.Tensor = self._model(**batch.to(self._device)).logits
        if logits.shape != (len(rows), len(self._labels)):
            raise ModelError(
                f"the classifier returned scores of shape {tuple(logits.shape)} for {len(rows)} "
                f"rows and {len(self._labels)} labels; take a sequence classifier"
            )
        return torch.sigmoid(logits.float()).cpu().tolist()

    def _check_padding(self, folder: str, embeddings: int) -> None:
        pad = self._tokenizer.pad_token_id
        if pad is None or pad == self._tokenizer.eos_token_id or pad >= embeddings:
            raise ModelError(
                f"the classifier {folder!r} has no padding token of its own, without which it "
                "would read the wrong position; add one to its tokenizer and embeddings"
            )


def in_batches(
    rows: Sequence[_In],
    ids: Sequence[Sequence[int]],
    batch_size: int,
    what: str,
    read: Callable[[list[_In]], list[_Out]],
) -> list[_Out]:
    """What `read` makes of the rows, in their order, batch by batch.

    Longest first, so that running out of memory shows in the first batch.

    Args:
        rows: What is read.
        ids: Token ids of each, for their length.
        batch_size: Rows per batch.
        what: Name of what is made, for the progress bar.
        read: Makes one result of each row of a batch.
    """
    from tqdm import tqdm

    order = sorted(range(len(rows)), key=lambda index: -len(ids[index]))
    made: dict[int, _Out] = {}
    with tqdm(total=len(order), desc=what, disable=None, leave=False) as bar:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            made.update(zip(batch, read([rows[index] for index in batch]), strict=True))
            bar.update(len(batch))
    return [made[index] for index in range(len(rows))]


@contextmanager
def _memory(batch_size: int) -> Iterator[None]:
    """Names the setting to lower where the device runs out of memory."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the device ran out of memory with {batch_size} rows at once; lower the batch_size of "
            "the transformers backend (evaluation.backend.transformers.batch_size)"
        ) from error


def _collect() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
