"""Models larger than memory: the weights of a decoder block are read when it runs, and freed after.

What leads up to the blocks is held; the head is read as a block is.  Any forward pass can be had,
at the price of reading the weights; gradients, which need all blocks at once, can't.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from modeling.checkpoint import Checkpoint, local_folder
from modeling.inspection import inspect_model, read_config, require_own_names
from modeling.model_files import StoredTensor, stored_tensors
from modeling.stored import read_tensor
from settings import ModelError

_STORED = "stored"
_BLOCK = re.compile(r"^(?P<block>.+?\.\d+)\.")


class _Weights:
    """The parameters of a module that lie in files: (owner, name, where), read while it is held."""

    def __init__(self, device: str) -> None:
        self.places: list[tuple[nn.Module, str, StoredTensor]] = []
        self._device, self._holders = device, 0
        self._empty: list[nn.Parameter] = []

    def take(self) -> None:
        """Reads them, unless they are there."""
        self._holders += 1
        if self._holders > 1:
            return
        self._empty = [cast(nn.Parameter, own._parameters[name]) for own, name, _ in self.places]
        for (owner, name, stored), old in zip(self.places, self._empty, strict=True):
            value = read_tensor(stored).to(self._device, old.dtype)
            owner._parameters[name] = _parameter(value)

    def leave(self) -> None:
        """Frees them, unless someone else holds them."""
        self._holders -= 1
        if not self._holders:
            for (owner, name, _), old in zip(self.places, self._empty, strict=True):
                owner._parameters[name] = old


def weight_bytes(checkpoint: Checkpoint) -> int:
    """What the full weights take in memory, in the dtype that they run in."""
    tensors = stored_tensors(local_folder(checkpoint)).values()
    size = getattr(torch, checkpoint.dtype).itemsize
    return sum(math.prod(tensor.shape) for tensor in tensors) * int(size)


def load_streamed(checkpoint: Checkpoint, device: str) -> Any:
    """The model as `modeling.loading.load_model` gives it, its blocks' weights left in the files.

    Of a LoRA on top, A and B are held.  Where many batches run, `modeling.capture.run_decoder` or
    `held` spare reading a block for each.

    Raises:
        ModelError: Not every weight of the blocks lies in the files as the blocks have it.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    inspect_model(checkpoint)
    require_own_names(checkpoint)
    dtype = getattr(torch, checkpoint.dtype)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            read_config(checkpoint), dtype=dtype, trust_remote_code=False
        )
    found: dict[nn.Module, _Weights] = {}
    head = model.get_output_embeddings()
    for key, stored in stored_tensors(local_folder(checkpoint)).items():
        path, _, name = key.rpartition(".")
        owner = _submodule(model, path)
        if owner is None or name not in owner._parameters:
            continue
        if match := _BLOCK.match(key):
            block = model.get_submodule(match["block"])
            found.setdefault(block, _Weights(device)).places.append((owner, name, stored))
        elif owner is head:
            found.setdefault(head, _Weights(device)).places.append((owner, name, stored))
        else:
            owner._parameters[name] = _parameter(read_tensor(stored).to(device, dtype))
    if head not in found:  # Tied.
        head.weight = model.get_input_embeddings().weight
    for module in model.modules():
        for name, empty in module._parameters.items():
            if empty is not None and empty.is_meta:
                # One NaN seen as a whole matrix: PEFT puts A and B where the weights are.
                nan = torch.full((1,), torch.nan, dtype=empty.dtype, device=device)
                module._parameters[name] = _parameter(nan.expand(empty.shape))
        module._buffers = {k: b if b is None else b.to(device) for k, b in module._buffers.items()}
    whole = (len(each.places) == len(list(own.parameters())) for own, each in found.items())
    if not found or not all(whole):
        raise ModelError(
            f"the files of {checkpoint.base!r} don't hold its blocks' weights as it runs them, so "
            "that they can't be streamed; set runtime.stream_weights=false"
        )
    for module, weights in found.items():
        setattr(module, _STORED, weights)
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)
    if checkpoint.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, checkpoint.adapter)
    if checkpoint.steering is not None:
        from modeling.steering import load_steering, steer

        steer(model, load_steering(checkpoint.steering))
    return model.eval()


def streamed_blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks whose weights lie in files, in order; of any other model none."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return [block for each in lists for block in each if hasattr(block, _STORED)]


@contextmanager
def held(block: nn.Module) -> Iterator[None]:
    """Reads the weights of a streamed block once for as long as this lasts."""
    weights: _Weights | None = getattr(block, _STORED, None)
    if weights is None:
        yield
        return
    try:
        weights.take()
        yield
    finally:
        weights.leave()


def is_passed(block: nn.Module) -> bool:
    """Whether a block that is called does nothing (`modeling.capture.entered`)."""
    return "forward" in vars(block)


def is_held(parameter: Tensor) -> bool:
    """Whether these are a parameter's own numbers, and not what stands for those in a file."""
    return parameter.untyped_storage().nbytes() >= parameter.nbytes


def _enter(module: nn.Module, _: Any) -> None:
    if not is_passed(module):
        getattr(module, _STORED).take()


def _leave(module: nn.Module, *_: Any) -> None:
    if not is_passed(module):
        getattr(module, _STORED).leave()


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
