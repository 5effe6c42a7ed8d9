"""What the dashboard asks of a W&B server, and what a user is told where that fails."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.results.files import write_whole
from experiments.tracking.charts import Chart
from experiments.tracking.panels import (
    Content,
    fill_report,
    fill_workspace,
    report_title,
    workspace_name,
)
from settings import RelockError

if TYPE_CHECKING:
    import wandb

log = logging.getLogger("relock")

_MADE = "dashboard.json"
_TIMEOUT_SECONDS = 30


def refusals() -> tuple[type[Exception], ...]:
    """What W&B's libraries raise where a server can't be reached, refuses or answers nonsense."""
    import requests
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    return wandb.Error, WandbApiFailedError, requests.RequestException, OSError, ValueError


@contextmanager
def explained() -> Iterator[None]:
    """Turns what W&B's libraries raise into one sentence."""
    try:
        yield
    except RelockError:
        raise
    except refusals() as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RelockError(
            f"W&B can't be reached or refuses ({reason}); check the network, WANDB_BASE_URL, the "
            "key, --entity and --project, then run this again: it goes on where it stopped"
        ) from error


def connect(entity: str | None, project: str, sweep: str, jobs: int) -> tuple[wandb.Api, str]:
    """The server's interface and the entity, once it is known that the sweep's runs are there.

    Args:
        entity: User or team; None: the key's own.
        project: W&B project.
        sweep: The runs' group.
        jobs: How many runs there should be.

    Raises:
        RelockError: The server can't be reached, or there is no such entity, project or group.
    """
    import wandb

    with explained():
        api = wandb.Api(timeout=_TIMEOUT_SECONDS)
        entity = entity or api.default_entity
        if not entity:
            raise RelockError("the API key has no entity of its own; name one with --entity")
        runs = api.runs(
            f"{entity}/{project}",
            filters={"group": sweep, "jobType": {"$ne": "summary"}},
            lazy=True,
        )
        try:
            found = len(runs)
        except ValueError:
            raise RelockError(
                f"W&B has no project {entity}/{project} that this key may read; set --entity and "
                "--project to where the runs were uploaded"
            ) from None
    if not found:
        raise RelockError(
            f"{entity}/{project} has no runs of the group {sweep!r}; upload them first, or set "
            "--entity and --project to where they are"
        )
    if found < jobs:
        log.warning("W&B has %d of the sweep's %d finished runs", found, jobs)
    return api, entity


def make_presets(api: wandb.Api, entity: str, charts: Sequence[Chart]) -> dict[str, str]:
    """Hands the charts' specifications to the server.

    A name stands for one content, so one that is there already needn't be made again.

    Returns:
        The specifications' ids by the charts' names.
    """
    presets = {}
    for chart in charts:
        try:
            presets[chart.name] = api.create_custom_chart(
                entity=entity,
                name=chart.preset,
                display_name=f"Relock: {chart.title}",
                spec_type="vega2",
                access="private",
                spec=chart.spec,
            )
        except refusals() as error:
            presets[chart.name] = f"{entity}/{chart.preset}"
            reason = " ".join(str(error).split())
            level = logging.DEBUG if "exist" in reason else logging.WARNING
            log.log(level, "the server doesn't take the chart %s (%s)", chart.preset, reason)
    return presets


def save(content: Content, folder: Path, kinds: Sequence[str]) -> dict[str, str]:
    """Makes the workspace and the report, or brings those up to date that were made before.

    Args:
        content: What they show.
        folder: The sweep's `wandb` folder, where their addresses are kept.
        kinds: "workspace", "report", or both.

    Returns:
        Their addresses.

    Raises:
        RelockError: The server can't be reached or refuses.
    """
    made = _made(folder)
    savers: dict[str, Callable[[Content, str | None], str]] = {
        "workspace": _save_workspace,
        "report": _save_report,
    }
    for kind in kinds:
        with explained():
            made[kind] = savers[kind](content, _same_place(made.get(kind), content))
        write_whole(folder / _MADE, json.dumps(made, indent=1) + "\n")
    return {kind: made[kind] for kind in kinds}


def _made(folder: Path) -> dict[str, str]:
    try:
        made: dict[str, str] = json.loads((folder / _MADE).read_text())
    except (OSError, ValueError):
        return {}
    return made


def _same_place(url: str | None, content: Content) -> str | None:
    return url if url and f"/{content.entity}/{content.project}" in url else None


def _save_workspace(content: Content, url: str | None) -> str:
    import wandb_workspaces.workspaces as ws

    workspace = _earlier(ws.Workspace.from_url, url) or ws.Workspace(
        entity=content.entity, project=content.project, name=workspace_name(content.sweep)
    )
    fill_workspace(workspace, content)
    return str(workspace.save().url)


def _save_report(content: Content, url: str | None) -> str:
    import wandb_workspaces.reports.v2.interface as wr

    report = _earlier(wr.Report.from_url, url) or wr.Report(
        content.project, content.entity, report_title(content.sweep)
    )
    fill_report(report, content)
    return str(report.save().url)


def _earlier(load: Callable[[str], Any], url: str | None) -> Any:
    """What lies at an address; None where nothing does any more."""
    if url is None:
        return None
    try:
        return load(url)
    except refusals() as error:
        log.info("%s is gone (%s); making another", url, error)
        return None
