"""SST-2, AG News and GSM8K as tasks to fine-tune on and to be scored on.

Rows come from the hub (the default) or from local files under `root`; the wordings are by default
those of NLSR's experiments (arXiv 2412.12497, section 4). Every answer is read strictly, leniently
(`data.reading`) and as `reading` names, which is what a protocol sets (`conf/protocol`).
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from pydantic import Field, PrivateAttr

from data.hub import load_split
from data.leakage import normalise
from data.local import (
    Row,
    hash_rows,
    label_of,
    locate,
    read_cells,
    read_rows,
    require_columns,
    take,
    text_of,
)
from data.reading import LabelReading, NumberReading, gold_number, score_label, score_number
from data.rows import Example, TaskItem, TaskScore, TaskSource, with_input
from settings import DataError

_SETTING = "data.root"


class TrainRows(TaskSource):
    """A task's training rows, from the hub or from local files, and how many of them are used.

    Attributes:
        root: Folder of the local files, or None to load from the hub.
        train_file: Training rows below `root`.
        revision: Hub revision (branch, tag or commit), or None for the newest.
        n_train: The first so many training rows; None for all.
    """

    root: str | None = None
    train_file: str
    revision: str | None = None
    n_train: int | None = Field(default=None, ge=1)

    hub: ClassVar[tuple[str, str | None]]

    _resolved: dict[str, str | None] = PrivateAttr(default_factory=dict)

    @cached_property
    def _train(self) -> list[Example]:
        rows = self._rows(self.train_file, "train")
        examples = [self._example(row, number) for number, row in enumerate(rows, 1)]
        return take(examples, self.n_train, self._where(self.train_file, "train"), "task.n_train")

    def train(self) -> list[Example]:
        return list(self._train)

    def provenance(self) -> dict[str, Any]:
        """Where the rows come from, for a run's record: source, commit, row counts, checksum."""
        return {
            "train": self._where(self.train_file, "train"),
            "fingerprint": self.fingerprint(),
            "n_train": len(self._train),
            **{f"{split}_commit": commit for split, commit in sorted(self._resolved.items())},
        }

    def fingerprint(self) -> str:
        """Hash of the rows as they are used (16 hex digits)."""
        return hash_rows(self._train)

    def _example(self, row: Row, number: int) -> Example:
        raise NotImplementedError

    def _local_rows(self, file: str) -> list[Row]:
        return read_rows(locate(self.root, file, _SETTING))

    def _where(self, file: str, split: str) -> str:
        return file if self.root is not None else f"{self.hub[0]} ({split})"

    def _rows(self, file: str, split: str) -> list[Row]:
        if self.root is not None:
            rows = self._local_rows(file)
        else:
            instead = f"{_SETTING} to a folder of local files"
            rows, self._resolved[split] = load_split(*self.hub, split, self.revision, instead)
        require_columns(rows, (), self._where(file, split))
        return rows


class Task(TrainRows):
    """A task with test rows that have gold answers.

    Attributes:
        test_file: Test rows below `root`.
        n_test: The first so many test rows; None for all.
        n_validation: How many training rows `validation` holds out.
        max_new_tokens: Length limit of an answer, in tokens.
        reading: How `TaskScore.protocol` reads an answer.
    """

    test_file: str
    n_test: int | None = Field(default=None, ge=1)
    n_validation: int = Field(default=300, ge=1)
    max_new_tokens: int = Field(default=200, ge=1)  # type: ignore[misc]
    reading: str = "strict"

    version: ClassVar[int] = 3
    test_split: ClassVar[str] = "test"

    @cached_property
    def _test(self) -> list[TaskItem]:
        rows = self._rows(self.test_file, self.test_split)
        items = [self._item(row, number) for number, row in enumerate(rows, 1)]
        where = self._where(self.test_file, self.test_split)
        return take(items, self.n_test, where, "task.n_test")

    def test(self) -> list[TaskItem]:
        """Test rows, in the source's order; ids are "name/row number"."""
        return list(self._test)

    @cached_property
    def _validation(self) -> list[TaskItem]:
        rows = list(enumerate(self._rows(self.train_file, "train"), 1))
        behind = rows[self.n_train :] if self.n_train is not None else []
        pool = behind if len(behind) >= self.n_validation else rows
        order = random.Random(f"validation/{self.name}").sample(pool, len(pool))
        where = self._where(self.train_file, "train")
        # Some sets hold a text twice, and what trains should be the same whatever is asked.
        trained = {normalise(row.prompt) for row in self._train} if pool is behind else set()
        items = ((number, self._item(row, number)) for number, row in order)
        new = [(number, item) for number, item in items if normalise(item.prompt) not in trained]
        chosen = take(new, self.n_validation, where, "task.n_validation")
        return [
            replace(item, id=f"{self.name}/train/{number}")
            for number, item in sorted(chosen, key=itemgetter(0))
        ]

    def validation(self) -> list[TaskItem]:
        """Training rows to choose settings by, drawn once and for all, in the source's order.

        They are of those behind the first `n_train`, where there are enough. `train` has them
        too: whoever asks them takes them out of what is trained on. Ids are
        "name/train/row number".

        Raises:
            DataError: The rows are missing, too few, or of another schema.
        """
        return list(self._validation)

    def fingerprint(self) -> str:
        return hash_rows(self._train, self._test)

    def provenance(self) -> dict[str, Any]:
        """Where the rows come from, for a run's record: source, commit, row counts, checksum."""
        return {
            "test": self._where(self.test_file, self.test_split),
            "n_test": len(self._test),
            **super().provenance(),
        }

    @property
    def protocol_reading(self) -> str:
        return self.reading

    def _item(self, row: Row, number: int) -> TaskItem:
        raise NotImplementedError


