"""Figures of attack success, task accuracy and degeneracy against a setting that was swept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.report.drawing import GREY, Drawing, Scale, frame, legend, legend_entry, margins
from experiments.report.harm import RATIO
from experiments.report.panels import Line, asked, panels, subject
from experiments.report.pool import Row
from experiments.report.style import is_number, plain, short

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
_SAFE_NAME = "dashed, hollow: asked to be safe"
_FEWEST_VALUES = 3
_WIDTH, _ROW_HEIGHT, _LEGEND_ROW = 11.0, 2.9, 0.2


def figures(rows: Sequence[Row]) -> Iterator[Drawing]:
    """A figure of every numeric setting of which an attack or defense was run with three values.

    Seeds are left out, and the poison ratio, which has its own figure. So is a setting that never
    varies while all others stay as they are, as between models with different presets.
    """
    for setting in dict.fromkeys(key for row in rows for key in row.settings):
        if setting != RATIO and not setting.endswith("seed"):
            sweep = Sweep(rows, setting)
            if sweep.is_drawn:
                yield sweep.drawing()


class Sweep:
    """A setting, and the attacked and defended models that were run over it.

    Attributes:
        rows: The attacked models, and those of defenses that edited something in any run.
        joint: Settings that change exactly when this one does, such as a LoRA's alpha with its
            rank.
        panels: One for each attack; a line's rows differ in the setting alone.
    """

    def __init__(self, report: Sequence[Row], setting: str) -> None:
        """Takes the report's rows, and the setting's dotted key."""
        self.setting = setting
        editing = {row.name for row in report if row.edited}
        self.rows = [
            row
            for row in report
            if row.role == "attacked" or (row.role == "defended" and row.name in editing)
        ]
        self.joint = _joint([row.settings for row in self.rows if self._has(row)], setting)
        self.panels = panels(self.rows, report, (setting, *self.joint))
        self._keys = {key for row in report for key in row.settings}
        self._values: dict[str | None, set[float]] = {}
        for row in filter(self._has, self.rows):
            self._values.setdefault(self._owner(row), set()).add(row.settings[setting])

    def _has(self, row: Row) -> bool:
        return is_number(row.settings.get(self.setting))

    def _owner(self, row: Row) -> str | None:
        """The attack or defense that the setting is of: alpha is not the same in two defenses."""
        return row.labels.get(self.setting.partition(".")[0])

    @property
    def is_drawn(self) -> bool:
        """Whether there is something to see: three numbers, and no text among them."""
        given = {row.settings.get(self.setting) for row in self.rows} - {None}
        if not all(map(is_number, given)):
            return False
        most = max(map(len, self._values.values()), default=0)
        lines = (line for panel in self.panels for line in panel.lines)
        return most >= _FEWEST_VALUES and any(len(self.swept(line)) > 1 for line in lines)

    def swept(self, line: Line) -> list[Row]:
        """The rows of a line over which the setting runs, by its value."""
        swept = [
            row for row in line.rows if self._has(row) and len(self._values[self._owner(row)]) > 1
        ]
        return sorted(swept, key=lambda row: row.settings[self.setting])

    @property
    def name(self) -> str:
        """The setting's, as short as the other settings allow."""
        return short(self.setting, self._keys)

    def drawing(self) -> Drawing:
        """The figure with its heading."""
        note = asked(self.rows, "ASR")
        title = f"Sweep of {self.name}: {subject(self.rows)}"
        return Drawing(f"against_{self.name.replace('.', '_')}", title, self.draw(), note)

    def draw(self) -> Figure:
        """ASR, task accuracy and degenerate answers against the setting, with 95 % intervals.

        Every attack has a row of panels; what doesn't depend on the setting is a level line.
        """
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        size = len(self.panels), len(METRICS)
        grid = figure.subplots(*size, sharex=True, sharey=True, squeeze=False)
        scale = Scale([value for values in self._values.values() for value in values])
        keys: dict[str, Any] = {}
        for row_of_axes, panel in zip(grid, self.panels, strict=True):
            row_of_axes[0].set_ylabel(panel.title or "share (%)")
            for axes, metric in zip(row_of_axes, METRICS, strict=True):
                keys |= self._draw_panel(axes, panel.lines, metric, scale)
        for axes, title in zip(grid[0], METRICS.values(), strict=True):
            axes.set_title(title, fontsize=10)
        joint = ", ".join(short(other, self._keys) for other in self.joint)
        for axes in grid[-1]:
            scale.draw(axes)
            axes.set_xlabel(self.name + (f" (with {joint})" if joint else ""))
        height = 0.8 + _ROW_HEIGHT * len(self.panels) + _LEGEND_ROW * len(keys)
        figure.set_size_inches(_WIDTH, height)
        legend(figure, keys)
        return figure

    def _draw_panel(
        self, axes: Axes, lines: Sequence[Line], metric: str, scale: Scale
    ) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        frame(axes)
        for number, line in enumerate(lines):
            swept = self.swept(line)
            places = {
                id(row): scale.at(row.settings[self.setting], number, len(lines)) for row in swept
            }
            for name in (metric, _SAFE) if metric == "asr" else (metric,):
                keys |= _draw_swept(axes, line, swept, places, name)
                for row in line.rows:
                    if id(row) not in places:
                        keys |= self._draw_level(axes, line, row, name)
        if not keys:
            axes.text(0.5, 0.5, "no rows", transform=axes.transAxes, ha="center", color=GREY)
        return keys

    def _draw_level(self, axes: Axes, line: Line, row: Row, metric: str) -> dict[str, Any]:
        estimate, color = _estimate(row, metric), line.look["color"]
        if not estimate.n:
            return {}
        at = ""
        if self.setting in row.settings:
            at = f" ({self.name}={plain(row.settings[self.setting])})"
        name = f"{line.name}{at}, level line"
        style = "--" if metric == _SAFE else "-"
        axes.axhline(100 * estimate.value, label=name, color=color, linestyle=style, linewidth=1.2)
        axes.axhspan(100 * estimate.low, 100 * estimate.high, color=color, alpha=0.12, linewidth=0)
        return {name: legend_entry(name, {"color": color})}


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
    axes: Axes, line: Line, rows: Sequence[Row], places: Mapping[int, float], metric: str
) -> dict[str, Any]:
    """A line over the setting; dashed and hollow where models were asked to be safe."""
    shown = [row for row in rows if _estimate(row, metric).n]
    if not shown:
        return {}
    estimates = [_estimate(row, metric) for row in shown]
    safe = metric == _SAFE
    look: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white"} if safe else {}
    axes.errorbar(
        [places[id(row)] for row in shown],
        [100 * estimate.value for estimate in estimates],
        yerr=margins(estimates),
        label=f"{line.name}, asked to be safe" if safe else line.name,
        linewidth=1.4,
        markersize=5,
        capsize=2.5,
        elinewidth=0.9,
        alpha=0.9,
        **line.look,
        **look,
    )
    keys = {line.name: legend_entry(line.name, line.look)}
    if safe:
        grey = {"color": GREY, "marker": "o", "mfc": "white", "linestyle": "--"}
        keys[_SAFE_NAME] = legend_entry(_SAFE_NAME, grey)
    return keys
