"""Workspace and report of a sweep on W&B: W&B's own panels, which `experiments.dashboard` saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.report.columns import COLUMNS
from experiments.tracking.uploads import PAGE, POOLED

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import PanelTypes, Report
    from wandb_workspaces.workspaces import Workspace

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
    "summary:cost/prepare_seconds",
    "summary:cost/apply_seconds",
]


@dataclass(frozen=True)
class Content:
    """What there is to show of a sweep.

    Attributes:
        sweep: Its name, which is its runs' group.
        project: W&B project.
        entity: W&B user or team.
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
