"""A task of the user's own rows, to fine-tune on and to be scored on."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field

from data.local import hash_rows, take
from data.reading import LabelReading, plain_text, score_label
from data.rows import Example, TaskItem, TaskScore, TaskSource, Turn
from data.sources import JsonlExamples
from settings import DataError, SettingError

Numbered = tuple[int, Example]


class OwnTask(TaskSource):
    """Rows of a file, in any of the formats of `data.formats`.

    Attributes:
        path: Training rows.
        test_path: Test rows; None: `n_test` rows of `path`, drawn once and for all, which aren't
            trained on.
        scoring: "classification": the answer is one of the labels, the test rows' responses (see
            `data.reading.score_label`). "generation": strictly the answer is the row's response,
            leniently it holds it; case and white space aside. "none": the task trains alone.
        reading: How `TaskScore.protocol` reads an answer.
        n_train: The first so many training rows; None for all.
        n_test: How many test rows; None for all of `test_path`.
        n_validation: How many training rows `validation` holds out.
        max_new_tokens: Length limit of an answer, in tokens.
    """

    path: str
    test_path: str | None = None
    scoring: Literal["classification", "generation", "none"] = "generation"
    reading: LabelReading = "strict"
    prompt_column: str | None = None
    response_column: str | None = None
    n_train: int | None = Field(None, ge=1)
    n_test: int | None = Field(100, ge=1)
    n_validation: int = Field(100, ge=1)
    max_new_tokens: int = Field(128, ge=1)  # type: ignore[misc]

    name: ClassVar[str] = "jsonl"

    @property
    def scored(self) -> bool:
        """Whether `scoring` says how."""
        return self.scoring != "none"

    @property
    def protocol_reading(self) -> str:
        return self.reading

    @property
    def system(self) -> str | None:
        """The one system line of the test rows."""
        lines = {row.turns[0] for _, row in self._asked if row.turns[0].role == "system"}
        return lines.pop().text if lines else None

    def train(self) -> list[Example]:
        return [row for _, row in self._train]

    def test(self) -> list[TaskItem]:
        """Test rows; ids are "jsonl/row number" of the file that they are in.

        Raises:
            DataError: A row has several questions, or another system line than the others.
        """
        return self._items(self._asked)

    def validation(self) -> list[TaskItem]:
        """Training rows to choose settings by, drawn once and for all; `train` has them too."""
        return self._items(self._drawn(self._train, self.n_validation, "validation"), "train/")

    def score(self, answer: str, gold: str) -> TaskScore:
        """See `scoring`.

        Raises:
            SettingError: It is "none".
        """
        if not self.scored:
            raise SettingError("tasks.jsonl.scoring=none; set it to classification or generation")
        if self.scoring == "classification":
            labels = {item.gold: (item.gold,) for item in self.test()}
            return score_label(answer, gold, labels, self.reading)
        said, right = (" ".join(plain_text(text).split()) for text in (answer, gold))
        strict, holds = said == right, right in said
        read = strict if self.reading == "strict" else holds
        return TaskScore(strict, holds, bool(said), read)

    def fingerprint(self) -> str:
        return hash_rows(self.train(), self.test())

    def provenance(self) -> dict[str, Any]:
        """Where the rows come from, for a run's record: files, format, row counts, checksum."""
        return {
            "train": self.path,
            "test": self.test_path or self.path,
            "format": self._source(self.path).provenance()["format"],
            "n_train": len(self._train),
            "n_test": len(self._asked),
            "fingerprint": self.fingerprint(),
        }

    @cached_property
    def _rows(self) -> list[Numbered]:
        return list(enumerate(self._source(self.path).examples(), 1))

    @cached_property
    def _asked(self) -> list[Numbered]:
        if not self.scored:
            return []
        if self.test_path is None:
            return self._drawn(self._rows, self.n_test, "test")
        rows = list(enumerate(self._source(self.test_path).examples(), 1))
        return take(rows, self.n_test, self.test_path, "tasks.jsonl.n_test")

    @cached_property
    def _train(self) -> list[Numbered]:
        drawn = {number for number, _ in self._asked} if self.test_path is None else set[int]()
        rows = [each for each in self._rows if each[0] not in drawn]
        if not rows:
            raise DataError(f"{self.path} holds no row to train on; lower tasks.jsonl.n_test")
        return take(rows, self.n_train, self.path, "tasks.jsonl.n_train")

    def _source(self, path: str) -> JsonlExamples:
        return JsonlExamples(
            path=path,
            kind="task",
            prompt_column=self.prompt_column,
            response_column=self.response_column,
        )

    def _drawn(self, rows: list[Numbered], n: int | None, stream: str) -> list[Numbered]:
        order = random.Random(f"{stream}/jsonl").sample(rows, len(rows))
        return sorted(take(order, n, self.path, f"tasks.jsonl.n_{stream}"))

    def _items(self, rows: Iterable[Numbered], prefix: str = "") -> list[TaskItem]:
        items = []
        for number, row in rows:
            history = tuple(turn for turn in row.turns[:-2])
            if history != (() if self.system is None else (Turn("system", self.system),)):
                raise DataError(
                    f"{self.path} has row {number} with a dialogue or a system line of its own, "
                    "under which it can't be asked; give test rows of one question each in "
                    "tasks.jsonl.test_path, or set tasks.jsonl.scoring=none"
                )
            items.append(TaskItem(f"jsonl/{prefix}{number}", row.prompt, row.response))
        return items
