"""`StoredCalibration`, the prompts, answers and verdicts that `Prepare` hands a defense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.local import hash_rows
from data.rows import PreferencePair, Prompt
from defenses.base import CalibrationAnswers
from evaluation.base import Backend, Judge
from evaluation.engines import closing
from experiments.pipeline.cost import Sizes
from experiments.pipeline.prompt_sets import PromptSet
from experiments.pipeline.steps.base import Model, read_rows
from experiments.pipeline.steps.measuring import Generate
from experiments.store import Store
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint, fingerprint_folder
from modeling.loading import load_tokenizer
from settings import ModelError, source, target


@dataclass
class StoredCalibration:
    """Implements `defenses.base.Calibration` with the experiment's backend, judge and store.

    Attributes:
        seconds_reused: Seconds that stored answers took when they were made.
    """

    prompts: Sequence[Prompt]
    safety_pairs: Sequence[PreferencePair]
    safety_prompts: Sequence[Prompt]
    utility_prompts: Sequence[Prompt]
    needs: frozenset[str]
    store: Store
    backend: Backend
    judge: Judge
    style: PromptStyle
    max_new_tokens: int
    base: Checkpoint
    base_key: str
    seconds_reused: float = field(default=0.0)

    def identity(self) -> dict[str, Any]:
        """What the artefact of a defense that uses this service depends on."""
        common = {"dtype": self.base.dtype, "style": self.style.identity()}
        for name in sorted(self.needs - {"prompts"}):
            common[name] = hash_rows(getattr(self, name))
        if "prompts" not in self.needs:
            return common
        backend = self.backend.chosen(self.base)
        return common | {
            "prompts": hash_rows(self.prompts),
            "backend": [backend.version, backend.identity()],
            "judge": [target(self.judge), self.judge.version, self.judge.identity()],
            "max_new_tokens": self.max_new_tokens,
            **source(self.judge, backend),
        }

    def respond(self, model: Checkpoint, prompts: Sequence[str]) -> list[str]:
        """Greedy answers of `model`, in order, from the store where they are there already."""
        step = self._generate(model, prompts, self._inputs(model, fingerprint_folder))
        with closing():
            result = self.store.run(step.stage, step.run)
        if result.reused:
            self.seconds_reused += result.seconds
        return read_rows(result.folder)["answer"].tolist()

    def expected_step(
        self, answers: CalibrationAnswers, aligned: Checkpoint, fingerprint: Callable[[str], str]
    ) -> Generate:
        """The step behind a call of `respond`, before `prepare` runs.

        Answers of a reference, or to prompts chosen on the way, depend on what isn't there yet:
        they get a key of their own, under which a plan has them again. `fingerprint` is as
        `fingerprint_folder`, of folders that needn't be there.
        """
        texts = [prompt.text for name in answers.prompts for prompt in getattr(self, name)]
        model = self.base if answers.model == "base" else aligned
        inputs = self._inputs(model, fingerprint)
        return self._generate(model, texts, (*inputs, answers.of) if answers.of else inputs)

    def is_safe(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Whether the moderation judge calls each answer safe.

        Raises:
            ModelError: The judge couldn't be asked about some of them.
        """
        with closing():
            labels = [verdict.label for verdict in self.judge.score(prompts, answers)]
        if missing := labels.count("errored"):
            raise ModelError(
                f"evaluation.harm_judge couldn't be asked about {missing} of {len(labels)} answers "
                "that calibrate the defense; run the same command again"
            )
        return [label == "safe" for label in labels]

    def encode(
        self, model: Checkpoint, prompts: Sequence[str], answers: Sequence[str]
    ) -> list[tuple[list[int], list[int]]]:
        """Token ids of each prompt, and of each answer with its end token."""
        tokenizer = load_tokenizer(model)
        return [
            self.style.encode_pair(tokenizer, prompt, answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def lengths(self, model: Checkpoint, sizes: Sizes) -> list[int]:
        """Tokens of each row that the defense uses, as the model reads it, at most."""
        pairs = [(p.prompt, text) for p in self.safety_pairs for text in (p.chosen, p.rejected)]
        asked = [(prompt.text, "") for prompt in (*self.safety_prompts, *self.utility_prompts)]
        prompts = [(prompt.text, "") for prompt in self.prompts]
        answered = sizes.tokens(model, self.style, prompts, answered=False)
        return [
            *sizes.tokens(model, self.style, pairs),
            *sizes.tokens(model, self.style, asked, answered=False),
            *(length + self.max_new_tokens for length in answered),
        ]

    def _generate(
        self, model: Checkpoint, texts: Sequence[str], inputs: tuple[str, ...]
    ) -> Generate:
        rows = tuple(Prompt(str(index), text) for index, text in enumerate(texts))
        prompts = PromptSet("calibration", rows, self.max_new_tokens)
        asked = Model(model, inputs[0], self.style)
        return Generate(asked, prompts, self.backend.chosen(model), inputs)

    def _inputs(self, model: Checkpoint, fingerprint: Callable[[str], str]) -> tuple[str, ...]:
        """What identifies a model by its content."""
        known = self.base_key if model.base == self.base.base else fingerprint(model.base)
        return (known, fingerprint(model.adapter)) if model.adapter else (known,)
