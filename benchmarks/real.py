"""`serving` and `training` on the real model that `make real-model` gets."""

from __future__ import annotations

import subprocess
import sys

from experiments.config.experiment import PROJECT

MODEL = PROJECT / "outputs" / "models" / "smollm2"
SIZES = {"serving": ["--prompts", "64"], "training": ["--rows", "16"]}


def main() -> int:
    """Runs both; 1 if one failed."""
    if not MODEL.is_dir():
        print("real: no model in outputs/models/smollm2; run make real-model first")
        return 0
    command, shared = [sys.executable, "-m"], ["--model", str(MODEL), "--repeats", "1"]
    codes = [
        subprocess.call([*command, f"benchmarks.{name}", *shared, *sizes])
        for name, sizes in SIZES.items()
    ]
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
