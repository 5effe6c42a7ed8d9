"""Sources of training rows, preference pairs and prompts for real models.

Each is a frozen settings object: local files of any path (JSON lines, JSON, CSV, TSV, Parquet,
text), or PKU-Alignment's data sets from the hub or a local copy with the same columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from data.formats import Format, columns, example, pair, recognise
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


class RowSource(Settings):
    """A source whose rows a subclass selects, in `_selected`.

    Attributes:
        n: The first so many of the rows asked for; None for all.
    """

    n: int | None = Field(default=None, ge=1)

    # The hub commits that rows were read from, in the order of reading.
    _commits: list[str | None] = PrivateAttr(default_factory=list)

    def fingerprint(self) -> str:
        """Hash of the rows as they are used (16 hex digits)."""
        return hash_rows(self._selected)

    def provenance(self) -> dict[str, Any]:
        """Where the rows come from, for a run's record: source, commit, row count, checksum."""
        return {
            "source": self._where,
            "fingerprint": self.fingerprint(),
            "n": len(self._selected),
            "commit": self._commits[-1] if self._commits else None,
        }

    @property
    def _selected(self) -> list[Any]:
        raise NotImplementedError

    @property
    def _where(self) -> str:
        """The file or data set, for messages."""
        raise NotImplementedError

    def _text(self, row: Row, column: str, number: int) -> str:
        return text_of(row, column, self._where, number)

    def _numbered(self, rows: list[Row], columns: Sequence[str]) -> list[tuple[int, Row]]:
        """The rows, which must have these columns, with their numbers, which count from 1."""
        require_columns(rows, columns, self._where)
        return list(enumerate(rows, 1))


class ExampleRows(RowSource):
    """A source of training rows."""

    def examples(self) -> list[Example]:
        """The rows, in the order of the file or data set."""
        return list(self._selected)


class PairRows(RowSource):
    """A source of preference pairs."""

    def pairs(self) -> list[PreferencePair]:
        """The pairs, in the order of the file or data set."""
        return list(self._selected)


class PromptRows(RowSource):
    """A source of prompts."""

    def prompts(self) -> list[Prompt]:
        """The prompts, in the order of the file or data set."""
        return list(self._selected)


class FileSource(RowSource):
    """Rows of one local file.

    Attributes:
        path: The file: .jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet or .txt.
    """

    path: str

    @property
    def name(self) -> str:
        """The file's name without its extensions, which starts the ids of its rows."""
        return self.path.replace("\\", "/").rpartition("/")[2].partition(".")[0]

    @property
    def _where(self) -> str:
        return self.path

    def _rows(self, *columns: str) -> list[tuple[int, Row]]:
        return self._numbered(read_rows(locate(None, self.path)), columns)


class HubSource(RowSource):
    """Rows of one split of a hub data set, or of a local copy of it.

    Attributes:
        path: A local file with the hub's columns (.jsonl, .jsonl.gz, .parquet), or None.
        revision: Hub revision, or None for the newest.
        split: Split on the hub; a local file is one split already.
    """

    path: str | None = None
    revision: str | None = None
    split: str

    hub: ClassVar[str]

    @property
    def name(self) -> str:
        """Data set and split, which start the ids of its rows."""
        return f"{self.hub.rpartition('/')[2]}/{self.split}"

    @property
    def _where(self) -> str:
        return self.path or self.name

    def _rows(self, *columns: str, config: str | None = None) -> list[tuple[int, Row]]:
        if self.path is not None:
            return self._numbered(read_rows(locate(None, self.path)), columns)
        instead = "path to a local copy"
        rows, commit = load_split(self.hub, config, self.split, self.revision, instead)
        self._commits.append(commit)
        return self._numbered(rows, columns)

    def _flagged(self, safe: bool, *columns: str) -> list[tuple[int, Row]]:
        """BeaverTails' rows that are safe, or those that aren't."""
        rows = self._rows("prompt", "is_safe", "category", *columns)
        return [each for each in rows if _flag(each[1], "is_safe", self._where, each[0]) is safe]


