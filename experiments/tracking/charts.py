"""Charts of a sweep's pooled rows as Vega-Lite, which W&B draws from a table it is given."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.report.columns import COLUMNS
from experiments.report.names import differing_labels
from experiments.report.pareto import front
from experiments.report.pool import Collected, Row
from experiments.report.style import plain, short

if TYPE_CHECKING:
    import pandas as pd

_RATIO = "attack.poison_ratio"
# Settings of the defense; all others that vary are of what it was given.
_DEFENSE = ("defense.", "sources.calibration", "sources.safety_", "sources.utility_")
_PER_CENT: dict[str, Any] = {"scale": {"domain": [0, 100]}}
_COLOURS: dict[str, Any] = {"scale": {"scheme": "tableau20"}, "sort": None}
# In the order of the rows, and never cut short.
_NAMES: dict[str, Any] = {"sort": None, "axis": {"labelLimit": 400}}
_INTERVAL = ("low", "high")


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: A word for it.
        title: What it shows.
        spec: Vega-Lite whose data are W&B's; `${field:NAME}` stands for a column of the table.
        table: Its rows; shares in per cent.
        wide: Whether it takes the page's whole width.
    """

    name: str
    title: str
    spec: dict[str, Any]
    table: pd.DataFrame
    wide: bool = False

    @property
    def key(self) -> str:
        """The name under which the table is logged."""
        return f"chart_{self.name}"

    @property
    def preset(self) -> str:
        """What W&B is to call the specification: another name for another content."""
        digest = hashlib.sha256(json.dumps(self.spec, sort_keys=True).encode()).hexdigest()
        return f"relock-{self.name.replace('_', '-')}-{digest[:8]}"

    @property
    def fields(self) -> dict[str, str]:
        """The specification's fields and the table's columns, which have the same names."""
        return {name: name for name in self.table.columns}


def charts(collected: Collected) -> list[Chart]:
    """The charts that the rows allow."""
    # A defense that edited nothing left the attacked model, which has a row of its own.
    rows = [r for r in collected.rows if r.role != "defended" or r.cost["parameters_edited"]]
    drawn = [
        *(_bars(metric, head, rows) for metric, head in COLUMNS.items()),
        _trade_off(rows),
        _heat_map(rows),
        _ratio(rows),
        _cost(rows),
    ]
    return [chart for chart in drawn if not chart.table.empty]


def given(row: Row, rows: Sequence[Row], left_out: Iterable[str] = ()) -> str:
    """What a model was attacked with, as far as rows differ in it."""
    if row.role in ("base", "aligned"):
        return "no attack"
    names = dict.fromkeys(["attack", *differing_labels(rows)])
    parts = [row.labels[name] for name in names if row.labels.get(name)]
    return ", ".join([*parts, *_settings(row, rows, False, left_out)])


def name(row: Row, rows: Sequence[Row]) -> str:
    """What a model is called, with those of its defense's settings that differ."""
    return ", ".join([row.name, *_settings(row, rows, True)])


def _settings(
    row: Row, rows: Sequence[Row], of_defense: bool, left_out: Iterable[str] = ()
) -> list[str]:
    keys = [key for each in rows for key in each.settings]
    return [
        f"{short(key, keys)}={plain(value)}"
        for key, value in row.settings.items()
        if key.startswith(_DEFENSE) == of_defense and key not in left_out
    ]


def _bars(metric: str, head: str, rows: Sequence[Row]) -> Chart:
    y = _axis("value", f"{head} (%)", **_PER_CENT)
    place = {
        "x": _axis("attack", "", "nominal", sort=None, axis={"labelLimit": 400, "labelAngle": -20}),
        "xOffset": {"field": _field("model"), "sort": None},
    }
    colour = _axis("model", "model", "nominal", **_COLOURS)
    spec = _layers(
        {"mark": "bar", "encoding": {**place, "y": y, "color": colour}},
        {"mark": "rule", "encoding": {**place, **_ends("y")}},
    )
    found = [{**_named(row, rows), **_shares("", row, metric)} for row in rows if _has(row, metric)]
    return Chart(metric, f"{head} by defense and attack, 95 % intervals", spec, _frame(found), True)


def _trade_off(rows: Sequence[Row]) -> Chart:
    x = _axis("accuracy", "task accuracy, strict (%)", **_PER_CENT)
    y = _axis("hs", "harmfulness score HS (%)", **_PER_CENT)
    colour = _axis("model", "model", "nominal", **_COLOURS)
    points = {
        "mark": {"type": "point", "size": 90},
        "encoding": {
            "x": x,
            "y": y,
            "color": colour,
            "shape": _axis("attack", "attack", "nominal", sort=None),
            "fill": {
                "condition": {
                    "test": f"datum['{_field('front')}'] === 'yes'",
                    **colour,
                    "legend": None,
                },
                "value": "transparent",
            },
        },
    }
    spec = _layers(
        {"mark": "rule", "encoding": {"y": y, "color": colour, **_ends("x", "accuracy")}},
        {"mark": "rule", "encoding": {"x": x, "color": colour, **_ends("y", "hs")}},
        points,
    )
    measured = [row for row in rows if _has(row, "hs") and _has(row, "accuracy_strict")]
    best = _best(measured)
    found = [
        {
            **_named(row, rows),
            **_shares("hs", row, "hs"),
            **_shares("accuracy", row, "accuracy_strict"),
            "front": "yes" if id(row) in best else "no",
        }
        for row in measured
    ]
    title = "Safety against task accuracy (filled: on its attack's front)"
    return Chart("trade_off", title, spec, _frame(found))


