"""The repair: masks, calibration of q, and the projection, one safety dimension after another.

Paper: continual projection.  U = {}; for each dimension t: M_t = TopQ(harm_t) minus TopP(benign),
N_t = M_t minus U, project N_t, U = U + N_t.
"""

from __future__ import annotations

import math
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from defenses.base import EditStep, Models
from defenses.fgsn.neurons import Scope, find_q, neuron_scores, safety_mask
from defenses.fgsn.project import Matrix, Projection, edit_neurons, masked_norm
from defenses.fgsn.union import Union
from modeling.capture import TokenRow
from modeling.checkpoint import Checkpoint, device_name
from modeling.deltas import (
    Factored,
    alignment,
    fine_tuning,
    read_weight,
    rewrite_weights,
    write_edited,
)
from modeling.importance import input_norms, wanda_scores
from settings import SettingError

BENIGN = ""  # Key of the benign prompts, which no dimension can have.
STEPS = "steps"


@dataclass(frozen=True, slots=True)
class Plan:
    """The resolved settings of a repair.

    Attributes:
        layers: {layer: projections} in which neurons are looked for.
        shapes: {projection: (d_out, d_in)} of all projections in the model's blocks; their
            scalars are the denominator of every share.
        q: Share taken of the harmful scores; None where `target_edited` says.
        p: Share of the benign scores left out.
        target_edited: The share to be edited, or None.
        scope: Of the top cuts.
        granularity: Neurons are rows, or single weights.
        weight: Which weight is scored.
        weight_seed: Of "random" ones.
        tokens: Whose inputs are counted.
        batch_size: Rows per forward pass.
        target: What is projected.
        projection: How.
        rescore: Whether each step scores, and edits, the model of the step before.
    """

    layers: Mapping[int, list[str]]
    shapes: Mapping[str, tuple[int, int]]
    q: float | None
    p: float
    target_edited: float | None
    scope: Scope
    granularity: Literal["row", "weight"]
    weight: Literal["merged", "aligned", "delta", "random"]
    weight_seed: int
    tokens: Literal["prompt", "answer"]
    batch_size: int
    target: Literal["delta", "merged"]
    projection: Projection
    rescore: bool

    @property
    def scalars(self) -> int:
        """The denominator: scalars of all projections in the model's blocks."""
        return sum(d_out * d_in for d_out, d_in in self.shapes.values())

    @property
    def low_rank(self) -> bool:
        """Whether an edit of an adapter is again an adapter."""
        return self.target == "delta" and self.granularity == "row"


@dataclass(slots=True)
class Tally:
    """What one step did.

    Attributes:
        selected: Scalars of the neurons it was the first to select.
        changed: Those of them that differ, before they are rounded to the file's dtype.
        modules: Projections with such.
        before: Sum of squares of all selected neurons before the edit, those of earlier steps too.
        after: The same after it.
        without_direction: Projections with selected neurons that were left alone since D = 0.
    """

    selected: int = 0
    changed: int = 0
    modules: set[str] = field(default_factory=set)
    before: float = 0.0
    after: float = 0.0
    without_direction: set[str] = field(default_factory=set)

    @property
    def norm_kept(self) -> float | None:
        """||edited|| / ||before|| of the selected neurons."""
        return math.sqrt(self.after / self.before) if self.before else None


@dataclass(frozen=True, slots=True)
class Repaired:
    """What `repair` did: q, the models, their tallies in the same order, and U."""

    q: float
    steps: tuple[EditStep, ...]
    tallies: tuple[Tally, ...]
    union: Union


