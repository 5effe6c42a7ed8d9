"""What enters lora_A and lora_B on some data: how defenses score an adapter's own scalars."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modeling.capture import Batch, captured_inputs


def adapter_linears(model: Any, names: Iterable[str]) -> dict[str, nn.Linear]:
    """{"MODULE.A": lora_A, "MODULE.B": lora_B} of a `PeftModel`'s active adapter.

    Args:
        model: The `PeftModel`.
        names: Module paths of adapted projections inside the base model.
    """
    core, active = model.get_base_model(), model.active_adapter
    linears: dict[str, nn.Linear] = {}
    for name in names:
        layer = core.get_submodule(name)
        linears |= {f"{name}.A": layer.lora_A[active], f"{name}.B": layer.lora_B[active]}
    return linears


@torch.no_grad()
def consume_inputs(
    core: nn.Module,
    modules: Mapping[str, nn.Module],
    data: Iterable[Batch],
    positions: Callable[[Batch], Tensor],
    consume: Callable[[str, Tensor], None],
) -> None:
    """Runs a model over batches and passes on what enters some of its modules.

    Args:
        core: What is called with each batch.
        modules: {name: module in it}.
        data: The batches.
        positions: Gives the tokens of a batch that count, (rows, length) bool.
        consume: Called with a module's name and its input (tokens, d).
    """
    with captured_inputs(modules, consume) as focus:
        for batch in data:
            focus.positions = positions(batch)
            core(**batch.inputs, use_cache=False)
