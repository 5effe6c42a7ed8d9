"""The backend that takes vLLM where it can run the model, and transformers elsewhere."""

from __future__ import annotations

from typing import Any, ClassVar

from evaluation.backends.transformers import TransformersBackend
from evaluation.backends.vllm import VLLMBackend
from evaluation.base import Backend, Classifier, Engine
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from settings import target


class AutoBackend(Backend):
    """Chooses per model: vLLM where it is installed and has the architecture, else transformers.

    Attributes:
        vllm: What runs the models that vLLM can serve.
        transformers: What runs the others, and those whose repair is a set of hooks.
    """

    version: ClassVar[int] = 1

    vllm: VLLMBackend = VLLMBackend()
    transformers: TransformersBackend = TransformersBackend()

    def chosen(self, checkpoint: Checkpoint) -> Backend:
        """The backend that runs this checkpoint.

        A model whose config.json isn't on this machine yet is taken for one that vLLM has.
        """
        from evaluation.backends.vllm.weights import is_installed, raw_config

        if checkpoint.steering is None and is_installed() and _is_served(raw_config(checkpoint)):
            return self.vllm
        return self.transformers

    def identity(self) -> dict[str, Any]:
        """Of both, as one can't say which runs without knowing the model; of `chosen`, better."""
        from evaluation.backends.vllm.weights import is_installed

        parts = {"transformers": self.transformers.identity()}
        if is_installed():
            parts["vllm"] = self.vllm.identity()
        return {"_target_": target(self), **parts}

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuses what the chosen backend refuses."""
        self.chosen(checkpoint).check(checkpoint)

    def open(
        self, checkpoint: Checkpoint, style: PromptStyle, undefended: Checkpoint | None = None
    ) -> Engine:
        """Opens the checkpoint with the chosen backend."""
        return self.chosen(checkpoint).open(checkpoint, style, undefended)

    def classifier(self, folder: str, dtype: str) -> Classifier:
        """Opens the classifier with vLLM where it has the architecture, else with transformers."""
        return self.chosen(Checkpoint(folder, dtype=dtype)).classifier(folder, dtype)


def _is_served(config: dict[str, Any] | None) -> bool:
    from evaluation.backends.vllm.weights import head_oddity, is_known

    return config is None or (is_known(config) and head_oddity(config) is None)