class Scores:
    """Wanda scores of one model's neurons on each set of prompts, a layer at a time."""

    def __init__(
        self,
        aligned: Checkpoint,
        scored: Checkpoint,
        plan: Plan,
        prompts: Mapping[str, Sequence[TokenRow]],
    ) -> None:
        names = [name for members in plan.layers.values() for name in members]
        self._aligned, self._scored, self._plan = aligned, scored, plan
        self._norms = {
            key: input_norms(scored, rows, plan.batch_size, plan.tokens, names)
            for key, rows in prompts.items()
        }
        self._rows: dict[tuple[int, str], dict[str, Tensor]] = {}

    def masks(self, key: str, q: float) -> Iterator[tuple[str, Tensor]]:
        """M_t of one dimension, projection by projection."""
        plan = self._plan
        for layer in plan.layers:
            harmful, benign = (self._layer(layer, each) for each in (key, BENIGN))
            yield from safety_mask(harmful, benign, q, plan.p, plan.scope).items()

    def _layer(self, layer: int, key: str) -> dict[str, Tensor]:
        """Scores of one layer; rows' are few and kept, weights' are computed each time."""
        names = self._plan.layers[layer]
        if self._plan.granularity == "weight":
            norms = self._norms[key]
            return {name: wanda_scores(self._weight(name), norms[name]) for name in names}
        if (layer, key) not in self._rows:
            keys = list(self._norms)
            for each in keys:
                self._rows[layer, each] = {}
            for name in names:
                norms_of_all = torch.stack([self._norms[each][name] for each in keys], 1)
                scores = neuron_scores(self._weight(name), norms_of_all)
                for each, column in zip(keys, scores.unbind(1), strict=True):
                    self._rows[layer, each][name] = column
        return self._rows[layer, key]

    def _weight(self, name: str) -> Tensor:
        if self._plan.weight == "random":
            seed = self._plan.weight_seed + zlib.crc32(name.encode())
            generator = torch.Generator().manual_seed(seed)
            return torch.rand(self._plan.shapes[name], generator=generator)
        if self._plan.weight == "aligned":
            return read_weight(self._aligned, name)
        if self._plan.weight == "merged":
            return read_weight(self._scored, name)
        delta = fine_tuning(self._aligned, self._scored, name, "cpu")
        return delta.rows(slice(None)) if isinstance(delta, Factored) else delta


def repair(
    plan: Plan,
    models: Models,
    start: Checkpoint,
    prompts: Mapping[str, Sequence[TokenRow]],
    union: Union,
    written: Union,
    out: Path,
) -> Repaired:
    """Edits the neurons of each dimension that no dimension before had, and writes the models.

    With fixed scores every step's model is `start` with all neurons so far projected, once and
    from `start`'s own weights, so that the last one depends on their union alone.  With
    `rescore` a step scores and edits the model of the step before.

    Args:
        plan: The settings.
        models: Base and aligned.
        start: The model to repair.
        prompts: Token rows of each dimension in order, and of the benign prompts (`BENIGN`).
        union: U, the neurons that aren't edited again.
        written: Those of them that are to be projected in `start`, which lacks that edit.
        out: The folder of the last model; those before go to "steps" in it.
    """
    dimensions = [key for key in prompts if key != BENIGN]
    scored = dimensions[:1] if plan.rescore else dimensions
    scores = Scores(models.aligned, start, plan, _of(prompts, scored))
    q = choose_q(plan, scores, dimensions, union)
    union, written = union.copy(), written.copy()
    scratch = out.with_name(f".{out.name}.{STEPS}")
    steps, tallies, source = [], [], start
    try:
        for index, name in enumerate(dimensions):
            if plan.rescore and index:
                scores = Scores(models.aligned, source, plan, _of(prompts, [name]))
                written = Union(plan.granularity, plan.shapes)
            fresh = new_neurons(scores, name, q, union)
            for module, mask in fresh.items():
                union.add(module, mask)
                written.add(module, mask)
            last = index == len(dimensions) - 1
            folder = out if last else scratch / step_folder(index, name)
            made, tally = write_step(plan, models, source, written, fresh, folder)
            source = made if plan.rescore else start
            tallies.append(tally)
            steps.append(EditStep(name, made, tally.changed))
        if scratch.exists():
            scratch.rename(out / STEPS)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    moved = [_moved(step, scratch, out / STEPS) for step in steps]
    return Repaired(q, tuple(moved), tuple(tallies), union)


