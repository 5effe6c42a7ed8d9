"""The report of FGSN's `apply`, with every share beside its denominator."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from defenses.base import Edit
from defenses.fgsn.continual import ContinualEdit
from defenses.fgsn.layers import by_layer
from defenses.fgsn.plan import EditPlan
from defenses.fgsn.union import Union
from modeling.checkpoint import Checkpoint, count_parameters


def describe(plan: EditPlan, result: ContinualEdit, attacked: Checkpoint, edited: int) -> Edit:
    """Describes an edit as the contract of a defense asks.

    Args:
        plan: The settings.
        result: The steps, their tallies and U.
        attacked: The model that was edited.
        edited: Scalars of effective weights that differ from its own.
    """
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
