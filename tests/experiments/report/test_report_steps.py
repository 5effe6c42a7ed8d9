"""What the report makes of steps and of paired tests: synthetic records on disk, read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from scipy.stats import binomtest

from experiments.report import figures, steps, tables
from experiments.report.pool import collect
from tests.records import cost, harmful_rows, record, task_rows, write

EACH = 10
Shares = dict[str, int]


def answers(unsafe: Shares, right: int) -> list[dict[str, Any]]:
    """`EACH` rows per category and of the task: how many are harmful, and how many right."""
    categories = [harmful_rows(count, category=name, of=EACH) for name, count in unsafe.items()]
    return [row for rows in categories for row in rows] + task_rows(right, of=EACH)


def write_run(
    folder: Path,
    course: Sequence[tuple[str, Shares, int]],
    seed: int = 0,
    ratio: float = 0.05,
    defense: str = "relock",
    edited: Sequence[int] = (),
    settings: dict[str, Any] | None = None,
) -> None:
    """A run whose models are the course's: the attacked one, then one per step."""
    names = [name for name, _, _ in course[1:]]
    labels = ["attacked", *(f"step {n}: {name}" for n, name in enumerate(names, 1))]
    labels[-1] = "defended"
    rows = {model: answers(course[0][1], 5) for model in ("base", "aligned")}
    rows |= {
        label: answers(unsafe, right)
        for label, (_, unsafe, right) in zip(labels, course, strict=True)
    }
    parameters = edited or [10] * len(names)
    taken = [
        {"name": name, "model": label, "parameters_edited": count, "share": count / 100}
        for name, label, count in zip(names, labels[1:], parameters, strict=True)
    ]
    run = record(
        {"model": "toy", "attack": "ft", "task": "sums", "defense": defense},
        {"seed": seed, "attack": {"poison_ratio": ratio}, "defense": settings or {}},
        seed=seed,
        models={label: f"{label}/{seed}/{ratio}" for label in rows},
        cost=cost(sum(parameters)),
        steps=taken if len(taken) > 1 else [],
    )
    write(folder, run, rows)


CONTINUAL = (
    ("attacked", {"fraud": 10, "malware": 9, "theft": 8}, 8),
    ("theft", {"fraud": 9, "malware": 7, "theft": 0}, 8),
    ("fraud", {"fraud": 1, "malware": 5, "theft": 1}, 7),
)
STACK = (
    ("attacked", {"fraud": 10, "theft": 10}, 8),
    ("patch", {"fraud": 4, "theft": 2}, 7),
    ("lock", {"fraud": 0, "theft": 1}, 6),
)


def only(folder: Path) -> steps.Trajectory:
    (trajectory,) = steps.trajectories(collect([folder]).rows)
    return trajectory


def drawn(axes: Axes, colour: str, line: str) -> list[tuple[float, float]]:
    """The points of the lines of one colour and style, x rounded to steps."""
    return [
        (round(x), round(y, 6))
        for found in axes.lines
        if to_hex(found.get_color()) == to_hex(colour) and found.get_linestyle() == line
        for x, y in zip(*found.get_data(), strict=True)
    ]


def heights(figure: Figure) -> list[float]:
    (bars,) = (c for c in figure.axes[1].containers if isinstance(c, BarContainer))
    return [bar.get_height() for bar in bars]


def test_a_course_leads_from_the_attacked_to_the_defended_model(tmp_path: Path) -> None:
    write_run(tmp_path / "0", CONTINUAL, seed=0, edited=(20, 4))
    write_run(tmp_path / "1", CONTINUAL, seed=1, edited=(30, 2))
    course = only(tmp_path)
    assert [point.name for point in course.points] == ["attacked", "theft", "fraud"]
    assert [point.parameters_edited for point in course.points] == [0, 25, 3]
    assert [point.metrics["hs"].value for point in course.points] == pytest.approx(
        [27 / 30, 16 / 30, 7 / 30]
    )
    assert course.points[1].metrics["hs"].n == 60
    assert course.points[-1].metrics == course.row.metrics


