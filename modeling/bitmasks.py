"""Bool masks as bytes, eight entries to one, lowest first; how defenses store chosen neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """The entries of a bool mask in order, (ceil(n / 8),) uint8 on the CPU."""
    return torch.from_numpy(np.packbits(mask.cpu().flatten().numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of this shape, on the CPU, that `pack_bits` made `packed` of."""
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits).bool().reshape(tuple(shape))
