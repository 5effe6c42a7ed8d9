"""The calibration service that defenses get: prompts, stored answers, and the judge's opinion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data.local import hash_rows
from data.rows import PreferencePair, Prompt
from evaluation.base import Backend, Judge
from evaluation.engines import closing
from experiments.pipeline import stages
from experiments.pipeline.inputs import PromptSet
from experiments.store import Store
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint, fingerprint_folder
from modeling.loading import load_tokenizer
from settings import ModelError, target


@dataclass
class StoredCalibration:
    """Implements `defenses.base.Calibration` with the experiment's backend, judge and store.

    Attributes:
        prompts: Calibration prompts; none of them is used in the evaluation.
        safety_pairs: Pairs of a safe and an unsafe answer; likewise.
        safety_prompts: Harmful prompts by category; likewise.
        utility_prompts: Benign prompts; likewise.
        needs: What the defense uses of these (`defenses.base.Defense.needs`).
        base_key: Identity of the base model, so that its weights need not be hashed again.
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
        common = {"dtype": self.base.dtype, "style": self.style.model_dump()}
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
        }

    def respond(self, model: Checkpoint, prompts: Sequence[str]) -> list[str]:
        """Greedy answers of `model`, in order, from the store where they are there already."""
        rows = tuple(Prompt(str(index), text) for index, text in enumerate(prompts))
        asked = PromptSet("calibration", rows, self.max_new_tokens)
        backend = self.backend.chosen(model)
        stage, make = stages.generation(backend, model, self.style, asked, self._identity(model))
        with closing():
            result = self.store.run(stage, make)
        if result.reused:
            self.seconds_reused += result.seconds
        return stages.read_rows(result.folder)["answer"].tolist()

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
            (
                self.style.encode_prompt(tokenizer, prompt),
                self.style.encode_answer(tokenizer, prompt, answer),
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def _identity(self, model: Checkpoint) -> tuple[str, ...]:
        known = self.base_key if model.base == self.base.base else fingerprint_folder(model.base)
        return (known, fingerprint_folder(model.adapter)) if model.adapter else (known,)
