"""A task of the user's own rows: what is held out, and how answers are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.own_task import OwnTask
from data.rows import TaskScore
from settings import DataError, SettingError


def file(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{n}", "response": ("yes", "no")[n % 2]} for n in range(count)]


def dialogue(prompt: str, system: str | None = None) -> dict[str, Any]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "a"}]
    lines = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*lines, *turns]}


def test_held_out_rows_are_not_trained_on_and_stay_the_same(tmp_path: Path) -> None:
    path = file(tmp_path, labelled(20))
    task = OwnTask(path=path, n_test=5, n_validation=4)
    tested = {item.prompt for item in task.test()}
    trained = {row.prompt for row in task.train()}
    assert (len(tested), len(trained)) == (5, 15)
    assert not tested & trained
    assert {item.prompt for item in task.validation()} <= trained
    assert OwnTask(path=path, n_test=5, n_train=3).test() == task.test()
    assert len(OwnTask(path=path, scoring="none").train()) == 20


def test_test_rows_of_a_file_of_their_own(tmp_path: Path) -> None:
    path = file(tmp_path, labelled(4))
    test_path = file(tmp_path, labelled(6)[4:], "test.jsonl")
    task = OwnTask(path=path, test_path=test_path, n_test=None)
    assert [(item.id, item.prompt) for item in task.test()] == [
        ("jsonl/1", "p4"),
        ("jsonl/2", "p5"),
    ]
    assert len(task.train()) == 4


@pytest.mark.parametrize(
    ("scoring", "answer", "score"),
    [
        ("classification", "Yes", TaskScore(True, True, True, True)),
        ("classification", "I say yes", TaskScore(False, True, True, False)),
        ("classification", "yes or no", TaskScore(False, False, False, False)),
        ("generation", " YES ", TaskScore(True, True, True, True)),
        ("generation", "oh yes", TaskScore(False, True, True, False)),
        ("generation", "", TaskScore(False, False, False, False)),
    ],
)
def test_answers_are_read_as_scoring_says(
    tmp_path: Path, scoring: str, answer: str, score: TaskScore
) -> None:
    path = file(tmp_path, labelled(8))
    task = OwnTask.validated({"path": path, "n_test": 6, "scoring": scoring}, "task")
    assert task.score(answer, "yes") == score


@pytest.mark.parametrize(
    ("labels", "answer", "gold", "other"),
    [
        ((" even", " odd"), "odd", " odd", " even"),
        (("ne\u0301gatif", "positif"), "n\u00e9gatif", "ne\u0301gatif", "positif"),
        (("Odd", "odd", "even"), "odd", "Odd", "even"),
        (("Odd", "odd", "even"), "ODD", "odd", "even"),
    ],
)
@pytest.mark.parametrize("reading", ["strict", "lenient", "contained"])
def test_labels_are_read_however_they_are_written(
    tmp_path: Path, labels: tuple[str, ...], answer: str, gold: str, other: str, reading: str
) -> None:
    rows = [{"prompt": f"p{n}", "response": label} for n, label in enumerate(labels)]
    path = file(tmp_path, rows)
    settings = {"path": path, "test_path": path, "n_test": None, "scoring": "classification"}
    task = OwnTask.validated({**settings, "reading": reading}, "task")
    assert task.score(answer, gold) == TaskScore(True, True, True, True)
    assert task.score(f"So {answer}.", gold) == TaskScore(False, True, True, reading != "strict")
    assert task.score(answer, other) == TaskScore(False, False, True, False)


def test_test_rows_are_asked_under_their_one_system_line(tmp_path: Path) -> None:
    rows = [dialogue(f"p{n}", "Be brief.") for n in range(4)]
    task = OwnTask(path=file(tmp_path, rows), n_test=2)
    assert task.system == "Be brief."
    assert len(task.test()) == 2
    with pytest.raises(DataError, match="a system line of its own"):
        OwnTask(path=file(tmp_path, [*rows, dialogue("p", "Other.")]), n_test=5).test()
    with pytest.raises(DataError, match="a system line of its own"):
        OwnTask(path=file(tmp_path, [*rows, dialogue("p")]), n_test=5).test()


def test_rows_that_are_not_scored_may_be_dialogues(tmp_path: Path) -> None:
    rows = [dialogue("p", "Other."), dialogue("q")]
    task = OwnTask(path=file(tmp_path, rows), scoring="none")
    assert not task.scored
    assert task.test() == []
    with pytest.raises(SettingError, match="scoring=none"):
        task.score("a", "a")
