"""The lock: an artefact of its own, made once and applied to any fine-tune of its model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from defenses.safetylock.directions import Directions, overlap, top
from modeling.heads import HeadLayout
from settings import ModelError

TENSORS, METADATA = "lock.safetensors", "lock.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Lock:
    """Directions of all heads of one model, and how well each tells safe from unsafe.

    It holds every head, so that K and alpha can be chosen when it is applied; `k` and `alpha`
    are what it is meant to be applied with, None where that is left open.

    Attributes:
        scores: (seeds, layers, heads) float32; the first seed's choose the heads, the others
            tell how stable the choice is.
        accuracy: (layers, heads) float32, the probes' validation accuracy with the first seed.
        origin: Hashes that identify the model and the chat template it was taken from.
        settings: The settings it was made with.
    """

    directions: Directions
    scores: Tensor
    accuracy: Tensor
    layout: HeadLayout
    origin: dict[str, str | None]
    settings: dict[str, Any]
    k: int | None = None
    alpha: float | None = None

    def heads(self, k: int) -> list[tuple[int, int]]:
        """The K heads that carry safety best, as (layer, head), best first."""
        return top(self.scores[0], k)

    def stability(self, k: int) -> dict[str, Any]:
        """How the set of K heads depends on the seed of the probes' split.

        "jaccard" is the mean over all pairs of seeds, "seeds" their number, "frequency" per chosen
        head the share of seeds that choose it.
        """
        sets = [top(score, k) for score in self.scores]
        return {
            "seeds": len(sets),
            "jaccard": overlap(sets),
            "frequency": [
                sum(head in chosen for chosen in sets) / len(sets) for head in self.heads(k)
            ],
        }

    def deltas(self, heads: Sequence[tuple[int, int]], alpha: float) -> dict[int, Tensor]:
        """delta_l = concat_h(1[h in S_l] alpha sigma u), added to o_proj's input.

        Layers without a chosen head are left out; the others' are (heads * head_dim,) float32.
        """
        width = self.layout.heads * self.layout.head_dim
        deltas: dict[int, Tensor] = {}
        for layer, head in sorted(heads):
            delta = deltas.setdefault(layer, torch.zeros(width))
            step = alpha * self.directions.sigma[layer, head] * self.directions.u[layer, head]
            delta[self.layout.columns(head)] = step
        return deltas

    def check_fits(self, layout: HeadLayout, setting: str) -> None:
        """Refuses (ModelError) a model of another architecture or shape."""
        theirs = asdict(layout)
        for name, ours in asdict(self.layout).items():
            if theirs[name] != ours:
                raise ModelError(
                    f"{setting} has {name}={theirs[name]}, but the lock was taken from a model "
                    f"with {name}={ours}; apply it to a fine-tune of that model, or build a lock "
                    "from this one's original"
                )

    def save(self, folder: Path) -> None:
        """Writes `lock.safetensors` and `lock.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                "u": self.directions.u.contiguous(),
                "sigma": self.directions.sigma.contiguous(),
                "scores": self.scores.contiguous(),
                "accuracy": self.accuracy.contiguous(),
            },
            folder / TENSORS,
        )
        metadata = {
            "format": FORMAT,
            "layout": asdict(self.layout),
            "origin": self.origin,
            "settings": self.settings,
            "k": self.k,
            "alpha": self.alpha,
            "heads": None if self.k is None else self.describe(self.heads(self.k)),
        }
        (folder / METADATA).write_text(json.dumps(metadata, indent=1) + "\n")

    def describe(self, heads: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """Layer, head, sigma, score and probe accuracy of each of the heads."""
        return [
            {
                "layer": layer,
                "head": head,
                "sigma": float(self.directions.sigma[layer, head]),
                "score": float(self.scores[0, layer, head]),
                "accuracy": float(self.accuracy[layer, head]),
            }
            for layer, head in heads
        ]


def load_lock(folder: Path, setting: str) -> Lock:
    """Reads a lock back; `setting` named its folder.

    Raises:
        ModelError: It is incomplete, damaged, or of another format.
    """
    for name in (TENSORS, METADATA):
        if not (folder / name).is_file():
            raise ModelError(
                f"{setting}={str(folder)!r} is no lock ({name} is missing); build it with "
                "python -m defenses.safetylock build"
            )
    damaged = ModelError(f"{setting}={str(folder)!r} is a damaged lock; build it again")
    try:
        metadata = json.loads((folder / METADATA).read_text())
        tensors = load_file(folder / TENSORS)
    except (ValueError, SafetensorError):
        raise damaged from None
    if metadata.get("format") != FORMAT:
        raise ModelError(
            f"{setting}={str(folder)!r} has lock format {metadata.get('format')}, this version "
            f"reads {FORMAT}; build the lock again"
        )
    try:
        lock = Lock(
            Directions(tensors["u"], tensors["sigma"]),
            tensors["scores"],
            tensors["accuracy"],
            HeadLayout(**metadata["layout"]),
            metadata["origin"],
            metadata["settings"],
            metadata["k"],
            metadata["alpha"],
        )
    except (KeyError, TypeError):
        raise damaged from None
    shape = (lock.layout.layers, lock.layout.heads)
    sound = lock.directions.u.shape == (*shape, lock.layout.head_dim) and all(
        tensor.shape[-2:] == shape for tensor in (lock.directions.sigma, lock.scores, lock.accuracy)
    )
    if not sound or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise damaged
    return lock


def fingerprint(folder: Path) -> str:
    """SHA-256 over a lock's two files (16 hex digits)."""
    digest = hashlib.sha256()
    for name in (TENSORS, METADATA):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]
