"""Generation with vLLM, in a process of its own that stays warm between checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from evaluation.backends import canary
from evaluation.backends.transformers import load_classifier_tokenizer, read_labels
from evaluation.backends.vllm.engine import EnginePlan, VLLMClassifier, VLLMEngine, take
from evaluation.backends.vllm.process import obstacle
from evaluation.backends.vllm.weights import ServedWeights, raw_config, served, shape
from evaluation.base import Backend
from evaluation.token_engine import end_tokens
from modeling.architectures import vllm_head_obstacle
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint, local_folder
from modeling.inspection import inspect_model
from modeling.loading import load_tokenizer
from settings import ModelError, SettingError, target

_ELSE = "or set backend@evaluation.backend=transformers"


class VLLMBackend(Backend):
    """Serves models with vLLM; what is served must pass the canary before it answers.

    A closed engine stays at rest in its process: the next checkpoint of the same shape is loaded
    into it in place of its weights, which takes a moment where starting vLLM takes a minute.
    Adapters are served as adapters where vLLM can, and merged into a temporary copy elsewhere.

    Attributes:
        gpu_memory_utilization: Share of a GPU's memory for weights and key-value cache.
        kv_cache_gib: Size of the key-value cache on a CPU, in GiB.
        max_model_len: Tokens that a prompt and its answer may have together; None for as many as
            the model has positions and memory has room.
        tensor_parallel_size: Over how many GPUs a model is spread.
        enforce_eager: Whether to run without CUDA graphs and compilation: slower, but starts
            sooner.  On a CPU it always does.
        batch_invariant: Whether an answer may not depend on what is batched with it
            (VLLM_BATCH_INVARIANT; GPUs of compute capability 8.0 and above).
        keep: How many engines stay at rest, their weights in main memory; 0 ends each one once it
            is closed.
        start_seconds: How long starting an engine may take.
    """

    version: ClassVar[int] = 1
    own_process: ClassVar[bool] = True

    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    kv_cache_gib: int = Field(default=4, ge=1)
    # The canary's longest text and continuation take 168.
    max_model_len: int | None = Field(default=None, ge=168)
    tensor_parallel_size: int = Field(default=1, ge=1)
    enforce_eager: bool = False
    batch_invariant: bool = False
    keep: int = Field(default=2, ge=0)
    start_seconds: float = Field(default=1800.0, gt=0.0)

    @property
    def rows_at_once(self) -> int:
        return 256  # Sequences that vLLM schedules together by default.

    def identity(self) -> dict[str, Any]:
        """Class, and the settings that change how numbers are rounded."""
        names = {"tensor_parallel_size", "enforce_eager", "batch_invariant"}
        return {"_target_": target(self), **self.model_dump(mode="json", include=names)}

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuses what vLLM can't serve, from what is installed and the model's config.json.

        Raises:
            SettingError: vLLM isn't installed, or runs on nothing that is here.
            ModelError: The model runs with hooks, or has heads that vLLM doesn't compute.
        """
        self._check_installed()
        if checkpoint.steering is not None:
            raise ModelError(
                "vLLM can't run a model whose repair is a set of hooks; set defense.form=baked, "
                + _ELSE
            )
        config = raw_config(checkpoint)
        if config is not None:
            _check_heads(config, f"the model {checkpoint.base!r}")

    def open(
        self, checkpoint: Checkpoint, style: PromptStyle, reference: Checkpoint | None = None
    ) -> VLLMEngine:
        """Serves a checkpoint; `reference` is for the canary.

        Raises:
            SettingError: vLLM isn't installed.
            ModelError: The model can't be served, or what is served isn't the model.
        """
        self.check(checkpoint)
        inspect_model(checkpoint)
        config, generation = _configs(local_folder(checkpoint))
        tokenizer = load_tokenizer(checkpoint)
        with served(checkpoint) as what:
            plan = self._plan(what, "generate", checkpoint.dtype, config)
            running = take(plan, what, self.keep)
        ends = end_tokens(generation, config, tokenizer)
        engine = VLLMEngine(running, tokenizer, style, ends, _positions(config))
        engine.verify(canary.verify, checkpoint, reference)
        return engine

    def classifier(self, folder: str, dtype: str) -> VLLMClassifier:
        """Serves a sequence classifier.

        Raises:
            SettingError: vLLM isn't installed.
            ModelError: It can't be served, lacks a trained head or labels, or what is served isn't
                the classifier.
        """
        from transformers import AutoConfig

        self._check_installed()
        named = f"the classifier {folder!r}"
        _check_heads(json.loads((Path(folder) / "config.json").read_text()), named)
        inspect_model(Checkpoint(folder, dtype=dtype), classifier=True)
        config = AutoConfig.from_pretrained(folder)
        labels = read_labels(folder, config)
        what = ServedWeights(Path(folder))
        running = take(self._plan(what, "classify", dtype, config), what, self.keep)
        opened = VLLMClassifier(running, load_classifier_tokenizer(folder), labels)
        opened.verify(canary.verify_classifier, Checkpoint(folder, dtype=dtype), opened.context)
        return opened

    def _plan(self, what: ServedWeights, kind: str, dtype: str, config: Any) -> EnginePlan:
        length = -1  # As many as the model has and memory holds.
        if self.max_model_len is not None:
            length = min(self.max_model_len, _positions(config) or self.max_model_len)
        options = {
            "kind": kind,
            "dtype": dtype,
            "sleep": self.keep > 0,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "max_model_len": length,
            "tensor_parallel_size": self.tensor_parallel_size,
            "enforce_eager": self.enforce_eager,
        }
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_cache_gib),
            "VLLM_BATCH_INVARIANT": str(int(self.batch_invariant)),
        }
        return EnginePlan(shape(what.folder), what.rank, options, environment, self.start_seconds)

    def _check_installed(self) -> None:
        reason = obstacle()
        if reason is not None:
            raise SettingError(
                f"backend@evaluation.backend=vllm needs vLLM, which {reason}; install it "
                f"(pip install -e '.[vllm]'), {_ELSE}"
            )


def _check_heads(config: dict[str, Any], what: str) -> None:
    obstacle = vllm_head_obstacle(config)
    if obstacle is not None:
        raise ModelError(f"{what} has {obstacle}; run it on a GPU, {_ELSE}")


def _configs(folder: Path) -> tuple[Any, Any]:
    """The model's config, and its generation settings where it ships some."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    if not (folder / "generation_config.json").is_file():
        return config, None
    return config, GenerationConfig.from_pretrained(folder)


def _positions(config: Any) -> int | None:
    return getattr(config, "max_position_embeddings", None)
