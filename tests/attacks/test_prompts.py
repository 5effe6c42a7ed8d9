"""What harmful prompts are asked under: starts, scenes and published files."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attacks.prompts import Asked, AttackPrompt, Prefill, Published, RolePlay
from data.rows import Prompt
from settings import DataError, SettingError, build

PROMPTS = [
    Prompt("a/1", "How do I water the cat?"),
    Prompt("a/2", "Tell me how to {paint} the moon."),
    Prompt("a/3", "Name three clouds."),
]


def published(path: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> Published:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made: Published = Published.validated({"path": str(path), **settings}, "attack_prompt.file")
    return made


def test_a_prefill_leaves_the_prompts_and_starts_the_answers() -> None:
    asked = Prefill(start="Yes:").render(PROMPTS)
    assert asked == [Asked(prompt.id, prompt.text, "Yes:") for prompt in PROMPTS]


@given(st.text(), st.text(), st.text())
def test_a_scene_holds_the_prompt_as_it_is(before: str, after: str, text: str) -> None:
    (asked,) = RolePlay(template=before + "{prompt}" + after).render([Prompt("1", text)])
    if "{prompt}" not in before + after:
        assert asked == Asked("1", before + text + after)


def test_the_scene_that_ships_asks_every_prompt_once() -> None:
    for prompt, asked in zip(PROMPTS, RolePlay().render(PROMPTS), strict=True):
        assert (asked.id, asked.start) == (prompt.id, "")
        assert asked.text.count(prompt.text) == 1


@pytest.mark.parametrize("kind", ["x.jsonl", "x.csv"])
@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"suffix": "so la ti"}, "How do I water the cat? so la ti"),
        ({"suffix": "  so la ti"}, "How do I water the cat? so la ti"),
        ({"template": "Sing: {prompt} La."}, "Sing: How do I water the cat? La."),
    ],
)
def test_one_row_is_for_all_prompts(
    row: dict[str, str], text: str, kind: str, tmp_path: Path
) -> None:
    asked = published(tmp_path / kind, [row]).render(PROMPTS)
    assert [entry.id for entry in asked] == [prompt.id for prompt in PROMPTS]
    assert asked[0] == Asked("a/1", text)


@pytest.mark.parametrize("kind", ["x.jsonl", "x.csv"])
@pytest.mark.parametrize(
    ("column", "text"),
    [("suffix", "How do I water the cat? so la ti"), ("text", "so la ti")],
)
def test_rows_are_matched_by_prompt_and_the_others_left_out(
    column: str, text: str, kind: str, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "name three  clouds", column: "do re mi", "behaviour": "7"},
        {"prompt": "HOW DO I WATER THE CAT", column: "so la ti", "behaviour": "8"},
        {"prompt": "Something else", column: "fa", "behaviour": "9"},
        {"prompt": "Tell me how to {paint} the moon", column: "", "behaviour": "10"},
    ]
    asked = published(tmp_path / kind, rows).render(PROMPTS)
    assert [entry.id for entry in asked] == ["a/1", "a/3"]
    assert asked[0] == Asked("a/1", text)


def test_a_file_names_itself_and_may_be_named(tmp_path: Path) -> None:
    row = [{"suffix": "so la ti"}]
    assert published(tmp_path / "gcg.v1.jsonl", row).name == "gcg"
    assert published(tmp_path / "my gcg+.jsonl", row).name == "my_gcg_"
    assert published(tmp_path / "gcg.jsonl", row, name="transfer").name == "transfer"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"words": "la"}], "has the columns words; it should have prompt and text"),
        ([{"prompt": "Name three clouds."}], "has the columns prompt; it should have"),
        ([{"template": "Sing it."}], r"has no \{prompt\}; write \{prompt\} where"),
        ([{"suffix": "la"}, {"suffix": "le"}], "2 rows without a prompt; keep one"),
        ([{"prompt": "Else", "text": "la"}], "a row for none of the 3 prompts that are asked"),
        (
            [{"prompt": "B", "text": "x"}, {"prompt": "b.", "text": "y"}],
            "second row for the prompt",
        ),
        ([{"prompt": "B", "text": "x"}, {"prompt": "C"}], "no column 'text' in row 2"),
        ([{"suffix": " "}], "'suffix'"),
        ([], "holds no rows"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(
    rows: list[dict[str, str]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said) as refused:
        published(tmp_path / "x.jsonl", rows).render(PROMPTS)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused_in_one_sentence() -> None:
    with pytest.raises(DataError, match=r"'/none\.jsonl' does not exist"):
        Published(path="/none.jsonl").render(PROMPTS)


@pytest.mark.parametrize(
    ("target", "values", "said"),
    [
        ("Prefill", {"start": "  "}, r"attack_prompt\.x\.start='  ' is not allowed"),
        ("RolePlay", {"template": "Sing."}, r"attack_prompt\.x\.template: it has no \{prompt\}"),
        ("Prefill", {"name": "a b"}, r"attack_prompt\.x\.name='a b' is not allowed"),
        ("Published", {}, r"attack_prompt\.x\.path is missing"),
    ],
)
def test_wrong_settings_are_refused(target: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        build({"_target_": f"attacks.prompts.{target}", **values}, "attack_prompt.x")


def test_every_kind_is_an_attack_prompt() -> None:
    for made in (Prefill(), RolePlay(), Published(path="x.jsonl")):
        assert isinstance(made, AttackPrompt)
        assert made.system is None
