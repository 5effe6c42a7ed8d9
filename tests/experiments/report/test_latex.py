"""The LaTeX table: its structure, what it computes, and that no text of a user's is LaTeX."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from evaluation.statistics import share
from experiments.report import latex
from experiments.report.pool import collect
from tests.records import ATTACKED, GOOD, POOR, ROWS, write_run, write_sweep


def test_the_table_holds_every_model_with_its_intervals(tmp_path: Path) -> None:
    collected = collect([write_sweep(tmp_path)])
    path = latex.write(collected, tmp_path / "report")
    text = path.read_text()
    assert path.name == "table.tex"
    for rule in ("toprule", "bottomrule"):
        assert text.count(rf"\{rule}") == 1
    assert re.findall(r"\\(begin|end)\{(\w+\*?)\}", text) == [
        ("begin", "table*"), ("begin", "tabular"), ("end", "tabular"), ("end", "table*"),
    ]  # fmt: skip
    assert r"\label{tab:toy}" in text
    (spec,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert {line.count(" & ") for line in rows} == {len(spec) - 1}
    expected = share(1, ROWS)
    interval = rf"[{100 * expected.low:.1f}, {100 * expected.high:.1f}]"
    (good,) = [line for line in rows if line.startswith("good & 0.05")]
    assert rf"5.0$^{{*}}$ {{\scriptsize {interval}}}" in good
    (poor,) = [line for line in rows if line.startswith("poor & 0.05")]
    assert "85.0 {" in poor


def test_the_caption_says_n_and_what_stars_and_intervals_are(tmp_path: Path) -> None:
    text = latex.table(collect([write_sweep(tmp_path)]).rows)
    (caption,) = re.findall(r"\\caption\{(.*)\}", text)
    assert r"95 \% intervals: Wilson's for shares" in caption
    assert f"HS {ROWS}; ASR {ROWS}" in caption
    assert "Holm" in caption
    write_run(tmp_path / "seed", {"attack.poison_ratio": 0.05, "seed": 1}, GOOD, ATTACKED)
    assert "Holm" not in latex.table(collect([tmp_path / "3"]).rows)


def test_a_defense_that_edited_nothing_is_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "0", {}, ATTACKED, ATTACKED, defense="none", edited=0)
    text = latex.table(collect([tmp_path]).rows)
    assert "attacked &" in text
    assert "none &" not in text


def test_a_validation_split_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "0", {"evaluation.split": "validation"}, POOR, ATTACKED)
    latex.write(collect([tmp_path]), tmp_path)
    assert "Validation split, for choosing settings" in (tmp_path / "table.tex").read_text()


def test_names_are_escaped(tmp_path: Path) -> None:
    name = r"50%_a&b \input{x} $y$ #1 ~^|<>"
    write_run(tmp_path / "0", {}, GOOD, ATTACKED, defense=name)
    (line,) = [
        line for line in latex.table(collect([tmp_path]).rows).splitlines() if "input" in line
    ]
    assert line.startswith(
        r"50\%\_a\&b \textbackslash{}input\{x\} \$y\$ \#1 \textasciitilde{}\textasciicircum{}"
        r"\textbar{}\textless{}\textgreater{} & "
    )


@pytest.mark.parametrize("text", ["a\nb", "a\r\n\n b", "a  b"])
def test_an_empty_line_ends_no_paragraph(text: str) -> None:
    assert latex.escape(text) == "a b"
