"""`PlannedSizes`, sizes of models that needn't be there yet, and `PlaceholderJudge` for judges.

Steps tell their costs by these sizes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.backends.transformers import TransformersBackend
from evaluation.base import Judge, Verdict
from evaluation.judges.local_model import ModelJudge, WeightsJudge
from evaluation.judges.strongreject import StrongRejectJudge
from experiments.config.experiment import Experiment
from experiments.pipeline.cost import CHARACTERS_PER_TOKEN, ModelSize, Work
from experiments.plan.models import Library, Located
from experiments.plan.shapes import BYTES, Shape, read_shape
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import load_tokenizer
from modeling.model_files import ADAPTER_CONFIG
from modeling.training import LoraSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# What a judge that is a causal model is asked besides the prompt and the answer: the published
# instructions take some 150 to 1,000 tokens, and can't be counted before they are fetched.
_QUESTION_TOKENS = 500
# What a chat template writes around one turn, role names and marks.
_TOKENS_PER_TURN = 6


class PlannedSizes:
    """Implements `experiments.pipeline.cost.Sizes` from config files and tokenizers."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.inexact: set[str] = set()  # Models whose tokens are guessed from characters.
        self._parents: dict[str, Checkpoint] = {}
        self._loras: dict[str, LoraSettings] = {}

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
        return read_shape(self._located(checkpoint).folder)

    def model(self, checkpoint: Checkpoint, fresh: LoraSettings | None = None) -> ModelSize:
        """As `Sizes.model`."""
        lora = fresh or self._lora(checkpoint.adapter)
        return model_size(self.shape(checkpoint), checkpoint.dtype, lora)

    def judging(self, judge: Judge, lengths: Sequence[int]) -> Work:
        """As `Sizes.judging`; rows alone where the judge is words, or somebody's endpoint."""
        real = judge.judge if isinstance(judge, PlaceholderJudge) else judge
        if not isinstance(real, WeightsJudge):
            return Work(rows=len(lengths))
        folder = weights_of(self.library, real, "judge").folder
        if not isinstance(real, ModelJudge):
            size = model_size(read_shape(folder, classifier=True), real.dtype, None)
            most = getattr(real, "max_length", max(lengths, default=0))
            return size.forward([min(most, length) for length in lengths])
        size = model_size(read_shape(folder), real.dtype, None)
        backend = real.backend or TransformersBackend()
        at_once = backend.chosen(Checkpoint(str(folder), dtype=real.dtype)).rows_at_once
        questions = [length + _QUESTION_TOKENS for length in lengths]
        return size.generation(questions, real.new_tokens, at_once)

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
        """As `Sizes.tokens`."""
        tokenizer = self._tokenizer(checkpoint)
        return [_count(tokenizer, style, *row, system, answered, training) for row in rows]

    def _located(self, checkpoint: Checkpoint) -> Located:
        """The base or aligned model that a checkpoint's full weights came from."""
        while checkpoint.base in self._parents:
            checkpoint = self._parents[checkpoint.base]
        return self.library.of(checkpoint)

    def _lora(self, adapter: str | None) -> LoraSettings | None:
        if adapter is not None and adapter not in self._loras:
            config = json.loads((Path(adapter) / ADAPTER_CONFIG).read_text())
            self._loras[adapter] = LoraSettings(
                rank=config["r"], target_modules=tuple(config["target_modules"])
            )
        return self._loras.get(adapter or "")

    def _tokenizer(self, checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
        """The tokenizer of the model that a checkpoint came from; None where it isn't here."""
        located = self._located(checkpoint)
        if any((located.folder / name).is_file() for name in _TOKENIZERS):
            return _load_tokenizer(located.folder)
        self.inexact.add(located.name)
        return None


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


@cache
def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(Checkpoint(str(folder)))


@cache
def _count(
    tokenizer: PreTrainedTokenizerBase | None,
    style: PromptStyle,
    prompt: str,
    answer: str,
    system: str | None,
    answered: bool,
    training: bool,
) -> int:
    if tokenizer is None:
        return _guess(style, prompt, answer, system) + answered
    if not answered:
        return len(style.encode_start(tokenizer, prompt, answer, system))
    head = style.encode_prompt(tokenizer, prompt, system, training=training)
    return len(head) + len(style.encode_answer(tokenizer, prompt, answer, system))


def _guess(style: PromptStyle, prompt: str, answer: str, system: str | None) -> int:
    """Tokens by the number of characters, with room for a chat template's marks."""
    if style.style == "alpaca":
        texts, marks = [style.render_alpaca(prompt, system)], 0
    else:
        texts = [turn["content"] for turn in style.messages(prompt, system=system)]
        marks = _TOKENS_PER_TURN * (len(texts) + 1)
    return marks + sum(-(-len(text) // CHARACTERS_PER_TOKEN) for text in (*texts, answer))


class PlaceholderJudge(Judge):
    """Stands for a judge whose weights aren't here: all that it would judge counts as to run."""

    name: str
    judge: WeightsJudge

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Nothing is judged in a plan."""
        raise NotImplementedError


def with_placeholders(experiment: Experiment, library: Library) -> Experiment:
    """The experiment with placeholders for judges whose weights aren't on this machine.

    Raises:
        ModelError: Nothing is known of a judge's model; one sentence.
    """

    def here(judge: Judge, setting: str) -> Judge:
        if not isinstance(judge, WeightsJudge) or weights_of(library, judge, setting).here:
            return judge
        return PlaceholderJudge(name=type(judge).__name__, judge=judge)

    evaluation = experiment.evaluation
    judges = {name: here(judge, f"judges.{name}") for name, judge in evaluation.judges.items()}
    harm = here(evaluation.harm_judge, "evaluation.harm_judge")
    refusal = here(evaluation.refusal_judge, "evaluation.refusal_judge")
    own = replace(evaluation, judges=judges, harm_judge=harm, refusal_judge=refusal)
    return replace(experiment, evaluation=own)


def weights_of(library: Library, judge: WeightsJudge, setting: str) -> Located:
    """The full weights that a judge runs on: its own, or those that its adapter is put on.

    Raises:
        ModelError: Not even its config.json can be had; one sentence.
    """
    base = judge.base if isinstance(judge, StrongRejectJudge) else None
    base = base or _adapted_model(judge.model, judge.revision)
    name, revision = (judge.model, judge.revision) if base is None else (base, None)
    return library.locate(name, revision, f"{setting}.model")


def _adapted_model(name: str, revision: str | None) -> str | None:
    """The base that an adapter names; None for full weights, and where it can't be looked up."""
    from huggingface_hub import hf_hub_download, is_offline_mode

    path = str(Path(name, ADAPTER_CONFIG))
    try:
        if not Path(name).is_dir():
            offline = is_offline_mode()
            path = hf_hub_download(
                name, ADAPTER_CONFIG, revision=revision, local_files_only=offline
            )
        return str(json.loads(Path(path).read_text())["base_model_name_or_path"])
    except Exception:
        # Most are no adapters; what the hub's HTTP library raises is no error of its own.
        return None
