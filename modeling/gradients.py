"""Gradients by the weights of linear layers, without any weight's holding one.

The gradient by W of a row is the sum over its tokens of (output's gradient) x (input)^T: both are
captured of a whole batch, which costs one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modeling.capture import Batch, TokenRow, batches
from modeling.checkpoint import Checkpoint
from modeling.importance import projection_modules
from modeling.loading import load_model
from modeling.projections import open_projections

Consume = Callable[[str, Tensor, Tensor], None]
"""Gets a layer's name, its inputs (rows, length, in) and its output's gradients (rows, length, out)
of a batch."""


def gradient_magnitudes(
    checkpoint: Checkpoint,
    rows: Sequence[TokenRow],
    batch_size: int,
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """The mean over rows of |g|, g the gradient by W of an answer's mean negative log-likelihood.

    |W| times this is SNIP's score (Lee et al. 2019, arXiv 1810.02340; Wei et al. 2024, arXiv
    2402.05162).

    Args:
        checkpoint: The model, as it runs; W is what an adapter leaves of a weight.
        rows: (prompt ids, answer ids).
        batch_size: Rows per pass.
        names: Module paths of projections; None: all of the blocks.

    Returns:
        {module path: (d_out, d_in) float32, on the CPU}.

    Raises:
        ModelError: The model has no such projection.
    """
    source = open_projections(checkpoint)
    source.check(names or ())
    model: Any = load_model(checkpoint).eval()
    core = model if checkpoint.adapter is None else model.get_base_model()
    modules = projection_modules(core, source, names)
    sums = {name: torch.zeros(source.shapes[name]) for name in modules}

    def add(name: str, x: Tensor, grad: Tensor) -> None:
        sums[name] += (grad.float().mT @ x.float()).abs().sum(0).cpu()

    data = batches(rows, batch_size, str(model.device), by_length=True)
    losses = (-(log_likelihoods(model, each) / each.answers.sum(1)).sum() for each in data)
    backward(model, modules, losses, add)
    return {name: total / len(rows) for name, total in sums.items()}


def log_likelihoods(model: Any, batch: Batch) -> Tensor:
    """The log-likelihood of each row's answer given its prompt, (rows,)."""
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1].float()
    token = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    return (token * batch.answers[:, 1:]).sum(1)


def backward(
    model: Any, linears: Mapping[str, nn.Module], losses: Iterable[Tensor], consume: Consume
) -> None:
    """Has `consume` called for each of the `linears` at every loss's backward pass.

    Losses are of one batch each, and are computed while this asks for them.
    """
    with torch.enable_grad(), _differentiable_inputs(model), _captured(linears, consume):
        for loss in losses:
            loss.backward()
            del loss  # Its graph holds the inputs, and the next one is built before the name is.


@contextmanager
def _differentiable_inputs(model: Any) -> Iterator[None]:
    """Lets gradients flow from the embeddings on, while no weight gets one of its own."""
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _captured(linears: Mapping[str, nn.Module], consume: Consume) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def watch(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()
            if output.requires_grad:
                output.register_hook(lambda grad: consume(name, x, grad))

        return watch

    handles = [module.register_forward_hook(hook(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
