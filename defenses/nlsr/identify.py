"""The identification of safety-critical neurons: statistics, scores and masks (paper: step 2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
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
    entered,
    run_block,
)
from modeling.gradients import log_likelihoods
from modeling.lora import LoraAdapter, grouped
from modeling.streaming import held
from settings import SettingError

if TYPE_CHECKING:
    from defenses.nlsr import NLSR

# Gives the scores of a module's "A" (r, d_in) or "B" (d_out, r); to be asked once for each.
Score = Callable[[str, str], Tensor]
# Modules of one shape, and their scores.
Portion = tuple[Sequence[str], Score]
Linears = Mapping[str, nn.Linear]

# What a CPU holds the graph of: its products gain nothing from more tokens, and each takes room.
_GRAPH_TOKENS = 128
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
    for names, score in _scored(model, linears, reference, rows, plan, generator):
        found = _cut(names, score, plan, generator)
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
) -> Iterator[Portion]:
    """Scores of all modules, in portions whose masks are found before the next is scored.

    Where the method goes by blocks, a later one is scored on what comes out of the earlier ones as
    they are then.
    """
    if plan.method == "random":
        yield from _random(reference, generator)
        return
    model.eval()
    per_sample = 2 if plan.method == "preference_snip" else 1
    size = plan.batch_size
    if plan.by_gradient and model.device.type == "cpu":
        longest = per_sample * max(len(prompt) + len(answer) for prompt, answer in rows)
        size = min(size, max(1, _GRAPH_TOKENS // longest))
    # The sums of gradients may depend on the order.
    data = batches(rows, size * per_sample, str(model.device), by_length=not plan.by_gradient)
    run = _Pass(model, data, [None] * len(data))
    members = {0: list(reference.names)}
    if plan.resolved["sequential"]:
        run.blocks, members = _blocks(model.get_base_model(), reference.names)
    score = _scorer(run, linears, len(rows), plan)
    last = max(members)
    for index in range(last + 1):
        if names := members.get(index):
            sizes = {name: reference.shapes[name] for name in names}
            shapes = {name: (s.rank, s.d_in, s.d_out) for name, s in sizes.items()}
            yield from score(list(grouped(shapes).values()))
        if index < last:
            run.advance()


def _scorer(
    run: _Pass, linears: Linears, samples: int, plan: NLSR
) -> Callable[[list[list[str]]], Iterator[Portion]]:
    """What scores modules, in groups of one shape, on the pass as it then is."""
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
        """Passes what enters modules at answer tokens to `consume`; those of the next block.

        Nothing behind the last of them is run: where that is a lora_B, neither is the product with
        its projection's own weight.
        """
        with captured_inputs(modules, consume) as focus, ExitStack() as stack:
            stack.enter_context(self._held())
            for at, batch in enumerate(self.data):
                focus.run(batch.answers, partial(self._run, at))
                if at == 0 and focus.last is not None:
                    layer, _, side = focus.last.rpartition(".")
                    if side == "B":
                        stack.enter_context(_unread(self.model.get_base_model(), layer))

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
        with self._held():
            for at in range(len(self.data)):
                self.hidden[at] = self._run(at).cpu()
        self.index += 1

    def _held(self) -> AbstractContextManager[None]:
        """Reads a streamed block once for all rows."""
        return held(self.blocks[self.index]) if self.blocks else nullcontext()

    def _run(self, at: int) -> Tensor:
        base = self.model.get_base_model()
        if not self.blocks:
            return base(**self.data[at].inputs, use_cache=False)
        return run_block(base, self.blocks, self.index, self.data[at], self._entering(at))

    def _entering(self, at: int) -> Tensor | None:
        stored = self.hidden[at]
        return None if stored is None else stored.to(self.data[at].input_ids.device)


@contextmanager
def _unread(base: nn.Module, name: str) -> Iterator[None]:
    """Spares an adapted projection its own weight's product, where nothing will read the sum."""
    weight: Any = base.get_submodule(name).get_submodule("base_layer")
    weight.forward = lambda x: x
    try:
        yield
    finally:
        del weight.forward


