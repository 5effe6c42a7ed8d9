"""What a repair did, with every share beside its denominator."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from defenses.base import Edit
from defenses.fgsn.continual import Plan, Repaired
from defenses.fgsn.layers import by_layer
from defenses.fgsn.union import Union
from modeling.checkpoint import Checkpoint
from modeling.headers import count_parameters


def report(plan: Plan, repaired: Repaired, attacked: Checkpoint, edited: int) -> Edit:
    """Describes a repair as the contract of a defense asks.

    Args:
        plan: The settings.
        repaired: What `repair` did.
        attacked: The model that was repaired.
        edited: Scalars of effective weights that differ from its own.
    """
    steps, tallies, total = repaired.steps, repaired.tallies, plan.scalars
    selected = sum(tally.selected for tally in tallies)
    touched = {name for tally in tallies for name in tally.modules}
    diagnostics = {
        "layers": list(plan.layers),
        "q": repaired.q,
        "p": plan.p,
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
        "maps": [_share_map(plan, repaired.union)],
    }
    return Edit(
        defended=steps[-1].checkpoint,
        parameters_edited=edited,
        parameters_total=count_parameters(replace(attacked, adapter=None)),
        modules=tuple(name for name in plan.shapes if name in touched),
        diagnostics=diagnostics,
        steps=steps if len(steps) > 1 else (),
    )


def _share_map(plan: Plan, union: Union) -> dict[str, Any]:
    """The share of each projection that has been edited, by layer."""
    layers, edited = by_layer(plan.shapes), union.scalars
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in plan.shapes))

    def share(names: list[str], kind: str) -> float:
        found = [name for name in names if name.endswith(f".{kind}")]
        whole = sum(plan.shapes[name][0] * plan.shapes[name][1] for name in found)
        return 100 * sum(edited.get(name, 0) for name in found) / whole if whole else 0.0

    return {
        "name": "edited_neurons",
        "title": "Share of each projection that was edited; outlined: the layers chosen",
        "rows": "layer",
        "columns": f"projection ({', '.join(kind.removesuffix('_proj') for kind in kinds)})",
        "unit": "%",
        "values": [[share(names, kind) for kind in kinds] for names in layers.values()],
        "marked": [[at, column] for at in plan.layers for column in range(len(kinds))],
    }
