"""What the report's tables show beside the main figures, and what an older record lacks."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from evaluation.metric_names import MetricName
from evaluation.statistics import Estimate, PairedTest, share
from experiments.report import tables
from experiments.report.columns import main_columns, sections
from experiments.report.cut_rows import cut_rows
from experiments.report.harm import figures
from experiments.report.html.summary import findings
from experiments.report.pareto import choices, front
from experiments.report.pool import Collected, collect
from experiments.report.run_table import one_line
from experiments.report.table import Cell, terminal
from experiments.results.environment import environment
from experiments.results.record import Record
from experiments.store import Stage, Store
from experiments.store.__main__ import main as store_main
from settings import DataError
from settings.terminal import print_in_ascii
from tests.records import ATTACKED, rewrite, write_run

DEFENDED = {"harmful": 2, "benign": 1, "right": 15}


def with_verdicts(folder: Path, cut: int = 0, judge: str = "", seed: int = 0) -> Path:
    """A run of which some harmful answers were cut and, if named, a further judge saw all."""
    write_run(folder, {"seed": seed}, DEFENDED, ATTACKED)
    rows = pd.read_parquet(folder / "rows.parquet")
    harmful = rows["set"] == "harmful"
    rows.loc[harmful & rows["id"].isin([str(i) for i in range(19, 19 - cut, -1)]), "truncated"] = (
        True
    )
    if judge:
        rows.loc[harmful, f"{judge}_label"] = rows.loc[harmful, "harm_label"]
        rows.loc[harmful, f"{judge}_score"] = math.nan
        rows.loc[harmful, f"{judge}_truncated"] = False
    rewrite(folder, rows)
    return folder


def titles(collected: Collected) -> list[str]:
    return [section.title for section in sections(collected.rows)]


def test_what_never_counts_as_safe_is_shown_where_there_is_any(tmp_path: Path) -> None:
    assert titles(collect([with_verdicts(tmp_path / "whole")])) == []
    collected = collect([with_verdicts(tmp_path / "cut", cut=5)])
    assert titles(collected) == [
        "answers that never count as safe",
        "answers and texts that were cut",
    ]
    (defended,) = (row for row in collected.rows if row.role == "defended")
    assert defended.metrics["hs_upper"] == share(2 + 5, 20)
    page = tables.markdown(collected)
    assert "Answers that never count as safe:" in page
    assert "| relock | 0.0 0.0–16.1 n=20 |" in page
    console = Console(width=200)
    with console.capture() as capture:
        tables.show(collected, console)
    assert "HS if cut is harmful" in capture.get()


def test_cut_answers_to_tasks_and_cut_training_rows_are_told(tmp_path: Path) -> None:
    folder = with_verdicts(tmp_path / "run")
    assert cut_rows(collect([folder]).runs) == []
    rows = pd.read_parquet(folder / "rows.parquet")
    rows.loc[rows["set"] == "task:sums", "truncated"] = rows["id"].isin(["0", "1", "2"])
    attack = {"rows": {"task": 90, "harmful": 10}, "rows_cut": 7, "rows_left_out": 1}
    align = {"sft": {"rows": 50, "rows_cut": 0}, "preference": {"pairs": 40, "rows_cut": 3}}
    rewrite(folder, rows, attack=attack, align=align)
    collected = collect([folder])
    assert titles(collected) == ["answers and texts that were cut"]
    assert collected.rows[0].metrics["task_truncated"] == share(3, 20)
    said = [
        "alignment, preference: of 40 training rows 3 were cut and 0 left out, being longer than "
        "max_length",
        "ft on sums: of 100 training rows 7 were cut and 1 left out, being longer than "
        "attack.train.max_length",
    ]
    assert cut_rows(collected.runs) == said
    page = tables.markdown(collected)
    assert all(sentence in page for sentence in said)
    console = Console(width=200)
    with console.capture() as capture:
        tables.show(collected, console)
    assert all(sentence in capture.get() for sentence in said)


def test_a_further_judge_has_a_table_with_its_agreement(tmp_path: Path) -> None:
    collected = collect([with_verdicts(tmp_path / "run", judge="harmbench")])
    (section,) = sections(collected.rows)
    # It gives no score and failed on nothing, so neither has a column.
    assert list(section.columns) == ["hs:harmbench", "kappa:harm~harmbench"]
    page = tables.markdown(collected)
    assert "| model | HS harmbench | kappa harm and harmbench | seeds |" in page
    assert "| relock | 10.0 2.8–30.1 n=20 | 1.00 n=20 | 1 |" in page
    assert "| HS | ASR | accuracy | HS harmbench |" in page


def test_seeds_of_one_row_are_clusters(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path / str(seed), {"seed": seed}, DEFENDED, {**ATTACKED, "harmful": 5 * seed})
    collected = collect([tmp_path])
    (attacked,) = (row for row in collected.rows if row.role == "attacked")
    hs, pooled = attacked.metrics["hs"], share(15, 60)
    assert (hs.value, hs.n) == (pooled.value, 60)
    assert hs.high - hs.low > 2 * (pooled.high - pooled.low)
    # The model before the attack is one model, whatever the attack's seed.
    (base,) = (row for row in collected.rows if row.role == "base")
    assert base.metrics["hs"] == share(1, 20)


def said(cell: Cell) -> str:
    return " ".join((cell.text, *cell.more))


@pytest.mark.parametrize(
    ("estimate", "metric", "text"),
    [
        (None, "hs", "-"),
        (Estimate(math.nan, math.nan, math.nan, 0), "hs", "-"),
        (Estimate(math.nan, math.nan, math.nan, 7), "perplexity", "- n=7"),
        (Estimate(0.5, 0.25, 0.75, 8), "hs", "50.0 25.0–75.0 n=8"),
        (Estimate(12.345, 11.0, 14.0, 9), "perplexity", "12.35 11.00–14.00 n=9"),
        (Estimate(1.0, math.nan, math.nan, 9), "kappa:harm~x", "1.00 n=9"),
    ],
)
def test_cells(estimate: Estimate | None, metric: str, text: str) -> None:
    cell = tables.estimate_cell(estimate, MetricName.parse(metric).unit)
    assert said(cell) == text.replace("12.35", f"{12.345:.2f}")


def test_a_corrected_p_value_is_told_from_a_plain_one() -> None:
    test: Any = (-0.957, 1e-6, 1, 20, 100, -0.976, -0.931, "McNemar, exact")
    assert said(tables.paired_cell(PairedTest(*test))) == "-95.7 [-97.6, -93.1] (p < 0.001)"
    assert (
        said(tables.paired_cell(PairedTest(*test, 0.02)))
        == "-95.7 [-97.6, -93.1] (p = 0.020, Holm)"
    )
    assert said(tables.paired_cell(None)) == "-"


def test_one_line_names_what_a_repaired_model_is_worst_under(tmp_path: Path) -> None:
    def metrics(**shares: float) -> dict[str, dict[str, float | None]]:
        return {
            name.replace("_under_", "+"): {"value": value, "low": None, "high": None, "n": 20}
            for name, value in shares.items()
        }

    write_run(tmp_path, {}, DEFENDED, ATTACKED)
    lost = PairedTest(-0.05, 0.5, 1, 2, 20, -0.2, 0.1, "McNemar, exact")
    paired: Any = {"accuracy_strict": asdict(lost)}
    record = replace(Record.read(tmp_path), paired=paired)
    attacked = metrics(hs=0.87, hs_under_shift=1.0, accuracy_strict=0.8)
    plain = metrics(hs=0.02, hs_under_shift=0.01, accuracy_strict=0.75, degenerate=0.2)
    kept = metrics(hs=0.02, hs_under_shift=1.0, accuracy_strict=0.75, degenerate=0)
    ruined = metrics(hs=0.02, hs_under_shift=0.01, accuracy_strict=0, degenerate=0.45)
    said = [
        one_line(replace(record, metrics={"attacked": attacked, "defended": defended}))
        for defended in (plain, kept, ruined)
    ]
    assert said == [
        "attacked -> relock: HS 87.0 -> 2.0, accuracy 80.0 -> 75.0",
        "attacked -> relock: HS 87.0 -> 2.0, under shift 100.0 -> 100.0, accuracy 80.0 -> 75.0",
        "attacked -> relock: HS 87.0 -> 2.0, accuracy 80.0 -> 0.0, "
        "broken (accuracy 0, degenerate 45 %)",
    ]


def test_a_repair_that_broke_its_model_is_marked_and_no_choice(tmp_path: Path) -> None:
    mute = {"harmful": 1, "benign": 0, "right": 0}
    of = {
        "good": {"harmful": 3, "benign": 0, "right": 16},
        "mute": mute,
        "loop": {"harmful": 2, "benign": 12, "right": 17},
    }
    for name, shares in of.items():
        write_run(tmp_path / name, {}, shares, ATTACKED, defense=name)
    # Nothing is lost where nothing was right, and what edits nothing broke nothing.
    never = {"harmful": 18, "benign": 1, "right": 0}
    write_run(tmp_path / "never", {"seed": 1, "attack.n": 1}, mute, never)
    write_run(tmp_path / "idle", {"seed": 1, "attack.n": 1}, never, never, "idle", edited=0)
    rows = collect([tmp_path]).rows
    assert {row.name: row.broken for row in rows if row.role == "defended"} == {
        "good": "", "mute": "accuracy 0", "loop": "degenerate 30 %", "relock": "", "idle": "",
    }  # fmt: skip
    assert [row.name for row in front(rows)] == ["relock", "good"]
    choosing = [choice for choice in choices(rows) if choice.best]
    assert [(choice.best and choice.best.name, choice.feasible) for choice in choosing] == [
        ("good", 1)
    ]
    page = tables.markdown(collect([tmp_path]))
    assert "| mute (broken) |" in page
    assert "it is no choice." in page
    assert "(broken)" not in tables.markdown(collect([tmp_path / "good"]))
    found = [each for each in findings(rows) if each.broken]
    assert [line.split(" HS ")[0] for line in found[0].broken] == [
        "mute: accuracy 0;",
        "loop: degenerate 30 %;",
    ]
    assert "Of 3 defenses, 1 brings" in found[0].text
    labels = [
        text.get_text()
        for drawing in figures(rows)
        for key in drawing.figure.legends
        for text in key.get_texts()
    ]
    assert labels.count("broken by its repair") == 1


@pytest.mark.parametrize(
    ("harm", "columns", "tested"),
    [
        ({"judge": "keyword"}, ["HS = ASR", "accuracy"], ["HS = ASR", "accuracy"]),
        ({"judge": "other"}, ["HS", "ASR", "accuracy"], ["HS", "ASR", "accuracy"]),
    ],
)
def test_what_one_judge_gives_twice_is_shown_once(
    harm: dict[str, str], columns: list[str], tested: list[str], tmp_path: Path
) -> None:
    write_run(tmp_path, {}, DEFENDED, ATTACKED)
    rewrite(tmp_path, judges={"harm": harm, "refusal": {"judge": "keyword"}})
    collected = collect([tmp_path])
    assert list(main_columns(collected.rows).values())[: len(columns)] == columns
    (differences,) = tables.difference_tables(collected.rows)
    assert list(differences.headings)[1:] == [*tested, "seeds"]
    assert ("one judge gives both" in tables.markdown(collected)) == ("HS = ASR" in columns)
    console = Console(width=70)
    with console.capture() as capture:
        tables.show(collected, console)
    assert ("ASR" in capture.get().replace("HS = ASR", "")) == ("ASR" in columns)
    # The data keeps both.
    assert {"hs", "asr"} <= set(tables.frame(collected))


def test_records_older_than_a_field_are_read(tmp_path: Path) -> None:
    write_run(tmp_path, {}, DEFENDED, ATTACKED)
    path = tmp_path / "record.json"
    content = json.loads(path.read_text())
    for name in ("backends", "judges", "refine", "paired_refined", "steps"):
        del content[name]
    path.write_text(json.dumps(content))
    assert Record.read(tmp_path).backends == {}
    assert len(collect([tmp_path]).rows) == 4


def test_a_record_of_another_version_is_told(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"of": "a later version"}')
    with pytest.raises(DataError, match=r"record.json is no record that this version reads"):
        Record.read(tmp_path)


def test_the_environment_names_what_could_have_run() -> None:
    packages = environment()["packages"]
    assert packages["torch"]
    assert {"vllm", "openai", "statsmodels"} <= packages.keys()


def test_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    table = Table("tasks")
    table.add_row("[sst2,gsm8k]")
    console = terminal()
    console.print(table)
    console.print("plugins=[my_repairs]")
    said = capsys.readouterr().out
    assert "[sst2,gsm8k]" in said
    assert "plugins=[my_repairs]" in said


def test_a_narrow_terminal_has_every_figure_whole(tmp_path: Path) -> None:
    collected = collect([with_verdicts(tmp_path / "run", cut=3)])
    said = {}
    for width in (300, 110):
        console = Console(width=width, markup=False, record=True, file=io.StringIO())
        tables.show(collected, console)
        said[width] = console.export_text()
    figures = set(re.findall(r"\d+\.\d–\d+\.\d|\d+\.\d+ (?:s|%)|\d+ MB", said[300]))
    assert figures
    assert all(figure in said[110] for figure in figures)
    assert "…" not in said[110]
    assert said[110].count("attacked") > said[300].count("attacked"), "in parts"


def test_a_terminal_without_utf_8_gets_the_tables_in_ascii(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_verdicts(tmp_path / "run", cut=5)
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    print_in_ascii()
    collected = collect([folder])
    tables.show(collected, terminal())
    Store(tmp_path / "store").run(Stage("judge", 1, {"name": "ü" * 99}), lambda out: None)
    store_main(["--root", str(tmp_path / "store"), "list"])
    sys.stdout.flush()
    lines = written.getvalue().decode("ascii").splitlines()
    assert any(line.startswith("+---") for line in lines)
    assert any("0.0-16.1" in line for line in lines)
