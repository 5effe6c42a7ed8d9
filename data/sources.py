"""Sources of training rows, preference pairs and prompts for real models.

Each is a frozen settings object: local files of any path (JSON lines, JSON, CSV, TSV, Parquet,
text), or PKU-Alignment's data sets from the hub or a local copy with the same columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from data.hub import load_split
from data.local import (
    Row,
    harm_category,
    hash_rows,
    label_of,
    locate,
    matches,
    read_rows,
    require_columns,
    take,
    text_of,
)
from data.rows import Example, PreferencePair, Prompt
from settings import DataError, Settings


class FileSource(Settings):
    """Rows of one local file.

    Attributes:
        path: The file: .jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet or .txt.
        n: The first so many rows; None for all.
    """

    path: str
    n: int | None = Field(default=None, ge=1)

    @property
    def name(self) -> str:
        """The file's name without its extensions, which starts the ids of its rows."""
        return self.path.replace("\\", "/").rpartition("/")[2].partition(".")[0]

    def fingerprint(self) -> str:
        """Hash of the rows as they are used (16 hex digits)."""
        return hash_rows(self._selected)

    @property
    def _selected(self) -> list[Any]:
        raise NotImplementedError

    def _rows(self, *columns: str) -> list[Row]:
        rows = read_rows(locate(None, self.path, "path"))
        require_columns(rows, columns, self.path)
        return rows


class JsonlExamples(FileSource):
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
                text_of(row, self.prompt_column, self.path, number),
                text_of(row, self.response_column, self.path, number),
                self.kind,
                _category(row, self.category_column, self.path, number),
            )
            for number, row in enumerate(rows, 1)
        ]
        return take(examples, self.n, self.path)

    def examples(self) -> list[Example]:
        """The rows, in the file's order."""
        return list(self._selected)


class JsonlPairs(FileSource):
    """Preference pairs of a file with a prompt, a chosen and a rejected column."""

    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"

    @cached_property
    def _selected(self) -> list[PreferencePair]:
        columns = (self.prompt_column, self.chosen_column, self.rejected_column)
        pairs = [
            PreferencePair(*(text_of(row, column, self.path, number) for column in columns))
            for number, row in enumerate(self._rows(*columns), 1)
        ]
        return take(pairs, self.n, self.path)

    def pairs(self) -> list[PreferencePair]:
        """The pairs, in the file's order."""
        return list(self._selected)


class FilePrompts(FileSource):
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
                text_of(row, self.text_column, self.path, number),
                _category(row, self.category_column, self.path, number),
            )
            for number, row in enumerate(rows, 1)
            if matches(row, self.where)
        ]
        _require_unique(prompts, self.path)
        return take(prompts, self.n, self.path)

    def prompts(self) -> list[Prompt]:
        """The prompts, in the file's order."""
        return list(self._selected)


class JsonlPrompts(FilePrompts):
    """Prompts of a JSON-lines file."""


class CsvPrompts(FilePrompts):
    """Prompts of a CSV file with a header line."""


class PkuSource(Settings):
    """What the data sets of PKU-Alignment share: hub id, split, or a local copy.

    Attributes:
        path: A local file with the hub's columns (.jsonl, .jsonl.gz, .parquet), or None.
        revision: Hub revision, or None for the newest.
        split: Split on the hub; a local file is one split already.
        n: The first so many of the rows asked for; None for all.
    """

    path: str | None = None
    revision: str | None = None
    split: str
    n: int | None = Field(default=None, ge=1)

    hub: ClassVar[str]

    _resolved: list[str | None] = PrivateAttr(default_factory=list)

    @property
    def name(self) -> str:
        """Data set and split, which start the ids of its rows."""
        return f"{self.hub.rpartition('/')[2]}/{self.split}"

    def fingerprint(self) -> str:
        """Hash of the rows as they are used (16 hex digits)."""
        return hash_rows(self._selected)

    def provenance(self) -> dict[str, Any]:
        """Where the rows come from, for a run's record: source, commit, row count, checksum."""
        return {
            "source": self.path or self.name,
            "fingerprint": self.fingerprint(),
            "n": len(self._selected),
            "commit": self._resolved[-1] if self._resolved else None,
        }

    @property
    def _selected(self) -> list[Any]:
        raise NotImplementedError

    def _rows(self, *columns: str) -> Iterator[tuple[int, Row]]:
        if self.path is not None:
            rows = read_rows(locate(None, self.path, "path"))
        else:
            rows, commit = load_split(
                self.hub, None, self.split, self.revision, "path to a local copy"
            )
            self._resolved.append(commit)
        require_columns(rows, columns, self.path or self.name)
        return enumerate(rows, 1)


