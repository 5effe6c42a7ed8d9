"""What a sweep's workspace and report on W&B hold, put together with W&B's own library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.report.columns import COLUMNS, legend
from experiments.tracking.charts import Chart

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import PanelTypes, Report
    from wandb_workspaces.workspaces import Workspace

_PAGE = 24
_HEIGHT = 9
_LONGEST_TITLE = 128
_COST = {
    "cost/prepare_seconds": "seconds to prepare",
    "cost/apply_seconds": "seconds to apply",
    "cost/apply_peak_bytes": "peak memory to apply (bytes)",
    "cost/share_edited": "share of the parameters edited",
}
_PINNED = (
    "config:attack.value",
    "config:defense.value",
    "config:seed.value",
    "summary:attacked/hs",
    "summary:defended/hs",
    "summary:attacked/accuracy_strict",
    "summary:defended/accuracy_strict",
    "summary:cost/prepare_seconds",
    "summary:cost/apply_seconds",
)


@dataclass(frozen=True)
class Content:
    """What there is to show of a sweep.

    Attributes:
        sweep: Its name, which is its runs' group.
        project: W&B project.
        entity: W&B user or team.
        charts: Charts of the pooled rows.
        presets: By the chart's name, the id of its specification on the server.
        figures: Names of the images that the summary run holds.
        table: The report's tables as Markdown.
        swept_ratio: Whether runs differ in the poison ratio.
    """

    sweep: str
    project: str
    entity: str
    charts: Sequence[Chart]
    presets: Mapping[str, str]
    figures: Sequence[str]
    table: str
    swept_ratio: bool


def fill_workspace(workspace: Workspace, content: Content) -> None:
    """Gives a workspace its runs and panels, in place of those that it had."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    workspace.runset_settings = ws.RunsetSettings(
        filters=[expr.Metric("Group") == content.sweep],
        groupby=[],
        pinned_columns=["run:displayName", *_PINNED],
    )
    workspace.sections = [
        ws.Section(
            name=heading,
            panels=panels,
            is_open=True,
            layout_settings=ws.SectionLayoutSettings(columns=2, rows=2),
        )
        for heading, panels in _sections(content).items()
    ]


def fill_report(report: Report, content: Content, lookup: bool = True) -> None:
    """Gives a report its text and panels, in place of those that it had.

    Args:
        report: A new or an earlier one.
        content: What to show.
        lookup: Whether each set of runs names its project, which the library then asks the
            server for; without, it is the report's own.
    """
    import wandb_workspaces.reports.v2.interface as wr
    from wandb_workspaces import expr

    entity, project = (content.entity, content.project) if lookup else ("", "")
    report.title = report_title(content.sweep)
    report.description = "Attack, repair and evaluation of one sweep, side by side."
    report.width = "fluid"
    group = [expr.Metric("Group") == content.sweep]
    blocks: list[Any] = [wr.TableOfContents()]
    for heading, panels in _sections(content).items():
        runs = wr.Runset(name="runs", filters=group, entity=entity, project=project)
        blocks += [wr.H1(heading), wr.PanelGrid(runsets=[runs], panels=panels)]
    tables = wr.MarkdownBlock(content.table)
    report.blocks = [*blocks, wr.H1("Every row with its interval and n"), tables]


def _sections(content: Content) -> dict[str, list[PanelTypes]]:
    """Panels by what heads them, each laid out over the page's width."""
    import wandb_workspaces.reports.v2.interface as wr

    found: dict[str, list[Any]] = {
        "Pooled over seeds": [
            wr.MarkdownPanel(
                f"{legend(COLUMNS)}\nThese charts show the rows of the sweep's summary run."
            ),
            *(_chart(chart, content.presets) for chart in content.charts),
        ],
        "Single runs": [*_bars(), *_scatters(content.swept_ratio)],
        "Cost": [_bar(title, metric) for metric, title in _COST.items()],
        "Training": [
            wr.LinePlot(title=f"loss of the {name}", x=f"{name}/step", y=[f"{name}/loss"])
            for name in ("attack", "refine")
        ],
        "Tables": [
            wr.WeavePanelSummaryTable(table_name=table) for table in ("pooled", "hs_by_category")
        ],
        "Figures of the report": [
            wr.MediaBrowser(title=name, media_keys=[name], num_columns=1)
            for name in content.figures
        ],
    }
    wide = {chart.title for chart in content.charts if chart.wide}
    return {heading: _laid_out(panels, wide) for heading, panels in found.items() if panels}


