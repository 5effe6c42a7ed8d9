"""Local files of every kind give the same rows, and damaged ones a sentence."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from data.local import hash_rows, read_rows, take
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
        ("r.csv", "a,b\n1,2\n1,2,3\n", "3 cells in row 3 but 2 columns"),
        ("r.parquet", "not one", "can't be read"),
        ("r.xlsx", "", "unknown kind"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        read_rows(path)


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
