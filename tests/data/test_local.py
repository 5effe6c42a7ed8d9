"""Local files of every kind give the same rows, and damaged ones a sentence."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from data.local import hash_rows, locate, read_cells, read_rows, take
from data.rows import Example, Prompt
from settings import DataError

ROWS = [{"prompt": 'say "a", b', "response": "one\ntwo"}, {"prompt": "é", "response": "x"}]


def write(folder: Path, name: str) -> Path:
    path = folder / name
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if name.endswith(".jsonl"):
        path.write_text(lines + "\n", encoding="utf-8")
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif name.endswith(".csv"):
        text = 'prompt,response\n"say ""a"", b","one\ntwo"\né,x\n'
        path.write_text("\N{ZERO WIDTH NO-BREAK SPACE}" + text, encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.json", "r.csv", "r.parquet"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert read_rows(write(tmp_path, name)) == ROWS


def test_tab_separated_files_keep_bare_quotes(tmp_path: Path) -> None:
    path = tmp_path / "r.tsv"
    path.write_text('sentence\tlabel\na " in it \t1\n')
    assert read_rows(path) == [{"sentence": 'a " in it ', "label": "1"}]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("name", ["r.tsv", "r.TSV"])
def test_tab_separated_files_whose_writer_quoted_cells(
    tmp_path: Path, name: str, quoting: Literal[0, 1, 2]
) -> None:
    rows = [{"sentence": 'say "a"\tor b', "label": 1}, {"sentence": "two\nlines", "label": 0}]
    path = tmp_path / name
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False, quoting=quoting)
    assert read_rows(path) == [{**row, "label": str(row["label"])} for row in rows]


def test_a_text_file_has_a_row_per_line(tmp_path: Path) -> None:
    path = tmp_path / "r.txt"
    path.write_text("\N{ZERO WIDTH NO-BREAK SPACE}one, two \r\n\n  three\n", encoding="utf-8")
    assert read_rows(path) == [{"text": "one, two"}, {"text": "three"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.jsonl", '{"prompt": "a"}\n\n{"prompt": ', "line 3 is no JSON"),
        ("r.jsonl", '{"prompt": "a"}\n{"prompt": "\\ud83d"}', "a lone surrogate, such as"),
        ("r.json", '[{"prompt": {"a": ["\\ude00 b"]}}]', "in row 1; write the whole character"),
        ("r.jsonl", "[1, 2]\n", "one JSON object per row"),
        ("r.jsonl", '{"prompt": "a"}\n' + "[" * 200_000, "line 2 is nested too deep; repair"),
        ("r.json", "[" * 200_000, "can't be read: maximum recursion depth"),
        ("r.csv", "a,b\n1,2\n1,2,3\n", "3 cells in row 3 but 2 columns"),
        ("r.csv", "prompt,response,prompt\na,b,c\n", "the column 'prompt' twice; rename or drop"),
        ("r.tsv", "a\ta\n1\t2\n", "the column 'a' twice"),
        ("r.parquet", "not one", "can't be read"),
        ("r.xlsx", "", "unknown kind"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        read_rows(path)


def _truncated(content: bytes) -> bytes:
    return content[:-12]


def _flipped(content: bytes) -> bytes:
    return content[:10] + bytes(255 - byte for byte in content[10:])


@pytest.mark.parametrize("damage", [_truncated, _flipped])
def test_damaged_archives_are_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path, "r.jsonl.gz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"r.jsonl.gz' can't be read: .*; give a whole, readable"):
        read_rows(path)


def test_cells_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(b"1,a,\xff\n")
    with pytest.raises(DataError, match=r"r.csv' can't be read: 'utf-8' codec"):
        read_cells(path)


def test_empty_columns_may_be_several(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("a,,\n1,,\n")
    assert read_rows(path) == [{"a": "1", "": ""}]


@pytest.mark.parametrize(
    ("file", "setting", "said"),
    [
        ("none.jsonl", None, "the file 'none.jsonl' does not exist in {here}; give the path of a"),
        ("{here}/none.jsonl", None, "'{here}/none.jsonl' does not exist; give the path of a file"),
        ("none.jsonl", "a.path", "in {here}; set a.path to where the file lies, or b"),
        ("folder", None, "^'folder' is a folder and no file; give the path of a file"),
        ("folder", "a.path", "is a folder and no file; set a.path to where the file lies, or b"),
    ],
)
def test_what_is_no_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, setting: str | None, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    instead = "" if setting is None else ", or b"
    with pytest.raises(DataError, match=said.format(here=tmp_path)):
        locate(None, file.format(here=tmp_path), setting, instead)


def test_too_few_rows_say_what_to_do() -> None:
    assert take([1, 2, 3], 2, "f.jsonl") == [1, 2]
    with pytest.raises(DataError, match=r"asked for n=4 but f.jsonl holds 3.*lower n or give more"):
        take([1, 2, 3], 4, "f.jsonl")


def test_hash_follows_the_rows() -> None:
    rows = [Example("a", "b", "task"), Example("c", "d", "task")]
    assert hash_rows(rows) == hash_rows(list(rows))
    assert hash_rows(rows) != hash_rows(rows[::-1])
    assert hash_rows(rows[:1], rows[1:]) != hash_rows(rows)
    assert hash_rows([Prompt("a", "b", "")]) != hash_rows([Example("a", "b", "")])
