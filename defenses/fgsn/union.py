"""U, the neurons that have been edited: what continual projection leaves alone from then on.

W_safe isn't idempotent, so that U is stored beside the result, where `continue_from` finds it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from defenses.fgsn.plan import EditPlan
from modeling.checkpoint import Checkpoint
from modeling.importance import pack_bits, unpack_bits
from settings import ModelError, SettingError

if TYPE_CHECKING:
    from defenses.fgsn import FGSN


# A folder of its own: engines take every safetensors file beside a model's for weights.
FOLDER = "fgsn"
BITS, RECORD = "union.safetensors", "union.json"
FORMAT = 1


@dataclass(slots=True)
class Union:
    """A set of neurons: rows or single weights of projections, eight to a byte.

    `shapes` {projection: (d_out, d_in)} holds all projections that may have neurons in it.
    """

    granularity: str
    shapes: Mapping[str, tuple[int, int]]
    _packed: dict[str, Tensor] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def mask(self, name: str) -> Tensor:
        """The neurons of one projection, (d_out,) or (d_out, d_in) bool."""
        size = self._size(name)
        if name not in self._packed:
            return torch.zeros(size, dtype=torch.bool)
        return unpack_bits(self._packed[name], size)

    def add(self, name: str, mask: Tensor) -> None:
        """Adds neurons of one projection."""
        mask = self.mask(name) | mask.cpu()
        self._packed[name] = pack_bits(mask)
        self._counts[name] = int(mask.sum())

    def copy(self) -> Union:
        """A set that grows on its own."""
        return Union(self.granularity, self.shapes, dict(self._packed), dict(self._counts))

    @property
    def scalars(self) -> dict[str, int]:
        """How many scalars of the effective weights the neurons are, by projection."""
        rows = self.granularity == "row"
        return {
            name: count * (self.shapes[name][1] if rows else 1)
            for name, count in self._counts.items()
        }

    def save(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Writes the set and what is known of it."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._packed, folder / BITS)
        content = {
            **record,
            "format": FORMAT,
            "granularity": self.granularity,
            "shapes": {name: list(self.shapes[name]) for name in self._packed},
        }
        (folder / RECORD).write_text(json.dumps(content, indent=1) + "\n")

    def _size(self, name: str) -> tuple[int, ...]:
        return self.shapes[name][:1] if self.granularity == "row" else self.shapes[name]


def union_folder(folder: str | Path) -> Path:
    """Where a stored set lies: the folder itself, or the one inside a defended model's.

    Raises:
        ModelError: There is none.
    """
    for place in (Path(folder), Path(folder) / FOLDER):
        if (place / BITS).is_file() and (place / RECORD).is_file():
            return place
    raise ModelError(
        f"defense.continue_from={str(folder)!r} holds no edited neurons ({BITS} and {RECORD}); "
        "give the folder of a model that defense=fgsn has defended, or null to start anew"
    )


def load_union(
    folder: str | Path,
    aligned: Mapping[str, Any] | None,
    granularity: str,
    shapes: Mapping[str, tuple[int, int]],
) -> tuple[Union, dict[str, Any]]:
    """Reads a stored set and its record, and checks that it belongs to this model.

    Raises:
        ModelError: It is damaged, or of another model or granularity; where `aligned` is None, the
            aligned model isn't looked at.
    """
    place = union_folder(folder)
    try:
        record = json.loads((place / RECORD).read_text())
        packed = load_file(place / BITS)
    except (ValueError, OSError, SafetensorError) as error:
        raise _refused(folder, f"can't be read ({error})") from None
    if record.get("format") != FORMAT:
        raise _refused(folder, f"is of format {record.get('format')!r}, not {FORMAT}")
    if record["granularity"] != granularity:
        raise ModelError(
            f"defense.continue_from={str(folder)!r} holds neurons of granularity "
            f"{record['granularity']}; set defense.granularity={record['granularity']}"
        )
    stored = {name: tuple(size) for name, size in record["shapes"].items()}
    if any(shapes.get(name) != size for name, size in stored.items()):
        raise _refused(folder, "is of a model of another shape")
    if aligned is not None and record["aligned"] != aligned:
        raise _refused(folder, "is of another aligned model")
    union = Union(granularity, shapes)
    for name, size in stored.items():
        count = size[0] if granularity == "row" else size[0] * size[1]
        bits = packed.get(name)
        if bits is None or bits.dtype != torch.uint8 or bits.numel() != -(-count // 8):
            raise _refused(folder, "is damaged")
        union._packed[name] = bits
        union._counts[name] = int(union.mask(name).sum())
    return union, record


def _refused(folder: str | Path, what: str) -> ModelError:
    return ModelError(
        f"what defense.continue_from={str(folder)!r} holds {what}; give the folder of a model "
        "that defense=fgsn has defended from this aligned model, or null to start anew"
    )


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run of continual projection starts.

    Attributes:
        model: The model to edit.
        union: U, the neurons that aren't edited again.
        missing: The neurons of U that are to be projected in `model`, which lacks that edit.
        edited: How many scalars were edited before.
    """

    model: Checkpoint
    union: Union
    missing: Union
    edited: int = 0


def projection_settings(settings: FGSN) -> dict[str, Any]:
    """The settings of the projection, which runs on one model must share."""
    names = ("edit", "blend_weight", "norm", "target", "rescore")
    return {name: getattr(settings, name) for name in names}


def find_start(
    plan: EditPlan, attacked: Checkpoint, identity: Mapping[str, Any], aligned: Mapping[str, Any]
) -> Start:
    """The start of a run, from `continue_from` where that is set.

    A model that isn't the one that the earlier run edited is taken to hold that edit.

    Raises:
        ModelError: What `continue_from` names is damaged or doesn't fit.
        SettingError: The earlier run edited this very model in another way.
    """
    settings = plan.settings
    empty = Union(settings.granularity, plan.shapes)
    folder = settings.continue_from
    if folder is None:
        return Start(attacked, empty, empty)
    union, record = load_union(folder, aligned, settings.granularity, plan.shapes)
    if record["attacked"] != identity:
        return Start(attacked, union, empty)
    edited = record["parameters_edited"]
    if settings.rescore:
        return Start(_model_in(union_folder(folder).parent, attacked), union, empty, edited)
    for name, value in projection_settings(settings).items():
        if record["projection"][name] != value:
            raise SettingError(
                f"defense.continue_from={folder!r} repaired this very model with "
                f"{name}={record['projection'][name]}; set defense.{name} to that"
            )
    return Start(attacked, union, union, edited)


def _model_in(folder: Path, attacked: Checkpoint) -> Checkpoint:
    """The model that an earlier run wrote for the same attacked model."""
    if (folder / "adapter_config.json").is_file():
        return replace(attacked, adapter=str(folder))
    if (folder / "config.json").is_file():
        return Checkpoint(str(folder), dtype=attacked.dtype)
    raise ModelError(
        f"defense.rescore=true goes on from the model that was defended, and {str(folder)!r} holds "
        "none; set defense.continue_from to the folder of that model"
    )
