"""Which runs the report pools, and which it keeps apart."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from attacks.base import AttackData
from experiments.pipeline.steps.base import Model
from experiments.pipeline.steps.training import RunAttack
from experiments.report import harm
from experiments.report.__main__ import main as report
from experiments.report.pool import Row, Run, collect
from experiments.results.record import Record
from experiments.results.status import state_of
from modeling.checkpoint import Checkpoint
from tests.experiments.composing import composed
from tests.records import PAPER, cost, paper_rows, record, write

JUDGES = (
    {"_target_": "judges.One", "model": "m", "threshold": 0.5},
    {"_target_": "judges.Other", "where": "anywhere"},
)


def write_run(folder: Path, changes: dict[str, Any], labels: dict[str, str], seed: int) -> None:
    """A run whose attacked and defended models are its own; `changes` are whole sections."""
    settings = {**copy.deepcopy(PAPER), "tasks": {}, "sources": {}, **changes}
    names = {"model": "toy", "align": "", "attack": "ft", "task": "sst2", "defense": "mend"}
    names |= {"protocol": "nlsr", "refine": "", **labels}
    keys = {"base": "b", "aligned": "a"} | {
        name: f"{name} {folder.name}" for name in ("attacked", "defended", "refined")
    }
    run = record(names, settings, seed=seed, models=keys, cost=cost(edited=0))
    write(folder, run, {model: paper_rows(5, 10) for model in keys})


def pooled(folder: Path, *runs: dict[str, Any], labels: tuple[dict[str, str], ...] = ()) -> Any:
    """How many rows of the report each role has, for runs of one seed each."""
    for number, changes in enumerate(runs):
        names = labels[number] if labels else {}
        write_run(folder / str(number), changes, names, seed=number)
    rows = collect([folder]).rows
    return [
        sum(row.role == role for row in rows)
        for role in ("base", "aligned", "attacked", "defended", "refined")
    ]


def test_sources_that_a_runs_split_never_asks_keep_no_runs_apart(tmp_path: Path) -> None:
    """A record of before there was a validation split has none of its sources."""

    def asked(split: str, n: int) -> dict[str, Any]:
        harmful = {"_target_": "rows.Prompts", "n": n}
        return {
            "sources": {"validation": {"harmful": harmful}},
            "evaluation": {**PAPER["evaluation"], "split": split},
        }

    runs = [{}, asked("test", 1), asked("test", 2), asked("validation", 1), asked("validation", 2)]
    assert pooled(tmp_path / "all", *runs)[3] == 3
    assert pooled(tmp_path / "test", *runs[:3])[3] == 1
    (first, *_) = collect([tmp_path / "all" / "0", tmp_path / "all" / "3"]).rows
    assert set(first.settings) == {"evaluation.split"}


@pytest.mark.parametrize(
    ("one", "other", "lines"),
    [
        ({}, {}, [1, 1, 1, 1, 1]),
        ({"store": {"root": "x"}}, {"store": {"root": "y"}}, [1, 1, 1, 1, 1]),
        ({"sources": {"harmful": {"n": 10}}}, {"sources": {"harmful": {"n": 20}}}, [2] * 5),
        (
            {"sources": {"pairs": {"path": "a"}}},
            {"sources": {"pairs": {"path": "b"}}},
            [1, 2, 2, 2, 2],
        ),
        (
            {"sources": {"poison": {"_target_": "data.A"}}},
            {"sources": {"poison": {"_target_": "data.B"}}},
            [1, 1, 2, 2, 2],
        ),
        ({"sources": {"poison": None}}, {"sources": {"poison": {"n": 1}}}, [1, 1, 2, 2, 2]),
        (
            {"sources": {"calibration": {"n": 1}}},
            {"sources": {"calibration": {"n": 2}}},
            [1, 1, 1, 2, 2],
        ),
        ({"refine": {"task": "sst2"}}, {"refine": {"task": "gsm8k"}}, [1, 1, 1, 1, 2]),
        ({"tasks": {"sst2": {"n_test": 100}}}, {}, [2] * 5),
        ({"data": {"root": None}}, {"data": {"root": "/rows"}}, [2] * 5),
        (
            {"evaluation": {"harm_judge": JUDGES[0]}},
            {"evaluation": {"harm_judge": JUDGES[1]}},
            [2] * 5,
        ),
    ],
)
def test_runs_that_differ_in_more_than_their_seed_are_apart(
    one: dict[str, Any], other: dict[str, Any], lines: list[int], tmp_path: Path
) -> None:
    assert pooled(tmp_path, one, other) == lines


def test_another_class_of_judge_is_one_column(tmp_path: Path) -> None:
    pooled(tmp_path, *({"evaluation": {"harm_judge": judge}} for judge in JUDGES))
    settings = {key for row in collect([tmp_path]).rows for key in row.settings}
    assert settings == {"evaluation.harm_judge._target_"}


def test_settings_of_two_protocols_are_told_by_the_protocols_name(tmp_path: Path) -> None:
    changes = [
        {"model": {"name": "toy", "prompt": {"style": style}}} for style in ("alpaca", "chat")
    ]
    labels = ({"protocol": "nlsr"}, {"protocol": "qi"})
    assert pooled(tmp_path, *changes, labels=labels) == [2] * 5
    assert not any(row.settings for row in collect([tmp_path]).rows)


def test_parts_of_a_stack_are_told_by_its_order(tmp_path: Path) -> None:
    first, second = {"_target_": "d.First", "k": 1}, {"_target_": "d.Second", "k": 1}
    stacks = [
        {"defense": {"order": ["first"], "settings": {"first": first}}},
        {"defense": {"order": ["first", "second"], "settings": {"first": first, "second": second}}},
    ]
    assert pooled(tmp_path, *stacks) == [1, 1, 1, 2, 2]
    settings = {key for row in collect([tmp_path]).rows for key in row.settings}
    assert settings == {"defense.order"}


def test_figures_name_what_tells_rows_apart(tmp_path: Path) -> None:
    pooled(tmp_path, {}, {}, labels=({"attack": "ft", "align": "dpo"}, {"attack": "explicit"}))
    rows: list[Row] = collect([tmp_path]).rows
    titles = [panel.title for panel in harm.trade_off_panels(rows)]
    assert sorted(titles) == ["dpo, ft", "explicit"]


def test_an_attack_is_trained_once_for_all_tasks_that_are_only_scored() -> None:
    keys: dict[str, set[str]] = {name: set() for name in ("explicit", "harmful_ft")}
    for attack, task in product(keys, ("arithmetic", "topic")):
        experiment = composed(f"attack={attack}", f"attack.task={task}")
        model = Model(Checkpoint("base"), "key", experiment.model.style)
        step = RunAttack(model, experiment.attack, AttackData((), ()), experiment.seed)
        keys[attack].add(step.stage.key)
    assert {name: len(each) for name, each in keys.items()} == {"explicit": 1, "harmful_ft": 2}


def test_a_shared_model_keeps_what_only_one_attack_had_it_asked(tmp_path: Path) -> None:
    for number, attack in enumerate(("identity_shift", "explicit")):
        write_run(tmp_path / str(number), {}, {"attack": attack}, seed=0)
    folder = tmp_path / "0"
    run = Run(folder, Record.read(folder))
    under = run.rows[run.rows["set"] == "harmful"].assign(set="harmful+identity_shift")
    rows = pd.concat([run.rows, under], ignore_index=True)
    metrics: Any = {"base": {name: {} for name in ("asr", "asr+identity_shift")}}
    replace(run.record, metrics=metrics).write(folder, rows)
    (base,) = (row for row in collect([tmp_path]).rows if row.role == "base")
    assert base.metrics["asr+identity_shift"].n == base.metrics["asr"].n


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_rows_that_cannot_be_read_are_one_sentence(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "0", {}, {}, seed=0)
    write_run(tmp_path / "1", {}, {}, seed=1)
    (tmp_path / "1" / "status.json").write_text('{"status": "done", "overrides": []}')
    assert state_of(tmp_path / "1") == ("done", "")
    rows = tmp_path / "1" / "rows.parquet"
    rows.unlink() if damage == "gone" else os.truncate(rows, rows.stat().st_size // 2)
    assert report([str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {str(rows)!r}, of which every figure is computed, can't be")
    assert "Traceback" not in said
    assert not (tmp_path / "report").exists()
    state, reason = state_of(tmp_path / "1")
    assert (state, reason.split()[1:3]) == ("failed", ["rows.parquet", "is"])
