"""The identification of safety-critical neurons: statistics, scores and masks (paper: step 2)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from defenses.nlsr import gradients, scores
from defenses.nlsr.masks import MaskPair, TopK, cut
from modeling.capture import (
    Batch,
    Focus,
    Grams,
    SquareSums,
    TokenRow,
    batches,
    captured_inputs,
    run_block,
)
from modeling.lora import LoraAdapter, grouped
from settings import SettingError

Method = Literal["low_rank", "wanda", "snip", "preference_snip", "random"]
ScorePairs = dict[str, tuple[Tensor, Tensor]]

_BLOCK = re.compile(r"^(?P<path>.+?)\.(?P<index>\d+)\.")


@dataclass(frozen=True, slots=True)
class Identification:
    """The resolved settings of the identification; see `NLSR` for their meaning."""

    method: Method
    sparsity: float
    topk: TopK
    mask_seed: int = 42
    batch_size: int = 8
    rank_rule: scores.RankRule = "kept"
    sequential: bool = True
    accumulate_gradients: bool = False
    dpo_beta: float = 0.1


@torch.no_grad()
def identify(
    model: Any, reference: LoraAdapter, rows: Sequence[TokenRow], plan: Identification
) -> dict[str, MaskPair]:
    """Finds the safety-critical neurons of the reference adapter.

    Args:
        model: W_0 with the reference adapter on it, a `PeftModel` (unused by "random").  With
            the low-rank score in sequential order its adapter is overwritten by the projections.
        reference: The same adapter on disk, for names and shapes.
        rows: Token ids of calibration prompts and answers; only answers enter statistics.  For
            "preference_snip" they alternate between chosen and rejected.
        plan: How to score and cut.

    Returns:
        {module: (mask of A (r, d_in), mask of B (d_out, r))}, bool, on the CPU.
    """
    generator = torch.Generator().manual_seed(plan.mask_seed)
    masks: dict[str, MaskPair] = {}
    for scored in _scored(model, reference, rows, plan, generator):
        masks.update(_cut(scored, plan, generator))
    return {name: masks[name] for name in reference.names}


def _scored(
    model: Any,
    reference: LoraAdapter,
    rows: Sequence[TokenRow],
    plan: Identification,
    generator: torch.Generator,
) -> Iterator[ScorePairs]:
    """Score pairs of all modules, in portions: per block where the method goes by blocks."""
    if plan.method == "random":
        yield from _random(reference, generator)
        return
    device = str(model.device)
    model.eval()
    sides = _sides(model, reference.names)
    if plan.method == "low_rank":
        data = batches(rows, plan.batch_size, device, by_length=True)
        yield from _low_rank(model, sides, data, plan)
    elif plan.method == "wanda":
        data = batches(rows, plan.batch_size, device, by_length=True)
        yield _wanda(model, sides, data, len(rows))
    else:
        yield _by_gradient(model, sides, rows, plan, device)


def _cut(
    scored: ScorePairs, plan: Identification, generator: torch.Generator
) -> Iterator[tuple[str, MaskPair]]:
    shapes = {name: (*a.shape, *b.shape) for name, (a, b) in scored.items()}
    for names in grouped(shapes).values():
        stacks = (torch.stack([scored[name][side] for name in names]) for side in (0, 1))
        a, b = (cut(stack, plan.sparsity, plan.topk, generator).cpu() for stack in stacks)
        yield from zip(names, zip(a, b, strict=True), strict=True)


def _random(reference: LoraAdapter, generator: torch.Generator) -> Iterator[ScorePairs]:
    """Uniform scores, the chance level of Table 5."""
    for name, shape in reference.shapes.items():
        a = torch.rand(shape.rank, shape.d_in, generator=generator)
        b = torch.rand(shape.d_out, shape.rank, generator=generator)
        yield {name: (a, b)}


def _low_rank(
    model: Any, sides: Mapping[str, Sequence[nn.Linear]], data: list[Batch], plan: Identification
) -> Iterator[ScorePairs]:
    """|What| per module (paper: step 2), of the whole model at once or block by block.

    All it needs of the data is Z^T Z, (r, r) per module, Z the tokens between A and B.
    """
    base = model.get_base_model()
    if not plan.sequential:
        grams = Grams()
        with captured_inputs({n: s[1] for n, s in sides.items()}, grams.add) as focus:
            for batch in data:
                focus.positions = batch.answers
                base(**batch.inputs, use_cache=False)
        yield _projected(sides, grams, plan, keep=False)
        return
    blocks, members = _blocks(base, list(sides))
    hidden: list[Tensor | None] = [None] * len(data)
    last = max(members)
    for index in range(last + 1):
        here = {name: sides[name] for name in members.get(index, [])}
        if here:
            grams = Grams()
            with captured_inputs({n: s[1] for n, s in here.items()}, grams.add) as focus:
                _run(base, blocks, index, data, hidden, focus)
            yield _projected(here, grams, plan, keep=True)
        if index < last:
            hidden = _run(base, blocks, index, data, hidden, None)


def _run(
    base: nn.Module,
    blocks: nn.ModuleList,
    index: int,
    data: Sequence[Batch],
    hidden: Sequence[Tensor | None],
    focus: Focus | None,
) -> list[Tensor | None]:
    """Runs one block over all batches; outputs wait on the CPU, and aren't kept under a focus."""
    outputs: list[Tensor | None] = []
    for batch, stored in zip(data, hidden, strict=True):
        if focus is not None:
            focus.positions = batch.answers
        entering = None if stored is None else stored.to(batch.input_ids.device)
        output = run_block(base, list(blocks), index, batch, entering)
        outputs.append(None if focus is not None else output.cpu())
    return outputs