def choose_q(plan: Plan, scores: Scores, dimensions: Sequence[str], union: Union) -> float:
    """`q` as it is given, or the one whose share of edited scalars is `target_edited`.

    Raises:
        SettingError: Not even q = 1 edits so much.
    """
    if plan.target_edited is None:
        if plan.q is None:
            raise ValueError("a plan needs q or target_edited")
        return plan.q

    def share(q: float) -> float:
        together = Union(plan.granularity, plan.shapes)
        for name in dimensions:
            for module, mask in new_neurons(scores, name, q, union).items():
                together.add(module, mask)
        return sum(together.scalars.values()) / plan.scalars

    if (most := share(1.0)) < plan.target_edited:
        raise SettingError(
            f"defense.target_edited={plan.target_edited} can't be reached: even q=1 selects only "
            f"{most:.4f} of the {plan.scalars:,} scalars of the model's projections in "
            f"{len(plan.layers)} layers; lower it, give more defense.layers, or lower defense.p"
        )
    return find_q(share, plan.target_edited)


def new_neurons(scores: Scores, dimension: str, q: float, union: Union) -> dict[str, Tensor]:
    """N_t = M_t minus U (paper: continual projection); projections without any are left out."""
    found = {}
    for name, mask in scores.masks(dimension, q):
        fresh = mask.cpu() & ~union.mask(name)
        if bool(fresh.any()):
            found[name] = fresh
    return found


def write_step(
    plan: Plan,
    models: Models,
    source: Checkpoint,
    written: Union,
    fresh: Mapping[str, Tensor],
    out: Path,
) -> tuple[Checkpoint, Tally]:
    """Writes `source` with the neurons of `written` edited.

    Args:
        plan: The settings.
        models: Base and aligned.
        source: The model to edit.
        written: What is edited in it.
        fresh: Those among them that no step before selected, for the tally.
        out: The folder to write.
    """
    device, tally = device_name(), Tally()
    chosen = written.scalars
    tally.selected = sum(
        int(mask.sum()) * (1 if mask.dim() == 2 else plan.shapes[name][1])
        for name, mask in fresh.items()
    )

    def edit(name: str, matrix: Matrix) -> Matrix | None:
        if not chosen.get(name):
            return None
        mask = written.mask(name)
        edited = edit_neurons(
            lambda: alignment(models, name, device), matrix, mask, plan.projection
        )
        if edited is None:
            tally.without_direction.add(name)
        else:
            _count(tally, name, matrix, edited, mask, fresh.get(name))
        return edited

    def edit_weight(name: str, weight: Tensor) -> Tensor | None:
        if not chosen.get(name):
            return None
        if plan.target == "merged":
            return cast(Tensor | None, edit(name, weight))
        aligned = read_weight(models.aligned, name).to(device)
        delta = cast(Tensor | None, edit(name, weight - aligned))
        if delta is None:
            return None
        # What isn't selected stays as it is, to the bit.
        return torch.where(written.mask(name).to(device), aligned.add_(delta), weight)

    if plan.low_rank:
        count = write_edited(models.aligned, source, out, edit)
    else:
        names = [name for name, scalars in chosen.items() if scalars]
        count = rewrite_weights(source, out, edit_weight, names=names)
    return count.defended, tally


def step_folder(index: int, name: str) -> str:
    """The folder of a step: its number and its name without what a path can't hold."""
    return f"{index}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}"


def _of(
    prompts: Mapping[str, Sequence[TokenRow]], dimensions: Sequence[str]
) -> dict[str, Sequence[TokenRow]]:
    return {key: prompts[key] for key in (*dimensions, BENIGN)}


def _count(
    tally: Tally, name: str, old: Matrix, new: Matrix, mask: Tensor, fresh: Tensor | None
) -> None:
    tally.before += masked_norm(old, mask) ** 2
    tally.after += masked_norm(new, mask) ** 2
    if fresh is None:
        return
    if isinstance(old, Factored) and isinstance(new, Factored):
        changed = int((old.b != new.b).any(1).cpu()[fresh].sum()) * old.a.shape[1]
    else:
        changed = int((cast(Tensor, old) != cast(Tensor, new)).cpu()[fresh].sum())
    tally.changed += changed
    if changed:
        tally.modules.add(name)


def _moved(step: EditStep, old: Path, new: Path) -> EditStep:
    """The step after its folder has moved from `old` to `new`."""
    model = step.checkpoint
    base, adapter = (
        str(new / Path(path).relative_to(old)) if path and Path(path).is_relative_to(old) else path
        for path in (model.base, model.adapter)
    )
    return replace(step, checkpoint=replace(model, base=str(base), adapter=adapter))
