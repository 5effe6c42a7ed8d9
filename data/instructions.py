"""Alpaca and Dolly: instruction sets for benign fine-tuning.

They train, but have no gold answers to be scored by. That such rows alone weaken a model's
refusals is the third risk of Qi et al. (arXiv 2310.03693), who look at rows that hold no refusals
themselves: `drop_refusals` leaves those out.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

from pydantic import PrivateAttr

from data.local import Row, require_columns, take, text_of
from data.refusals import refuses
from data.rows import Example, TaskItem, TaskScore, TaskSource, with_input
from data.tasks import TrainRows
from settings import SettingError


class Unscored(TaskSource):
    """A task that trains and has no gold answers."""

    # Nothing is asked of a task without test rows.
    max_new_tokens: ClassVar[int] = 0

    @property
    def scored(self) -> bool:
        """No: there are no gold answers."""
        return False

    def test(self) -> list[TaskItem]:
        """No rows: there are no gold answers."""
        return []

    def score(self, answer: str, gold: str) -> TaskScore:
        """Refused: there are no gold answers.

        Raises:
            SettingError: Always.
        """
        raise SettingError(
            f"{self.name} has no gold answers to be scored by; leave it out of evaluation.tasks"
        )


class InstructionSet(Unscored, TrainRows):
    """A set of instructions, some of them with an input, and responses.

    Attributes:
        drop_refusals: Whether rows whose response holds a refusal phrase (`data.refusals`) are
            left out; how many were is in the provenance.
    """

    drop_refusals: bool = True

    columns: ClassVar[tuple[str, str, str]]
    category_column: ClassVar[str | None] = None

    _dropped: dict[str, int] = PrivateAttr(default_factory=dict)

    @cached_property
    def _train(self) -> list[Example]:
        where = self._where(self.train_file, "train")
        rows = self._rows(self.train_file, "train")
        require_columns(rows, self.columns, where)
        # Alpaca holds a few rows with nothing in the place of the response.
        answered = [
            (number, row) for number, row in enumerate(rows, 1) if str(row[self.columns[2]]).strip()
        ]
        kept = [
            self._example(row, number)
            for number, row in answered
            if not (self.drop_refusals and refuses(row[self.columns[2]]))
        ]
        self._dropped["blank_rows_dropped"] = len(rows) - len(answered)
        self._dropped["refusals_dropped"] = len(answered) - len(kept)
        return take(kept, self.n_train, where, "task.n_train")

    def provenance(self) -> dict[str, Any]:
        """Where the rows come from, for a run's record, and how many were left out and why."""
        return {**super().provenance(), **self._dropped}

    def _example(self, row: Row, number: int) -> Example:
        instruction, text, response = self.columns
        return Example(
            with_input(text_of(row, instruction, self.name, number), row[text] or ""),
            text_of(row, response, self.name, number),
            "task",
            "" if self.category_column is None else str(row.get(self.category_column) or ""),
        )


class Alpaca(InstructionSet):
    """Instructions that a model wrote and answered (Taori et al. 2023); 52,002 rows on the hub.

    Columns: instruction, input, output.
    """

    train_file: str = "instructions/alpaca_5000.json"

    name: ClassVar[str] = "alpaca"
    hub: ClassVar[tuple[str, str | None]] = ("tatsu-lab/alpaca", None)
    columns: ClassVar[tuple[str, str, str]] = ("instruction", "input", "output")


class Dolly(InstructionSet):
    """Instructions that people wrote and answered (Databricks 2023); 15,011 rows on the hub.

    Columns: instruction, context, response, category.
    """

    train_file: str = "instructions/dolly_subset_387.jsonl"

    name: ClassVar[str] = "dolly"
    hub: ClassVar[tuple[str, str | None]] = ("databricks/databricks-dolly-15k", None)
    columns: ClassVar[tuple[str, str, str]] = ("instruction", "context", "response")
    category_column: ClassVar[str | None] = "category"
