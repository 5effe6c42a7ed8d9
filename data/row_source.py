"""The bases of sources: rows selected from a file or a hub data set, known by their content."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, PrivateAttr

from data.hub import load_split
from data.local import Row, hash_rows, locate, read_rows, require_columns, text_of
from data.rows import Example, PreferencePair, Prompt
from settings import Settings


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

    @property
    def _selected(self) -> list[Any]:
        raise NotImplementedError

    @property
    def _where(self) -> str:
        """The file or data set, for messages."""
        raise NotImplementedError

    @property
    def _commit(self) -> str | None:
        return self._commits[-1] if self._commits else None

    def _text(self, row: Row, column: str, number: int) -> str:
        return text_of(row, column, self._where, number)


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
        """The prompts, in the order of the file or data set.

        Raises:
            DataError: The rows are missing, of another schema, or not as many as expected.
        """
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
        """The rows with their numbers, which count from 1."""
        rows = read_rows(locate(None, self.path, "path"))
        require_columns(rows, columns, self.path)
        return list(enumerate(rows, 1))


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

    def provenance(self) -> dict[str, Any]:
        """Where the rows come from, for a run's record: source, commit, row count, checksum."""
        return {
            "source": self._where,
            "fingerprint": self.fingerprint(),
            "n": len(self._selected),
            "commit": self._commit,
        }

    @property
    def _where(self) -> str:
        return self.path or self.name

    def _rows(self, *columns: str, config: str | None = None) -> list[tuple[int, Row]]:
        """The rows with their numbers, which count from 1."""
        if self.path is not None:
            rows = read_rows(locate(None, self.path, "path"))
        else:
            instead = "path to a local copy"
            rows, commit = load_split(self.hub, config, self.split, self.revision, instead)
            self._commits.append(commit)
        require_columns(rows, columns, self._where)
        return list(enumerate(rows, 1))
