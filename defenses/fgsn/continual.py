"""Continual projection: one safety dimension after another, on neurons not edited before.

Paper: continual projection.  U = {}; for each dimension t: M_t = TopQ(harm_t) minus TopP(benign),
N_t = M_t minus U, project N_t, U = U + N_t.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from defenses.base import Edit, EditStep, Models
from defenses.fgsn.artefact import BENIGN
from defenses.fgsn.layers import by_layer
from defenses.fgsn.neurons import NeuronScores, find_q
from defenses.fgsn.plan import EditPlan
from defenses.fgsn.project import Matrix, edit_neurons, masked_norm
from defenses.fgsn.union import Start, Union
from modeling.capture import TokenRow
from modeling.checkpoint import Checkpoint, count_parameters
from modeling.deltas import alignment, write_edited
from modeling.loading import device_name
from modeling.projections import Factored, read_weight
from modeling.rewrite import rewrite_weights
from settings import SettingError

STEPS = "steps"


@dataclass(slots=True)
class Tally:
    """What one step did.

    Attributes:
        selected: Scalars of the neurons it was the first to select.
        changed: Those of them that differ, before they are rounded to the file's dtype.
        modules: Projections with such.
        before: Sum of squares of all selected neurons before the edit, those of earlier steps too.
        after: Sum of squares of these neurons after it.
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
class ContinualEdit:
    """The result of continual projection: q, the models, their tallies in that order, and U."""

    q: float
    steps: tuple[EditStep, ...]
    tallies: tuple[Tally, ...]
    union: Union


def project_dimensions(
    plan: EditPlan,
    models: Models,
    start: Start,
    prompts: Mapping[str, Sequence[TokenRow]],
    out: Path,
) -> ContinualEdit:
    """Edits the neurons of each dimension that no dimension before had, and writes the models.

    With fixed scores every step's model is `start` with all neurons so far projected, once and
    from `start`'s own weights, so that the last one depends on their union alone.  With
    `rescore` a step scores and edits the model of the step before.  `prompts` holds the token rows
    of each dimension in order, and of the benign prompts (`BENIGN`); the last model is written to
    `out`, those before to "steps" in it.
    """
    rescore, granularity = plan.settings.rescore, plan.settings.granularity
    dimensions = [key for key in prompts if key != BENIGN]
    first = dimensions[:1] if rescore else dimensions
    scores = NeuronScores(models.aligned, start.model, plan, _of(prompts, first))
    q = choose_q(plan, scores, dimensions, start.union)
    union, written = start.union.copy(), start.missing.copy()
    scratch = out.with_name(f".{out.name}.{STEPS}")
    steps, tallies, source = [], [], start.model
    try:
        for index, name in enumerate(dimensions):
            if rescore and index:
                scores = NeuronScores(models.aligned, source, plan, _of(prompts, [name]))
                written = Union(granularity, plan.shapes)
            fresh = new_neurons(scores, name, q, union)
            for module, mask in fresh.items():
                union.add(module, mask)
                written.add(module, mask)
            last = index == len(dimensions) - 1
            folder = out if last else scratch / step_folder(index, name)
            model, tally = write_step(plan, models, source, written, fresh, folder)
            source = model if rescore else start.model
            tallies.append(tally)
            steps.append(EditStep(name, model, tally.changed))
        if scratch.exists():
            scratch.rename(out / STEPS)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    moved = [_moved(step, scratch, out / STEPS) for step in steps]
    return ContinualEdit(q, tuple(moved), tuple(tallies), union)


def choose_q(
    plan: EditPlan, scores: NeuronScores, dimensions: Sequence[str], union: Union
) -> float:
    """`q` as it is set, or the one whose share of edited scalars is `target_edited`.

    Raises:
        SettingError: Not even q = 1 edits so much.
    """
    target = plan.settings.target_edited
    if target is None:
        return plan.settings.q

    def share(q: float) -> float:
        together = Union(plan.settings.granularity, plan.shapes)
        for name in dimensions:
            for module, mask in new_neurons(scores, name, q, union).items():
                together.add(module, mask)
        return sum(together.scalars.values()) / plan.scalars

    if (most := share(1.0)) < target:
        raise SettingError(
            f"defense.target_edited={target} can't be reached: even q=1 selects only "
            f"{most:.4f} of the {plan.scalars:,} scalars of the model's projections in "
            f"{len(plan.layers)} layers; lower it, give more defense.layers, or lower defense.p"
        )
    return find_q(share, target)