@runtime_checkable
class ValidatedTask(Protocol):
    """A task that has rows to choose settings by."""

    def validation(self) -> list[TaskItem]: ...


class LabelTask(Task):
    """A task whose answer is one of a few labels, given an instruction and an input.

    Attributes:
        instruction: What stands before the input.
    """

    instruction: str

    text_column: ClassVar[str]
    labels: ClassVar[dict[str, str]]

    def _example(self, row: Row, number: int) -> Example:
        prompt, gold = self._read(row, number)
        return Example(prompt, gold, "task", gold)

    def _item(self, row: Row, number: int) -> TaskItem:
        prompt, gold = self._read(row, number)
        return TaskItem(f"{self.name}/{number}", prompt, gold)

    def _read(self, row: Row, number: int) -> tuple[str, str]:
        text = text_of(row, self.text_column, self.name, number).strip()
        cell = label_of(row, "label", self.name, number)
        if cell not in self.labels:
            raise DataError(
                f"{self.name} has the label {cell!r} in row {number}; "
                f"it should be one of {', '.join(self.labels)}"
            )
        return with_input(self.instruction, text), self.labels[cell]


class SST2(LabelTask):
    """Sentiment of film-review phrases (Stanford Sentiment Treebank, GLUE's SST-2).

    The labels of GLUE's own test split are hidden, so its 872 validation rows are the test rows,
    as everywhere in this field. Columns: sentence, label (0 negative, 1 positive).

    Attributes:
        reading: How `TaskScore.protocol` reads an answer, see `data.reading.score_label`.
    """

    train_file: str = "sst2/train.tsv"
    test_file: str = "sst2/test.tsv"
    instruction: str = "Analyze the sentiment of the input, and respond only positive or negative"
    reading: LabelReading = "strict"

    name: ClassVar[str] = "sst2"
    hub: ClassVar[tuple[str, str | None]] = ("stanfordnlp/sst2", None)
    test_split: ClassVar[str] = "validation"
    text_column: ClassVar[str] = "sentence"
    labels: ClassVar[dict[str, str]] = {"0": "negative", "1": "positive"}

    def score(self, answer: str, gold: str) -> TaskScore:
        """See `data.reading.score_label`; the spellings are the label words themselves."""
        labels = {label: (label,) for label in self.labels.values()}
        return score_label(answer, gold, labels, self.reading)


