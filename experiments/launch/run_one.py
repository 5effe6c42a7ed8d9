"""One experiment from validated settings to a record on disk."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from pathlib import Path

from experiments.config.experiment import Experiment
from experiments.pipeline.inputs import read_inputs
from experiments.results.environment import environment
from experiments.results.record import Record
from experiments.store import StageResult, Store

log = logging.getLogger("relock")


def run_and_record(
    experiment: Experiment, folder: Path, overrides: list[str], group: str | None
) -> Record:
    """Runs the experiment, writes its record to `folder`, tracks it and prints its table.

    Args:
        experiment: Validated settings.
        folder: The run's own folder.
        overrides: The command line's overrides, for the record.
        group: Name of the sweep this run belongs to, or None.

    Returns:
        The record that was written.
    """
    from experiments.launch.progress.listener import listening
    from experiments.pipeline.pipeline import Pipeline, find_models
    from experiments.pipeline.recording import build_record
    from experiments.pipeline.runner import Runner
    from experiments.report.run_table import one_line, print_run
    from experiments.results.events import append

    start = time.perf_counter()
    _quiet_libraries()
    progress = experiment.runtime.progress
    with listening(folder, in_sweep=group is not None, progress=progress) as listener:
        base, aligned = find_models(experiment.model)
        inputs = read_inputs(experiment)
        isolate = experiment.runtime.isolate
        runner = Runner(Store(experiment.store), listener, isolate=isolate)
        outcome = Pipeline(experiment, inputs, base, aligned, runner).run()
    record = build_record(
        experiment, inputs, outcome, overrides, environment(), time.perf_counter() - start
    )
    record.write(folder, outcome.rows)
    where = experiment.tracker.track(record, outcome.rows, folder, group)
    if group is None:
        print_run(record, folder)
    else:
        result = one_line(record)
        append(folder, "job", "measured", result=result)
        log.info("%s", result)
    _say_stages(outcome.stages)
    log.info("%s", where)
    log.info("record: %s", folder)
    return record


def _quiet_libraries() -> None:
    """Leaves the terminal to the run: deprecations among the libraries are not the user's."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()


def _say_stages(results: list[StageResult]) -> None:
    unique: dict[str, StageResult] = {}
    for result in results:
        unique.setdefault(result.key, result)
    made = Counter(result.name for result in unique.values() if not result.reused)
    reused = Counter(result.name for result in unique.values() if result.reused)
    parts = [
        f"{name} {made[name]} made, {reused[name]} reused"
        for name in dict.fromkeys(result.name for result in results)
    ]
    log.info("stages: %s", "; ".join(parts))
