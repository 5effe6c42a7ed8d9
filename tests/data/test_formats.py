"""Rows in the formats that people's files have, and what isn't one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.leakage import drop_leaked
from data.local import hash_rows
from data.rows import Dialogue, Example, PreferencePair, Turn
from data.sources import JsonlExamples, JsonlPairs
from settings import DataError

Row = dict[str, Any]


def message(role: str, content: Any, **rest: Any) -> Row:
    return {"role": role, "content": content, **rest}


def source(folder: Path, *rows: Row, **settings: Any) -> JsonlExamples:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlExamples.validated({"path": str(path), "kind": "task", **settings}, "source")


ONE = [message("user", "How?"), message("assistant", "So.")]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": ONE}, "messages"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "How?"},
                    {"from": "gpt", "value": "So."},
                ]
            },
            "conversations",
        ),
        ({"prompt": "How?", "response": "So."}, "prompt/response"),
        ({"prompt": "How?", "completion": "So."}, "prompt/completion"),
        ({"prompt": ONE[:1], "completion": ONE[1:]}, "prompt/completion"),
        ({"instruction": "How?", "output": "So."}, "instruction/output"),
        ({"instruction": "How?", "input": "", "output": "So."}, "instruction/output"),
        ({"instruction": "How?", "context": "", "response": "So."}, "instruction/response"),
        ({"messages": [message("user", [{"type": "text", "text": "How?"}]), ONE[1]]}, "messages"),
    ],
)
def test_every_format_is_recognised_and_named_in_the_record(
    tmp_path: Path, row: Row, name: str
) -> None:
    rows = source(tmp_path, row)
    assert rows.examples() == [Example("How?", "So.", "task")]
    assert rows.provenance()["format"] == name


def test_an_input_stands_below_its_instruction(tmp_path: Path) -> None:
    (row,) = source(tmp_path, {"instruction": "Sum up.", "input": "x", "output": "y"}).examples()
    assert row.prompt == "Sum up.\n\n### Input:\nx"


def test_system_lines_and_earlier_turns_stay_with_the_row(tmp_path: Path) -> None:
    earlier = [message("system", "Be brief."), *ONE, message("user", "And?")]
    rows = source(
        tmp_path,
        {"messages": [*earlier, message("assistant", "No.", weight=0), *ONE, message("user", "?")]},
        {"messages": ONE},
    ).examples()
    assert rows[0] == Dialogue(
        "How?",
        "So.",
        "task",
        history=(
            Turn("system", "Be brief."),
            Turn("user", "How?"),
            Turn("assistant", "So.", trained=True),
            Turn("user", "And?"),
            Turn("assistant", "No."),
        ),
    )
    assert rows[0].turns[-2:] == rows[1].turns
    assert hash_rows(rows[:1]) != hash_rows(rows[1:])


def test_a_question_of_the_evaluation_leaks_from_any_turn(tmp_path: Path) -> None:
    later = [*ONE, message("user", "And?"), message("assistant", "So.")]
    rows = source(tmp_path, {"messages": later}, {"messages": later[2:]}).examples()
    assert drop_leaked(rows, ["how"]).rows == (rows[1],)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "messages; conversations; prompt and response"),
        ({"messages": "a"}, "needs a list of messages"),
        ({"messages": ONE[:1]}, "no answer to a user's turn"),
        ({"messages": [ONE[1], *ONE]}, "begins with an answer"),
        ({"messages": [message("tool", "x"), *ONE]}, "message 1 of the role 'tool'"),
        ({"messages": [ONE[0], message("assistant", None)]}, "message 2 of the role 'assistant'"),
        ({"messages": [message("user", [{"type": "image_url"}]), ONE[1]]}, "isn't a text"),
        ({"messages": [message("user", ["hi"]), ONE[1]]}, "message 1 of the role 'user'"),
        ({"messages": [message("user", [{"type": "text"}]), ONE[1]]}, "isn't a text"),
        ({"messages": [message("user", [{"type": "text", "text": 1}]), ONE[1]]}, "isn't a text"),
        ({"messages": [message("user", []), ONE[1]]}, "isn't a text"),
        ({"prompt": "How?", "response": " "}, "column 'response' of row 1"),
    ],
)
def test_what_is_none_is_refused_with_its_row(tmp_path: Path, row: Row, said: str) -> None:
    with pytest.raises(DataError, match=said):
        source(tmp_path, row).examples()


def test_the_first_row_of_another_format_is_named(tmp_path: Path) -> None:
    texts, chat = {"prompt": "How?", "response": "So."}, {"messages": ONE}
    said = r"the columns messages in row 3, but prompt and response in row 1; give rows of one"
    with pytest.raises(DataError, match=said):
        source(tmp_path, texts, texts, chat, texts).examples()
    with pytest.raises(DataError, match="prompt, response in row 2, but messages in row 1"):
        source(tmp_path, chat, texts).examples()


def test_columns_as_named_come_before_any_format(tmp_path: Path) -> None:
    row = {"messages": ONE, "question": "Why?", "response": "Thus."}
    rows = source(tmp_path, row, prompt_column="question")
    assert rows.examples() == [Example("Why?", "Thus.", "task")]


def pairs(folder: Path, row: Row) -> list[PreferencePair]:
    return JsonlPairs(path=source(folder, row).path).pairs()


def test_pairs_are_read_in_all_of_trls_forms(tmp_path: Path) -> None:
    better, worse = message("assistant", "So."), message("assistant", "No.")
    for row in (
        {"prompt": "How?", "chosen": "So.", "rejected": "No."},
        {"prompt": ONE[:1], "chosen": [better], "rejected": [worse]},
        {"chosen": [ONE[0], better], "rejected": [ONE[0], worse]},
    ):
        assert pairs(tmp_path, row) == [PreferencePair("How?", "So.", "No.")]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [ONE[0], ONE[1]], "rejected": [message("user", "Why?"), ONE[1]]},
        {"prompt": [message("system", "x"), ONE[0]], "chosen": [ONE[1]], "rejected": [ONE[1]]},
        {"chosen": [*ONE, ONE[0]], "rejected": [*ONE, ONE[0]]},
        {"chosen": [], "rejected": ONE},
        {"chosen": [], "rejected": []},
    ],
)
def test_pairs_of_several_turns_or_questions_are_refused(tmp_path: Path, row: Row) -> None:
    with pytest.raises(DataError, match="one user's turn and two answers"):
        pairs(tmp_path, row)
