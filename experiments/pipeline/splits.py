"""`SplitRows`, what an evaluation's test or validation split asks, and `LeakFilter`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from data.leakage import drop_leaked, normalise
from data.rows import Example, Prompt, TaskItem
from data.tasks import ValidatedTask
from experiments.config.experiment import Experiment
from experiments.config.sources import AskedSources, Split
from settings import DataError

HARMFUL, BENIGN, OVER_REFUSAL, TASK = "harmful", "benign", "over_refusal", "task"
HELD_OUT = "held_out"
VALIDATION: Split = "validation"
_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class SplitRows:
    """What a split asks.

    Attributes:
        prompts: By set, the harmful ones first.
        items: By task.
        held_out: Texts whose likelihood is measured.
    """

    prompts: dict[str, tuple[Prompt, ...]]
    items: dict[str, tuple[TaskItem, ...]]
    held_out: tuple[Example, ...]

    @property
    def texts(self) -> list[str]:
        """The text of everything asked."""
        texts = [prompt.text for prompts in self.prompts.values() for prompt in prompts]
        texts += [item.prompt for items in self.items.values() for item in items]
        return texts + [_held_out_text(example) for example in self.held_out]

    def without(self, texts: Iterable[str]) -> tuple[SplitRows, dict[str, int]]:
        """The rows that ask none of these texts, and how many were dropped, by set.

        Raises:
            DataError: No row of a set remains.
        """
        unwanted, dropped = {normalise(text) for text in texts}, dict[str, int]()

        def rows_without(
            name: str, rows: Sequence[_Row], text: Callable[[_Row], str]
        ) -> tuple[_Row, ...]:
            remaining = tuple(row for row in rows if normalise(text(row)) not in unwanted)
            dropped[name] = len(rows) - len(remaining)
            if rows and not remaining:
                raise DataError(
                    f"evaluation.split=validation: all {len(rows)} validation rows of {name} are "
                    "asked in the test split too; give others (sources.validation)"
                )
            return remaining

        split = SplitRows(
            {
                name: rows_without(name, rows, lambda row: row.text)
                for name, rows in self.prompts.items()
            },
            {
                name: rows_without(f"{TASK}:{name}", rows, lambda row: row.prompt)
                for name, rows in self.items.items()
            },
            rows_without(HELD_OUT, self.held_out, _held_out_text),
        )
        return split, dropped


class LeakFilter:
    """Drops rows whose prompt is among the evaluation's, and counts them by source."""

    def __init__(self, asked: Sequence[str]) -> None:
        self.asked = asked
        self.dropped: dict[str, int] = {}

    def __call__(self, name: str, rows: Iterable[Any]) -> tuple[Any, ...]:
        clean, self.dropped[name] = drop_leaked(list(rows), self.asked)
        return tuple(clean)


def read_test_split(experiment: Experiment) -> SplitRows:
    """What results are measured on, the further sets included."""
    evaluation, tasks = experiment.evaluation, experiment.tasks
    further = {name: prompts_of(source) for name, source in evaluation.prompt_sets.items()}
    items = {name: tuple(tasks[name].test()) for name in evaluation.tasks}
    return _split(experiment.sources.asked("test"), further, items)


def read_validation_split(experiment: Experiment) -> SplitRows:
    """What settings are chosen on."""
    items = {
        name: tuple(cast("ValidatedTask", experiment.tasks[name]).validation())
        for name in experiment.evaluation.tasks
    }
    return _split(experiment.sources.asked(VALIDATION), {}, items)


def prompts_of(source: Any) -> tuple[Prompt, ...]:
    """The prompts of a source that may be None."""
    return () if source is None else tuple(source.prompts())


def _split(
    sources: AskedSources,
    further: dict[str, tuple[Prompt, ...]],
    items: dict[str, tuple[TaskItem, ...]],
) -> SplitRows:
    prompts = {
        HARMFUL: prompts_of(sources.harmful),
        BENIGN: prompts_of(sources.benign),
        OVER_REFUSAL: prompts_of(sources.over_refusal),
        **further,
    }
    held_out = () if sources.held_out is None else tuple(sources.held_out.examples())
    return SplitRows({name: rows for name, rows in prompts.items() if rows}, items, held_out)


def _held_out_text(example: Example) -> str:
    return example.prompt or example.response
