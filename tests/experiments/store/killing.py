"""Runs the main command again and again in processes that are killed at a given point.

`python -m tests.experiments.store.killing FOLDER POINTS OVERRIDES`: one process for each of the
points, which a comma parts, one after another. A point is the name of a stage, whose step is let
finish, and of whose files one is then cut in half; or a file of the run's folder, about to get its
name; or "end", where nothing is killed; or "undisturbed", the same in a store of its own.
FOLDER/log gets a line for each stage that is made: the point's place, the stage and its key.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from experiments.pipeline.steps.base import AskingStep, Step
from experiments.pipeline.steps.defense import Apply, Prepare
from experiments.pipeline.steps.measuring import (
    Generate,
    JudgeAnswers,
    Likelihood,
    ScoreAnswers,
)
from experiments.pipeline.steps.training import Align, Merge, RunAttack
from tests.experiments.store.forks import forked

STEPS: tuple[type[Step], ...] = (
    Align, Prepare, Merge, RunAttack, Apply, Generate, Likelihood, JudgeAnswers, ScoreAnswers,
)  # fmt: skip


def main() -> None:
    """Prints how each process ended: its exit code, or minus the signal."""
    folder, points, overrides = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    for place, point in enumerate(points):
        own = folder / "undisturbed" if point == "undisturbed" else folder
        places = [f"store.root={own / 'store'}", f"hydra.run.dir={own / 'run'}"]
        become = partial(_become, folder / "log", place, point)
        print(forked([*overrides, *places], become))


def _become(log: Path, place: int, point: str) -> None:
    for step in STEPS:
        # What is asked in one pass with others is written on its own.
        name = "write" if issubclass(step, AskingStep) else "run"
        setattr(step, name, _watched(getattr(step, name), log, place, point))
    if "." in point:
        _die_before_renaming(point)


def _watched(make: Callable[..., Any], log: Path, place: int, point: str) -> Callable[..., Any]:
    @wraps(make)
    def watched(step: Step, *arguments: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{place} {step.stage.name} {step.stage.key}\n")
        report = make(step, *arguments)
        if step.stage.name == point:
            files = [path for path in arguments[-1].rglob("*") if path.is_file()]
            for largest in sorted(files, key=lambda path: path.stat().st_size)[-1:]:
                os.truncate(largest, largest.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return report

    return watched


def _die_before_renaming(name: str) -> None:
    replace = Path.replace

    def dying(path: Path, target: Any) -> Path:
        if Path(target).name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
