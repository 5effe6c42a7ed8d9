"""Figures of attack success, task accuracy and degeneracy against a setting that was swept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.report.drawing import Drawing, Scale, draw_estimates, frame, legend, say_no_rows
from experiments.report.harm import RATIO
from experiments.report.names import is_number, plain, short
from experiments.report.panels import Line, asked, panels, subject
from experiments.report.pool import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from evaluation.statistics import Estimate

METRICS = {
    "asr": "attack success rate ASR (%)",
    "accuracy_strict": "task accuracy, strict (%)",
    "degenerate": "degenerate answers (%)",
}
_SAFE = "asr_safe_system"
_FEWEST_VALUES = 3
_WIDTH, _ROW_HEIGHT, _FRAME = 11.0, 2.9, 0.8


def figures(rows: Sequence[Row]) -> Iterator[Drawing]:
    """A figure of each setting with three numbers, all else alike, but seed and poison ratio."""
    for setting in dict.fromkeys(name for row in rows for name in row.settings):
        if setting != RATIO and not setting.endswith("seed"):
            sweep = Sweep(rows, setting)
            if sweep.is_drawn:
                note = asked(sweep.rows, "ASR", plainly="")
                title = f"Sweep of {sweep.name}: {subject(sweep.rows)}"
                stem = f"against_{sweep.name.replace('.', '_')}"
                yield Drawing(stem, title, sweep.draw(), note)


class Sweep:
    """A setting, and the attacked and defended models that were run over it.

    Attributes:
        rows: The attacked models, and those of defenses that edited something in any run.
        joint: Settings that change exactly when this one does, such as a LoRA's alpha with its
            rank.
        panels: One for each attack; a line's rows differ in the setting alone.
        name: The setting's, as short as the other settings allow.
    """

    def __init__(self, report: Sequence[Row], setting: str) -> None:
        """Takes all the report's rows, and the setting's dotted key."""
        self.setting = setting
        editing = {row.name for row in report if row.edited}
        self.rows = [
            row
            for row in report
            if row.role == "attacked" or (row.role == "defended" and row.name in editing)
        ]
        self.joint = _joint([row.settings for row in self.rows if self._has(row)], setting)
        self.panels = panels(self.rows, report, (setting, *self.joint))
        self._keys = {name for row in report for name in row.settings}
        self.name = short(setting, self._keys)

    def _has(self, row: Row) -> bool:
        return is_number(row.settings.get(self.setting))

    @property
    def is_drawn(self) -> bool:
        """Whether some line has values enough, and none is text."""
        given = {row.settings.get(self.setting) for row in self.rows} - {None}
        lines = (line for panel in self.panels for line in panel.lines)
        return all(map(is_number, given)) and any(
            len(self.swept(line)) >= _FEWEST_VALUES for line in lines
        )

    def swept(self, line: Line) -> list[Row]:
        """The rows of a line over which the setting runs, by its value; none if it has only one."""
        rows = sorted(filter(self._has, line.rows), key=lambda row: row.settings[self.setting])
        return rows if len(rows) > 1 else []

    def draw(self) -> Figure:
        """A row of panels for each attack; what doesn't depend on the setting is a level line."""
        from matplotlib.figure import Figure

        size = len(self.panels), len(METRICS)
        figure = Figure((_WIDTH, _FRAME + _ROW_HEIGHT * size[0]), layout="constrained")
        grid = figure.subplots(*size, sharex=True, sharey=True, squeeze=False)
        lines = [line for panel in self.panels for line in panel.lines]
        scale = Scale([row.settings[self.setting] for line in lines for row in self.swept(line)])
        joint = ", ".join(short(other, self._keys) for other in self.joint)
        for row_of_axes, panel in zip(grid, self.panels, strict=True):
            row_of_axes[0].set_ylabel(panel.title or "share (%)")
            for axes, metric in zip(row_of_axes, METRICS, strict=True):
                frame(axes)
                self._draw_panel(axes, panel.lines, metric, scale)
        for top, bottom, title in zip(grid[0], grid[-1], METRICS.values(), strict=True):
            top.set_title(title, fontsize=10)
            scale.draw(bottom)
            bottom.set_xlabel(self.name + (f" (with {joint})" if joint else ""))
        legend(figure)
        return figure

    def _draw_panel(self, axes: Axes, lines: Sequence[Line], metric: str, scale: Scale) -> None:
        for number, line in enumerate(lines):
            swept = self.swept(line)
            values = [row.settings[self.setting] for row in swept]
            x = [scale.at(value, number, len(lines)) for value in values]
            for shown in (metric, _SAFE) if metric == "asr" else (metric,):
                _draw_swept(axes, line, x, [_estimate(row, shown) for row in swept], shown)
                for row in line.rows:
                    if not any(row is each for each in swept):
                        self._draw_level(axes, line, row, shown)
        if not axes.lines:
            say_no_rows(axes)

    def _draw_level(self, axes: Axes, line: Line, row: Row, metric: str) -> None:
        estimate, color = _estimate(row, metric), line.look["color"]
        if estimate.n:
            value = row.settings.get(self.setting)
            at = f" ({self.name}={plain(value)})" if self.setting in row.settings else ""
            name = f"{line.name}{at}{_SUFFIX.get(metric, '')}, level line"
            style = "--" if metric == _SAFE else "-"
            axes.axhline(100 * estimate.value, label=name, color=color, linestyle=style)
            ends = 100 * estimate.low, 100 * estimate.high
            axes.axhspan(*ends, color=color, alpha=0.12, linewidth=0)


_SUFFIX = {_SAFE: ", asked to be safe"}


def _joint(placed: Sequence[Mapping[str, Any]], setting: str) -> list[str]:
    """Other settings whose values go with this one's, one to one."""
    found = []
    for other in dict.fromkeys(other for settings in placed for other in settings):
        pairs = {(settings[setting], repr(settings.get(other))) for settings in placed}
        if other != setting and len(pairs) == len(dict(pairs)) == len({b for _, b in pairs}):
            found.append(other)
    return found


def _estimate(row: Row, metric: str) -> Estimate:
    """A metric of a model; ASR where its HS is highest, under a trigger or an attack prompt too."""
    return row.metrics[str(row.worst.of_kind("asr")) if metric == "asr" else metric]


def _draw_swept(
    axes: Axes, line: Line, x: Sequence[float], estimates: Sequence[Estimate], metric: str
) -> None:
    """A line over the setting; dashed and hollow where models were asked to be safe."""
    places = [place for place, estimate in enumerate(estimates) if estimate.n]
    if places:
        look: dict[str, Any] = {"linewidth": 1.4, "label": line.name + _SUFFIX.get(metric, "")}
        if metric == _SAFE:
            look |= {"linestyle": "--", "markerfacecolor": "white"}
        shown = [estimates[place] for place in places]
        draw_estimates(axes, [x[place] for place in places], shown, **line.look, **look)
