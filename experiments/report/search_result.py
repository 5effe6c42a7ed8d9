"""What a search found, in sentences: the best settings, and the command that tests them."""

from __future__ import annotations

from evaluation.metric_names import MetricName
from evaluation.statistics import Estimate
from experiments.report import pareto
from experiments.report.pareto import Choice
from experiments.report.pool import Collected, Row
from experiments.results.command_line import command_line

# What the run of the chosen settings has in place of the search's.
_TEST_SPLIT = "evaluation.split=test"


def sentences(collected: Collected) -> list[str]:
    """What a reader has to know of a validation split, and what was best where there was a search.

    For every attacked model whose defenses had an objective: the best settings, or the front, and
    the command that tests them.
    """
    said = [f"note: {collected.note}; no paper's figures stand beside"] if collected.note else []
    for choice in pareto.choices(collected.rows):
        if choice.searched:
            said += _front(choice) if choice.feasible is None else _best(choice)
    return said


def _best(choice: Choice) -> list[str]:
    count, best = len(choice.defended), choice.best
    if best is None:
        return [f"best: none of {count} settings is feasible; allow more (objective.within)"]
    head = f"best of {count} settings ({choice.feasible} feasible)"
    return [f"{head}: {choice.name_of(best)}: {_figures(choice, best)}", *_how_to_test(best)]


def _front(choice: Choice) -> list[str]:
    found, count = choice.unbeaten, len(choice.defended)
    lines = [f"front of {count} settings: {len(found)} that none beats in all of these figures"]
    for row in found:
        lines.append(f"- {choice.name_of(row)}: {_figures(choice, row)}")
        lines += _how_to_test(row)
    return lines


def _figures(choice: Choice, row: Row) -> str:
    metrics = pareto.measured(choice.attacked, row)
    shown = []
    for model, metric in dict.fromkeys(choice.objective.read):
        figures = metrics[model].get(metric)
        unit = MetricName.parse(metric).unit
        text = " ".join(filter(None, Estimate.of(figures).shown(unit))) if figures else "-"
        shown.append(f"{metric} of {model} {text}")
    return ", ".join(shown)


def _how_to_test(row: Row) -> list[str]:
    run = row.runs[0]
    if not run.validates:
        return ["chosen on the test split, so that these figures flatter it"]
    return [f"test it once: {command_line(run.record.overrides, _TEST_SPLIT, folder=run.folder)}"]
