"""Held-out text: files of several layouts, and WikiText's paragraphs, local and from the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data.rows import Example, ExampleSource
from data.text import FileText, WikiText
from settings import DataError, SettingError, build

PROJECT = Path(__file__).resolve().parents[2]
LINES = [
    "",
    " = Kite = \n",
    "",
    " A kite is a light frame with cloth , flown on a line . \n",
    " = = Making one = = \n",
    " \n",
    " Fold the well @-@ dried paper twice , then glue the edges and wait for an hour . \n",
    " Short . \n",
    " = x is what this line begins with , and it is no heading although it is a long one . \n",
]
PARAGRAPHS = [LINES[3].strip(), LINES[6].strip(), LINES[8].strip()]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def wiki(folder: Path, **settings: Any) -> WikiText:
    path = jsonl(folder / "wiki.jsonl", [{"text": line} for line in LINES])
    return WikiText(path=path, **{"min_characters": 20, **settings})


def from_conf(name: str, **settings: Any) -> Any:
    option = OmegaConf.merge(OmegaConf.load(PROJECT / f"conf/text/{name}.yaml"), settings)
    return build(OmegaConf.to_container(option), "sources.held_out")  # type: ignore[arg-type]


def test_plain_text_has_no_prompt(tmp_path: Path) -> None:
    source = FileText(path=jsonl(tmp_path / "t.jsonl", [{"text": "One."}, {"text": "Two."}]))
    assert isinstance(source, ExampleSource)
    assert source.name == "t"
    assert source.examples() == [Example("", "One.", "benign"), Example("", "Two.", "benign")]


def test_responses_stand_beside_their_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "a?", "response": "b", "text": "unused"}]
    assert FileText(path=jsonl(tmp_path / "t.jsonl", rows)).examples() == [
        Example("a?", "b", "benign")
    ]
    named = FileText(
        path=jsonl(tmp_path / "u.jsonl", [{"ask": "a?", "say": "b"}]),
        prompt_column="ask",
        response_column="say",
    )
    assert named.examples() == [Example("a?", "b", "benign")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_paragraphs_of_a_text_file_keep_their_lines(tmp_path: Path, end: str) -> None:
    lines = ["", "First,", "still first.", "", " \t", "Second.", "", "", "Third.", ""]
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbf" + end.join(lines).encode())
    texts = [row.response for row in FileText(path=str(path)).examples()]
    assert texts == ["First,\nstill first.", "Second.", "Third."]
    assert [row.response for row in FileText(path=str(path), n=2).examples()] == texts[:2]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"body": "x"}], r"no column 'text' in row 1 \(it has body\)"),
        ([{"text": " "}], "' ' in column 'text' of row 1"),
        ([{"prompt": "a", "response": "b"}, {"prompt": "a"}], "no column 'response' in row 2"),
        ([{"prompt": "a", "response": None}], "None in column 'response' of row 1"),
        ([], "holds no rows"),
    ],
)
def test_rows_of_another_schema_are_named(
    tmp_path: Path, rows: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        FileText(path=jsonl(tmp_path / "t.jsonl", rows)).examples()


def test_what_a_file_lacks_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist; give the path of a file"):
        FileText(path=str(tmp_path / "none.txt")).examples()
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt' can't be read as UTF-8"):
        FileText(path=str(tmp_path / "latin.txt")).examples()
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(DataError, match="holds no rows"):
        FileText(path=str(tmp_path / "blank.txt")).examples()
    path = jsonl(tmp_path / "t.jsonl", [{"text": "One."}])
    with pytest.raises(DataError, match=r"asked for n=2 .* holds 1 rows"):
        FileText(path=path, n=2).examples()


def test_wikitext_is_its_paragraphs_without_headings(tmp_path: Path) -> None:
    source = wiki(tmp_path)
    assert isinstance(source, ExampleSource)
    assert source.examples() == [Example("", text, "benign") for text in PARAGRAPHS]
    assert [row.response for row in wiki(tmp_path, min_characters=60).examples()] == PARAGRAPHS[1:]
    assert [row.response for row in wiki(tmp_path, n=1).examples()] == PARAGRAPHS[:1]
    shortest = [row.response for row in wiki(tmp_path, min_characters=1).examples()]
    assert shortest == [*PARAGRAPHS[:2], "Short .", PARAGRAPHS[2]]


def test_wikitext_that_holds_too_little_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lower min_characters"):
        wiki(tmp_path, min_characters=1000).examples()
    with pytest.raises(DataError, match=r"asked for n=4 .* holds 3 rows"):
        wiki(tmp_path, n=4).examples()
    path = jsonl(tmp_path / "other.jsonl", [{"text": None}])
    with pytest.raises(DataError, match="None in column 'text' of row 1"):
        WikiText(path=path).examples()
    path = jsonl(tmp_path / "other.jsonl", [{"page": "x"}])
    with pytest.raises(DataError, match="no column 'text' in row 1"):
        WikiText(path=path).examples()


def test_the_fingerprint_follows_the_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [{"text": "One."}, {"text": "Two."}])
    copy = jsonl(tmp_path / "copy.jsonl", [{"text": "One."}, {"text": "Two."}])
    source = FileText(path=path)
    assert FileText(path=copy).fingerprint() == source.fingerprint()
    assert FileText(path=path, n=1).fingerprint() != source.fingerprint()
    assert source.provenance() == {
        "source": path,
        "fingerprint": source.fingerprint(),
        "n": 2,
        "commit": None,
    }
    whole = wiki(tmp_path)
    assert wiki(tmp_path, min_characters=21).fingerprint() == whole.fingerprint()
    assert wiki(tmp_path, min_characters=60).fingerprint() != whole.fingerprint()
    assert whole.provenance() == {
        "source": str(tmp_path / "wiki.jsonl"),
        "fingerprint": whole.fingerprint(),
        "n": 3,
        "commit": None,
    }


def test_every_option_builds(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [{"text": "One."}])
    assert from_conf("jsonl", path=path).examples() == [Example("", "One.", "benign")]
    assert (from_conf("wikitext").name, from_conf("wikitext").n) == ("wikitext-2-raw-v1/test", 500)
    assert len(from_conf("organism", n=6).examples()) == 6
    with pytest.raises(SettingError, match=r"sources\.held_out\.min_characters=0"):
        from_conf("wikitext", min_characters=0)


def offline(code: str, home: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_wikitext_reads_its_subset_and_split_as_the_hub_lays_them_out(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "wikitext"
    part = folder / "wikitext-2-raw-v1"
    part.mkdir(parents=True)
    for split, lines in (("test", LINES), ("train", ["Nothing of this is held out ."])):
        table = pyarrow.table({"text": lines})
        parquet.write_table(table, part / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        "  - split: test\n    path: wikitext-2-raw-v1/test-*\n"
        "  - split: train\n    path: wikitext-2-raw-v1/train-*\n---\n"
    )
    code = f"""
from typing import ClassVar
from data.text import WikiText
class Copy(WikiText):
    hub: ClassVar[str] = {str(folder)!r}
print([row.response for row in Copy(min_characters=20).examples()])
"""
    assert offline(code, tmp_path / "home") == str(PARAGRAPHS)


def test_a_hub_out_of_reach_is_a_sentence(tmp_path: Path) -> None:
    code = """
from data.text import WikiText
from settings import DataError
try:
    WikiText().examples()
except DataError as error:
    print(error)
"""
    said = offline(code, tmp_path)
    assert said.startswith("the split 'test' of 'Salesforce/wikitext' can't be loaded")
    assert "set path to a local copy" in said
