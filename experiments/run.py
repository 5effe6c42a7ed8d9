"""The main command: `python -m experiments.run defense=nlsr attack=harmful_ft model=organism`."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments import sweep
from experiments.configuration import CONF, register_resolvers, validate
from experiments.messages import explain, is_users
from settings import RelockError

log = logging.getLogger("relock")

STATUS = "status.json"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _job(config: DictConfig) -> None:
    """One experiment. In a multirun a failure is written down and the others go on."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    overrides = list(hydra_config.overrides.task)
    try:
        _run(config, folder, overrides)
    except Exception as error:
        _write_status(folder, "failed", overrides, error)
        if not isinstance(error, RelockError):
            log.error("%s", "".join(traceback.format_exception(error)))
        print(f"error: {explain(error)}", file=sys.stderr)
        if hydra_config.mode == RunMode.RUN:
            sys.exit(1)
    else:
        _write_status(folder, "done", overrides, None)


def _run(config: DictConfig, folder: Path, overrides: list[str]) -> None:
    from experiments.experiment import run_and_record

    hydra_config = HydraConfig.get()
    experiment = validate(config, dict(hydra_config.runtime.choices), _conf_folders(hydra_config))
    group = Path(hydra_config.sweep.dir).name if hydra_config.mode == RunMode.MULTIRUN else None
    run_and_record(experiment, folder, overrides, group)


def _conf_folders(hydra_config: HydraConf) -> list[Path]:
    sources = hydra_config.runtime.config_sources
    return [Path(source.path) for source in sources if source.schema == "file"]


def _write_status(folder: Path, status: str, overrides: list[str], error: Exception | None) -> None:
    content = {"status": status, "overrides": overrides}
    if error is not None:
        content["reason"] = explain(error)
        content["traceback"] = "".join(traceback.format_exception(error))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATUS).write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    """Runs the command line; returns the exit code.

    Errors that a user can mend are one sentence on stderr; others keep their stack trace.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and this function words the message.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    register_resolvers()
    sweep.forget()
    try:
        _job()
    except KeyboardInterrupt:
        print(
            "interrupted; what is finished is in the store, run the same command again to go on",
            file=sys.stderr,
        )
        return 130
    except Exception as error:
        if not is_users(error):
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 1 if sweep.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
