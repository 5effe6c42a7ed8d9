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
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.config.experiment import register_resolvers, validate
from experiments.config.explain import explain, is_users
from experiments.launch import launchers
from experiments.launch.progress.console import leave_terminal, viewed
from experiments.results.events import append
from experiments.results.files import write_whole
from experiments.results.objective import returned
from experiments.results.status import STATUS

log = logging.getLogger("relock")

# Hydra checks our options of launchers by the plugins' own types, and warns that it will stop to.
warnings.filterwarnings("ignore", message=r"(?s).*ConfigStore schema with the same name")

# A worker process unpickles `job` by its name, and needs them before Hydra asks for its folder.
register_resolvers()


def job(config: DictConfig) -> Any:
    """Runs one experiment. In a multirun a failure is written down and the others go on.

    Args:
        config: The composed configuration, without its `hydra` section.

    Returns:
        What a search goes by; None where there is no search, or the job failed.
    """
    quiet_libraries()
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if not launchers.has_workers(hydra_config):
        return _written_down(config, folder)
    try:
        hydra = _plain(HydraConfig.instance().cfg)
        return launchers.in_own_process(partial(_in_child, config, hydra))
    except Exception as error:
        _fail(config, folder, error)
        return None


def _plain(hydra: Any) -> dict[str, Any]:
    """Hydra's section without its classes, since a plugin's can't be pickled by name."""
    resolved: Any = OmegaConf.to_container(hydra, resolve=True)
    return {"hydra": resolved["hydra"]}


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
    from experiments.launch.run_one import run_and_record

    hydra_config = HydraConfig.get()
    sources = hydra_config.runtime.config_sources
    folders = [Path(source.path) for source in sources if source.schema == "file"]
    experiment = validate(config, dict(hydra_config.runtime.choices), folders)
    experiment.runtime.prepare(launchers.default_threads(hydra_config))
    group = Path(hydra_config.sweep.dir).name if hydra_config.mode == RunMode.MULTIRUN else None
    record = run_and_record(experiment, folder, list(hydra_config.overrides.task), group)
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
