"""`Measurement` of a step in seconds and peak memory: of a defense's stages, and of benchmarks."""

from __future__ import annotations

import ctypes
import gc
import importlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_SAMPLE_SECONDS = 0.005


@dataclass(slots=True)
class Measurement:
    """What a step cost; filled in when the step ends.

    Attributes:
        seconds: Wall-clock seconds.
        peak_bytes: Highest memory during the step above what was held when it began: of the
            accelerator's allocator where there is one; else of the process without the files that
            it maps (libraries, weights), in samples some milliseconds apart.
    """

    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measured() -> Iterator[Measurement]:
    """Measures the block; the yielded `Measurement` is valid after it.

    Neither what an earlier step has freed nor the import of the large libraries, which falls to
    whichever step is first, is counted.
    """
    for library in ("pandas", "peft", "pyarrow.dataset", "pyarrow.parquet", "transformers"):
        importlib.import_module(library)
    import torch

    cost = Measurement()
    memory = _AcceleratorMemory() if torch.cuda.is_available() else _ProcessMemory()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        cost.peak_bytes = max(0, memory.peak())


class _AcceleratorMemory:
    """Peak of torch's allocator from here on."""

    def __init__(self) -> None:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def peak(self) -> int:
        """Bytes above those at the start."""
        import torch

        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._before


class _ProcessMemory:
    """Peak of the process's memory from here on, sampled by a thread.

    The kernel's own peak (VmHWM) counts a library's pages to the step that is first to touch them.
    """

    def __init__(self) -> None:
        import psutil  # type: ignore[import-untyped]

        # What earlier steps have freed goes back to the system: it would hide what this one takes.
        gc.collect()
        with suppress(OSError, AttributeError):  # glibc alone keeps it, and has the call.
            ctypes.CDLL(None).malloc_trim(0)
        self._process = psutil.Process()
        self._before = self._peak = self._resident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)
        self._thread.start()

    def peak(self) -> int:
        """Bytes above those at the start."""
        self._ended.set()
        self._thread.join()
        return max(self._peak, self._resident()) - self._before

    def _sample(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, self._resident())

    def _resident(self) -> int:
        """Bytes of the process in memory that no file stands behind."""
        info = self._process.memory_info()
        return int(info.rss - getattr(info, "shared", 0))
