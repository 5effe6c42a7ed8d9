"""Activations at chosen positions, streamed into sums, so that memory doesn't grow with rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modeling.streaming import held, streamed_blocks

TokenRow = tuple[list[int], list[int]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of (prompt, answer) tokens, padded on the right.

    Attributes:
        input_ids: (rows, length).
        attention_mask: (rows, length), 1 where there is a token.
        answers: (rows, length) bool, true at the answer's tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    answers: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a causal language model is called with."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def batches(
    rows: Sequence[TokenRow], size: int, device: str, *, by_length: bool = False, pad_id: int = 0
) -> list[Batch]:
    """Pads rows of (prompt ids, answer ids) into batches.

    `by_length` puts rows of similar length together, which saves padding; only for statistics in
    which the order of rows doesn't count.  `pad_id` matters only where padding is counted.
    """
    if by_length:
        rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    return [_pad(rows[at : at + size], device, pad_id) for at in range(0, len(rows), size)]


def _pad(rows: Sequence[TokenRow], device: str, pad_id: int) -> Batch:
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), pad_id)
    attention, answers = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        attention[row, :end] = 1
        answers[row, len(prompt) : end] = True
    return Batch(ids.to(device), attention.to(device), answers.to(device))


class _AllReached(Exception):  # noqa: N818
    """Ends a forward pass when every captured module has had its input."""


@dataclass(slots=True)
class Focus:
    """What a capture takes of the running batch.

    Attributes:
        positions: (rows, length) bool; None: nothing is taken.
        last: The module whose input ended the last pass of `run`.
    """

    positions: Tensor | None = None
    last: str | None = None
    _names: frozenset[str] = frozenset()
    _left: set[str] | None = None

    def run(self, positions: Tensor, forward: Callable[[], object]) -> None:
        """Takes these positions of one forward pass, which ends at the last module's input.

        A module that is captured runs once in a pass.
        """
        self.positions, self._left = positions, set(self._names)
        with suppress(_AllReached):
            forward()
        self.positions = self._left = None

    def reached(self, name: str) -> None:
        """Notes that a module's input was taken."""
        if self._left is not None:
            self._left.discard(name)
            if not self._left:
                self.last = name
                raise _AllReached


@contextmanager
def captured_inputs(
    modules: Mapping[str, nn.Module], consume: Callable[[str, Tensor], None]
) -> Iterator[Focus]:
    """Passes the inputs of modules, at the positions in focus, to `consume`.

    Args:
        modules: {name: module whose first positional argument is (rows, length, d)}.
        consume: Called with a module's name and its input (tokens, d), detached.

    Yields:
        The focus: call `run` with each forward pass, or, for what comes behind the modules too, set
        its `positions` before each.
    """
    focus = Focus(_names=frozenset(modules))

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            if focus.positions is not None:
                consume(name, args[0].detach()[focus.positions])
                focus.reached(name)

        return take

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield focus
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class Grams:
    """Running X^T X per module, (d, d) in float64, of inputs X (tokens, d)."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, x: Tensor) -> None:
        """Adds the tokens `x` (tokens, d)."""
        x = x.double()
        gram = x.mT @ x
        self.sums[name] = self.sums[name].add_(gram) if name in self.sums else gram


@dataclass(slots=True)
class SquareSums:
    """Running column-wise sums of squares per module, (d,) in float64."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, x: Tensor) -> None:
        """Adds the tokens `x` (tokens, d)."""
        if name not in self.sums:
            self.sums[name] = x.new_zeros(x.shape[1], dtype=torch.float64)
        for part in x.split(rows_in_cache(x)):
            self.sums[name].add_(part.double().square_().sum(0))


def rows_in_cache(x: Tensor) -> int:
    """How many rows of x (n, d) to hold in float64 at a time.

    On a CPU what stays in its cache takes a third of the time of more.
    """
    return max(1, (1 << 16 if x.device.type == "cpu" else 1 << 22) // x.shape[1])


class _BlockDone(Exception):  # noqa: N818
    """Ends a forward pass once its one block has run; carries that block's output."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def run_block(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    index: int,
    batch: Batch,
    hidden: Tensor | None,
) -> Tensor:
    """The output (rows, length, d) of one decoder block; the pass ends behind it.

    `hidden` is what enters it, as for `entered`.
    """

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        raise _BlockDone(output[0] if isinstance(output, tuple) else output)

    handle = blocks[index].register_forward_hook(stop)
    try:
        with entered(blocks, index, hidden):
            model(**batch.inputs, use_cache=False)
    except _BlockDone as stopped:
        return stopped.output
    finally:
        handle.remove()
    raise RuntimeError(f"block {index} was not run by the model's forward pass")


@contextmanager
def entered(blocks: Sequence[nn.Module], index: int, hidden: Tensor | None) -> Iterator[None]:
    """Lets forward passes of a model begin at one of its decoder blocks.

    The model itself is called, with every earlier block passing its input through, so that the
    block gets the masks and position embeddings that its architecture gives it.

    `hidden` is the block's input (rows, length, d); None: what the model gives it, which is the
    embeddings for the first of its `blocks`.
    """

    def replace_input(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if hidden is None:
            return None
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    handle = blocks[index].register_forward_pre_hook(replace_input, with_kwargs=True)
    try:
        with _passing_through(blocks[:index]):
            yield
    finally:
        handle.remove()


@contextmanager
def _passing_through(blocks: Sequence[nn.Module]) -> Iterator[None]:
    def identity(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states

    for block in blocks:
        block.forward = identity
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def adapter_linears(model: Any, names: Iterable[str]) -> dict[str, nn.Linear]:
    """{"MODULE.A": lora_A, "MODULE.B": lora_B} of a `PeftModel`'s active adapter.

    `names` are module paths of adapted projections inside the base model.
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
    """Runs `core` over batches and passes on what enters some of its modules (`captured_inputs`).

    Nothing behind the last of them is run.  `positions` gives the tokens of a batch that count,
    (rows, length) bool.
    """
    data = list(data)
    with captured_inputs(modules, consume) as focus:

        def start(at: int) -> None:
            focus.positions = positions(data[at])

        if streamed_blocks(core):
            run_decoder(core, data, start)
            return
        for batch in data:
            focus.run(positions(batch), partial(core, **batch.inputs, use_cache=False))


def run_decoder(core: nn.Module, data: Sequence[Batch], start: Callable[[int], None]) -> None:
    """Runs a decoder over batches, for what hooks make of it.

    Where the weights are streamed (`modeling.streaming`), one block after another runs over all
    batches, so that its weights are read once; what comes out of it waits on the CPU.  Hooks then
    see the batches once per block, and those of blocks also where they are passed (`is_passed`).

    `start` is called with the number of a batch before it runs.
    """
    blocks = streamed_blocks(core)
    if not blocks:
        for at, batch in enumerate(data):
            start(at)
            core(**batch.inputs, use_cache=False)
        return
    hidden: list[Tensor | None] = [None] * len(data)
    for index, block in enumerate(blocks):
        with held(block):
            for at, batch in enumerate(data):
                start(at)
                entering = hidden[at]
                if entering is not None:
                    entering = entering.to(batch.input_ids.device)
                hidden[at] = run_block(core, blocks, index, batch, entering).cpu()