def _cut(
    names: Sequence[str], score: Score, plan: NLSR, generator: torch.Generator
) -> dict[str, MaskPair]:
    topk, rounding = plan.resolved["topk"], plan.resolved["rounding"]
    # All of A before all of B: draws among ties go on.
    a, b = (
        [
            cut(score(name, side)[None], plan.sparsity, topk, rounding, generator)[0]
            for name in names
        ]
        for side in "AB"
    )
    return {name: (x.cpu(), y.cpu()) for name, x, y in zip(names, a, b, strict=True)}


def _random(reference: LoraAdapter, generator: torch.Generator) -> Iterator[Portion]:
    """Uniform scores, the chance level of Table 5."""

    def score(name: str, side: str) -> Tensor:
        shape = reference.shapes[name]
        size = (shape.rank, shape.d_in) if side == "A" else (shape.d_out, shape.rank)
        return torch.rand(size, generator=generator)

    yield from (([name], score) for name in reference.names)


def _low_rank(
    run: _Pass, linears: Linears, plan: NLSR, groups: list[list[str]]
) -> Iterator[Portion]:
    """|What| per module (paper: step 2); block by block, What is written into the model.

    All it needs of the data is Z^T Z, (r, r) per module, Z the tokens between A and B.
    """
    grams = Grams()
    run.inputs({name: linears[f"{name}.B"] for group in groups for name in group}, grams.add)
    for group in groups:
        a, b = (torch.stack([linears[f"{name}.{s}"].weight for name in group]) for s in "AB")
        gram = torch.stack([grams.sums.pop(name) for name in group])
        rank_a, rank_b = (
            scores.projection_rank(
                plan.resolved["rank_rule"], plan.sparsity, a.shape[1], (w.shape[1], w.shape[2])
            )
            for w in (a, b)
        )
        whats = scores.project(a, b, gram, rank_a, rank_b)
        found = {
            (name, side): what
            for side, stack in zip("AB", whats, strict=True)
            for name, what in zip(group, stack, strict=True)
        }
        if plan.resolved["sequential"]:
            for (name, side), what in found.items():
                linears[f"{name}.{side}"].weight.copy_(what)
        yield group, partial(_magnitude, found)


def _magnitude(found: dict[tuple[str, str], Tensor], name: str, side: str) -> Tensor:
    return found.pop((name, side)).abs_()


def _wanda(
    run: _Pass, linears: Linears, samples: int, groups: list[list[str]]
) -> Iterator[Portion]:
    squares = SquareSums()
    run.inputs(_of_modules(linears, groups), squares.add)

    def score(name: str, side: str) -> Tensor:
        key = f"{name}.{side}"
        return scores.wanda(linears[key].weight, squares.sums.pop(key), samples)

    yield from ((group, score) for group in groups)


def _by_gradient(
    run: _Pass,
    linears: Linears,
    plan: NLSR,
    reference: Sequence[Tensor] | None,
    groups: list[list[str]],
) -> Iterator[Portion]:
    """|W| * sum |g|, the SNIP score with the likelihood or, given a reference, DPO's loss."""

    def losses() -> Iterator[Tensor]:
        # No name holds a batch's graph while the next one is built.
        for at, batch in enumerate(run.data):
            if reference is None:
                yield gradients.snip_loss(run.likelihoods(at), batch)
            else:
                yield gradients.preference_loss(run.likelihoods(at), reference[at], plan.dpo_beta)

    sums = gradients.GradientSums(
        plan.resolved["accumulate_gradients"], rows_per_sample=1 if reference is None else 2
    )
    totals = gradients.sum_gradients(run.model, _of_modules(linears, groups), losses(), sums)

    def score(name: str, side: str) -> Tensor:
        key = f"{name}.{side}"
        return totals.pop(key).mul_(linears[key].weight.detach().abs())

    yield from ((group, score) for group in groups)


def _of_modules(linears: Linears, groups: list[list[str]]) -> dict[str, nn.Linear]:
    keys = (f"{name}.{side}" for group in groups for name in group for side in "AB")
    return {key: linears[key] for key in keys}


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
