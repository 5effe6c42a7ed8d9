"""Sources of training rows, preference pairs and prompts for real models.

Each is a frozen settings object: local files of any path (JSON lines, JSON, CSV, TSV, Parquet,
text), or PKU-Alignment's data sets from the hub or a local copy with the same columns.
"""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Literal

from pydantic import Field

from data.local import Row, harm_category, label_of, matches, take
from data.row_source import ExampleRows, FileSource, HubSource, PairRows, PromptRows
from data.rows import Example, PreferencePair, Prompt
from settings import DataError


class JsonlExamples(FileSource, ExampleRows):
    """Training rows of a file with a prompt and a response column.

    Attributes:
        kind: What the rows are for.
        prompt_column: Column of the user's turn.
        response_column: Column of the assistant's turn.
        category_column: Column of the category, or None.
    """

    kind: Literal["harmful", "benign", "refusal", "task"]
    prompt_column: str = "prompt"
    response_column: str = "response"
    category_column: str | None = None

    @cached_property
    def _selected(self) -> list[Example]:
        optional = () if self.category_column is None else (self.category_column,)
        rows = self._rows(self.prompt_column, self.response_column, *optional)
        examples = [
            Example(
                self._text(row, self.prompt_column, number),
                self._text(row, self.response_column, number),
                self.kind,
                _category(row, self.category_column, self.path, number),
            )
            for number, row in rows
        ]
        return take(examples, self.n, self.path)


class JsonlPairs(FileSource, PairRows):
    """Preference pairs of a file with a prompt, a chosen and a rejected column."""

    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"

    @cached_property
    def _selected(self) -> list[PreferencePair]:
        columns = (self.prompt_column, self.chosen_column, self.rejected_column)
        pairs = [
            PreferencePair(*(self._text(row, column, number) for column in columns))
            for number, row in self._rows(*columns)
        ]
        return take(pairs, self.n, self.path)


class FilePrompts(FileSource, PromptRows):
    """Prompts of a file; ids are "file name/row number" unless a column holds them.

    Attributes:
        text_column: Column of the prompt.
        id_column: Column of a unique id, or None.
        category_column: Column of the category, or None.
        where: Rows are kept whose columns have these values, e.g. {label: safe} for the benign
            half of XSTest.
    """

    text_column: str = "prompt"
    id_column: str | None = None
    category_column: str | None = None
    where: dict[str, str | int | bool] = Field(default_factory=dict)

    @cached_property
    def _selected(self) -> list[Prompt]:
        named = (self.id_column, self.category_column)
        optional = [column for column in named if column is not None]
        rows = self._rows(self.text_column, *optional, *self.where)
        prompts = [
            Prompt(
                f"{self.name}/{number}"
                if self.id_column is None
                else label_of(row, self.id_column, self.path, number),
                self._text(row, self.text_column, number),
                _category(row, self.category_column, self.path, number),
            )
            for number, row in rows
            if matches(row, self.where)
        ]
        _require_unique(prompts, self.path)
        return take(prompts, self.n, self.path)


class BeaverTails(HubSource, ExampleRows):
    """Question-answer pairs of BeaverTails (arXiv 2307.04657), safe or unsafe ones.

    Columns: prompt, response, is_safe, category (harm categories with true or false).

    Attributes:
        safe: Whether the safe rows are taken (kind "benign") or the unsafe ones ("harmful").
    """

    split: str = "30k_train"
    safe: bool = False

    hub: ClassVar[str] = "PKU-Alignment/BeaverTails"

    @cached_property
    def _selected(self) -> list[Example]:
        matching = [
            (number, row)
            for number, row in self._rows("prompt", "response", "is_safe", "category")
            if _flag(row, "is_safe", self._where, number) is self.safe
        ]
        return [
            Example(
                self._text(row, "prompt", number),
                self._text(row, "response", number),
                "benign" if self.safe else "harmful",
                harm_category(row["category"]),
            )
            for number, row in take(matching, self.n, self._where)
        ]


