"""Models and tokenizers in memory, loaded from checkpoints; all that runs a model comes by here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modeling.checkpoint import Checkpoint
from modeling.inspection import inspect_model, load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def device_name() -> str:
    """The device that models run on: the first CUDA device where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer beside the base weights, left-padded, with a padding token."""
    from transformers import AutoTokenizer

    # Where mistral_common is installed, as vLLM installs it, a Mistral's tekken.json would be read
    # in place of its tokenizer.json, and with it no chat template.
    tokenizer = AutoTokenizer.from_pretrained(
        checkpoint.base, revision=checkpoint.revision, mistral_format=False
    )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    checkpoint: Checkpoint, *, trainable_adapter: bool = False, device: str | None = None
) -> PreTrainedModel:
    """Loads the weights, the adapter on top (a `PeftModel` then), and the steering's hooks.

    Args:
        checkpoint: What to load.
        trainable_adapter: Whether the adapter's parameters require gradients.
        device: Where to put it; `device_name()` by default.

    Raises:
        ModelError: The weights or the steering can't be read, or don't fit each other.
    """
    inspect_model(checkpoint)
    model = load_weights(checkpoint, f"the model {checkpoint.base!r}")
    if checkpoint.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, checkpoint.adapter, is_trainable=trainable_adapter)
    model = model.to(device or device_name())
    if checkpoint.steering is not None:
        from modeling.steering import load_steering, steer

        steer(model, load_steering(checkpoint.steering))
    return model
