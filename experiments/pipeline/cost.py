"""What steps cost: amounts (`Work`), and their formulas over a model's size (`ModelSize`).

Every step says its own cost by these; `experiments.plan` knows the sizes and adds the work up.

Memory is weights, adapter, optimiser and what the rows need. N are a model's scalars, h its width,
L its blocks, s the bytes of a number of its weights; a LoRA's numbers are float32 (PEFT).
  Training: AdamW holds two moments beside the gradient, 3 times what is trained. DPO and KTO keep a
    copy of the adapter as the reference. A block keeps 17 s h of activations for each token of a
    forward pass (Korthikanti et al. 2022, arXiv 2205.05198, equation 2 without the attention
    matrix), and twice that for a LoRA, whose inputs are cast to float32; with gradient
    checkpointing one block does, beside s h L.
  Generation: the cache of keys and values at full length.
Arithmetic is 2 N for each token of a pass (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from evaluation.base import Judge
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.training import LoraSettings, TrainSettings

FLOAT_BYTES = 4
# A row of answers or verdicts in Parquet besides its texts: id, category, numbers, page headers.
_BYTES_PER_ROW = 64
# English text under the tokenizers of the models here.
CHARACTERS_PER_TOKEN = 4
# Activations that a block keeps of a token, in numbers of the model's width.
_ACTIVATIONS = 17


@dataclass(frozen=True)
class Work:
    """What a step takes.

    Attributes:
        rows: Rows that it trains on, answers, judges, scores, or runs through a model.
        prompt_tokens: Tokens that go in, of each row once an epoch.
        answer_tokens: Tokens that are generated, at most.
        disk: Bytes in the store.
        memory: Bytes of GPU memory at its peak.
        operations: Floating-point operations.
        weight_reads: Bytes of weights that are read for one generated token after another.
    """

    rows: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    disk: int = 0
    memory: int = 0
    operations: float = 0.0
    weight_reads: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both, one after the other."""
        ours, theirs = asdict(self), asdict(other)
        sums = {name: value + theirs[name] for name, value in ours.items()}
        return Work(**{**sums, "memory": max(self.memory, other.memory)})


@dataclass(frozen=True)
class ModelSize:
    """A model as a step loads it.

    Attributes:
        parameters: All scalars of its weights, tied ones once.
        number_bytes: Bytes of each.
        key_width: Width of all key-value heads together.
        lora_parameters: Scalars of its adapter; 0 without one.
    """

    parameters: int
    number_bytes: int
    layers: int
    hidden: int
    key_width: int
    lora_parameters: int = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return self.number_bytes * self.parameters

    @property
    def adapter_bytes(self) -> int:
        """Bytes of the adapter."""
        return FLOAT_BYTES * self.lora_parameters

    @property
    def bytes(self) -> int:
        """Bytes of weights and adapter."""
        return self.weight_bytes + self.adapter_bytes

    def cache_bytes(self, tokens: int) -> int:
        """Keys and values of so many tokens."""
        return 2 * self.number_bytes * self.key_width * self.layers * tokens

    def activation_bytes(self, tokens: int, *, checkpointing: bool) -> int:
        """What training keeps of a forward pass over so many tokens; see the module."""
        numbers = _ACTIVATIONS * (2 if self.lora_parameters else 1)
        numbers = numbers + self.layers if checkpointing else numbers * self.layers
        return numbers * self.number_bytes * self.hidden * tokens

    def forward(self, lengths: Sequence[int]) -> Work:
        """A pass without gradients over rows of these lengths."""
        tokens = sum(lengths)
        return Work(
            rows=len(lengths),
            prompt_tokens=tokens,
            memory=self.bytes,
            operations=self._operations(tokens),
        )

    def generation(self, prompts: Sequence[int], answer: int, batch: int) -> Work:
        """Answers of `answer` tokens to prompts of these lengths, so many at once.

        An upper bound: answers end before their limit.
        """
        rows = len(prompts)
        batch = min(batch, rows) or 1
        longest = max(prompts, default=0) + answer
        return replace(
            self.forward(prompts),
            answer_tokens=rows * answer,
            memory=self.bytes + self.cache_bytes(batch * longest),
            operations=self._operations(sum(prompts) + rows * answer),
            weight_reads=float(-(-rows // batch) * answer * self.bytes),
        )

    def training(
        self, lengths: Sequence[int], settings: TrainSettings, *, answers: int = 1, copies: int = 0
    ) -> Work:
        """One phase of training: of the adapter where there is one, else of all weights.

        Args:
            lengths: Tokens of the rows.
            settings: The phase.
            answers: How many of the rows one training row holds; preference methods take two.
            copies: Forward passes of each row through the reference; 0 where none is kept.
        """
        if not lengths:
            return Work()
        lengths = [min(settings.max_length, length) for length in lengths]
        epochs = settings.epochs
        if settings.max_steps is not None:
            epochs = settings.max_steps * settings.batch_size * answers / len(lengths)
        tokens = round(sum(lengths) * epochs)
        at_once = min(settings.rows_per_pass * answers, len(lengths)) * max(lengths)
        optimiser = 3 * (self.adapter_bytes or self.weight_bytes)
        reference = self.adapter_bytes if copies else 0
        backward = 1 if self.lora_parameters else 2
        passes = 1 + backward + settings.gradient_checkpointing + copies
        return Work(
            rows=len(lengths),
            prompt_tokens=tokens,
            memory=self.bytes
            + optimiser
            + reference
            + self.activation_bytes(at_once, checkpointing=settings.gradient_checkpointing),
            operations=passes * self._operations(tokens),
        )

    def _operations(self, tokens: int) -> float:
        return 2.0 * (self.parameters + self.lora_parameters) * tokens


class Sizes(Protocol):
    """Sizes of models and lengths of rows, whether the models are there or not."""

    def model(self, checkpoint: Checkpoint, fresh: LoraSettings | None = None) -> ModelSize:
        """A checkpoint's size, with its own adapter or with a fresh one."""

    def judging(self, judge: Judge, lengths: Sequence[int]) -> Work:
        """A judge's work on prompts and answers that are so long together."""

    def tokens(
        self,
        checkpoint: Checkpoint,
        style: PromptStyle,
        rows: Iterable[tuple[str, str]],
        system: str | None = None,
        *,
        answered: bool = True,
        training: bool = False,
    ) -> list[int]:
        """Tokens of each prompt with its whole answer or, not `answered`, the start of one."""


def table_bytes(rows: int, tokens: int = 0) -> int:
    """Bytes of a stage's table of rows that hold so many tokens of text."""
    return rows * _BYTES_PER_ROW + tokens * CHARACTERS_PER_TOKEN
