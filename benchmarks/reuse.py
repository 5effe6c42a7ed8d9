"""A sweep of 4 poison ratios x 2 defenses: one store against a fresh store for every job.

And what a job in a process of its own spends on imports.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SWEEP = [
    "attack.poison_ratio=0,0.01,0.05,0.1",
    "defense=none,nlsr",
    "attack.n=160",
    "evaluation.limits.harmful=40",
    "evaluation.limits.benign=20",
    "evaluation.limits.over_refusal=20",
    "evaluation.limits.task=40",
    "tracker=none",
]

REPEATS = 5
# What a job imports, after the call that each job's process makes first, or without it.
IMPORTS = """
import time
from settings.process import collect_rarely
{call}
import experiments.launch.job, experiments.pipeline.pipeline, torch, transformers, peft
from trl import SFTTrainer
print(time.process_time())
"""


def import_seconds() -> dict[str, float]:
    """CPU seconds of importing, medians of alternating repeats, by the call that comes first."""
    seconds: dict[str, list[float]] = {"pass": [], "collect_rarely()": []}
    for _ in range(REPEATS):
        for call, measured in seconds.items():
            command = [sys.executable, "-c", IMPORTS.format(call=call)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            measured.append(float(done.stdout))
    return {call: statistics.median(measured) for call, measured in seconds.items()}


def run_sweep(root: Path, store: str) -> tuple[float, Counter[bool]]:
    """Runs the sweep with its store at `store`.

    Returns:
        Wall-clock seconds, and how many stages were reused (True) and made (False), each key
        counted once per job.
    """
    command = [sys.executable, "-m", "experiments.run", "-m", *SWEEP]
    command += [f"store.root={store}", f"hydra.sweep.dir={root / 'runs'}"]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    count: Counter[bool] = Counter()
    for record in (root / "runs").glob("*/record.json"):
        stages = {s["key"]: s["reused"] for s in json.loads(record.read_text())["stages"]}
        count.update(stages.values())
    return seconds, count


def main() -> None:
    """Measures imports, runs the sweep three times, and prints seconds, stages and ratios."""
    usual, rarely = import_seconds().values()
    print(f"imports of a job's process, CPU seconds: {usual:.2f}, with garbage left until after")
    print(f"them {rarely:.2f} ({usual / rarely:.2f}x)")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shared = str(root / "store")
        alone = run_sweep(root / "alone", str(root / "stores") + "/${hydra:job.num}")
        first = run_sweep(root / "first", shared)
        again = run_sweep(root / "again", shared)
    print("sweep of 4 poison ratios x 2 defenses, 8 jobs")
    print(f"{'':28}{'seconds':>9}{'made':>7}{'reused':>8}{'faster':>8}")
    for name, (seconds, count) in (
        ("a fresh store per job", alone),
        ("one store", first),
        ("one store, the sweep again", again),
    ):
        ratio = alone[0] / seconds
        print(f"{name:28}{seconds:9.1f}{count[False]:7}{count[True]:8}{ratio:7.1f}x")


if __name__ == "__main__":
    main()
