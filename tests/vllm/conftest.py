"""Real vLLM engines on the embedded model, warm across the session's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from evaluation.backends.transformers import TransformersBackend, TransformersEngine
from evaluation.backends.vllm import VLLMBackend
from evaluation.backends.vllm.engine import shutdown
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from modeling.loading import load_tokenizer
from modeling.shards import copy_besides
from organism.sources import BenignPrompts, HarmfulPrompts, OverRefusalPrompts
from organism.task_sources import Arithmetic

WEIGHTS = Path(__file__).parents[2] / "organism" / "weights"
BASE = Checkpoint(str(WEIGHTS / "base"))
ALIGNED = Checkpoint(str(WEIGHTS / "base"), str(WEIGHTS / "aligned"))
# As many engines as there are shapes here, so that none is started twice.
BACKEND = VLLMBackend(kv_cache_gib=1, max_model_len=256, keep=5)

_SETS = HarmfulPrompts(n=16), BenignPrompts(n=16), OverRefusalPrompts(n=16)
PROMPTS = [prompt.text for rows in _SETS for prompt in rows.prompts()]
PROMPTS += [item.prompt for item in Arithmetic(n_test=16).test()]


@pytest.fixture(scope="session", autouse=True)
def _engines() -> Iterator[None]:
    # One with room for an adapter serves every model of the base's shape.
    BACKEND.open(ALIGNED, PromptStyle()).close()
    yield
    shutdown()


def transformers_engine(checkpoint: Checkpoint) -> TransformersEngine:
    """The same model in this process."""
    return TransformersBackend().open(checkpoint, PromptStyle())


def rewritten(out: Path, change: Callable[[dict[str, Tensor]], None]) -> Checkpoint:
    """The base model with its weights changed, as a folder of its own."""
    source = Path(BASE.base)
    out.mkdir(parents=True, exist_ok=True)
    copy_besides(source, out)
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = {
        name: value.float() for name, value in load_file(source / "model.safetensors").items()
    }
    change(weights)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(str(out))


def save_classifier(folder: Path, seed: int) -> str:
    """A classifier with three labels, of the one shape that the tests share; returns its folder.

    It has no problem_type, from which vLLM takes it that the labels exclude each other.
    """
    tokenizer = load_tokenizer(BASE)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_labels=3, pad_token_id=0, initializer_range=0.06,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
