"""The identification of safety-critical neurons: statistics, scores and masks (paper: step 2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from defenses.nlsr import gradients, scores
from defenses.nlsr.masks import MaskPair, cut
from modeling.capture import (
    Batch,
    Grams,
    SquareSums,
    TokenRow,
    adapter_linears,
    batches,
    captured_inputs,
    consume_inputs,
    entered,
    run_block,
)
from modeling.gradients import log_likelihoods
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
        model: W_0 with the reference adapter on it, a `PeftModel` (unused by "random").  Its
            adapter is overwritten: by the low-rank score's projections in sequential order, or by
            zeros where another score's masks are.
        reference: That adapter on disk, for names and shapes.
        rows: Token ids of calibration prompts and answers; only answers enter statistics.  For
            "preference_snip" they alternate between chosen and rejected.
        plan: The settings of the scores and the cut.

    Returns:
        {module: (mask of A (r, d_in), mask of B (d_out, r))}, bool, on the CPU.
    """
    generator = torch.Generator().manual_seed(plan.mask_seed)
    linears = {} if plan.method == "random" else adapter_linears(model, reference.names)
    masks: dict[str, MaskPair] = {}
    for scored in _scored(model, linears, reference, rows, plan, generator):
        found = dict(_cut(scored, plan, generator))
        masks |= found
        if plan.method not in ("random", "low_rank"):
            _zero(linears, found)
    return {name: masks[name] for name in reference.names}


def _scored(
    model: Any,
    linears: Linears,
    reference: LoraAdapter,
    rows: Sequence[TokenRow],
    plan: NLSR,
    generator: torch.Generator,
) -> Iterator[ScorePairs]:
    """Score pairs of all modules, in portions: per block where the method goes by blocks.

    A later block is scored on what comes out of the earlier ones as they are then.
    """
    if plan.method == "random":
        yield from _random(reference, generator)
        return
    model.eval()
    size = plan.batch_size * (2 if plan.method == "preference_snip" else 1)
    by_length = plan.method in ("low_rank", "wanda")  # The others' sums may depend on the order.
    data = batches(rows, size, str(model.device), by_length=by_length)
    run = _Pass(model, data, [None] * len(data))
    members = {0: list(reference.names)}
    if plan.resolved["sequential"]:
        run.blocks, members = _blocks(model.get_base_model(), reference.names)
    score = _scorer(run, linears, len(rows), plan)
    last = max(members)
    for index in range(last + 1):
        if names := members.get(index):
            yield score(names)
        if index < last:
            run.advance()


def _scorer(
    run: _Pass, linears: Linears, samples: int, plan: NLSR
) -> Callable[[Sequence[str]], ScorePairs]:
    """What scores the modules of these names on the pass as it then is."""
    if plan.method == "low_rank":
        return partial(_low_rank, run, linears, plan)
    if plan.method == "wanda":
        return partial(_wanda, run, linears, samples)
    if plan.method == "snip":
        return partial(_by_gradient, run, linears, plan, None)
    with run.model.disable_adapter():
        reference = [log_likelihoods(run.model, batch) for batch in run.data]
    return partial(_by_gradient, run, linears, plan, reference)


def _zero(linears: Linears, masks: Mapping[str, MaskPair]) -> None:
    """Zeroes what the masks leave out."""
    for name, pair in masks.items():
        for side, mask in zip("AB", pair, strict=True):
            weight = linears[f"{name}.{side}"].weight
            weight.mul_(mask.to(weight.device))


