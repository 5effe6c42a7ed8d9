"""LoRA adapters: PEFT folders as low-rank pairs, and algebra that never forms the product.

Throughout, A is (r, d_in), B is (d_out, r) and the adapter adds scale * B A to a projection's
weight of shape (d_out, d_in).  Leading dimensions, where a function allows them, are stacks of
adapters of one shape.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from modeling.checkpoint import Checkpoint
from modeling.inspection import check_start
from modeling.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    StoredTensor,
    is_adapter,
    read_header,
    verify_folder,
)
from modeling.shards import Content, copy_besides
from modeling.stored import read_rows
from settings import ModelError

_KEY = re.compile(r"^base_model\.model\.(?P<name>.+)\.lora_(?P<side>[AB])\.weight$")
_UNSUPPORTED = ("lora_magnitude_vector", "lora_embedding_", "lora_B.bias")
# Settings by which an adapter trains something besides, or other than, projections.
_ELSEWHERE = ("trainable_token_indices", "target_parameters")
_PAIR = re.compile(r"\.lora_[AB]\.weight$")
# Settings of PEFT's LoRA under which the adapted projection isn't x (W + scale B A)^T.
_NOT_PLAIN = (
    "modules_to_save",
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One adapted projection.

    Attributes:
        a: (r, d_in).
        b: (d_out, r).
        scale: What B A is multiplied by when it is added to the weight.
    """

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class LoraShape:
    """The sizes of one adapted projection and its scale."""

    rank: int
    d_in: int
    d_out: int
    scale: float


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A PEFT adapter folder and its adapter_config.json; its tensors are read on demand.

    `shapes` are {module path inside the base model: sizes}, blocks in numerical order.
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, LoraShape]

    @property
    def names(self) -> tuple[str, ...]:
        """Module paths inside the base model, e.g. "model.layers.0.self_attn.q_proj"."""
        return tuple(self.shapes)

    @property
    def weights(self) -> Path:
        """The safetensors file."""
        return self.folder / ADAPTER_WEIGHTS

    def pairs(
        self, names: Iterable[str] | None = None, device: str = "cpu"
    ) -> Iterator[tuple[str, LoraPair]]:
        """Yields (module, pair) one at a time, in the file's own dtype."""
        with safe_open(self.weights, framework="pt", device=device) as file:
            for name in self.names if names is None else names:
                a, b = (file.get_tensor(tensor_name(name, side)) for side in "AB")
                yield name, LoraPair(a, b, self.shapes[name].scale)

    def stack(self, names: Iterable[str], device: str = "cpu") -> tuple[Tensor, Tensor]:
        """A and B of same-shaped modules: (m, r, d_in) and (m, d_out, r)."""
        pairs = [pair for _, pair in self.pairs(names, device)]
        return torch.stack([p.a for p in pairs]), torch.stack([p.b for p in pairs])

    def groups(self, limit: int = 1 << 20) -> Iterator[list[str]]:
        """Module names in groups of one shape, to be stacked.

        A group holds at most `limit` scalars (one module at least), which bounds a stack's memory:
        what fits a cache is also the fastest.
        """
        sizes = {name: (s.rank, s.d_in, s.d_out) for name, s in self.shapes.items()}
        for (rank, d_in, d_out), names in grouped(sizes).items():
            step = max(1, limit // (rank * (d_in + d_out)))
            yield from (names[at : at + step] for at in range(0, len(names), step))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses, with a ModelError, a base whose modules (d_out, d_in) it doesn't fit."""
        for name, shape in self.shapes.items():
            if shapes.get(name) != (shape.d_out, shape.d_in):
                raise ModelError(
                    f"the adapter {str(self.folder)!r} edits {name} ({shape.d_out}, {shape.d_in}), "
                    "which its base doesn't have among its projections; use an adapter trained on "
                    "this model"
                )

    def fingerprint(self) -> str:
        """SHA-256 of the weights file (16 hex digits)."""
        with self.weights.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def open_adapter(folder: str | Path, setting: str) -> LoraAdapter:
    """Opens a PEFT LoRA folder; only its config and header are read.

    Raises:
        ModelError: The folder is incomplete, or no plain LoRA on linear projections.
    """
    folder = Path(folder)
    verify_folder(folder, setting)
    if not is_adapter(folder):
        raise ModelError(f"{setting}={str(folder)!r} is no adapter folder; give a PEFT LoRA folder")
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    check_start(config, f"{setting}={str(folder)!r}")
    header, _ = read_header(folder / ADAPTER_WEIGHTS)
    odd = next((key for key in header if any(part in key for part in _UNSUPPORTED)), None)
    odd = odd or next((name for name in _ELSEWHERE if config.get(name)), None)
    if config.get("peft_type") != "LORA" or odd is not None:
        raise ModelError(
            f"{setting}={str(folder)!r} is not a plain LoRA ({odd or config.get('peft_type')}); "
            "train the adapter as LoRA on linear projections, without DoRA, LoRA biases or tokens"
        )
    modules = {match["name"] for key in header if (match := _KEY.match(key))}
    if not modules:
        raise ModelError(f"{setting}={str(folder)!r} holds no LoRA weights; train the adapter anew")
    shapes = {name: _shape(name, header, config) for name in sorted(modules, key=_natural)}
    return LoraAdapter(folder, config, shapes)


def rewrite_adapter(
    source: LoraAdapter, out: Path, edit: Callable[[str, LoraPair], LoraPair | None]
) -> None:
    """Writes a copy of an adapter folder with some modules edited, one in memory at a time.

    The config (with its `base_model_name_or_path`), the tensors' dtypes and everything that is
    no LoRA pair stay as they are.

    `edit` is called with each module and its pair; it returns the new pair of the same shapes, or
    None to leave the module alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source.folder / ADAPTER_CONFIG, out / ADAPTER_CONFIG)
    shutil.copyfile(source.weights, out / ADAPTER_WEIGHTS)
    copy_besides(source.folder, out)
    header, start = read_header(source.weights)
    with (out / ADAPTER_WEIGHTS).open("r+b") as file:
        for name, pair in source.pairs():
            edited = edit(name, pair)
            if edited is None:
                continue
            for side, new, old in (("A", edited.a, pair.a), ("B", edited.b, pair.b)):
                if new.shape != old.shape:
                    raise ValueError(f"{name}: {tuple(new.shape)} can't replace {old.shape}")
                file.seek(start + header[tensor_name(name, side)]["data_offsets"][0])
                flat = new.detach().to("cpu", old.dtype).contiguous().flatten()
                file.write(flat.view(torch.uint8).numpy().data)


def product_inner(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """<B1 A1, B2 A2> = tr((B2^T B1)(A1 A2^T)), in float64.

    Costs O(r^2 (d_in + d_out)) and r x r memory instead of d_out x d_in.

    Args:
        a1: (..., r1, d_in).
        b1: (..., d_out, r1).
        a2: (..., r2, d_in).
        b2: (..., d_out, r2).

    Returns:
        (...): Frobenius inner products.
    """
    outer = b2.double().mT @ b1.double()
    inner = a2.double() @ a1.double().mT
    return (outer * inner).sum((-2, -1))


def product_norm(a: Tensor, b: Tensor) -> Tensor:
    """||B A||_F without forming B A: (...), in float64."""
    return product_inner(a, b, a, b).clamp(min=0).sqrt()


def product_cosine(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """Cosine of vec(B1 A1) and vec(B2 A2), shapes as in `product_inner`.

    A zero product has no direction: two zero products count as equal (1), one of them as
    unrelated (0).
    """
    a1, b1, a2, b2 = (side.double() for side in (a1, b1, a2, b2))
    norms1, norms2 = product_norm(a1, b1), product_norm(a2, b2)
    inner = product_inner(a1, b1, a2, b2)
    cosine = (inner / (norms1 * norms2)).clamp(-1, 1)
    both_zero = (norms1 == 0) & (norms2 == 0)
    return torch.where((norms1 == 0) | (norms2 == 0), both_zero.double(), cosine)


def grouped(shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[int, ...], list[str]]:
    """Names by shape, in order of first appearance."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault(shape, []).append(name)
    return groups


def tensor_name(name: str, side: str) -> str:
    """What PEFT calls lora_A or lora_B ("A", "B") of a module in an adapter's file."""
    return f"base_model.model.{name}.lora_{side}.weight"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _shape(name: str, header: Mapping[str, Any], config: Mapping[str, Any]) -> LoraShape:
    try:
        (rank, d_in), (d_out, _) = (header[tensor_name(name, side)]["shape"] for side in "AB")
    except KeyError:
        raise ModelError(f"the adapter of {name} lacks lora_A or lora_B; save it again") from None
    # PEFT's rule: the first pattern that matches the end of the module's path wins.
    patterns = [*(config.get("alpha_pattern") or {}).items(), (".*", config["lora_alpha"])]
    alpha = next(value for key, value in patterns if re.match(rf"(.*\.)?({key})$", name))
    root = math.sqrt(rank) if config.get("use_rslora") else rank
    return LoraShape(rank, d_in, d_out, alpha / root)


def mergeable_adapter(
    checkpoint: Checkpoint, setting: str, *, otherwise: str = ", or set defense.form=hooked"
) -> LoraAdapter | None:
    """The checkpoint's adapter, or None where it has none; only config and header are read.

    Raises:
        ModelError: The adapter is more than LoRA on linear projections.
    """
    if checkpoint.adapter is None:
        return None
    adapter = open_adapter(checkpoint.adapter, setting)
    odd = _oddity(adapter.config) or next(
        (key for key in read_header(adapter.folder / ADAPTER_WEIGHTS)[0] if not _PAIR.search(key)),
        None,
    )
    if odd is not None:
        raise ModelError(
            f"{setting}={checkpoint.adapter!r} can't be merged into its base because it is more "
            f"than LoRA on linear projections ({odd}); train it as plain LoRA{otherwise}"
        )
    return adapter


def _oddity(config: dict[str, Any]) -> str | None:
    for name in _NOT_PLAIN:
        if config.get(name):
            return f"{name}={config[name]!r}"
    if config.get("bias", "none") != "none":
        return f"bias={config['bias']!r}"
    return None


def merge(weight: Tensor, pair: LoraPair) -> Tensor:
    """W + scale B A in float32.

    The product is accumulated in place, so that memory holds one work copy.
    """
    work = weight.to(torch.float32, copy=True)
    return work.addmm_(pair.b.float(), pair.a.float(), alpha=pair.scale)


def merged_rows(
    stored: StoredTensor, pair: LoraPair | None, device: str | torch.device = "cpu"
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, (W + scale B A)[rows]), or W's without a pair, in float32 on `device`."""
    if pair is not None:
        a, b = (side.to(device=device, dtype=torch.float32) for side in (pair.a, pair.b))
    for rows, block in read_rows(stored):
        part = block.to(device)
        yield rows, part.float() if pair is None else merge(part, LoraPair(a, b[rows], pair.scale))


def merged_weights(
    adapter: LoraAdapter, stored: Mapping[str, StoredTensor]
) -> dict[str, Callable[[], Content]]:
    """{tensor name: gives its merged rows, float32} of the weights that an adapter changes."""

    def rows(module: str) -> Iterator[Tensor]:
        pair = next(adapter.pairs([module]))[1]
        return (part for _, part in merged_rows(stored[f"{module}.weight"], pair))

    names = (module for module in adapter.names if f"{module}.weight" in stored)
    return {f"{module}.weight": partial(rows, module) for module in names}