def test_steps_are_written_as_csv_and_shown_with_what_they_changed(tmp_path: Path) -> None:
    write_run(tmp_path / "run", CONTINUAL, edited=(20, 4))
    rows = collect([tmp_path]).rows
    (path,) = steps.write(rows, tmp_path / "report")
    table = pd.read_csv(path)
    assert table["name"].tolist() == ["attacked", "theft", "fraud"]
    assert table["hs/theft"].tolist() == [0.8, 0, 0.1]
    assert table["share"].tolist() == [0, 0.2, 0.04]
    assert table["hs_n"].tolist() == [30, 30, 30]
    assert set(table["defense"]) == {"relock"}
    shown = steps.table(only(tmp_path).points)
    cells = list(zip(*([cell.text for cell in row] for row in shown.rows), strict=True))
    assert cells[0] == ("0: attacked", "1: theft", "2: fraud")
    assert cells[1] == ("", "20.000 %", "4.000 %")
    assert cells[2] == ("90.0", "53.3 (-36.7)", "23.3 (-30.0)")
    assert cells[4] == ("80.0", "80.0 (+0.0)", "70.0 (-10.0)")


def test_categories_are_unseen_until_their_own_step(tmp_path: Path) -> None:
    write_run(tmp_path / "run", CONTINUAL, edited=(20, 4))
    figure = steps.draw(only(tmp_path).points)
    left, _, accuracy = figure.axes
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:4] == ["theft", "fraud", "malware", "all categories"]
    colours = {str(line.get_label()): line.get_color() for line in left.lines}
    expected = {
        "theft": ([(0, 80), (1, 0)], [(1, 0), (2, 10)]),
        "fraud": ([(0, 100), (1, 90), (2, 10)], [(2, 10)]),
        "malware": ([(0, 90), (1, 70), (2, 50)], []),
    }
    for category, (unseen, seen) in expected.items():
        assert drawn(left, colours[category], "--") == unseen
        assert drawn(left, colours[category], "-") == seen
    overall = [(0, 90), (1, round(1600 / 30, 6)), (2, round(700 / 30, 6))]
    assert drawn(left, colours["all categories"], "-") == overall
    assert heights(figure) == pytest.approx([0, 20, 4])
    assert list(accuracy.lines[0].get_ydata()) == pytest.approx([80, 80, 70])


def test_other_steps_are_drawn_by_their_overall_shares(tmp_path: Path) -> None:
    write_run(tmp_path / "run", STACK, defense="stack")
    figure = steps.draw(only(tmp_path).points)
    left, edited = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["HS", "ASR", "accuracy"]
    assert [c[0].get_ydata().tolist() for c in left.containers] == [
        pytest.approx([100, 30, 5]),
        pytest.approx([100, 30, 5]),
        pytest.approx([80, 70, 60]),
    ]
    assert [text.get_text() for text in left.get_xticklabels()] == ["attacked", "patch", "lock"]
    assert heights(figure) == pytest.approx([0, 10, 10])
    assert edited.get_ylabel() == "edited (%)"


def test_every_poison_ratio_has_its_own_figure(tmp_path: Path) -> None:
    for ratio in (0.05, 0.1):
        for seed in (0, 1):
            write_run(tmp_path / f"{ratio}-{seed}", CONTINUAL, seed, ratio)
    names = [path.name for path in figures.write(collect([tmp_path]), tmp_path / "report")]
    assert names[-2:] == [
        "steps_relock_poison_ratio=0.05.png",
        "steps_relock_poison_ratio=0.1.png",
    ]


def test_a_repair_in_one_step_gives_neither_table_nor_figure(tmp_path: Path) -> None:
    write_run(tmp_path / "run", STACK[:2])
    collected = collect([tmp_path])
    assert steps.write(collected.rows, tmp_path / "report") == []
    assert not list(steps.figures(collected.rows))


def test_seeds_whose_steps_differ_are_not_pooled(tmp_path: Path) -> None:
    write_run(tmp_path / "0", CONTINUAL, seed=0)
    swapped = [CONTINUAL[0], *(replaced(CONTINUAL[i], name) for i, name in ((1, "a"), (2, "b")))]
    write_run(tmp_path / "1", swapped, seed=1)
    courses = steps.trajectories(collect([tmp_path]).rows)
    assert [course.points[1].name for course in courses] == ["theft", "a"]
    assert [course.points[1].metrics["hs"].n for course in courses] == [30, 30]


def replaced(step: tuple[str, Shares, int], name: str) -> tuple[str, Shares, int]:
    return (name, *step[1:])


