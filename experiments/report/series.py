"""Which rows make one line when results are drawn against a setting, and how lines are laid out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.report.pool import Row
from experiments.report.style import COLOURS, is_number, plain, short
from experiments.report.tables import label

# Another figure shows it.
_COVERED = "attack.poison_ratio"
_FEWEST_VALUES = 3
_LABELS = ("model", "align", "attack", "task", "protocol")
_ATTACKED = "attacked (no defense)"


@dataclass(frozen=True)
class Series:
    """One line of a figure.

    Attributes:
        parts: What tells it apart: "defense" (or that there is none), names, settings.
        rows: Its rows, by the setting on the x axis.
        swept: Whether the setting runs over its rows; if not, it is one row that doesn't depend
            on the setting, or has no number there.
    """

    parts: dict[str, Any]
    rows: list[Row]
    swept: bool


@dataclass(frozen=True)
class Layout:
    """How series are told apart.

    Attributes:
        named: Parts that the legend names.
        keys: Settings among which a key's last part may be ambiguous.
        shade: The setting that a sequence of colours stands for, if any.
        panels: What heads every row of panels, and its series.
    """

    named: tuple[str, ...]
    keys: tuple[str, ...]
    shade: str | None
    panels: list[tuple[str, list[Series]]]


def settings_to_draw(rows: Iterable[Row]) -> list[str]:
    """The numeric settings of which some attack or defense was run with three values or more.

    Seeds are left out, and the poison ratio, which has its own figure. So is a setting that never
    varies while all others stay as they are, as between models with different presets.
    """
    rows = shown(rows)
    keys = dict.fromkeys(key for row in rows for key in row.settings)
    return [key for key in keys if _is_drawn(key, rows)]


def _is_drawn(key: str, rows: Sequence[Row]) -> bool:
    values = {row.settings.get(key) for row in rows} - {None}
    if key == _COVERED or key.endswith("seed") or not all(map(is_number, values)):
        return False
    most = max((len(owned) for owned in _owned(rows, key).values()), default=0)
    return most >= _FEWEST_VALUES and any(len(s.rows) > 1 for s in series(rows, key))


def shown(rows: Iterable[Row]) -> list[Row]:
    """Attacked models and those of defenses that edited something in any run."""
    rows = [row for row in rows if row.role in ("attacked", "defended")]
    editing = {label(row) for row in rows if row.cost.get("parameters_edited")}
    return [row for row in rows if row.role == "attacked" or label(row) in editing]


def _owner(row: Row, key: str) -> str | None:
    """The attack or defense that a setting is of: alpha is not the same in two defenses."""
    return row.labels.get(key.partition(".")[0])


def _owned(rows: Iterable[Row], key: str) -> dict[str | None, set[float]]:
    values: dict[str | None, set[float]] = {}
    for row in rows:
        if is_number(row.settings.get(key)):
            values.setdefault(_owner(row, key), set()).add(row.settings[key])
    return values


def together(rows: Iterable[Row], key: str) -> list[str]:
    """Settings that change exactly when `key` does, such as a LoRA's alpha with its rank."""
    placed = [row.settings for row in shown(rows) if is_number(row.settings.get(key))]
    others = dict.fromkeys(other for settings in placed for other in settings if other != key)
    return [other for other in others if _one_to_one(placed, key, other)]


def _one_to_one(placed: Sequence[Mapping[str, Any]], key: str, other: str) -> bool:
    pairs = {(settings[key], repr(settings.get(other))) for settings in placed}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def series(rows: Iterable[Row], key: str) -> list[Series]:
    """The lines of a figure against `key`: swept ones, and rows that don't depend on it."""
    rows = shown(rows)
    swept = {owner for owner, values in _owned(rows, key).items() if len(values) > 1}
    joint = together(rows, key)
    groups: dict[tuple[Any, ...], Series] = {}
    for row in rows:
        placed = is_number(row.settings.get(key)) and _owner(row, key) in swept
        left_out = {key, *joint} if placed else set()
        names = {name: row.labels.get(name, "") for name in _LABELS}
        settings = {k: v for k, v in row.settings.items() if k not in left_out}
        head = label(row) if row.role == "defended" else _ATTACKED
        parts = {"defense": head, **names, **settings}
        group = groups.setdefault((placed, *parts.items()), Series(parts, [], placed))
        group.rows.append(row)
    for group in groups.values():
        if group.swept:
            group.rows.sort(key=lambda row: row.settings[key])
    return list(groups.values())


