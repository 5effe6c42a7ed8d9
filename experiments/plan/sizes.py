"""`PlannedSizes`, sizes of models that needn't be there yet: what steps tell their costs by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from evaluation.backends.transformers import TransformersBackend
from evaluation.base import Judge
from evaluation.judges.moderation import ModerationJudge
from experiments.pipeline.cost import ModelSize, Work
from experiments.plan.judges import LocalJudge, PlaceholderJudge, WritingJudge, weights_of
from experiments.plan.models import Library, Located
from experiments.plan.shapes import BYTES, Shape
from experiments.plan.token_counts import TokenCounts
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import load_tokenizer
from modeling.training import LoraSettings

# What a judge that is a causal model is asked besides the prompt and the answer: the published
# instructions take some 150 to 1,000 tokens, and can't be counted before they are fetched.
_QUESTION_TOKENS = 500


class PlannedSizes:
    """Implements `experiments.pipeline.cost.Sizes` from config files and tokenizers.

    Attributes:
        library: Where base and aligned models are looked up.
        inexact: Names of models whose tokens are guessed from characters.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self.inexact: set[str] = set()
        self._parents: dict[str, Checkpoint] = {}
        self._loras: dict[str, LoraSettings] = {}
        self._counts: dict[Path, TokenCounts] = {}

    def keep(
        self, before: Checkpoint, after: Checkpoint, fresh: LoraSettings | None = None
    ) -> None:
        """Remembers that a stage makes the model `after` of another, with a fresh LoRA or its."""
        if after.base not in self._parents and not self.library.holds(after.base):
            self._parents[after.base] = before
        lora = fresh or self._lora(before.adapter)
        if after.adapter is not None and after.adapter not in self._loras and lora is not None:
            self._loras[after.adapter] = lora

    def shape(self, checkpoint: Checkpoint) -> Shape:
        """The shape of a checkpoint's full weights."""
        return self.library.shape(self._located(checkpoint).folder)

    def model(self, checkpoint: Checkpoint, fresh: LoraSettings | None = None) -> ModelSize:
        """As `Sizes.model`."""
        lora = fresh or self._lora(checkpoint.adapter)
        return model_size(self.shape(checkpoint), checkpoint.dtype, lora)

    def judging(self, judge: Judge, lengths: Sequence[int]) -> Work:
        """As `Sizes.judging`; rows alone where the judge is words, or somebody's endpoint."""
        real = judge.judge if isinstance(judge, PlaceholderJudge) else judge
        if not isinstance(real, LocalJudge):
            return Work(rows=len(lengths))
        folder = weights_of(self.library, real, "judge").folder
        if not isinstance(real, WritingJudge):
            shape = self.library.shape(folder, classifier=True)
            limit = (
                real.max_length if isinstance(real, ModerationJudge) else max(lengths, default=0)
            )
            return model_size(shape, real.dtype, None).forward([min(limit, n) for n in lengths])
        size = model_size(self.library.shape(folder), real.dtype, None)
        backend = real.backend or TransformersBackend()
        at_once = backend.chosen(Checkpoint(str(folder), dtype=real.dtype)).rows_at_once
        questions = [length + _QUESTION_TOKENS for length in lengths]
        return size.generation(questions, real.new_tokens, at_once)

    def prompts(
        self,
        checkpoint: Checkpoint,
        style: PromptStyle,
        texts: Sequence[str],
        system: str | None = None,
        starts: Sequence[str] | None = None,
    ) -> list[int]:
        """As `Sizes.prompts`."""
        return self._counter(checkpoint).prompts(style, texts, system, starts)

    def pairs(
        self,
        checkpoint: Checkpoint,
        style: PromptStyle,
        rows: Sequence[tuple[str, str]],
        *,
        training: bool = False,
    ) -> list[int]:
        """As `Sizes.pairs`."""
        return self._counter(checkpoint).pairs(style, rows, training=training)

    def _located(self, checkpoint: Checkpoint) -> Located:
        """The base or aligned model that a checkpoint's full weights came from."""
        while checkpoint.base in self._parents:
            checkpoint = self._parents[checkpoint.base]
        return self.library.of(checkpoint)

    def _lora(self, adapter: str | None) -> LoraSettings | None:
        if adapter is not None and adapter not in self._loras:
            config = json.loads((Path(adapter) / "adapter_config.json").read_text())
            self._loras[adapter] = LoraSettings(
                rank=config["r"], target_modules=tuple(config["target_modules"])
            )
        return self._loras.get(adapter or "")

    def _counter(self, checkpoint: Checkpoint) -> TokenCounts:
        located = self._located(checkpoint)
        if located.folder not in self._counts:
            place = Checkpoint(str(located.folder))
            tokenizer = load_tokenizer(place) if located.has_tokenizer else None
            self._counts[located.folder] = TokenCounts(tokenizer)
        if not self._counts[located.folder].exact:
            self.inexact.add(located.name)
        return self._counts[located.folder]


def model_size(shape: Shape, dtype: str, lora: LoraSettings | None) -> ModelSize:
    """The size of a model of this shape, with a LoRA or none."""
    return ModelSize(
        parameters=shape.parameters,
        number_bytes=BYTES[dtype],
        layers=shape.layers,
        hidden=shape.hidden,
        key_width=shape.key_width,
        lora_parameters=0 if lora is None else shape.lora_parameters(lora),
    )
