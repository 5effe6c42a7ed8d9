"""One job of the main command; a launcher's worker process imports it and calls `job`."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.configuration import register_resolvers, validate
from experiments.messages import explain
from settings import RelockError

log = logging.getLogger("relock")

STATUS = "status.json"
"""What became of a job, in its folder: "running", "done" or "failed" under "status"."""

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
    overrides = list(hydra_config.overrides.task)
    _write_status(folder, "running", overrides)
    try:
        _run(config, folder, overrides)
    except Exception as error:
        reason = {"reason": explain(error), "traceback": "".join(traceback.format_exception(error))}
        _write_status(folder, "failed", overrides, **reason)
        if not isinstance(error, RelockError):
            log.error("%s", reason["traceback"])
        print(f"error: {reason['reason']}", file=sys.stderr)
        if hydra_config.mode == RunMode.RUN:
            sys.exit(1)
    else:
        _write_status(folder, "done", overrides)
    return None


def quiet_libraries() -> None:
    """Leaves the terminal to the run: before anything heavy is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _run(config: DictConfig, folder: Path, overrides: list[str]) -> None:
    from experiments.experiment import run_and_record

    hydra_config = HydraConfig.get()
    experiment = validate(config, dict(hydra_config.runtime.choices), _conf_folders(hydra_config))
    group = Path(hydra_config.sweep.dir).name if hydra_config.mode == RunMode.MULTIRUN else None
    run_and_record(experiment, folder, overrides, group)


def _conf_folders(hydra_config: HydraConf) -> list[Path]:
    sources = hydra_config.runtime.config_sources
    return [Path(source.path) for source in sources if source.schema == "file"]


def _write_status(folder: Path, status: str, overrides: list[str], **more: str) -> None:
    content = {
        "status": status,
        "overrides": overrides,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    # A kill must not leave half of it.
    temporary = folder / f".{STATUS}"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(folder / STATUS)
