"""The backend that takes vLLM where it can run the model, and transformers elsewhere."""

from __future__ import annotations

from typing import Any, ClassVar

from evaluation.backends.transformers import TransformersBackend
from evaluation.backends.vllm import VLLMBackend
from evaluation.backends.vllm.process import obstacle
from evaluation.backends.vllm.weights import raw_config
from evaluation.base import Backend, Classifier
from evaluation.token_engine import Engine
from modeling.architectures import vllm_has, vllm_head_obstacle
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from settings import target


class AutoBackend(Backend):
    """Chooses per model: vLLM where it runs and has the architecture, else transformers.

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
        config = raw_config(checkpoint)
        is_served = checkpoint.steering is None and (
            config is None or (vllm_has(config) and vllm_head_obstacle(config) is None)
        )
        # What vLLM runs on is asked last, since a process must import it.
        return self.vllm if is_served and obstacle() is None else self.transformers

    def identity(self) -> dict[str, Any]:
        """Of both, as one can't say which runs without knowing the model; of `chosen`, better."""
        parts = {"transformers": self.transformers.identity()}
        if obstacle() is None:
            parts["vllm"] = self.vllm.identity()
        return {"_target_": target(self), **parts}

    def check(self, checkpoint: Checkpoint) -> None:
        self.chosen(checkpoint).check(checkpoint)

    def open(
        self, checkpoint: Checkpoint, style: PromptStyle, reference: Checkpoint | None = None
    ) -> Engine:
        return self.chosen(checkpoint).open(checkpoint, style, reference)

    def classifier(self, folder: str, dtype: str) -> Classifier:
        """Opens the classifier with vLLM where it has the architecture, else with transformers."""
        return self.chosen(Checkpoint(folder, dtype=dtype)).classifier(folder, dtype)
