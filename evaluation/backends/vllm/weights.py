"""What vLLM can serve of a checkpoint, and how: its shape, its adapter, or a merged copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from modeling.checkpoint import Checkpoint, local_folder
from modeling.loading import load_model, merged
from modeling.model_files import stamp, stored_tensors
from settings import ModelError

# What vLLM's `max_lora_rank` may be.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# Entries of a config.json that change nothing in how token ids become logits.
_IDLE = (
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServedWeights:
    """What an engine loads for a checkpoint.

    Attributes:
        folder: Full weights.
        adapter: A PEFT folder to serve on top of them, or None.
        rank: The engine's `max_lora_rank`; 0 without an adapter.
    """

    folder: Path
    adapter: Path | None = None
    rank: int = 0

    @property
    def stamp(self) -> tuple[Any, ...]:
        """Changes when the full weights lie elsewhere or are written anew."""
        return stamp(self.folder)

    @property
    def adapter_stamp(self) -> tuple[Any, ...] | None:
        """Changes when another adapter is served, or it is written anew; None without one."""
        return None if self.adapter is None else stamp(self.adapter)


@contextmanager
def served(checkpoint: Checkpoint) -> Iterator[ServedWeights]:
    """What is loaded for a checkpoint; a merged copy of it exists only inside the context.

    An adapter that vLLM can't serve as one is merged into a copy of the base on the CPU.
    """
    rank = lora_rank(checkpoint)
    if rank is not None:
        adapter = checkpoint.adapter and Path(checkpoint.adapter).absolute()
        yield ServedWeights(local_folder(checkpoint), adapter or None, rank)
        return
    with TemporaryDirectory(prefix="relock-merged-") as folder:
        # On the CPU, since a process that has touched the GPU keeps some of its memory.
        merged(load_model(checkpoint, device="cpu")).save_pretrained(folder)
        yield ServedWeights(Path(folder))


def lora_rank(checkpoint: Checkpoint) -> int | None:
    """The smallest `max_lora_rank` that serves the checkpoint; None: merge its adapter instead.

    0 where it has no adapter.
    vLLM refuses or ignores what is more than LoRA on linear projections, and ranks above 512.
    """
    from modeling.lora import mergeable_adapter

    try:
        adapter = mergeable_adapter(checkpoint, "model.adapter")
    except ModelError:
        return None
    if adapter is None:
        return 0
    if any(name.rpartition(".")[2] not in _PROJECTIONS for name in adapter.names):
        return None
    patterns = (adapter.config.get("rank_pattern") or {}).values()
    largest = max(adapter.config["r"], *patterns, *(s.rank for s in adapter.shapes.values()))
    return next((rank for rank in _RANKS if rank >= largest), None)


def shape(folder: Path) -> str:
    """What two folders share if one's weights can be put into the other's running engine.

    Their configs, up to what changes no logits, and the names and sizes of their tensors: vLLM
    only warns of a tensor that is missing and would go on with the one it had.
    """
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.shape for name, tensor in stored_tensors(folder).items()}
    counted = {key: value for key, value in config.items() if key not in _IDLE}
    if "quantization_config" in config:
        counted["_folder"] = str(folder)
    return hashlib.sha256(json.dumps([counted, tensors], sort_keys=True).encode()).hexdigest()


def raw_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The base's config.json, or None where it isn't on this machine yet."""
    path: Any = Path(checkpoint.base) / "config.json"
    # A folder that a stage will make has no hub id's form.
    if not path.is_absolute() and not checkpoint.is_local:
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(checkpoint.base, "config.json", revision=checkpoint.revision)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    return json.loads(Path(path).read_text())
