"""The sequence classifier of the transformers backend, which the canary's expectations use too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evaluation.backends.batches import free_memory, in_batches, inference
from modeling.loading import device_name
from settings import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


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
        import torch
        from transformers import AutoModelForSequenceClassification

        self.tokenizer = load_classifier_tokenizer(folder)
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
        model.config.pad_token_id = self.tokenizer.pad_token_id
        self._device = device or device_name()
        self._model: Any = model.to(self._device).eval()
        self.labels = read_labels(folder, model.config)

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