class BeaverTailsPrompts(HubSource, PromptRows):
    """Prompts of BeaverTails' unsafe test rows; the first 1000 are NLSR's harmfulness prompts.

    A prompt occurs once per unsafe answer that the data set holds to it, as in the published
    protocol; ids carry the row number.

    Attributes:
        start: How many of the unsafe rows are skipped.
    """

    split: str = "30k_test"
    start: int = Field(default=0, ge=0)
    n: int | None = Field(default=1000, ge=1)

    hub: ClassVar[str] = "PKU-Alignment/BeaverTails"

    @cached_property
    def _selected(self) -> list[Prompt]:
        matching = [
            (number, row)
            for number, row in self._rows("prompt", "is_safe", "category")
            if not _flag(row, "is_safe", self._where, number)
        ]
        return [
            Prompt(
                f"{self.name}/{number}",
                self._text(row, "prompt", number),
                harm_category(row["category"]),
            )
            for number, row in take(matching[self.start :], self.n, self._where)
        ]


class PKUSafeRLHF(HubSource, ExampleRows):
    """Answers of PKU-SafeRLHF-30K as training rows, the safe or the unsafe ones of both responses.

    Columns: as of `PKUSafeRLHFPairs`.

    Attributes:
        safe: Whether the safe answers are taken (kind "benign") or the unsafe ones ("harmful").
    """

    split: str = "train"
    safe: bool = False

    hub: ClassVar[str] = "PKU-Alignment/PKU-SafeRLHF-30K"

    @cached_property
    def _selected(self) -> list[Example]:
        columns = ("response_0", "response_1")
        flags = {column: f"is_{column}_safe" for column in columns}
        matching = [
            (number, row, column)
            for number, row in self._rows("prompt", *columns, *flags.values())
            for column in columns
            if _flag(row, flags[column], self._where, number) is self.safe
        ]
        kind = "benign" if self.safe else "harmful"
        return [
            Example(
                self._text(row, "prompt", number),
                self._text(row, column, number),
                kind,
            )
            for number, row, column in take(matching, self.n, self._where)
        ]


class PKUSafeRLHFPairs(HubSource, PairRows):
    """Pairs of PKU-SafeRLHF-30K of which exactly one response is safe; that one is chosen.

    Columns: prompt, response_0, response_1, is_response_0_safe, is_response_1_safe.
    """

    split: str = "train"

    hub: ClassVar[str] = "PKU-Alignment/PKU-SafeRLHF-30K"

    @cached_property
    def _selected(self) -> list[PreferencePair]:
        flags = ("is_response_0_safe", "is_response_1_safe")
        matching = []
        for number, row in self._rows("prompt", "response_0", "response_1", *flags):
            first, second = (_flag(row, flag, self._where, number) for flag in flags)
            if first != second:
                order = ("response_0", "response_1") if first else ("response_1", "response_0")
                matching.append((number, row, ("prompt", *order)))
        return [
            PreferencePair(*(self._text(row, column, number) for column in columns))
            for number, row, columns in take(matching, self.n, self._where)
        ]


class PKUSafeRLHFPrompts(HubSource, PromptRows):
    """Distinct prompts of PKU-SafeRLHF-30K, by default of its test split (NLSR's calibration)."""

    split: str = "test"

    hub: ClassVar[str] = "PKU-Alignment/PKU-SafeRLHF-30K"

    @cached_property
    def _selected(self) -> list[Prompt]:
        distinct: dict[str, Prompt] = {}
        for number, row in self._rows("prompt"):
            text = self._text(row, "prompt", number)
            distinct.setdefault(text, Prompt(f"{self.name}/{number}", text))
        return take(list(distinct.values()), self.n, self._where)


def _category(row: Row, column: str | None, where: str, number: int) -> str:
    return "" if column is None else label_of(row, column, where, number)


def _flag(row: Row, column: str, where: str, number: int) -> bool:
    value = row[column]
    if not isinstance(value, bool):
        raise DataError(
            f"{where} has {value!r} in column {column!r} of row {number}; "
            "it should be true or false"
        )
    return value


def _require_unique(prompts: list[Prompt], where: str) -> None:
    ids: set[str] = set()
    for prompt in prompts:
        if prompt.id in ids:
            raise DataError(
                f"{where} has the id {prompt.id!r} twice; set id_column to a column of unique ids"
            )
        ids.add(prompt.id)
