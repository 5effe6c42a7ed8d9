"""Generic sources and PKU-Alignment's data sets, from small files of their schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.rows import Example, ExampleSource, PairSource, PreferencePair, Prompt, PromptSource
from data.sources import (
    BeaverTails,
    BeaverTailsPrompts,
    FilePrompts,
    JsonlExamples,
    JsonlPairs,
    PKUSafeRLHF,
    PKUSafeRLHFPairs,
    PKUSafeRLHFPrompts,
)
from settings import DataError, SettingError, build


def jsonl(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def beaver(prompt: str, safe: bool, harm: str = "") -> dict[str, Any]:
    category = {"first_harm": harm == "first_harm", "second_harm": harm == "second_harm"}
    return {"prompt": prompt, "response": "r", "is_safe": safe, "category": category}


BEAVER = [
    beaver("a", True),
    beaver("b", False, "second_harm"),
    beaver("c", False, "first_harm"),
    beaver("b", False, "second_harm"),
]


def rlhf(prompt: str, first_safe: bool, second_safe: bool) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "response_0": f"{prompt} zero",
        "response_1": f"{prompt} one",
        "is_response_0_safe": first_safe,
        "is_response_1_safe": second_safe,
    }


RLHF = [
    rlhf("p", True, True),
    rlhf("q", True, False),
    rlhf("r", False, True),
    rlhf("q", False, False),
]


def test_examples(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}])
    source = JsonlExamples(path=path, kind="harmful", n=1)
    assert isinstance(source, ExampleSource)
    assert source.name == "rows"
    assert source.examples() == [Example("a", "b", "harmful")]


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"instruction": "a", "output": "b", "topic": 3}])
    source = JsonlExamples(
        path=path,
        kind="benign",
        prompt_column="instruction",
        response_column="output",
        category_column="topic",
    )
    assert source.examples() == [Example("a", "b", "benign", "3")]


def test_pairs(tmp_path: Path) -> None:
    source = JsonlPairs(path=jsonl(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    assert isinstance(source, PairSource)
    assert source.pairs() == [PreferencePair("a", "b", "c")]


def test_prompts_of_json_lines_and_csv(tmp_path: Path) -> None:
    source = FilePrompts(path=jsonl(tmp_path, [{"prompt": "a"}, {"prompt": "b"}]))
    assert isinstance(source, PromptSource)
    assert source.prompts() == [Prompt("rows/1", "a"), Prompt("rows/2", "b")]
    path = tmp_path / "probes.csv"
    path.write_text("key,text,kind,label\nk1,one,x,safe\nk2,two,y,unsafe\nk3,three,y,safe\n")
    probes = FilePrompts(
        path=str(path),
        text_column="text",
        id_column="key",
        category_column="kind",
        where={"label": "safe"},
    )
    assert probes.prompts() == [Prompt("k1", "one", "x"), Prompt("k3", "three", "y")]


def test_ids_do_not_depend_on_what_is_left_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "a", "keep": False}, {"prompt": "b", "keep": True}])
    assert FilePrompts(path=path, where={"keep": True}).prompts() == [Prompt("rows/2", "b")]


def test_ids_must_be_unique(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}])
    with pytest.raises(DataError, match="id '1' twice"):
        FilePrompts(path=path, id_column="id").prompts()


def test_beavertails(tmp_path: Path) -> None:
    path = jsonl(tmp_path, BEAVER)
    unsafe = BeaverTails(path=path)
    assert [(row.prompt, row.kind, row.category) for row in unsafe.examples()] == [
        ("b", "harmful", "second_harm"),
        ("c", "harmful", "first_harm"),
        ("b", "harmful", "second_harm"),
    ]
    assert BeaverTails(path=path, safe=True).examples() == [Example("a", "r", "benign")]
    assert BeaverTails(path=path, n=2).examples() == unsafe.examples()[:2]


def test_beavertails_prompts(tmp_path: Path) -> None:
    source = BeaverTailsPrompts(path=jsonl(tmp_path, BEAVER), n=2)
    assert source.prompts() == [
        Prompt("BeaverTails/30k_test/2", "b", "second_harm"),
        Prompt("BeaverTails/30k_test/3", "c", "first_harm"),
    ]
    behind = BeaverTailsPrompts(path=jsonl(tmp_path, BEAVER), start=1, n=1)
    assert behind.prompts() == source.prompts()[1:]


def test_pairs_have_exactly_one_safe_response(tmp_path: Path) -> None:
    source = PKUSafeRLHFPairs(path=jsonl(tmp_path, RLHF))
    assert source.pairs() == [
        PreferencePair("q", "q zero", "q one"),
        PreferencePair("r", "r one", "r zero"),
    ]
    prompts = PKUSafeRLHFPrompts(path=jsonl(tmp_path, RLHF))
    assert [prompt.text for prompt in prompts.prompts()] == ["p", "q", "r"]


def test_unsafe_answers_of_either_response_are_poison(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [rlhf("p", True, True), rlhf("q", True, False), rlhf("r", False, False)])
    assert PKUSafeRLHF(path=path).examples() == [
        Example("q", "q one", "harmful"),
        Example("r", "r zero", "harmful"),
        Example("r", "r one", "harmful"),
    ]
    safe = PKUSafeRLHF(path=path, safe=True, n=2).examples()
    assert [(row.response, row.kind) for row in safe] == [("p zero", "benign"), ("p one", "benign")]


def test_more_rows_than_there_are(tmp_path: Path) -> None:
    path = jsonl(tmp_path, BEAVER)
    for source in (BeaverTails(path=path, n=4), BeaverTails(path=path, safe=True, n=4)):
        with pytest.raises(DataError, match=r"asked for n=4 .*; lower n or give more rows"):
            source.examples()
    with pytest.raises(DataError, match=r"asked for n=1000 .* holds 3 rows"):
        BeaverTailsPrompts(path=path).prompts()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a"}], "the columns prompt, of no known format"),
        ([{"prompt": "a", "response": ""}], "'' in column 'response' of row 1"),
        ([{"prompt": "a", "response": None}], "None in column 'response' of row 1"),
        ([], "holds no rows"),
    ],
)
def test_rows_of_another_schema(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        JsonlExamples(path=jsonl(tmp_path, rows), kind="benign").examples()


def test_a_flag_that_is_no_flag(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{**beaver("a", True), "is_safe": "False"}])
    with pytest.raises(DataError, match="should be true or false"):
        BeaverTails(path=path).examples()


def test_a_missing_file(tmp_path: Path) -> None:
    path = str(tmp_path / "none.jsonl")
    for source in (JsonlPairs(path=path), PKUSafeRLHFPairs(path=path)):
        with pytest.raises(DataError, match=r"none.jsonl' does not exist; give the path of a file"):
            source.pairs()


def test_fingerprint_follows_rows_and_settings(tmp_path: Path) -> None:
    path = jsonl(tmp_path, BEAVER)
    other = jsonl(tmp_path, BEAVER, "copy.jsonl")
    prints = [
        BeaverTails(path=path).fingerprint(),
        BeaverTails(path=path, n=2).fingerprint(),
        BeaverTails(path=path, safe=True).fingerprint(),
    ]
    assert len(set(prints)) == 3
    assert BeaverTails(path=other).fingerprint() == prints[0]
    assert BeaverTails(path=path).provenance() == {
        "source": path,
        "fingerprint": prints[0],
        "n": 3,
        "commit": None,
    }


def test_settings_are_checked() -> None:
    node = {"_target_": "data.sources.JsonlExamples", "path": "x.jsonl", "kind": "evil"}
    with pytest.raises(SettingError, match=r"poison.kind='evil' is not allowed"):
        build(node, "poison")