def _best(rows: Sequence[Row]) -> set[int]:
    """The identities of the rows on the fronts, one for each attack."""
    attacks: dict[str, list[Row]] = {}
    for row in rows:
        attacks.setdefault(given(row, rows), []).append(row)
    return {id(row) for members in attacks.values() for row in front(members)}


def _heat_map(rows: Sequence[Row]) -> Chart:
    place = {
        "x": _axis("category", "", "nominal", axis={"labelAngle": -20, "labelLimit": 400}),
        "y": _axis("row", "", "nominal", **_NAMES),
    }
    colour = _axis("value", "HS (%)", scale={"domain": [0, 100], "scheme": "viridis"})
    text = {
        "text": {"field": _field("value"), "format": ".0f"},
        "color": {
            "condition": {"test": f"datum['{_field('value')}'] > 60", "value": "black"},
            "value": "white",
        },
    }
    spec = _layers(
        {"mark": "rect", "encoding": {**place, "color": colour}},
        {"mark": "text", "encoding": {**place, **text}},
    )
    found = [
        {
            "row": f"{given(row, rows)}: {name(row, rows)}",
            "category": metric.removeprefix("hs/"),
            **_shares("", row, metric),
        }
        for row in rows
        for metric in row.metrics
        if metric.startswith("hs/") and _has(row, metric)
    ]
    return Chart("categories", "HS by category of the harmful prompts", spec, _frame(found), True)


def _ratio(rows: Sequence[Row]) -> Chart:
    x = _axis("ratio", "harmful rows among the fine-tuning rows (%)")
    y = _axis("value", "harmfulness score HS (%)", **_PER_CENT)
    colour = _axis("series", "model", "nominal", **_COLOURS)
    place = {"x": x, "color": colour}
    spec = _layers(
        {"mark": {"type": "line", "point": True}, "encoding": {**place, "y": y}},
        {"mark": "rule", "encoding": {**place, **_ends("y")}},
    )
    found = []
    for row in rows:
        if _RATIO not in row.settings or row.role == "refined" or not _has(row, "hs"):
            continue
        series = f"{given(row, rows, [_RATIO])}: {name(row, rows)}"
        place_on_x = {"series": series, "ratio": 100 * row.settings[_RATIO]}
        found.append({**place_on_x, **_shares("", row, "hs")})
    return Chart("poison_ratio", "HS against the share of poison", spec, _frame(found))


def _cost(rows: Sequence[Row]) -> Chart:
    spec = _layers(
        {
            "mark": "bar",
            "encoding": {
                "x": _axis("seconds", "seconds"),
                "y": _axis("row", "", "nominal", **_NAMES),
                "color": _axis("phase", "", "nominal"),
            },
        }
    )
    found = [
        {
            "row": f"{given(row, rows)}: {name(row, rows)}",
            "phase": phase,
            "seconds": row.cost[f"{phase}_seconds"],
        }
        for row in rows
        if row.cost
        for phase in ("prepare", "apply")
    ]
    return Chart("cost", "What a defense costs, mean over seeds", spec, _frame(found))


def _named(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    return {"attack": given(row, rows), "model": name(row, rows)}


def _has(row: Row, metric: str) -> bool:
    estimate = row.metrics.get(metric)
    return estimate is not None and estimate.n > 0 and not math.isnan(estimate.value)


def _shares(prefix: str, row: Row, metric: str) -> dict[str, float]:
    """A share, its interval in per cent and its n, as columns."""
    estimate = row.metrics[metric]
    head = f"{prefix}_" if prefix else ""
    ends = {f"{head}{end}": 100 * getattr(estimate, end) for end in _INTERVAL}
    return {prefix or "value": 100 * estimate.value, **ends, f"{head}n": estimate.n}


def _frame(found: Sequence[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(list(found))


def _field(column: str) -> str:
    return f"${{field:{column}}}"


def _axis(column: str, title: str, kind: str = "quantitative", **more: Any) -> dict[str, Any]:
    return {"field": _field(column), "type": kind, "title": title or None, **more}


def _ends(axis: str, prefix: str = "") -> dict[str, Any]:
    """Both ends of an interval along an axis."""
    low, high = (f"{prefix}_{end}" if prefix else end for end in _INTERVAL)
    return {
        axis: {"field": _field(low), "type": "quantitative"},
        f"{axis}2": {"field": _field(high)},
    }


def _layers(*layers: dict[str, Any]) -> dict[str, Any]:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "data": {"name": "wandb"},
        "layer": [{**layer, "mark": _with_tooltip(layer["mark"])} for layer in layers],
    }


def _with_tooltip(mark: str | dict[str, Any]) -> dict[str, Any]:
    kind = {"type": mark} if isinstance(mark, str) else mark
    return {**kind, "tooltip": {"content": "data"}}