def arrange(all_series: Sequence[Series], key: str) -> Layout:
    """Chooses how to tell the series apart: by palette as long as that has a colour for each.

    With more series a numeric setting becomes a sequence of colours, if there is one of three
    values or more, and rows of panels part the rest.
    """
    named = _named(all_series, key)
    keys = tuple(dict.fromkeys(k for s in all_series for row in s.rows for k in row.settings))
    if len(all_series) <= len(COLOURS):
        return Layout(named, keys, None, [("", list(all_series))])
    shade = _shade(all_series, named)
    rows_by: tuple[str, ...] = ()
    candidates = [part for part in ("defense", *named) if part != shade]
    crowding = _crowding(all_series, rows_by, shade)
    while crowding and candidates:
        tried = {part: _crowding(all_series, (*rows_by, part), shade) for part in candidates}
        best = min(tried, key=lambda part: tried[part])
        if tried[best] >= crowding:
            break
        rows_by, crowding = (*rows_by, best), tried[best]
        candidates.remove(best)
    panels = [
        (describe(heading, rows_by, keys), members)
        for heading, members in _panels(all_series, rows_by, shade)
    ]
    return Layout(tuple(p for p in named if p not in rows_by), keys, shade, panels)


def _named(all_series: Sequence[Series], key: str) -> tuple[str, ...]:
    """Labels that differ, and settings that differ between series of the same labels."""
    labels = [name for name in _LABELS if len({s.parts[name] for s in all_series}) > 1]
    values: dict[str, dict[tuple[str, ...], set[str]]] = {}
    for s in all_series:
        group = tuple(s.parts[name] for name in ("defense", *_LABELS))
        for part in s.parts.keys() - {"defense", *_LABELS}:
            values.setdefault(part, {}).setdefault(group, set()).add(repr(s.parts[part]))
    order = dict.fromkeys(part for s in all_series for part in s.parts)
    told = [p for p in order if p in values and max(map(len, values[p].values())) > 1]
    if key in values and key not in told:
        told.append(key)
    return (*labels, *told)


def _shade(all_series: Sequence[Series], named: Sequence[str]) -> str | None:
    """The numeric setting with the most values among the swept series."""
    values = {
        part: {s.parts[part] for s in all_series if s.swept and part in s.parts} for part in named
    }
    numeric = [
        part
        for part, given in values.items()
        if len(given) >= _FEWEST_VALUES and all(map(is_number, given))
    ]
    return max(numeric, key=lambda part: len(values[part]), default=None)


def _crowding(all_series: Sequence[Series], rows_by: Sequence[str], shade: str | None) -> int:
    """How many lines too many the fullest row of panels holds."""
    return max(_excess(members, shade) for _, members in _panels(all_series, rows_by, shade))


def _excess(members: Sequence[Series], shade: str | None) -> int:
    entries = {
        (repr({part: value for part, value in s.parts.items() if part != shade}), s.swept)
        for s in members
    }
    shaded = {
        repr({part: value for part, value in s.parts.items() if part != shade})
        for s in members
        if s.swept and shade in s.parts
    }
    return max(0, len(entries) - len(COLOURS)) + max(0, len(shaded) - 1)


def _panels(
    all_series: Sequence[Series], rows_by: Sequence[str], shade: str | None
) -> list[tuple[dict[str, Any], list[Series]]]:
    """Rows of panels: series that agree on `rows_by`, with those that don't depend on it."""
    places = [_place(s, rows_by, shade) for s in all_series]
    headings = [
        place
        for index, place in enumerate(places)
        if place not in places[:index] and not any(place.items() < p.items() for p in places)
    ]
    return [
        (h, [s for s, place in zip(all_series, places, strict=True) if place.items() <= h.items()])
        for h in headings
    ]


def _place(s: Series, rows_by: Sequence[str], shade: str | None) -> dict[str, Any]:
    # What others are compared with stands in every row: the attacked model, a line without x.
    compared = not s.swept or (s.parts["defense"] == _ATTACKED and shade not in s.parts)
    left_out = {"defense"} if compared else set()
    return {part: s.parts[part] for part in rows_by if part in s.parts and part not in left_out}


def describe(parts: Mapping[str, Any], chosen: Iterable[str], keys: Sequence[str]) -> str:
    """Some of a series' parts as a reader writes them; names stand alone."""
    return ", ".join(
        str(parts[part])
        if part in ("defense", *_LABELS)
        else f"{short(part, keys)}={plain(parts[part])}"
        for part in chosen
        if part in parts
    )
