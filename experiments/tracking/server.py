"""W&B's server for the dashboard: a sweep's runs are looked up, workspace and report saved."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.results.files import write_whole
from experiments.tracking.panels import Content, fill_report, fill_workspace
from settings import RelockError

log = logging.getLogger("relock")

_ADDRESSES = "dashboard.json"
_TIMEOUT_SECONDS = 30


def _refusals() -> tuple[type[Exception], ...]:
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
    except _refusals() as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RelockError(
            f"W&B can't be reached or refuses ({reason}); check the network, WANDB_BASE_URL, the "
            "key, --entity and --project, then run this again: it goes on where it stopped"
        ) from error


def find_entity(entity: str | None, project: str, sweep: str, jobs: int) -> str:
    """The user or team whose project holds the sweep's runs.

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
        of_sweep = {"group": sweep, "jobType": {"$ne": "summary"}}
        try:
            uploaded = len(api.runs(f"{entity}/{project}", filters=of_sweep, lazy=True))
        except ValueError:
            raise RelockError(
                f"W&B has no project {entity}/{project} that this key may read; set --entity and "
                "--project to where the runs were uploaded"
            ) from None
    if not uploaded:
        raise RelockError(
            f"{entity}/{project} has no runs of the group {sweep!r}; upload them first, or set "
            "--entity and --project to where they are"
        )
    if uploaded < jobs:
        log.warning("W&B has %d of the sweep's %d finished runs", uploaded, jobs)
    return entity


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
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws

    views: dict[str, tuple[Any, Callable[..., Any]]] = {
        "workspace": (ws.Workspace, fill_workspace),
        "report": (wr.Report, fill_report),
    }
    path = folder / _ADDRESSES
    addresses: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    for kind in kinds:
        view, fill = views[kind]
        with explained():
            earlier = None
            if f"/{content.entity}/{content.project}" in addresses.get(kind, ""):
                earlier = _load(view, addresses[kind])
            addresses[kind] = str(fill(content, earlier).save().url)
        write_whole(path, json.dumps(addresses, indent=1) + "\n")
    return {kind: addresses[kind] for kind in kinds}


def _load(view: Any, url: str) -> Any:
    """The workspace or report at an address; None where it is no more."""
    try:
        return view.from_url(url)
    except _refusals() as error:
        log.info("%s is gone (%s); making another", url, error)
        return None


def write(content: Content, folder: Path) -> list[Path]:
    """Writes to `folder` what workspace and report would be sent as, in JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, view in (("workspace", fill_workspace(content)), ("report", fill_report(content))):
        # The library keeps this for itself; nothing else of it works without a server.
        model: Any = view._to_model()
        paths.append(folder / f"wandb_{name}.json")
        text = model.model_dump_json(by_alias=True, exclude_none=True, indent=1)
        paths[-1].write_text(f"{text}\n")
    return paths