class BeaverTails(PkuSource):
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
        where = self.path or self.name
        wanted = [
            (number, row)
            for number, row in self._rows("prompt", "response", "is_safe", "category")
            if _flag(row, "is_safe", where, number) is self.safe
        ]
        return [
            Example(
                text_of(row, "prompt", where, number),
                text_of(row, "response", where, number),
                "benign" if self.safe else "harmful",
                harm_category(row["category"]),
            )
            for number, row in take(wanted, self.n, where)
        ]

    def examples(self) -> list[Example]:
        """The rows, in the data set's order."""
        return list(self._selected)


class BeaverTailsPrompts(PkuSource):
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
        where = self.path or self.name
        wanted = [
            (number, row)
            for number, row in self._rows("prompt", "is_safe", "category")
            if not _flag(row, "is_safe", where, number)
        ]
        return [
            Prompt(
                f"{self.name}/{number}",
                text_of(row, "prompt", where, number),
                harm_category(row["category"]),
            )
            for number, row in take(wanted[self.start :], self.n, where)
        ]

    def prompts(self) -> list[Prompt]:
        """The prompts, in the data set's order."""
        return list(self._selected)


class PKUSafeRLHF(PkuSource):
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
        where = self.path or self.name
        columns = ("response_0", "response_1")
        flags = {column: f"is_{column}_safe" for column in columns}
        wanted = [
            (number, row, column)
            for number, row in self._rows("prompt", *columns, *flags.values())
            for column in columns
            if _flag(row, flags[column], where, number) is self.safe
        ]
        kind = "benign" if self.safe else "harmful"
        return [
            Example(
                text_of(row, "prompt", where, number), text_of(row, column, where, number), kind
            )
            for number, row, column in take(wanted, self.n, where)
        ]

    def examples(self) -> list[Example]:
        """The rows, in the data set's order."""
        return list(self._selected)


class PKUSafeRLHFPairs(PkuSource):
    """Pairs of PKU-SafeRLHF-30K of which exactly one response is safe; that one is chosen.

    Columns: prompt, response_0, response_1, is_response_0_safe, is_response_1_safe.
    """

    split: str = "train"

    hub: ClassVar[str] = "PKU-Alignment/PKU-SafeRLHF-30K"

    @cached_property
    def _selected(self) -> list[PreferencePair]:
        where = self.path or self.name
        flags = ("is_response_0_safe", "is_response_1_safe")
        wanted = []
        for number, row in self._rows("prompt", "response_0", "response_1", *flags):
            first, second = (_flag(row, flag, where, number) for flag in flags)
            if first != second:
                order = ("response_0", "response_1") if first else ("response_1", "response_0")
                wanted.append((number, row, ("prompt", *order)))
        return [
            PreferencePair(*(text_of(row, column, where, number) for column in columns))
            for number, row, columns in take(wanted, self.n, where)
        ]

    def pairs(self) -> list[PreferencePair]:
        """The pairs, in the data set's order."""
        return list(self._selected)


class PKUSafeRLHFPrompts(PkuSource):
    """Distinct prompts of PKU-SafeRLHF-30K, by default of its test split (NLSR's calibration)."""

    split: str = "test"

    hub: ClassVar[str] = "PKU-Alignment/PKU-SafeRLHF-30K"

    @cached_property
    def _selected(self) -> list[Prompt]:
        where = self.path or self.name
        distinct: dict[str, Prompt] = {}
        for number, row in self._rows("prompt"):
            text = text_of(row, "prompt", where, number)
            distinct.setdefault(text, Prompt(f"{self.name}/{number}", text))
        return take(list(distinct.values()), self.n, where)

    def prompts(self) -> list[Prompt]:
        """The prompts, in the order of their first row."""
        return list(self._selected)


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
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(
                f"{where} has the id {prompt.id!r} twice; set id_column to a column of unique ids"
            )
        seen.add(prompt.id)