@dataclass(slots=True)
class _Pass:
    """The calibration rows on their way through a model, as a whole or block by block.

    Attributes:
        model: A `PeftModel`.
        data: The rows.
        hidden: What enters the next block, of each batch; None: what the model gives it.
        blocks: The decoder blocks; none where the model is run as a whole.
        index: The next block.
    """

    model: Any
    data: list[Batch]
    hidden: list[Tensor | None]
    blocks: Sequence[nn.Module] = ()
    index: int = 0

    def inputs(self, modules: Linears, consume: Callable[[str, Tensor], None]) -> None:
        """Passes what enters modules at answer tokens to `consume`; those of the next block."""
        if not self.blocks:
            base = self.model.get_base_model()
            consume_inputs(base, modules, self.data, attrgetter("answers"), consume)
            return
        with captured_inputs(modules, consume) as focus:
            for at, batch in enumerate(self.data):
                focus.positions = batch.answers
                self._run(at)

    def likelihoods(self, at: int) -> Tensor:
        """The log-likelihoods of a batch's answers, with gradients from the next block on."""
        if not self.blocks:
            return log_likelihoods(self.model, self.data[at])
        hidden = self._entering(at)
        hidden = None if hidden is None else hidden.detach().requires_grad_()
        with entered(self.blocks, self.index, hidden):
            return log_likelihoods(self.model, self.data[at])

    def advance(self) -> None:
        """Runs the next block; what comes out of it waits on the CPU."""
        self.hidden = [self._run(at).cpu() for at in range(len(self.data))]
        self.index += 1

    def _run(self, at: int) -> Tensor:
        base = self.model.get_base_model()
        return run_block(base, self.blocks, self.index, self.data[at], self._entering(at))

    def _entering(self, at: int) -> Tensor | None:
        stored = self.hidden[at]
        return None if stored is None else stored.to(self.data[at].input_ids.device)


def _cut(
    scored: ScorePairs, plan: NLSR, generator: torch.Generator
) -> Iterator[tuple[str, MaskPair]]:
    shapes = {name: (*a.shape, *b.shape) for name, (a, b) in scored.items()}
    topk, rounding = plan.resolved["topk"], plan.resolved["rounding"]
    for names in grouped(shapes).values():
        stacks = (torch.stack([scored[name][side] for name in names]) for side in (0, 1))
        a, b = (cut(stack, plan.sparsity, topk, rounding, generator).cpu() for stack in stacks)
        yield from zip(names, zip(a, b, strict=True), strict=True)


def _random(reference: LoraAdapter, generator: torch.Generator) -> Iterator[ScorePairs]:
    """Uniform scores, the chance level of Table 5."""
    for name, shape in reference.shapes.items():
        a = torch.rand(shape.rank, shape.d_in, generator=generator)
        b = torch.rand(shape.d_out, shape.rank, generator=generator)
        yield {name: (a, b)}


def _low_rank(run: _Pass, linears: Linears, plan: NLSR, names: Sequence[str]) -> ScorePairs:
    """|What| per module (paper: step 2); block by block, What is written into the model.

    All it needs of the data is Z^T Z, (r, r) per module, Z the tokens between A and B.
    """
    grams = Grams()
    run.inputs({name: linears[f"{name}.B"] for name in names}, grams.add)
    return _projected(linears, names, grams, plan, keep=plan.resolved["sequential"])


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


def _wanda(run: _Pass, linears: Linears, samples: int, names: Sequence[str]) -> ScorePairs:
    squares = SquareSums()
    run.inputs({key: linears[key] for key in _keys(names)}, squares.add)
    scored: ScorePairs = {}
    for name in names:
        lora_a, lora_b = (linears[f"{name}.{side}"] for side in "AB")
        x, z = (squares.sums[f"{name}.{side}"] for side in "AB")
        a, b = scores.wanda(lora_a.weight, lora_b.weight, x, z, samples)
        scored[name] = (a, b)
    return scored


def _by_gradient(
    run: _Pass,
    linears: Linears,
    plan: NLSR,
    reference: Sequence[Tensor] | None,
    names: Sequence[str],
) -> ScorePairs:
    """|W| * sum |g|, the SNIP score with the likelihood or, given a reference, DPO's loss."""

    def losses() -> Iterator[Tensor]:
        for at, batch in enumerate(run.data):
            likelihoods = run.likelihoods(at)
            if reference is None:
                yield gradients.snip_loss(likelihoods, batch)
            else:
                yield gradients.preference_loss(likelihoods, reference[at], plan.dpo_beta)

    sums = gradients.GradientSums(
        plan.resolved["accumulate_gradients"], rows_per_sample=1 if reference is None else 2
    )
    of_block = {key: linears[key] for key in _keys(names)}
    totals = gradients.sum_gradients(run.model, of_block, losses(), sums)
    weighted = {key: linears[key].weight.detach().abs() * total for key, total in totals.items()}
    return {name: (weighted[f"{name}.A"], weighted[f"{name}.B"]) for name in names}


def _keys(names: Sequence[str]) -> list[str]:
    return [f"{name}.{side}" for name in names for side in "AB"]


def _blocks(base: nn.Module, names: Sequence[str]) -> tuple[list[nn.Module], dict[int, list[str]]]:
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
    return list(stack), members
