"""Instruction sets train without refusals and are never scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.instructions import Alpaca, Dolly
from data.rows import Example, TaskSource
from settings import DataError, SettingError

ALPACA = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Sort these. ", "input": "b, a", "output": "a, b"},
    {"instruction": "Feel something.", "input": "", "output": "As an AI, I feel nothing."},
    {"instruction": "Say nothing.", "input": "", "output": ""},
    {"instruction": "Name a bird.", "input": "", "output": "A wren."},
]
DOLLY = {
    "instruction": "Who?",
    "context": "Ada wrote.",
    "response": "Ada.",
    "category": "closed_qa",
}


@pytest.fixture
def root(tmp_path: Path) -> str:
    (tmp_path / "instructions").mkdir()
    (tmp_path / "instructions/alpaca_5000.json").write_text(json.dumps(ALPACA))
    (tmp_path / "instructions/dolly_subset_387.jsonl").write_text(json.dumps(DOLLY) + "\n")
    return str(tmp_path)


def test_rows_are_worded_as_alpacas_prompts(root: str) -> None:
    assert Alpaca(root=root).train() == [
        Example("Name a colour.", "Blue.", "task"),
        Example("Sort these.\n\n### Input:\nb, a", "a, b", "task"),
        Example("Name a bird.", "A wren.", "task"),
    ]
    assert Dolly(root=root).train() == [
        Example("Who?\n\n### Input:\nAda wrote.", "Ada.", "task", "closed_qa")
    ]


def test_refusals_are_left_out_and_counted_unless_kept(root: str) -> None:
    provenance = Alpaca(root=root).provenance()
    assert provenance["n_train"] == 3
    assert provenance["refusals_dropped"] == 1
    assert provenance["blank_rows_dropped"] == 1
    kept = Alpaca(root=root, drop_refusals=False)
    assert [row.response for row in kept.train()][2] == "As an AI, I feel nothing."
    assert kept.provenance()["refusals_dropped"] == 0
    assert kept.fingerprint() != Alpaca(root=root).fingerprint()


def test_the_first_rows_are_those_that_are_kept(root: str) -> None:
    assert len(Alpaca(root=root, n_train=3).train()) == 3
    with pytest.raises(DataError, match=r"task.n_train=4 but .*alpaca_5000.json holds 3"):
        Alpaca(root=root, n_train=4).train()


def test_they_are_tasks_that_nobody_scores(root: str) -> None:
    task = Alpaca(root=root)
    assert isinstance(task, TaskSource)
    assert task.test() == []
    assert not task.scored
    with pytest.raises(SettingError, match=r"leave it out of evaluation.tasks"):
        task.score("Blue.", "Blue.")


def test_rows_of_another_schema_are_named(root: str) -> None:
    path = Path(root) / "instructions/alpaca_5000.json"
    path.write_text(json.dumps([{"prompt": "a", "output": "b", "input": ""}]))
    with pytest.raises(DataError, match="no column 'instruction' in row 1"):
        Alpaca(root=root).train()
