"""`WandbTracker`, a Weights & Biases run per experiment, and `NoTracker`: options of `tracker=`."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import HTTPError
from urllib.request import urlopen

from pydantic import Field

from experiments.results.files import write_whole
from experiments.results.record import Record
from experiments.tracking import wandb_fields
from settings import RelockError, Settings, first_line

if TYPE_CHECKING:
    import pandas as pd
    import wandb

log = logging.getLogger("relock")

_ANSWER_SECONDS, _START_SECONDS = 5.0, 30.0
_ANSWER_COLUMNS = ["model", "set", "id", "category", "prompt", "answer"]
_STAGE_COLUMNS = ["name", "key", "seconds", "reused"]


class NoTracker(Settings):
    """Tracks nothing."""

    def track(self, record: Record, rows: pd.DataFrame, folder: Path, group: str | None) -> str:
        """Says that nothing was tracked."""
        return "W&B: off (tracker=none)"


class WandbTracker(Settings):
    """One W&B run per experiment.

    Attributes:
        entity: W&B user or team; None: the key's own.
        mode: "auto" is online where an API key is set (and WANDB_MODE doesn't say otherwise) and
            offline elsewhere.
        group: Runs of one sweep share it; None: the sweep's own name.
        upload_answers: Whether prompts and answers leave this machine.
    """

    project: str = Field("relock", pattern=r"^[^/\\#?%:]{1,128}$")
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    group: str | None = Field(None, min_length=1, max_length=128)
    upload_answers: bool = False

    @property
    def online(self) -> bool:
        """Whether runs go to the server at once."""
        if self.mode != "auto":
            return self.mode == "online"
        return os.environ.get("WANDB_MODE", "online") == "online" and has_key()

    def track(self, record: Record, rows: pd.DataFrame, folder: Path, group: str | None) -> str:
        """Logs config, timings, metrics, tables and figures as one run.

        A folder has one W&B run for good: tracked again, it takes the earlier one's place. `group`
        is the name of the sweep's folder, or None for a single run.

        Returns:
            A line for the user: the run's address, or how to sync it.

        Raises:
            RelockError: W&B can't be reached although `mode` is "online".
        """
        import wandb

        try:
            online = self.online
        except RelockError as error:
            log.warning("%s; tracking offline", error)
            online = False
        try:
            return self._track(record, rows, folder, group, online)
        except wandb.Error as error:
            if not online:
                raise
            if self.mode == "online":
                raise RelockError(
                    f"W&B can't be reached ({first_line(error)}); the record is in {folder}; "
                    "check the key and the network, or set tracker.mode=offline"
                ) from error
            log.warning("W&B can't be reached (%s); tracking offline", first_line(error))
            wandb.teardown()  # Its service would go on with the run that it couldn't start.
            return self._track(record, rows, folder, group, online=False)

    def _track(
        self, record: Record, rows: pd.DataFrame, folder: Path, group: str | None, online: bool
    ) -> str:
        labels = record.labels
        sweep, job = _place(folder, group)
        with self.start(
            folder,
            online,
            group=self.group or sweep,
            job_type=labels["defense"],
            name="-".join([labels["model"], labels["attack"], labels["defense"], str(record.seed)]),
            tags=wandb_fields.tags(record),
            config=wandb_fields.config(record, job, sweep),
        ) as run:
            self._log(run, record, rows, folder)
            place = run.url if online else run.settings.sync_dir
        if online:
            return f"W&B: {place}"
        return f"W&B: offline; to upload it, run: wandb sync {place}"

    def start(self, folder: Path, online: bool, **options: Any) -> wandb.Run:
        """Starts the one W&B run of a folder, in place of what was tracked of it before.

        Options are `wandb.init`'s: group, job_type, name, tags, config.

        Nothing of the machine is told: neither its name, nor paths, command line, packages or the
        working tree's changes.

        Raises:
            wandb.Error: The server can't be reached or refuses.
        """
        import wandb

        if online:
            _check_server()
        run_id = _run_id(folder)
        for earlier in (folder / "wandb").glob(f"*run-*-{run_id}"):
            shutil.rmtree(earlier, ignore_errors=True)
        return wandb.init(
            project=self.project,
            entity=self.entity,
            dir=str(folder),
            mode="online" if online else "offline",
            id=run_id,
            **options,
            settings=wandb.Settings(
                silent=True,
                init_timeout=_START_SECONDS,
                console="off",
                program="experiments.run",
                host="",
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    def _log(self, run: wandb.Run, record: Record, rows: pd.DataFrame, folder: Path) -> None:
        import wandb

        from experiments.report import figures, tables
        from experiments.report.pool import collect

        run.summary.update(wandb_fields.summary(record))
        for name, report in (("attack", record.attack), ("refine", record.refine)):
            run.define_metric(f"{name}/loss", step_metric=f"{name}/step")
            for point in report.get("loss", []):
                run.log({f"{name}/step": point["step"], f"{name}/loss": point["loss"]})
        collected = wandb_fields.shareable(collect([folder]))
        media: dict[str, Any] = {
            "results": wandb.Table(dataframe=tables.frame(collected)),
            "stages": wandb.Table(
                columns=_STAGE_COLUMNS,
                data=[[stage[name] for name in _STAGE_COLUMNS] for stage in record.stages],
            ),
        }
        for path in figures.write(collected, folder / "figures"):
            media[f"figures/{path.stem}"] = wandb.Image(str(path))
        if self.upload_answers:
            media["answers"] = wandb.Table(dataframe=rows[_ANSWER_COLUMNS])
        run.log(media)


def sweep_name(folder: Path) -> str:
    """What W&B calls a sweep: its folder's name, with the day where that is a time of day."""
    folder = folder.resolve()
    day = folder.parent.name
    return f"{day}_{folder.name}" if re.fullmatch(r"\d{4}-\d\d-\d\d", day) else folder.name


def has_key() -> bool:
    """Whether W&B's library finds an API key, without asking for one or for the server's word.

    Raises:
        RelockError: What it finds can't be a key.
    """
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.Error as error:
        raise RelockError(
            f"W&B's library refuses the API key ({error}); set WANDB_API_KEY to a whole one"
        ) from error


def _check_server() -> None:
    """Asks whether W&B's server answers at all: its library tries for minutes where it doesn't.

    Raises:
        wandb.Error: It doesn't.
    """
    import wandb

    url = wandb.setup().settings.base_url
    try:
        urlopen(url, timeout=_ANSWER_SECONDS).close()
    except (HTTPError, HTTPException):
        return  # It does, whatever it says to this.
    except OSError as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, SSLError):  # The library has certificates of its own.
            raise wandb.Error(f"{url} doesn't answer: {reason}") from error


def _place(folder: Path, group: str | None) -> tuple[str | None, str]:
    """The sweep's name and the job's folder below the sweep's."""
    folder = folder.resolve()
    for parent in folder.parents:
        if parent.name == group:
            return sweep_name(parent), str(folder.relative_to(parent))
    return group, folder.name


def _run_id(folder: Path) -> str:
    """The id that a folder's W&B run has for good, wherever the folder is moved.

    It is drawn, not made of the folder's path: two machines may well have folders of one path.
    """
    path = folder / "wandb" / "run-id"
    if path.is_file() and (known := path.read_text().strip()):
        return known
    write_whole(path, f"{secrets.token_hex(8)}\n")
    return path.read_text().strip()