class JsonlExamples(FileSource, ExampleRows):
    """Training rows of a file, in one of the formats of `data.formats` or with columns as named.

    Attributes:
        prompt_column: Column of the user's turn; None: as the file's format has it.
        response_column: Column of the assistant's turn; likewise.
    """

    kind: Literal["harmful", "benign", "refusal", "task"]
    prompt_column: str | None = None
    response_column: str | None = None
    category_column: str | None = None

    def provenance(self) -> dict[str, Any]:
        """As of every source, and the format that the file was read in."""
        return {**super().provenance(), "format": self._format.name}

    @cached_property
    def _numbered_rows(self) -> list[tuple[int, Row]]:
        return self._rows(*filter(None, [self.category_column]))

    @cached_property
    def _format(self) -> Format:
        rows = [row for _, row in self._numbered_rows]
        if self.prompt_column is None and self.response_column is None:
            return recognise(rows, self.path)
        named = columns(self.prompt_column or "prompt", self.response_column or "response")
        require_columns(rows, named.columns, self.path)
        return named

    @cached_property
    def _selected(self) -> list[Example]:
        turns, category = self._format.turns, self.category_column
        examples = [
            example(
                turns(row, self.path, number),
                self.kind,
                "" if category is None else label_of(row, category, self.path, number),
                self.path,
                number,
            )
            for number, row in self._numbered_rows
        ]
        return take(examples, self.n, self.path)


class JsonlPairs(FileSource, PairRows):
    """Preference pairs of a file with a prompt, a chosen and a rejected column.

    Each holds texts or, as in TRL, lists of messages; see `data.formats.pair`.
    """

    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"

    @cached_property
    def _selected(self) -> list[PreferencePair]:
        answers = (self.chosen_column, self.rejected_column)
        rows = self._rows(*answers)
        if not all(isinstance(row[self.chosen_column], list) for _, row in rows):
            require_columns([row for _, row in rows], [self.prompt_column], self.path)
        names = (self.prompt_column, *answers)
        return take([pair(row, names, self.path, n) for n, row in rows], self.n, self.path)


class FilePrompts(FileSource, PromptRows):
    """Prompts of a file; ids are "file name/row number" unless a column holds them.

    Attributes:
        where: Rows are kept whose columns have these values, e.g. {label: safe} for the benign
            half of XSTest.
    """

    text_column: str = "prompt"
    id_column: str | None = None
    category_column: str | None = None
    where: dict[str, str | int | bool] = Field(default_factory=dict)

    @cached_property
    def _selected(self) -> list[Prompt]:
        def label(column: str | None, otherwise: str) -> str:
            return otherwise if column is None else label_of(row, column, self.path, number)

        prompts: dict[str, Prompt] = {}
        optional = filter(None, [self.id_column, self.category_column])
        for number, row in self._rows(self.text_column, *optional, *self.where):
            if not matches(row, self.where):
                continue
            name = label(self.id_column, f"{self.name}/{number}")
            if name in prompts:
                raise DataError(
                    f"{self.path} has the id {name!r} twice; set id_column to a column of unique "
                    "ids"
                )
            text = self._text(row, self.text_column, number)
            prompts[name] = Prompt(name, text, label(self.category_column, ""))
        return take(list(prompts.values()), self.n, self.path)


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
        matching = self._flagged(self.safe, "response")
        kind = "benign" if self.safe else "harmful"
        return [
            Example(
                self._text(row, "prompt", number),
                self._text(row, "response", number),
                kind,
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
        asked = take(self._flagged(False)[self.start :], self.n, self._where)
        return [
            Prompt(
                f"{self.name}/{number}",
                self._text(row, "prompt", number),
                harm_category(row["category"]),
            )
            for number, row in asked
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
            Example(self._text(row, "prompt", number), self._text(row, column, number), kind)
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


def _flag(row: Row, column: str, where: str, number: int) -> bool:
    value = row[column]
    if not isinstance(value, bool):
        raise DataError(
            f"{where} has {value!r} in column {column!r} of row {number}; "
            "it should be true or false"
        )
    return value