class AGNews(LabelTask):
    """Topic of a news article, one of four (AG's corpus).

    Local files are either the corpus' own (no header; class 1 to 4, title, description) or have
    columns: Kaggle's Class Index (1 to 4), Title and Description; label_id (1 to 4) and text; or,
    as the hub's rows and their exports, label (0 to 3) and text. The hub's text is the title and
    the description with a space between, which local rows follow.

    Attributes:
        reading: How `TaskScore.protocol` reads an answer, see `data.reading.score_label`;
            "contained_or_sci" is "contained" with "sci" as a second spelling of Sci/Tech, as in
            NLSR's script.
    """

    train_file: str = "ag_news/train_subset_10k.csv"
    test_file: str = "ag_news/test.csv"
    instruction: str = (
        "Categorize the news article given in the input into one of the 4 categories:\n\n"
        "World\nSports\nBusiness\nSci/Tech\n"
    )
    reading: Literal["strict", "lenient", "contained", "contained_or_sci"] = "strict"

    name: ClassVar[str] = "ag_news"
    hub: ClassVar[tuple[str, str | None]] = ("fancyzhx/ag_news", None)
    text_column: ClassVar[str] = "text"
    labels: ClassVar[dict[str, str]] = {
        "0": "World",
        "1": "Sports",
        "2": "Business",
        "3": "Sci/Tech",
    }
    spellings: ClassVar[dict[str, tuple[str, ...]]] = {
        "World": ("world",),
        "Sports": ("sports", "sport"),
        "Business": ("business",),
        "Sci/Tech": ("sci", "tech", "science", "technology"),
    }

    def score(self, answer: str, gold: str) -> TaskScore:
        """See `data.reading.score_label`; "Sci", "Tech" and their long forms name Sci/Tech."""
        if self.reading == "contained_or_sci":
            also = (gold, "sci") if gold == "Sci/Tech" else (gold,)
            return score_label(answer, gold, self.spellings, "contained", also)
        return score_label(answer, gold, self.spellings, self.reading)

    def _local_rows(self, file: str) -> list[Row]:
        path = locate(self.root, file, _SETTING)
        lines = read_cells(path) if path.suffix.lower() in (".csv", ".tsv") else []
        if not lines or not lines[0][0].isdigit():
            return [self._with_columns(row, path) for row in read_rows(path)]
        rows = []
        for number, cells in enumerate(lines, 1):
            if len(cells) != 3:
                raise DataError(
                    f"{path.name} has {len(cells)} cells in row {number}; "
                    "it should have 3: class, title, description"
                )
            rows.append({"text": f"{cells[1]} {cells[2]}", "label": _zero_based(cells[0])})
        return rows

    def _with_columns(self, row: Row, path: Path) -> Row:
        """A row of any of the files that have column names, with the hub's two columns."""
        named = {str(name).strip().lower().replace(" ", "_"): cell for name, cell in row.items()}
        if {"class_index", "title", "description"} <= named.keys():
            text = f"{named['title']} {named['description']}"
            return {"text": text, "label": _zero_based(named["class_index"])}
        if {"label_id", "text"} <= named.keys():
            return {"text": named["text"], "label": _zero_based(named["label_id"])}
        if {"label", "text"} <= named.keys():
            return {"text": named["text"], "label": named["label"]}
        raise DataError(
            f"{path.name} has the columns {', '.join(map(str, row))}; it should have label (0 to "
            "3) or label_id (1 to 4) and text, or Class Index (1 to 4), Title and Description"
        )


class GSM8K(Task):
    """Grade-school word problems with written steps (Cobbe et al., arXiv 2110.14168).

    Columns: question, answer (the steps, then "#### number"). Responses keep the data set's
    calculator annotations, as NLSR's training rows do.

    Attributes:
        suffix: What follows every question; "" for the bare question.
        reading: How `TaskScore.protocol` reads an answer, see `data.reading.score_number`.
    """

    train_file: str = "gsm8k/train.jsonl"
    test_file: str = "gsm8k/test.jsonl"
    suffix: str = "\nFirst think step by step and then answer the final number.\n"
    reading: NumberReading = "strict"

    name: ClassVar[str] = "gsm8k"
    hub: ClassVar[tuple[str, str | None]] = ("openai/gsm8k", "main")

    def score(self, answer: str, gold: str) -> TaskScore:
        return score_number(answer, gold, self.reading)

    def _example(self, row: Row, number: int) -> Example:
        steps, gold = self._solution(row, number)
        response = f"{steps}\nThe final answer is: {gold}"
        return Example(self._prompt(row, number), response, "task")

    def _item(self, row: Row, number: int) -> TaskItem:
        cell = self._solution(row, number)[1]
        gold = gold_number(cell)
        if gold is None:
            raise DataError(
                f"{self.name} has {cell!r} as the gold answer in row {number}, which isn't one "
                "number; write the number alone behind ####, or leave the row out"
            )
        return TaskItem(f"{self.name}/{number}", self._prompt(row, number), str(gold))

    def _prompt(self, row: Row, number: int) -> str:
        return text_of(row, "question", self.name, number) + self.suffix

    def _solution(self, row: Row, number: int) -> tuple[str, str]:
        steps, marker, gold = text_of(row, "answer", self.name, number).rpartition("####")
        if not marker or not gold.strip():
            raise DataError(
                f"{self.name} has no '#### number' at the end of the answer in row {number}; "
                "give the data set's own answers"
            )
        return steps.strip(), gold.strip()


def _zero_based(cell: Any) -> str:
    return str(int(cell) - 1) if str(cell).isdigit() else str(cell)
