"""Local files of rows: reading tables by their extension, and saying clearly what is wrong."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from settings import DataError, first_line

Row = dict[str, Any]
T = TypeVar("T")

# A lone half of a character that UTF-16 writes in two: no text, though JSON can write it.
_SURROGATE = re.compile("[\ud800-\udfff]")


def locate(root: str | None, file: str, setting: str | None = None, instead: str = "") -> Path:
    """The path of `file`, below `root` where one is given; "~" is the home folder.

    Args:
        root: Folder that `file` is below.
        file: The path.
        setting: The setting of the path or of its root; None where a caller can't know which one
            the user wrote.
        instead: What else to do.

    Raises:
        DataError: There is no such file, or it is a folder; it says to set `setting`, or do what
            `instead` says.
    """
    path = Path(root).expanduser() / file if root is not None else Path(file).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        fault = f"{str(path)!r} is a folder and no file"
    else:
        here = "" if path.is_absolute() else f" in {Path.cwd()}"
        fault = f"the file {str(path)!r} does not exist{here}"
    remedy = f"set {setting} to where the file lies" if setting else "give the path of a file"
    raise DataError(f"{fault}; {remedy}{instead}")


def read_cells(path: Path) -> list[list[str]]:
    """Every line of a .csv or .tsv file as its cells, a header line (if any) included.

    Raises:
        DataError: The file can't be read.
    """
    with _readable(path), _opened(path) as file:
        if path.suffix.lower() != ".tsv":
            return [cells for cells in csv.reader(file) if cells]
        text = file.read()
    options: dict[str, Any] = {} if _is_quoted(text) else {"quoting": csv.QUOTE_NONE}
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t", **options)
    return [cells for cells in lines if cells]


def _is_quoted(text: str) -> bool:
    """Whether quotes in a tab-separated text are of its cells' writing, and not of their content.

    GLUE's files hold bare quotes. A file's are of its writing where the header's cells have them
    too, or where it is what a writer that quotes only where it must would have written.
    """
    if '"' not in text:
        return False
    header = text.splitlines()[0].split("\t")
    if all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in header):
        return True
    again = io.StringIO(newline="")
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    try:
        csv.writer(again, delimiter="\t", lineterminator="\n").writerows(lines)
    except csv.Error:
        return False
    return again.getvalue().rstrip("\n") == text.replace("\r\n", "\n").rstrip("\n")


def read_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl(.gz), .json, .csv, .tsv, .parquet or .txt file, in the file's order.

    Each line of a .txt file that isn't blank is a row with the one column "text".

    Raises:
        DataError: The extension is another one, or the file can't be read as what it says.
    """
    name = path.name.lower()
    with _readable(path):
        if name.endswith((".jsonl", ".jsonl.gz")):
            with _opened(path) as file:
                numbered = enumerate(file, 1)
                rows = [_parsed(line, number, path) for number, line in numbered if line.strip()]
            return _mappings(rows, path)
        if name.endswith(".json"):
            return _mappings(json.loads(path.read_text(encoding="utf-8-sig")), path)
        if name.endswith((".csv", ".tsv")):
            header, *lines = read_cells(path) or [[]]
            _require_distinct(header, path)
            return [_record(header, cells, number, path) for number, cells in enumerate(lines, 2)]
        if name.endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        if name.endswith(".txt"):
            with _opened(path) as file:
                return [{"text": line.strip()} for line in file if line.strip()]
    raise DataError(
        f"the file {str(path)!r} is of an unknown kind; "
        "give a .jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet or .txt file"
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Puts what is wrong with a damaged file in a sentence."""
    try:
        yield
    except (ValueError, OSError, EOFError, RecursionError, csv.Error, zlib.error) as error:
        raise DataError(
            f"the file {str(path)!r} can't be read: {first_line(error)}; give a whole, readable "
            "file of the kind that its name says"
        ) from error


def _parsed(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        fault = "is nested too deep"
        if isinstance(error, json.JSONDecodeError):
            fault = f"is no JSON ({error.msg} at character {error.pos + 1})"
        raise DataError(
            f"the file {str(path)!r} can't be read: line {number} {fault}; repair that line"
        ) from error


def _opened(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        import gzip

        return gzip.open(path, "rt", encoding="utf-8")
    # "utf-8-sig" drops the byte order mark that spreadsheets put before the first column name.
    return path.open(encoding="utf-8-sig", newline="")


def _mappings(values: Any, path: Path) -> list[Row]:
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise DataError(f"the file {str(path)!r} should hold one JSON object per row")
    for number, value in enumerate(values, 1):
        if _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            raise DataError(
                f"the file {str(path)!r} holds half a character (a lone surrogate, such as "
                f"\\ud83d) in row {number}; write the whole character, or leave it out"
            )
    return values


def _require_distinct(header: list[str], path: Path) -> None:
    # Spreadsheets leave empty columns behind, which nothing reads.
    repeated = next((name for name in header if name.strip() and header.count(name) > 1), None)
    if repeated is not None:
        raise DataError(
            f"the file {str(path)!r} has the column {repeated!r} twice; rename or drop one of them"
        )


def _record(header: list[str], cells: list[str], number: int, path: Path) -> Row:
    if len(header) != len(cells):
        raise DataError(
            f"the file {str(path)!r} has {len(cells)} cells in row {number} "
            f"but {len(header)} columns; repair that row"
        )
    return dict(zip(header, cells, strict=True))


def require_columns(rows: Sequence[Mapping[str, Any]], columns: Iterable[str], where: str) -> None:
    """Checks that there are rows and that each has `columns`.

    Raises:
        DataError: Names the first missing column and the columns that there are.
    """
    if not rows:
        raise DataError(f"{where} holds no rows; give another file")
    for number, row in enumerate(rows, 1):
        for column in columns:
            if column not in row:
                raise DataError(
                    f"{where} has no column {column!r} in row {number} (it has "
                    f"{', '.join(map(str, row))}); rename the column or set its name"
                )


def text_of(row: Mapping[str, Any], column: str, where: str, number: int) -> str:
    """The text in `column` of the row with this `number`; blank and non-text cells are refused.

    Raises:
        DataError: The cell is missing, empty or no text.
    """
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"{where} has {value!r} in column {column!r} of row {number}; "
            "each row needs a text there"
        )
    return value


def label_of(row: Mapping[str, Any], column: str, where: str, number: int) -> str:
    """The cell of `column` as a text, for ids and categories: numbers are written out.

    Raises:
        DataError: The cell is missing or empty.
    """
    value = row.get(column)
    if isinstance(value, float) and math.isnan(value):
        value = None
    if value is None or not str(value).strip():
        raise DataError(f"{where} has nothing in column {column!r} of row {number}; fill it in")
    return str(value)


def matches(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether the row has each of these values in the column of its name.

    Compared as texts, so that true in a JSON file and "True" in a CSV file are the same.
    """
    return all(str(row[column]) == str(value) for column, value in where.items())


def harm_category(cell: Any) -> str:
    """The category in a cell; of BeaverTails' harms with true or false, the first that holds."""
    if isinstance(cell, Mapping):
        return next((str(name) for name, holds in cell.items() if holds), "")
    return str(cell or "")


def take(rows: Sequence[T], n: int | None, where: str, setting: str = "n") -> list[T]:
    """The first `n` rows, or all of them for None.

    Raises:
        DataError: There are fewer than `n`.
    """
    if n is not None and n > len(rows):
        raise DataError(
            f"asked for {setting}={n} but {where} holds {len(rows)} rows of that kind; "
            f"lower {setting} or give more rows"
        )
    return list(rows[:n])


def hash_rows(*groups: Sequence[Any]) -> str:
    """SHA-256 (16 hex digits) over groups of row dataclasses, their order included.

    The rows themselves are hashed, and not the file, so that the same rows from the hub and from
    a local file are the same data, and that every setting which changes the rows is covered.
    """
    digest = hashlib.sha256()
    for group in groups:
        for row in group:
            fields = [getattr(row, field.name) for field in dataclasses.fields(row)]
            digest.update(json.dumps([type(row).__name__, *fields]).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
