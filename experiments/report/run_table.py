"""A run's own table, which it prints at its end, and its one line in a sweep's progress."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluation.metric_names import HS, MetricName, worst_hs
from evaluation.statistics import PairedTest
from experiments.report import steps
from experiments.report.columns import ALWAYS, COLUMNS, once
from experiments.report.cut_rows import cut_rows
from experiments.report.pool import ROLES, Row, Run, collect
from experiments.report.table import as_terminal, terminal
from experiments.report.tables import cost_cell, show, show_parts, show_sections
from experiments.results.record import Record


def print_run(record: Record, folder: Path) -> None:
    """Prints what a run shows at its end: models, steps, and what the defense cost."""
    screen = terminal()
    run = Run(folder, record)
    rows = [_row(run, role) for role in ROLES if role in record.models]
    # No defense leaves the attacked model.
    shown = [row for row in rows if row.labels["defense"] != "none" or row.role != "defended"]
    show_parts(shown, screen, left_out=ALWAYS)
    show_sections(shown, screen)
    (defended,) = (row for row in rows if row.role == "defended")
    name, refine = record.labels["defense"], record.labels["refine"]
    lines = [
        f"{name}: prepare {cost_cell(defended, 'prepare_seconds').text}, "
        f"apply {cost_cell(defended, 'apply_seconds').text}, "
        f"peak memory {cost_cell(defended, 'peak').text}, "
        f"parameters edited {cost_cell(defended, 'share_edited').text} "
        f"({record.cost['parameters_edited']:,} of {record.cost['parameters_total']:,})"
    ]
    if defended.edited:
        lines.append(f"{name} against attacked: {_differences(record, record.paired)}")
    if record.broken:
        lines.append(f"{name} broke the model ({record.broken}): no choice, whatever its HS")
    if record.paired_refined:
        differences = _differences(record, record.paired_refined)
        lines.append(f"{name}, then {refine} against {name}: {differences}")
    if record.unknown_training:
        lines.append(record.unknown_training)
    for line in [*lines, *cut_rows([run])]:
        screen.print(line, highlight=False)
    if record.steps:
        points = steps.recorded_points(record)
        screen.print(as_terminal(steps.table(points, once(steps.SHOWN, record.one_judge))))


def print_measured(folder: Path) -> None:
    """Prints models that were measured alone, and the tests of each against the first."""
    screen, collected = terminal(), collect([folder])
    show(collected, screen)
    first = collected.rows[0].name
    lines = [
        f"{row.name} against {first}: {_differences(row.runs[0].record, row.paired)}"
        for row in collected.rows[1:]
    ]
    for line in [*lines, *collected.unknown, f"record: {folder}"]:
        screen.print(line, highlight=False, soft_wrap=True)


def _row(run: Run, role: str) -> Row:
    record = run.record
    cost = record.cost if role == "defended" else {}
    tests = {"defended": record.paired, "refined": record.paired_refined}.get(role, {})
    return Row(
        role,
        record.labels,
        {},
        record.estimates(role),
        (record.seed,),
        runs=(run,),
        cost=cost,
        paired={name: PairedTest.of(test) for name, test in tests.items()},
    )


def _differences(
    record: Record, tests: Mapping[str, Mapping[str, Any]] | Mapping[str, PairedTest]
) -> str:
    """Differences in points with their intervals and p-values."""
    triggers = [name for name in tests if MetricName.parse(name).attack_prompt]
    parts = []
    headings = COLUMNS | {name: MetricName.parse(name).heading for name in triggers}
    for metric, heading in once(headings, record.one_judge).items():
        found = tests[metric]
        test = found if isinstance(found, PairedTest) else PairedTest.of(found)
        if test.n:
            difference, interval, p_value = test.shown()
            parts.append(f"{heading} {difference} {interval} ({p_value})")
    return ", ".join(parts)


def one_line(record: Record) -> str:
    """What one job of a multirun says: HS and accuracy before and after the defense.

    Where the defended model is worse under a trigger or attack prompt than asked plainly, that is
    said besides.
    """
    before, after = record.estimates("attacked"), record.estimates("defended")
    changes = [f"HS {before['hs'].shown()[0]} -> {after['hs'].shown()[0]}"]
    worst = worst_hs(after) or HS
    if worst != HS and str(worst) in before:
        old, new = before[str(worst)].shown()[0], after[str(worst)].shown()[0]
        changes.append(f"under {worst.attack_prompt} {old} -> {new}")
    old, new = (each["accuracy_strict"].shown()[0] for each in (before, after))
    changes.append(f"accuracy {old} -> {new}")
    if record.broken:
        changes.append(f"broken ({record.broken})")
    return f"attacked -> {record.labels['defense']}: {', '.join(changes)}"
