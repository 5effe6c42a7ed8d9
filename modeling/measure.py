"""The cost of a stage or of a part of it: seconds and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(slots=True)
class Measurement:
    """What a step cost; filled in when the step ends.

    Attributes:
        seconds: Wall-clock seconds.
        peak_bytes: Highest memory during the step above what was held when it began: of the
            accelerator's allocator where there is one, else of the process.
    """

    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measured() -> Iterator[Measurement]:
    """Measures the block; the yielded `Measurement` is valid after it.

    Torch counts as used only when it is already imported, so that measuring doesn't import it.
    """
    cost, cuda = Measurement(), _cuda()
    before = _start(cuda)
    start = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        cost.peak_bytes = max(0, _peak(cuda) - before)


def _cuda() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available()


def _start(cuda: bool) -> int:
    if cuda:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError):  # Linux forgets the process's peak on request, other systems can't.
        _CLEAR.write_text("5")
    return _status("VmRSS") or _lifetime_peak()


def _peak(cuda: bool) -> int:
    if cuda:
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or _lifetime_peak()


def _status(field: str) -> int:
    if not _STATUS.is_file():
        return 0
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _lifetime_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