def _projected(
    sides: Mapping[str, Sequence[nn.Linear]], grams: Grams, plan: Identification, *, keep: bool
) -> ScorePairs:
    """|What| of modules, same shapes together; `keep` writes What into the model."""
    scored: ScorePairs = {}
    shapes = {name: (*a.weight.shape, b.out_features) for name, (a, b) in sides.items()}
    for (rank, d_in, d_out), names in grouped(shapes).items():
        a, b = (torch.stack([sides[name][side].weight for name in names]) for side in (0, 1))
        gram = torch.stack([grams.sums[name] for name in names])
        rank_a, rank_b = (
            scores.projection_rank(plan.rank_rule, plan.sparsity, rank, shape)
            for shape in ((rank, d_in), (d_out, rank))
        )
        whats = scores.project(a, b, gram, rank_a, rank_b)
        for name, *projected in zip(names, *whats, strict=True):
            if keep:
                for linear, what in zip(sides[name], projected, strict=True):
                    linear.weight.copy_(what)
            scored[name] = (projected[0].abs(), projected[1].abs())
    return scored


def _wanda(
    model: Any, sides: Mapping[str, Sequence[nn.Linear]], data: list[Batch], samples: int
) -> ScorePairs:
    squares = SquareSums()
    linears = _linears(sides)
    with captured_inputs(linears, squares.add) as focus:
        for batch in data:
            focus.positions = batch.answers
            model.get_base_model()(**batch.inputs, use_cache=False)
    scored: ScorePairs = {}
    for name, (lora_a, lora_b) in sides.items():
        x, z = (squares.sums[f"{name}.{side}"] for side in "AB")
        a, b = scores.wanda(lora_a.weight, lora_b.weight, x, z, samples)
        scored[name] = (a, b)
    return scored


def _by_gradient(
    model: Any,
    sides: Mapping[str, Sequence[nn.Linear]],
    rows: Sequence[TokenRow],
    plan: Identification,
    device: str,
) -> ScorePairs:
    """|W| * sum |g|, the SNIP score with the likelihood or the preference loss."""
    linears = _linears(sides)
    accumulate = plan.accumulate_gradients
    if plan.method == "snip":
        data = batches(rows, plan.batch_size, device)
        sums = gradients.snip(model, linears, data, accumulate=accumulate)
    else:
        data = batches(rows, 2 * plan.batch_size, device)
        sums = gradients.preference_snip(
            model, linears, data, beta=plan.dpo_beta, accumulate=accumulate
        )
    weighted = {key: linears[key].weight.detach().abs() * total for key, total in sums.items()}
    return {name: (weighted[f"{name}.A"], weighted[f"{name}.B"]) for name in sides}


def _sides(model: Any, names: Sequence[str]) -> dict[str, tuple[nn.Linear, nn.Linear]]:
    """The lora_A and lora_B layers of each module."""
    base = model.get_base_model()
    layers = {name: base.get_submodule(name) for name in names}
    adapter = model.active_adapter
    return {name: (layer.lora_A[adapter], layer.lora_B[adapter]) for name, layer in layers.items()}


def _linears(sides: Mapping[str, Sequence[nn.Linear]]) -> dict[str, nn.Linear]:
    return {f"{n}.{side}": s[at] for n, s in sides.items() for at, side in enumerate("AB")}


def _blocks(base: nn.Module, names: Sequence[str]) -> tuple[nn.ModuleList, dict[int, list[str]]]:
    """The decoder blocks that adapted modules lie in, and the modules of each block.

    Raises:
        SettingError: Some modules lie outside of a single stack of blocks.
    """
    matches = [_BLOCK.match(name) for name in names]
    paths = {match["path"] if match else "" for match in matches}
    stack = base.get_submodule(paths.pop()) if len(paths) == 1 else None
    if not isinstance(stack, nn.ModuleList):
        raise SettingError(
            "defense.sequential=true goes through the model block by block, but some adapted "
            "modules lie outside of its blocks; set defense.sequential=false"
        )
    members: dict[int, list[str]] = {}
    for name, match in zip(names, matches, strict=True):
        if match:
            members.setdefault(int(match["index"]), []).append(name)
    return stack, members