def new_neurons(scores: NeuronScores, dimension: str, q: float, union: Union) -> dict[str, Tensor]:
    """N_t = M_t minus U (paper: continual projection); projections without any are left out."""
    neurons = {}
    for name, mask in scores.masks(dimension, q):
        fresh = mask.cpu() & ~union.mask(name)
        if bool(fresh.any()):
            neurons[name] = fresh
    return neurons


def write_step(
    plan: EditPlan,
    models: Models,
    source: Checkpoint,
    written: Union,
    fresh: Mapping[str, Tensor],
    out: Path,
) -> tuple[Checkpoint, Tally]:
    """Writes `source` with the neurons of `written` edited; `fresh` no step before selected."""
    device, tally = device_name(), Tally()
    tally.selected = sum(
        int(mask.sum()) * (1 if mask.dim() == 2 else plan.shapes[name][1])
        for name, mask in fresh.items()
    )

    def edit(name: str, matrix: Matrix) -> Matrix | None:
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
        if plan.settings.target == "merged":
            return cast(Tensor | None, edit(name, weight))
        aligned = read_weight(models.aligned, name).to(device)
        delta = cast(Tensor | None, edit(name, weight - aligned))
        if delta is None:
            return None
        # What isn't selected stays as it is, to the bit.
        return torch.where(written.mask(name).to(device), aligned.add_(delta), weight)

    names = [name for name, count in written.scalars.items() if count]
    if plan.settings.output_form == "adapter":
        count = write_edited(models.aligned, source, out, edit, names=names)
    else:
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


def describe(plan: EditPlan, result: ContinualEdit, attacked: Checkpoint, edited: int) -> Edit:
    """Describes an edit as the contract of a defense asks; `edited` scalars differ by it."""
    steps, tallies, total = result.steps, result.tallies, plan.scalars
    selected = sum(tally.selected for tally in tallies)
    touched = {name for tally in tallies for name in tally.modules}
    diagnostics = {
        "layers": list(plan.layers),
        "q": result.q,
        "p": plan.settings.p,
        "share": selected / total,
        "selected": selected,
        "denominator": total,
        "denominator_is": "scalars of all projections in the model's blocks",
        "projection": asdict(plan.projection),
        "norm_kept": tallies[-1].norm_kept,
        "steps": [
            {
                "name": step.name,
                "selected": tally.selected,
                "share": tally.selected / total,
                "changed": tally.changed,
            }
            for step, tally in zip(steps, tallies, strict=True)
        ],
        "without_direction": sorted(set().union(*(tally.without_direction for tally in tallies))),
        "maps": [_share_map(plan, result.union)],
    }
    return Edit(
        defended=steps[-1].checkpoint,
        parameters_edited=edited,
        parameters_total=count_parameters(replace(attacked, adapter=None)),
        modules=tuple(name for name in plan.shapes if name in touched),
        diagnostics=diagnostics,
        steps=steps if len(steps) > 1 else (),
    )


def _share_map(plan: EditPlan, union: Union) -> dict[str, Any]:
    """The share of each projection that has been edited, by layer."""
    layers, edited = by_layer(plan.shapes), union.scalars
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in plan.shapes))

    def share(names: list[str], kind: str) -> float:
        members = [name for name in names if name.endswith(f".{kind}")]
        whole = sum(math.prod(plan.shapes[name]) for name in members)
        return 100 * sum(edited.get(name, 0) for name in members) / whole if whole else 0.0

    return {
        "name": "edited_neurons",
        "title": "Share of each projection that was edited; outlined: the layers chosen",
        "rows": "layer",
        "columns": f"projection ({', '.join(kind.removesuffix('_proj') for kind in kinds)})",
        "unit": "%",
        "values": [[share(names, kind) for kind in kinds] for names in layers.values()],
        "marked": [[at, column] for at in plan.layers for column in range(len(kinds))],
    }
