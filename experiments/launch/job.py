"""One job of the main command; a launcher's worker process imports it and calls `job`."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.config.experiment import Experiment, register_resolvers, validate
from experiments.config.explain import explain, is_users
from experiments.launch import launchers
from experiments.launch.progress.console import leave_terminal, viewed
from experiments.results.events import append
from experiments.results.files import write_whole
from experiments.results.objective import returned
from experiments.results.record import Record
from experiments.results.status import STATUS
from experiments.store import StageResult, Store
from settings import RelockError, first_line

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("relock")

# Hydra checks our options of launchers by the plugins' own types, and warns that it will stop to.
warnings.filterwarnings("ignore", message=r"(?s).*ConfigStore schema with the same name")

# A worker process unpickles `job` by its name, and needs them before Hydra asks for its folder.
register_resolvers()


def job(config: DictConfig) -> Any:
    """Runs one experiment. In a multirun a failure is written down and the others go on.

    Returns:
        What a search goes by; None where there is no search, or the job failed.
    """
    quiet_libraries()
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if not launchers.has_workers(hydra_config):
        return _written_down(config, folder)
    try:
        # Without its classes, since a plugin's can't be pickled by name.
        section: Any = OmegaConf.to_container(HydraConfig.instance().cfg, resolve=True)
        hydra = {"hydra": section["hydra"]}
        return launchers.in_own_process(partial(_in_child, config, hydra))
    except Exception as error:
        _fail(config, folder, error)
        return None


def _in_child(config: DictConfig, hydra: dict[str, Any]) -> Any:
    setup_globals()
    composed: Any = OmegaConf.create(hydra)
    HydraConfig.instance().cfg = composed
    hydra_config = HydraConfig.get()
    leave_terminal(Path(hydra_config.runtime.output_dir))
    configure_log(composed.hydra.job_logging, hydra_config.verbose)
    return _written_down(config, Path(hydra_config.runtime.output_dir))


def _written_down(config: DictConfig, folder: Path) -> Any:
    _write_status(folder, "running")
    try:
        value = _run(config, folder)
    except Exception as error:
        _fail(config, folder, error)
        return None
    _write_status(folder, "done")
    return value


def _fail(config: DictConfig, folder: Path, error: Exception) -> None:
    reason = {"reason": explain(error), "traceback": "".join(traceback.format_exception(error))}
    with suppress(OSError):  # The disk may be full; the job then counts as killed.
        _write_status(folder, "failed", **reason)
    if not is_users(error):
        log.error("%s", reason["traceback"])
    mode = HydraConfig.get().mode
    if not viewed(mode, config.runtime.progress):
        print(f"error: {reason['reason']}", file=sys.stderr)
    if mode == RunMode.RUN:
        sys.exit(1)


def quiet_libraries() -> None:
    """Leaves the terminal to the run: before anything heavy is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A log line that a full disk has no room for is no error of the run.
    logging.raiseExceptions = False


def _run(config: DictConfig, folder: Path) -> Any:
    hydra_config = HydraConfig.get()
    sources = hydra_config.runtime.config_sources
    folders = [Path(source.path) for source in sources if source.schema == "file"]
    experiment = validate(config, dict(hydra_config.runtime.choices), folders)
    experiment.runtime.prepare(launchers.default_threads(hydra_config))
    group = Path(hydra_config.sweep.dir).name if hydra_config.mode == RunMode.MULTIRUN else None
    record = _run_and_record(experiment, folder, list(hydra_config.overrides.task), group)
    return returned(record.objective)


def _write_status(folder: Path, status: str, **more: str) -> None:
    content = {
        "status": status,
        "overrides": list(HydraConfig.get().overrides.task),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    append(folder, "job", status)
    write_whole(folder / STATUS, json.dumps(content, indent=1) + "\n")


def _run_and_record(
    experiment: Experiment, folder: Path, overrides: list[str], group: str | None
) -> Record:
    """Runs the experiment, writes its record to `folder`, tracks it and prints its table."""
    from transformers.utils import logging as transformers_logging

    from experiments.launch.progress.listener import listening
    from experiments.pipeline.inputs import read_inputs
    from experiments.pipeline.pipeline import Pipeline, find_models
    from experiments.pipeline.recording import build_record
    from experiments.pipeline.runner import Runner
    from experiments.report.run_table import one_line, print_run
    from experiments.results.environment import environment
    from modeling.loading import check_tokenizer

    start = time.perf_counter()
    # Deprecations among the libraries are not the user's.
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.disable_progress_bar()
    progress = experiment.runtime.progress
    with listening(folder, in_sweep=group is not None, progress=progress) as listener:
        base, aligned = find_models(experiment.model)
        check_tokenizer(base.checkpoint, "model.base")
        if aligned is not None:
            check_tokenizer(aligned.checkpoint, "model.aligned")
        inputs = read_inputs(experiment)
        isolate = experiment.runtime.isolate
        runner = Runner(Store(experiment.store), listener, isolate=isolate)
        pipeline = Pipeline(experiment, inputs, base, aligned, runner)
        listener.total = pipeline.count_steps
        outcome = pipeline.run()
    record = build_record(
        experiment, inputs, outcome, overrides, environment(), time.perf_counter() - start
    )
    record.write(folder, outcome.rows)
    where = _tracked(experiment.tracker, record, outcome.rows, folder, group)
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


def _tracked(
    tracker: Any, record: Record, rows: pd.DataFrame, folder: Path, group: str | None
) -> str:
    """What a tracker says of where it tracked; the run is complete, whatever goes wrong there."""
    try:
        return str(tracker.track(record, rows, folder, group))
    except RelockError:
        raise
    except Exception as error:
        return f"the tracker failed ({type(error).__name__}: {first_line(error)}); all is recorded"


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
