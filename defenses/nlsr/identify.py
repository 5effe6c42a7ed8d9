"""The identification of safety-critical neurons: statistics, scores and masks (paper: step 2)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from defenses.nlsr import gradients, scores
from defenses.nlsr.masks import MaskPair, cut
from modeling.capture import (
    Batch,
    Focus,
    Grams,
    SquareSums,
    TokenRow,
    adapter_linears,
    batches,
    captured_inputs,
    consume_inputs,
    run_block,
)
from modeling.lora import LoraAdapter, grouped
from settings import SettingError

if TYPE_CHECKING:
    from defenses.nlsr import NLSR

ScorePairs = dict[str, tuple[Tensor, Tensor]]
Linears = Mapping[str, nn.Linear]

_BLOCK = re.compile(r"^(?P<path>.+?)\.(?P<index>\d+)\.")


@torch.no_grad()
def identify(
    model: Any, reference: LoraAdapter, rows: Sequence[TokenRow], plan: NLSR
) -> dict[str, MaskPair]:
    """Finds the safety-critical neurons of the reference adapter.

    Args:
        model: W_0 with the reference adapter on it, a `PeftModel` (unused by "random").  With
            the low-rank score in sequential order its adapter is overwritten by the projections.
        reference: That adapter on disk, for names and shapes.
        rows: Token ids of calibration prompts and answers; only answers enter statistics.  For
            "preference_snip" they alternate between chosen and rejected.
        plan: The settings of the scores and the cut.

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
    plan: NLSR,
    generator: torch.Generator,
) -> Iterator[ScorePairs]:
    """Score pairs of all modules, in portions: per block where the method goes by blocks."""
    if plan.method == "random":
        yield from _random(reference, generator)
        return
    model.eval()
    linears = adapter_linears(model, reference.names)
    if plan.method in ("snip", "preference_snip"):
        yield _by_gradient(model, linears, reference.names, rows, plan)
        return
    data = batches(rows, plan.batch_size, str(model.device), by_length=True)
    if plan.method == "low_rank":
        yield from _low_rank(model.get_base_model(), linears, reference.names, data, plan)
    else:
        yield _wanda(model.get_base_model(), linears, reference.names, data, len(rows))


def _cut(
    scored: ScorePairs, plan: NLSR, generator: torch.Generator
) -> Iterator[tuple[str, MaskPair]]:
    shapes = {name: (*a.shape, *b.shape) for name, (a, b) in scored.items()}
    topk = plan.resolved["topk"]
    for names in grouped(shapes).values():
        stacks = (torch.stack([scored[name][side] for name in names]) for side in (0, 1))
        a, b = (cut(stack, plan.sparsity, topk, generator).cpu() for stack in stacks)
        yield from zip(names, zip(a, b, strict=True), strict=True)


def _random(reference: LoraAdapter, generator: torch.Generator) -> Iterator[ScorePairs]:
    """Uniform scores, the chance level of Table 5."""
    for name, shape in reference.shapes.items():
        a = torch.rand(shape.rank, shape.d_in, generator=generator)
        b = torch.rand(shape.d_out, shape.rank, generator=generator)
        yield {name: (a, b)}


def _low_rank(
    base: nn.Module,
    linears: Linears,
    names: Sequence[str],
    data: list[Batch],
    plan: NLSR,
) -> Iterator[ScorePairs]:
    """|What| per module (paper: step 2), of the whole model at once or block by block.

    All it needs of the data is Z^T Z, (r, r) per module, Z the tokens between A and B.
    """
    if not plan.sequential:
        grams = Grams()
        seconds = {name: linears[f"{name}.B"] for name in names}
        consume_inputs(base, seconds, data, attrgetter("answers"), grams.add)
        yield _projected(linears, names, grams, plan, keep=False)
        return
    blocks, members = _blocks(base, names)
    hidden: list[Tensor | None] = [None] * len(data)
    last = max(members)
    for index in range(last + 1):
        if of_block := members.get(index):
            grams = Grams()
            seconds = {name: linears[f"{name}.B"] for name in of_block}
            with captured_inputs(seconds, grams.add) as focus:
                _run(base, blocks, index, data, hidden, focus)
            yield _projected(linears, of_block, grams, plan, keep=True)
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
    linears: Linears, names: Sequence[str], grams: Grams, plan: NLSR, *, keep: bool
) -> ScorePairs:
    """|What| of modules, same shapes together; `keep` writes What into the model."""
    scored: ScorePairs = {}
    pairs = {name: (linears[f"{name}.A"], linears[f"{name}.B"]) for name in names}
    shapes = {name: (*a.weight.shape, b.out_features) for name, (a, b) in pairs.items()}
    for (rank, d_in, d_out), group in grouped(shapes).items():
        a, b = (torch.stack([pairs[name][side].weight for name in group]) for side in (0, 1))
        gram = torch.stack([grams.sums[name] for name in group])
        rank_a, rank_b = (
            scores.projection_rank(plan.resolved["rank_rule"], plan.sparsity, rank, shape)
            for shape in ((rank, d_in), (d_out, rank))
        )
        whats = scores.project(a, b, gram, rank_a, rank_b)
        for name, *projected in zip(group, *whats, strict=True):
            if keep:
                for linear, what in zip(pairs[name], projected, strict=True):
                    linear.weight.copy_(what)
            scored[name] = (projected[0].abs(), projected[1].abs())
    return scored


def _wanda(
    base: nn.Module, linears: Linears, names: Sequence[str], data: list[Batch], samples: int
) -> ScorePairs:
    squares = SquareSums()
    consume_inputs(base, linears, data, attrgetter("answers"), squares.add)
    scored: ScorePairs = {}
    for name in names:
        lora_a, lora_b = (linears[f"{name}.{side}"] for side in "AB")
        x, z = (squares.sums[f"{name}.{side}"] for side in "AB")
        a, b = scores.wanda(lora_a.weight, lora_b.weight, x, z, samples)
        scored[name] = (a, b)
    return scored


def _by_gradient(
    model: Any,
    linears: Linears,
    names: Sequence[str],
    rows: Sequence[TokenRow],
    plan: NLSR,
) -> ScorePairs:
    """|W| * sum |g|, the SNIP score with the likelihood or the preference loss."""
    accumulate, device = plan.resolved["accumulate_gradients"], str(model.device)
    if plan.method == "snip":
        data = batches(rows, plan.batch_size, device)
        sums = gradients.snip(model, linears, data, accumulate=accumulate)
    else:
        data = batches(rows, 2 * plan.batch_size, device)
        sums = gradients.preference_snip(
            model, linears, data, beta=plan.dpo_beta, accumulate=accumulate
        )
    weighted = {key: linears[key].weight.detach().abs() * total for key, total in sums.items()}
    return {name: (weighted[f"{name}.A"], weighted[f"{name}.B"]) for name in names}


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
