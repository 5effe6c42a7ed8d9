"""Availability of vLLM on this machine: an installed one may still not import."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from importlib.util import find_spec

from evaluation.backends.vllm.process import child_environment, short

# Choosing the platform loads its kernels, which is where a build for another torch or driver fails;
# the rest of vLLM would take twice as long.
_IMPORT = """
from vllm.platforms import current_platform as platform
if not platform.device_type or platform.is_cuda_alike() and not platform.device_count():
    raise SystemExit("it finds no device that it was built for")
"""
_SECONDS = 300.0


@cache
def obstacle() -> str | None:
    """Why vLLM can't run here, to follow "vLLM, which"; None where it can.

    Where its module exists, a process of its own imports it, once for as long as this one runs.
    """
    if find_spec("vllm") is None:
        return "isn't installed"
    try:
        ran = subprocess.run(
            [sys.executable, "-c", _IMPORT],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=child_environment({}),
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"is installed but doesn't import within {_SECONDS:.0f} s"
    if ran.returncode == 0:
        return None
    lines = ran.stderr.decode(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), f"status {ran.returncode}")
    return f"is installed but doesn't run here ({short(last, 200)})"
