"""Every paper's grid, whole, at toy size through the real command line."""

from __future__ import annotations

import csv
import json
import math

import pytest

from experiments.report.__main__ import main as report
from experiments.results import published
from experiments.results.record import Record
from tests.experiments.conftest import Command

# The figures that need a model's own name, which the organism hasn't got.
OF_OTHER_MODELS = {"fgsn_table"}
# Sets that no paper has a figure of.
LEFT_OUT = ("sources.benign=null", "sources.over_refusal=null", "sources.held_out=null")
# A judge behind an endpoint is asked for only where the user names one.
OF_AN_ENDPOINT = ":rubric@"


# One job of one grid. The other cells and grids, of whose defenses, attacks, ways to align and
# tasks each has tests of its own, are slow; which figure belongs to which of their jobs is a test
# of the report's.
def test_a_part_of_a_grid_runs_and_is_held_against_the_paper(command: Command) -> None:
    held("nlsr_table1", command, "attack.poison_ratio=0.3", "defense=nlsr")


@pytest.mark.slow
@pytest.mark.parametrize("name", published.names())
def test_the_grid_runs_and_is_held_against_the_paper(name: str, command: Command) -> None:
    held(name, command)


def held(name: str, command: Command, *part: str) -> None:
    """Runs a grid, or a part of it, and reads what the report says beside the paper's figures."""
    run = command("-m", f"experiment={name}", "+scale=toy", *LEFT_OUT, *part, toy=False)
    assert run.code == 0, run.err
    jobs = [json.loads(path.read_text()) for path in run.folder.glob("*/status.json")]
    assert jobs
    assert {job["status"] for job in jobs} == {"done"}
    records = [Record.read(path.parent) for path in run.folder.glob("*/record.json")]
    assert len(records) == len(jobs)
    assert {record.labels["experiment"] for record in records} == {name}
    assert {record.labels["model"] for record in records} == {"organism"}

    assert report([str(run.folder)]) == 0
    markdown = (run.folder / "report" / "published.md").read_text()
    assert "model.base" in markdown or "model.aligned" in markdown
    with (run.folder / "report" / "published.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    figures = published.load(name).figures
    assert [row["paper"] for row in table] == [figure.value for figure in figures]
    for row, figure in zip(table, figures, strict=True):
        measured = figure.defense and figure.metric and name not in OF_OTHER_MODELS
        measured = measured and OF_AN_ENDPOINT not in figure.metric
        # The organism has other kinds of harm than the paper's three.
        measured = measured and not figure.metric.startswith("share_edited/")
        if measured and (not part or row["ours"]):
            assert math.isfinite(float(row["ours"])), row
            assert int(row["n"]) >= 1
        else:
            assert row["ours"] == ""
            assert row["remark"]
    # A part could be one that no figure of the paper's is held against.
    if part and name not in OF_OTHER_MODELS:
        assert any(row["ours"] for row in table)
