"""The base of judges with weights of their own: where these lie, what runs them, their identity."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, PrivateAttr

from evaluation.backends.transformers import TransformersBackend
from evaluation.base import Backend, Judge
from modeling.checkpoint import Checkpoint, resolve
from settings import ModelError, SettingError


@dataclass(frozen=True, slots=True)
class Weights:
    """The judge's model on this machine and what identifies it."""

    checkpoint: Checkpoint
    identity: str

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of the full weights."""
        config: dict[str, Any] = json.loads(
            (Path(self.checkpoint.base) / "config.json").read_text()
        )
        return config


class WeightsJudge(Judge):
    """A judge that is a model on this machine.

    A subclass says which transformers class it is (`architecture`), how a message calls that
    (`kind`) and what to set `model` to instead (`instead`), and its `name` in records.

    Attributes:
        model: Local folder or hub id of the weights.
        revision: Hub revision, or None for the newest.
        dtype: Precision of the weights.
        backend: Runs it; None for the evaluation's own, or transformers where there is none.
    """

    model: str
    revision: str | None = None
    dtype: str = Field(default="bfloat16", pattern="^(float32|float16|bfloat16)$")
    backend: Backend | None = None

    name: ClassVar[str]
    architecture: ClassVar[str]
    kind: ClassVar[str]
    instead: ClassVar[str]
    _resolved: Weights | None = PrivateAttr(default=None)

    def check(self, setting: str) -> None:
        """Refuses what is incomplete, of another kind, or can't be run by the backend.

        Raises:
            ModelError: One sentence that says what to set instead.
            SettingError: The backend can't run anything here.
        """
        weights = self._weights(setting)
        classes = weights.config.get("architectures") or []
        if not any(name.endswith(self.architecture) for name in classes):
            raise ModelError(
                f"{setting}.model={self.model!r} is {', '.join(classes) or 'of no known kind'}, "
                f"not a {self.kind}; set it to {self.instead}"
            )
        try:
            self._runner.check(weights.checkpoint)
        except (ModelError, SettingError) as error:
            raise type(error)(f"{setting}: {error}") from error

    def identity(self) -> dict[str, Any]:
        """What verdicts depend on: content of the weights, not their place, dtype and backend."""
        return {
            "judge": self.name,
            "weights": self._weights().identity,
            "dtype": self.dtype,
            "backend": [self._runner.version, self._runner.identity()],
        }

    @property
    def own_process(self) -> bool:
        """Whether the backend's engines are processes of their own."""
        return self._runner.own_process

    @property
    def _runner(self) -> Backend:
        return (self.backend or TransformersBackend()).chosen(self._weights().checkpoint)

    def _weights(self, setting: str = "the judge") -> Weights:
        # Kept, since identifying a local folder reads every byte of its weights.
        if self._resolved is None:
            self._resolved = self._resolve(setting)
        return self._resolved

    def _resolve(self, setting: str) -> Weights:
        folder, identity = resolve(self.model, self.revision, f"{setting}.model")
        return Weights(Checkpoint(folder, dtype=self.dtype), identity)
