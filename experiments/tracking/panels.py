"""A sweep on W&B, for `experiments.dashboard`: its uploads, its summary run, and what shows it.

Workspace and report are made of W&B's own panels, and kept by its server.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.report.columns import COLUMNS
from experiments.report.pool import Collected, Run
from experiments.results.files import write_whole
from experiments.tracking.wandb_tracker import WandbTracker
from settings import RelockError

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import PanelTypes, Report
    from wandb_workspaces.workspaces import Workspace

log = logging.getLogger("relock")

SUMMARY = "summary"
"""The job type of a sweep's summary run."""

PAGE, POOLED = "report", "pooled"
"""The names under which that run logs the report's page and its table."""

_OFFLINE = "offline-run-*"
_CLASS = f"{WandbTracker.__module__}.{WandbTracker.__qualname__}"

_ADDRESSES = "dashboard.json"
_TIMEOUT_SECONDS = 30
_LONGEST_TITLE = 128
_METRICS = {"worst_hs": "HS where it is worst", **COLUMNS}
_COST = {
    "cost/prepare_seconds": "seconds to prepare",
    "cost/apply_seconds": "seconds to apply",
    "cost/apply_peak_bytes": "peak memory to apply (bytes)",
    "cost/share_edited": "share of the parameters edited",
}
_PINNED = [
    "run:displayName",
    *(f"config:{name}.value" for name in ("attack", "defense", "seed")),
    *(
        f"summary:{model}/{metric}"
        for metric in ("worst_hs", "hs", "accuracy_strict")
        for model in ("attacked", "defended")
    ),
    "summary:worst_hs_under",
    "summary:broken",
    "summary:cost/prepare_seconds",
    "summary:cost/apply_seconds",
]


@dataclass(frozen=True)
class Content:
    """What there is to show of a sweep.

    Attributes:
        sweep: Its name, which is its runs' group.
        figures: Names of the images that the summary run holds.
        table: The report's tables as Markdown.
        varies_ratio: Whether runs differ in the poison ratio.
    """

    sweep: str
    project: str
    entity: str
    figures: Sequence[str]
    table: str
    varies_ratio: bool


def fill_workspace(content: Content, earlier: Workspace | None = None) -> Workspace:
    """The sweep's workspace; an earlier one gets its runs and panels in place of those it had."""
    import wandb_workspaces.workspaces as ws

    # The library refuses symbols in the name, "=" and "+" among them.
    plain = "".join(c if c.isalnum() or c in " -_.,:/" else "-" for c in content.sweep)
    workspace = earlier or ws.Workspace(
        entity=content.entity, project=content.project, name=f"Relock {plain}"
    )
    workspace.runset_settings = ws.RunsetSettings(
        filters=_of_sweep(content), groupby=[], pinned_columns=_PINNED
    )
    two_columns = ws.SectionLayoutSettings(columns=2, rows=2)
    workspace.sections = [
        ws.Section(name=heading, panels=panels, is_open=True, layout_settings=two_columns)
        for heading, panels in _sections(content).items()
    ]
    return workspace


def fill_report(content: Content, earlier: Report | None = None) -> Report:
    """The sweep's report; an earlier one gets its text and panels in place of those it had."""
    import wandb_workspaces.reports.v2.interface as wr

    title = f"Relock {content.sweep}"[:_LONGEST_TITLE]
    report = earlier or wr.Report(content.project, content.entity, title)
    report.title = title
    report.description = "Attack, repair and evaluation of one sweep, side by side."
    report.width = "fluid"
    blocks: list[Any] = [wr.TableOfContents()]
    for heading, panels in _sections(content).items():
        runs = wr.Runset(name="runs", filters=_of_sweep(content))
        blocks += [wr.H1(heading), wr.PanelGrid(runsets=[runs], panels=panels)]
    blocks += [wr.H1("Every row with its interval and n"), wr.MarkdownBlock(content.table)]
    report.blocks = blocks
    return report


def _of_sweep(content: Content) -> list[Any]:
    from wandb_workspaces import expr

    return [expr.Metric("Group") == content.sweep]


