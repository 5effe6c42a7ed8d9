"""The lock, an artefact of its own, made once and applied to any fine-tune of its model.

How it is applied: Zhu et al., section 2.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from defenses.base import Edit
from defenses.safetylock.directions import Directions, overlap, top
from modeling.checkpoint import Checkpoint, count_parameters, identify
from modeling.export import export_with_biases
from modeling.heads import HeadLayout, head_layout, output_biases
from modeling.steering import SteeredPositions, Steering, save_steering
from modeling.verify import random_rows, verify_export
from settings import ModelError, SettingError

TENSORS, METADATA = "lock.safetensors", "lock.json"
FORMAT = 1
PROVENANCE = "safetylock.json"
# How far apart scores are that another solver of the same probes gives.
NOISE = 1e-3


@dataclass(frozen=True, slots=True)
class Lock:
    """Directions of all heads of one model, and how well each tells safe from unsafe.

    It holds every head, so that K and alpha can be chosen when it is applied; `k` and `alpha`
    are what it is meant to be applied with, None where that is left open.

    Attributes:
        scores: (seeds, layers, heads) float32; the first seed's choose the heads, the others
            tell how stable the choice is.
        accuracy: (layers, heads) float32, the probes' validation accuracy with the first seed;
            None of a published lock, which holds its K heads alone and doesn't rank them.
        origin: Hashes that identify the model and the chat template it was taken from; of a
            published lock its file and what can't be verified.
        settings: The settings it was made with.
    """

    directions: Directions
    scores: Tensor
    accuracy: Tensor | None
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
        head the share of seeds that choose it.  "as_good" are the heads left out whose score lies
        within `NOISE` of the last chosen one's, so that the order is noise.
        """
        sets = [top(score, k) for score in self.scores]
        near = self.scores[0] >= self.scores[0][sets[0][-1]] - NOISE
        return {
            "as_good": [head for head in near.nonzero().tolist() if tuple(head) not in sets[0]],
            "seeds": len(sets),
            "jaccard": overlap(sets),
            "frequency": [
                sum(head in chosen for chosen in sets) / len(sets) for head in self.heads(k)
            ],
        }

    def deltas(self, heads: Sequence[tuple[int, int]], alpha: float) -> dict[int, Tensor]:
        """delta_l = concat_h(1[h in S_l] alpha sigma u), added to o_proj's input.

        Layers without a chosen head are left out; the others' are (heads * head_dim,) float32,
        products of the lock's `precision`.
        """
        width = self.layout.heads * self.layout.head_dim
        precision = getattr(torch, self.settings.get("precision", "float32"))
        u, sigma = (t.to(precision) for t in (self.directions.u, self.directions.sigma))
        deltas: dict[int, Tensor] = {}
        for layer, head in sorted(heads):
            delta = deltas.setdefault(layer, torch.zeros(width))
            delta[self.layout.columns(head)] = alpha * sigma[layer, head] * u[layer, head]
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

    def check_origin(self, aligned: Checkpoint, setting: str) -> None:
        """Refuses (ModelError) another aligned model than the lock's; a published one's is unknown.

        Raises:
            ModelError: The lock was taken from another model, or doesn't fit this one's shape.
        """
        self.check_fits(original_layout(aligned), f"the model {aligned.base!r}")
        if self.accuracy is None:
            return
        theirs = identify(aligned)
        if any(self.origin[part] != identity for part, identity in theirs.items()):
            raise ModelError(
                f"{setting} was taken from the model {self.origin['base']} with the adapter "
                f"{self.origin['adapter']}, and the aligned model is {theirs['base']} with "
                f"{theirs['adapter']}; give the lock of this model, or leave {setting} out"
            )

    def save(self, folder: Path) -> None:
        """Writes `lock.safetensors` and `lock.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"u": self.directions.u, "sigma": self.directions.sigma, "scores": self.scores}
        if self.accuracy is not None:
            tensors["accuracy"] = self.accuracy
        save_file({name: each.contiguous() for name, each in tensors.items()}, folder / TENSORS)
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
                "accuracy": (None if self.accuracy is None else float(self.accuracy[layer, head])),
            }
            for layer, head in heads
        ]


def find_lock(folder: str | Path, setting: str) -> Path:
    """The lock in a folder: the folder itself, or "lock" in what was prepared.

    Raises:
        ModelError: There is none.
    """
    places = (Path(folder), Path(folder) / "lock")
    found = next((place for place in places if (place / METADATA).is_file()), None)
    if found is None:
        raise ModelError(
            f"{setting}={str(folder)!r} holds no lock; make one by "
            "python -m experiments.repair prepare safetylock, or import a published one"
        )
    return found


def load_lock(folder: Path, setting: str) -> Lock:
    """Reads a lock back; `setting` named its folder.

    Raises:
        ModelError: It is incomplete, damaged, or of another format.
    """
    for name in (TENSORS, METADATA):
        if not (folder / name).is_file():
            raise ModelError(
                f"{setting}={str(folder)!r} is no lock ({name} is missing); make one by "
                "python -m experiments.repair prepare safetylock"
            )
    damaged = ModelError(f"{setting}={str(folder)!r} is a damaged lock; build it again")
    try:
        metadata = json.loads((folder / METADATA).read_text())
        tensors = load_file(folder / TENSORS)
        if metadata["format"] != FORMAT:
            raise ModelError(
                f"{setting}={str(folder)!r} has lock format {metadata['format']}, this version "
                f"reads {FORMAT}; build the lock again"
            )
        lock = Lock(
            Directions(tensors["u"], tensors["sigma"]),
            tensors["scores"],
            tensors.get("accuracy"),
            HeadLayout(**metadata["layout"]),
            metadata["origin"],
            metadata["settings"],
            metadata["k"],
            metadata["alpha"],
        )
    except (ValueError, KeyError, TypeError, SafetensorError):
        raise damaged from None
    shape = (lock.layout.layers, lock.layout.heads)
    sound = lock.directions.u.shape == (*shape, lock.layout.head_dim) and all(
        tensor.shape[-2:] == shape for name, tensor in tensors.items() if name != "u"
    )
    if not sound or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise damaged
    return lock


def lock_model(
    lock: Lock,
    attacked: Checkpoint,
    heads: Sequence[tuple[int, int]],
    alpha: float,
    positions: SteeredPositions,
    baked: bool,
    out: Path,
) -> Edit:
    """Locks a fine-tune of the model that the lock was taken from.

    Where it is `baked`, a plain model is written, which needs `positions` "all"; else `out` gets
    what a hook needs. The scalars edited are those of the biases or of the steering vectors that
    aren't zero; the diagnostics hold seconds and how the export compares with the hooked model.

    Raises:
        ModelError: The model has another shape, or the export differs from the hooked model.
        SettingError: The model is steered already.
    """
    if attacked.steering is not None:
        raise SettingError(
            "the model to be locked is steered by a hook already; apply the lock to the model "
            "that the hook was put on, or bake the first steering with defense.form=baked"
        )
    lock.check_fits(original_layout(attacked), f"the model {attacked.base!r}")
    steering = Steering(lock.deltas(heads, alpha), positions)
    modules = tuple(f"model.layers.{layer}.self_attn.o_proj" for layer in sorted(steering.deltas))
    total = count_parameters(attacked)
    if not baked:
        save_steering(steering, out)
        edited = sum(int(delta.count_nonzero()) for delta in steering.deltas.values())
        defended = replace(attacked, steering=str(out))
        return Edit(defended, edited, total, modules, {"baked": False})
    start = time.perf_counter()
    biases = output_biases(attacked, steering.deltas)
    computed = time.perf_counter()
    export_with_biases(attacked, biases, out)
    exported = time.perf_counter()
    _write_provenance(lock, attacked, heads, alpha, out)
    defended = Checkpoint(str(out), None, None, attacked.dtype)
    difference = verify_export(out, attacked, steering, random_rows(attacked))
    report = {
        "baked": True,
        "bias_seconds": computed - start,
        "export_seconds": exported - computed,
        "verify_seconds": time.perf_counter() - exported,
        "export": difference,
    }
    edited = sum(int(bias.count_nonzero()) for bias in biases.values())
    return Edit(defended, edited, total, modules, report)


def original_layout(checkpoint: Checkpoint) -> HeadLayout:
    """The model's shape; of a model that was exported in another architecture, its original's."""
    layout = head_layout(checkpoint)
    provenance = Path(checkpoint.base) / PROVENANCE
    if not provenance.is_file():
        return layout
    return replace(layout, model_type=json.loads(provenance.read_text())["model_type"])


def _write_provenance(
    lock: Lock, attacked: Checkpoint, heads: Sequence[tuple[int, int]], alpha: float, out: Path
) -> None:
    """Says beside the weights what was baked into them."""
    content = {
        "model_type": original_layout(attacked).model_type,
        "origin": lock.origin,
        "alpha": alpha,
        "heads": [list(head) for head in heads],
    }
    (out / PROVENANCE).write_text(json.dumps(content, indent=1) + "\n")