def _chart(chart: Chart, presets: Mapping[str, str]) -> PanelTypes:
    import wandb_workspaces.reports.v2.interface as wr

    panel = wr.CustomChart.from_table(
        chart.key, chart_fields=chart.fields, chart_strings={"title": chart.title}
    )
    panel.chart_name = presets[chart.name]
    return panel


def _bars() -> list[PanelTypes]:
    return [
        _bar(f"{head} of defended models", f"defended/{name}") for name, head in COLUMNS.items()
    ]


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


def _scatters(swept_ratio: bool) -> list[PanelTypes]:
    import wandb_workspaces.reports.v2.interface as wr

    hs = wr.SummaryMetric("defended/hs")
    panels: list[PanelTypes] = [
        wr.ScatterPlot(
            title="HS against task accuracy, runs",
            x=wr.SummaryMetric("defended/accuracy_strict"),
            y=hs,
            range_x=(0, 1),
            range_y=(0, 1),
        )
    ]
    if swept_ratio:
        ratio = wr.Config("attack/poison_ratio")
        panels.append(wr.ScatterPlot(title="HS against the poison ratio, runs", x=ratio, y=hs))
    return panels


def _laid_out(panels: Sequence[Any], wide: set[str]) -> list[PanelTypes]:
    """Two panels beside each other, wide ones alone."""
    import wandb_workspaces.reports.v2.interface as wr

    x = y = 0
    for panel in panels:
        title = getattr(panel, "chart_strings", {}).get("title")
        alone = title in wide or isinstance(panel, wr.MarkdownPanel)
        width = _PAGE if alone else _PAGE // 2
        if x + width > _PAGE:
            x, y = 0, y + _HEIGHT
        panel.layout = wr.Layout(x=x, y=y, w=width, h=_HEIGHT)
        x += width
    return list(panels)


def specifications(content: Content) -> tuple[dict[str, Any], dict[str, Any]]:
    """The workspace's and the report's specification as they would be sent."""
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws

    entity, project = content.entity, content.project
    workspace = ws.Workspace(entity=entity, project=project, name=workspace_name(content.sweep))
    fill_workspace(workspace, content)
    report = wr.Report(project, entity, report_title(content.sweep))
    fill_report(report, content, lookup=False)
    # The library keeps this for itself; nothing else of it works without a server.
    models = (model._to_model() for model in (workspace, report))
    dumped = (model.model_dump_json(by_alias=True, exclude_none=True) for model in models)
    first, second = (json.loads(text) for text in dumped)
    return first, second


def workspace_name(sweep: str) -> str:
    """The sweep's name as W&B's library takes it: it refuses symbols, "=" and "+" among them."""
    plain = "".join(c if c.isalnum() or c in " -_.,:/" else "-" for c in sweep)
    return f"Relock {plain}"


def report_title(sweep: str) -> str:
    """The report's title, no longer than W&B allows."""
    return f"Relock {sweep}"[:_LONGEST_TITLE]


def write(content: Content, folder: Path) -> list[Path]:
    """Writes the specifications and the charts with their rows to `folder`, as JSON."""
    workspace, report = specifications(content)
    drawn = {
        chart.name: {
            "title": chart.title,
            "preset": content.presets[chart.name],
            "specification": chart.spec,
            "rows": json.loads(chart.table.to_json(orient="records")),
        }
        for chart in content.charts
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, written in (("workspace", workspace), ("report", report), ("charts", drawn)):
        paths.append(folder / f"wandb_{name}.json")
        paths[-1].write_text(json.dumps(written, indent=1) + "\n")
    return paths