def _sections(content: Content) -> dict[str, list[PanelTypes]]:
    """Panels by what heads them."""
    import wandb_workspaces.reports.v2.interface as wr

    def media(name: str) -> PanelTypes:
        return wr.MediaBrowser(title=name, media_keys=[name], num_columns=1)

    hs = wr.SummaryMetric("defended/worst_hs")
    points: dict[str, Any] = {
        "HS against task accuracy": wr.SummaryMetric("defended/accuracy_strict")
    }
    if content.varies_ratio:
        points["HS against the poison ratio"] = wr.Config("attack/poison_ratio")
    return {
        "Report of the sweep": [
            media(PAGE),
            wr.WeavePanelSummaryTable(table_name=POOLED),
            *map(media, content.figures),
        ],
        "Defended models": [
            *(_bar(f"{head} of defended models", f"defended/{m}") for m, head in _METRICS.items()),
            *(wr.ScatterPlot(title=f"{title}, runs", x=x, y=hs) for title, x in points.items()),
        ],
        "Cost": [_bar(title, metric) for metric, title in _COST.items()],
        "Training": [
            wr.LinePlot(title=f"loss of the {name}", x=f"{name}/step", y=[f"{name}/loss"])
            for name in ("attack", "refine")
        ],
    }


def _bar(title: str, metric: str) -> PanelTypes:
    """Means over runs of one attack and defense, with the lowest and the highest of them."""
    import wandb_workspaces.reports.v2.interface as wr

    return wr.BarPlot(
        title=f"{title}: mean and range of runs",
        metrics=[wr.SummaryMetric(metric)],
        groupby=wr.Config("attack_and_defense"),
        groupby_aggfunc="mean",
        groupby_rangefunc="minmax",
        max_bars_to_show=40,
    )


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
    """The user or team whose project holds the sweep's runs: `entity`, or the key's own.

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

    Their addresses are returned, and kept in `folder`, the sweep's `wandb`.

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
        paths[-1].write_text(f"{text}\n", encoding="utf-8")
    return paths


def missing(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Runs that no W&B run stands for, and those whose W&B run is offline and not uploaded yet.

    It goes by what W&B's library left in the runs' folders.
    """
    untracked, waiting = [], []
    for run in runs:
        here = run.folder / "wandb"
        if any(not any(path.glob("*.synced")) for path in here.glob(_OFFLINE)):
            waiting.append(run)
        elif not any(here.glob("*run-*-*")):
            untracked.append(run)
    return untracked, waiting


def sync_command(folder: Path, runs: Sequence[Run]) -> str:
    """The command that uploads offline runs; one pattern where a sweep's jobs lie side by side."""
    if all(run.folder.parent == folder for run in runs):
        return f"wandb sync {shlex.quote(str(folder))}/*/wandb/{_OFFLINE}"
    return "wandb sync " + " ".join(
        f"{shlex.quote(str(run.folder))}/wandb/{_OFFLINE}" for run in runs
    )


def tracker_of(runs: Sequence[Run], project: str | None, entity: str | None) -> WandbTracker:
    """The tracker's settings that the sweep was run with, or the usual ones."""
    trackers = (run.record.settings.get("tracker") or {} for run in runs)
    used: dict[str, Any] = next((t for t in trackers if t.get("_target_") == _CLASS), {})
    options = {"project": project, "entity": entity}
    options = {name: value for name, value in options.items() if value is not None}
    settings = {name: value for name, value in used.items() if name != "_target_"}
    return WandbTracker.validated(settings | options, "tracker")


def track(runs: Sequence[Run], tracker: WandbTracker, sweep: Path) -> None:
    """Tracks runs of the sweep from their records and rows."""
    for number, run in enumerate(runs, start=1):
        group = None if run.folder == sweep else sweep.resolve().name
        line = tracker.track(run.record, run.rows, run.folder, group)
        log.info("[%d/%d] %s", number, len(runs), line)


def sum_up(
    collected: Collected,
    page: Path,
    figures: Sequence[Path],
    tracker: WandbTracker,
    sweep: Path,
    group: str,
) -> str:
    """Logs the report of a sweep as one run, in place of an earlier one.

    Raises:
        wandb.Error: The server can't be reached or refuses.
    """
    import wandb

    from experiments.report import tables

    commits = sorted({str(run.record.environment["commit"]) for run in collected.runs})
    media: dict[str, Any] = {
        PAGE: wandb.Html(str(page)),
        POOLED: wandb.Table(dataframe=tables.frame(collected)),
        **{figure_key(path): wandb.Image(str(path)) for path in figures},
    }
    with tracker.start(
        sweep,
        online=True,
        group=group,
        job_type=SUMMARY,
        name=f"summary of {group}",
        tags=[SUMMARY],
        config={"sweep": group, "jobs": len(collected.runs), "commits": ", ".join(commits)},
    ) as run:
        run.log(media)
        return str(run.url)


def figure_key(path: Path) -> str:
    """The name under which a figure is logged."""
    return f"figures/{path.stem}"