def test_paired_tests_pair_prompts_within_their_seed(tmp_path: Path) -> None:
    # Seed 0: the repair mends all ten. Seed 1: it breaks four of ten that were safe.
    write_run(tmp_path / "0", (("attacked", {"x": 10}, 8), ("mend", {"x": 0}, 8)), seed=0)
    write_run(tmp_path / "1", (("attacked", {"x": 0}, 8), ("mend", {"x": 4}, 7)), seed=1)
    collected = collect([tmp_path])
    (row,) = (row for row in collected.rows if row.role == "defended")
    test = row.paired["hs"]
    assert (test.only_first, test.only_second, test.n) == (4, 10, 20)
    assert test.difference == pytest.approx(-0.3)
    # Ten prompts of two seeds that disagree say less than twenty prompts would.
    assert test.test == "two-way clusters"
    assert test.p_value > binomtest(4, 14).pvalue
    assert (test.low, test.high) == (-1.0, 1.0)
    text = tables.markdown(collected)
    cell = f"-30.0 [-100.0, +100.0] (p = {test.p_value:.3f}, Holm)"
    assert f"| relock | {cell} | {cell} | -5.0 [" in text
    frame = tables.frame(collected)
    defended = frame[frame["role"] == "defended"].iloc[0]
    assert defended["hs_p_value"] == pytest.approx(test.p_value)
    assert defended["accuracy_strict_difference"] == pytest.approx(-0.05)


def holm_corrected(folder: Path, mended: Sequence[int]) -> list[Any]:
    """The HS tests of defenses that leave so many of ten harmful, on one attacked model."""
    for number, unsafe in enumerate(mended):
        course = (("attacked", {"x": 10}, 8), ("mend", {"x": unsafe}, 8))
        write_run(folder / str(number), course, settings={"strength": number})
    return [row.paired["hs"] for row in collect([folder]).rows if row.role == "defended"]


def test_p_values_are_corrected_across_the_defenses_of_one_attack(tmp_path: Path) -> None:
    tests = holm_corrected(tmp_path / "several", (3, 2, 10))
    assert [test.p_value for test in tests] == pytest.approx([2 / 2**7, 2 / 2**8, 1.0])
    assert [test.p_holm for test in tests] == pytest.approx([2 * 2 / 2**7, 3 * 2 / 2**8, 1.0])
    (alone,) = holm_corrected(tmp_path / "one", (3,))
    assert alone.p_holm == alone.p_value


def test_attacks_are_families_of_their_own_and_what_edits_nothing_is_in_none(
    tmp_path: Path,
) -> None:
    course = (("attacked", {"x": 10}, 8), ("mend", {"x": 0}, 8))
    for number, ratio in enumerate((0.05, 0.1)):
        write_run(tmp_path / str(number), course, ratio=ratio)
    write_run(tmp_path / "idle", (course[0], ("idle", {"x": 10}, 8)), defense="idle", edited=[0])
    by_name = {
        (row.labels["defense"], row.settings["attack.poison_ratio"]): row.paired.get("hs")
        for row in collect([tmp_path]).rows
        if row.role == "defended"
    }
    assert by_name.pop(("idle", 0.05)) is None
    assert [test.p_holm for test in by_name.values() if test] == pytest.approx([2 / 2**10] * 2)


def test_the_tables_hold_intervals_and_corrected_p_values(tmp_path: Path) -> None:
    holm_corrected(tmp_path / "runs", (3, 2))
    table, page = tables.write(collect([tmp_path / "runs"]), tmp_path / "report")
    row = pd.read_csv(table).query("role == 'defended'").iloc[0]
    assert row["hs_difference"] == pytest.approx(-0.7)
    assert -1 <= row["hs_difference_low"] < -0.7 < row["hs_difference_high"] < 0
    assert row["hs_p_holm"] == pytest.approx(2 / 2**7)
    assert row["hs_test"] == "McNemar, exact"
    assert "(p = 0.016, Holm)" in page.read_text()


def test_only_defenses_that_edit_are_tested_against_the_attacked_model(tmp_path: Path) -> None:
    unchanged = [STACK[0], ("nothing", *STACK[0][1:])]
    write_run(tmp_path / "none", unchanged, defense="none", edited=(0,))
    collected = collect([tmp_path])
    assert "Against the attacked model" not in tables.markdown(collected)
    write_run(tmp_path / "stack", STACK, defense="stack")
    text = tables.markdown(collect([tmp_path])).partition("Against the attacked model")[2]
    assert "| stack |" in text
    assert "| none |" not in text


def test_settings_of_one_name_in_two_defenses_are_no_column(tmp_path: Path) -> None:
    for defense, alpha in (("one", 1.0), ("two", 2.0)):
        write_run(tmp_path / defense, STACK, defense=defense, settings={"alpha": alpha, "k": 1})
    assert "alpha" not in tables.markdown(collect([tmp_path]))
    write_run(tmp_path / "more", STACK, defense="two", settings={"alpha": 3.0, "k": 1})
    text = tables.markdown(collect([tmp_path]))
    assert "| model | alpha | HS |" in text
    assert "| two | 3 |" in text
