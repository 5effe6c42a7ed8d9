"""What the report draws: synthetic records on disk, read back through matplotlib's objects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from evaluation.statistics import share
from experiments.report import figures, harm, heatmaps, sweeps
from experiments.report.__main__ import main as report
from experiments.report.drawing import TITLE, looks
from experiments.report.names import plain
from experiments.report.pareto import front
from experiments.report.pool import Row, collect
from experiments.report.sweeps import Sweep
from experiments.results.record import Record
from settings import RelockError
from tests.records import ATTACKED, ROWS, heat_map, write_run


def alpha_by_k(folder: Path, alphas: Iterable[float], ks: Iterable[int]) -> Path:
    """A sweep of two settings of one defense on one attacked model."""
    for i, (alpha, k) in enumerate(product(alphas, ks)):
        shares = {
            "harmful": max(0, 18 - round(4 * alpha) - k),
            "benign": min(ROWS, round(3 * alpha)),
            "right": max(0, 16 - k),
        }
        changes = {"defense.alpha": alpha, "defense.k": k}
        write_run(folder / str(i), changes, shares, ATTACKED)
    return folder


RATES = (1e-5, 3e-5, 1e-4, 3e-4)


def rates_by_adapter(folder: Path) -> Path:
    """Learning rates for two kinds of adapter, with the harmful prompts asked twice."""
    for i, (rate, adapter) in enumerate(product(RATES, ("resume", "fresh"))):
        step = RATES.index(rate) * 4 + (adapter == "fresh")
        attacked = {
            "harmful": 2 + step,
            "harmful_safe_system": step,
            "benign": 0,
            "right": 5 + step,
        }
        defended = attacked | {"harmful": step // 2, "harmful_safe_system": step // 4}
        changes = {"attack.train.learning_rate": rate, "attack.adapter": adapter}
        write_run(folder / str(i), changes, defended, attacked)
    return folder


def lines(axes: Axes) -> dict[str, ErrorbarContainer]:
    """Swept lines of a panel by label."""
    return {str(c.get_label()): c for c in axes.containers if isinstance(c, ErrorbarContainer)}


def levels(axes: Axes) -> dict[str, float]:
    """Horizontal lines of a panel by label."""
    swept = {id(c[0]) for c in axes.containers if isinstance(c, ErrorbarContainer)}
    return {
        str(line.get_label()): line.get_ydata()[0]
        for line in axes.lines
        if not str(line.get_label()).startswith("_") and id(line) not in swept
    }


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def shares(container: ErrorbarContainer, step: float = 0.5) -> tuple[list[float], list[float]]:
    """The points of a line; lines stand side by side within a quarter of a step."""
    x, y = container[0].get_data()
    return pytest.approx(list(x), abs=0.125 * step), list(y)


def swept(folder: Path, setting: str) -> Figure:
    return Sweep(collect([folder]).rows, setting).draw()


def test_a_sweep_of_two_settings_gives_a_figure_of_each(tmp_path: Path) -> None:
    collected = collect([alpha_by_k(tmp_path, (0.0, 0.5, 1.0), (1, 2, 4))])
    written = figures.write(collected, tmp_path / "report")
    assert [path.name for path in written] == [
        "hs_vs_accuracy.png", "pareto.png", "against_alpha.png", "against_k.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)

    asr, accuracy, degenerate = Sweep(collected.rows, "defense.alpha").draw().axes
    assert set(lines(asr)) == {"relock (k=1)", "relock (k=2)", "relock (k=4)"}
    # 18 of 20 - 4 alpha - k
    assert shares(lines(asr)["relock (k=2)"]) == ([0.0, 0.5, 1.0], pytest.approx([80, 70, 60]))
    assert shares(lines(accuracy)["relock (k=4)"])[1] == pytest.approx([60, 60, 60])
    # Over harmful and benign answers: 3 alpha of 40, rounded to whole answers.
    assert shares(lines(degenerate)["relock (k=1)"])[1] == pytest.approx([0, 5, 7.5])
    assert levels(asr) == {"attacked, level line": 90}
    assert list(asr.get_xticks()) == [0.0, 0.5, 1.0]
    assert asr.get_xscale() == "linear"
    assert asr.get_xlabel() == "alpha"


def test_headings_say_what_is_shown_and_of_what(tmp_path: Path) -> None:
    rows = collect([alpha_by_k(tmp_path, (0.0, 0.5, 1.0), (1,))]).rows
    titles = [drawing.title for drawing in (*harm.figures(rows), *sweeps.figures(rows))]
    assert titles == [
        "Harmfulness against task accuracy: toy, ft, sums",
        "Settings of defenses, harmfulness against task accuracy: toy, ft, sums",
        "Sweep of alpha: toy, ft, sums",
    ]
    drawn = (figure for drawing in harm.figures(rows) for figure in [drawing.figure])
    assert all(axes.get_title() == "" for figure in drawn for axes in figure.axes)


def test_error_bars_are_wilsons_interval(tmp_path: Path) -> None:
    asr = swept(alpha_by_k(tmp_path, (0.0, 0.5, 1.0), (1,)), "defense.alpha").axes[0]
    (bars,) = lines(asr)["relock"][2]
    expected = share(17, 20)
    ends = [100 * expected.low, 100 * expected.high]
    assert bars.get_segments()[0][:, 1] == pytest.approx(ends)
    interval = share(18, 20)
    (band,) = [patch for patch in asr.patches if patch.get_alpha() == 0.12]
    low, high = band.get_extents().transformed(asr.transData.inverted()).intervaly
    assert (low, high) == pytest.approx((100 * interval.low, 100 * interval.high))


def test_learning_rates_are_logarithmic_and_safe_asks_are_dashed(tmp_path: Path) -> None:
    collected = collect([rates_by_adapter(tmp_path)])
    names = [path.name for path in figures.write(collected, tmp_path / "report")]
    assert names == ["hs_vs_accuracy.png", "against_learning_rate.png"]
    figure = Sweep(collected.rows, "attack.train.learning_rate").draw()
    asr = figure.axes[0]
    assert asr.get_xscale() == "log"
    assert list(asr.get_xticks()) == list(RATES)
    labels = [text.get_text() for text in figure.axes[3].get_xticklabels()]
    assert labels == ["1e-5", "3e-5", "1e-4", "3e-4"]
    for panel, (adapter, extra) in enumerate((("fresh", 1), ("resume", 0))):
        asr, accuracy, _ = figure.axes[3 * panel : 3 * panel + 3]
        assert asr.get_ylabel() == f"adapter={adapter}"
        drawn = lines(asr)
        steps = np.array([0, 4, 8, 12]) + extra
        x, y = drawn["attacked"][0].get_data()
        assert list(x) == pytest.approx(RATES, rel=0.2)
        assert list(y) == pytest.approx(5 * (2 + steps))
        safe = drawn["attacked, asked to be safe"]
        assert shares(safe)[1] == pytest.approx(5 * steps)
        assert safe[0].get_linestyle() == "--"
        assert safe[0].get_markerfacecolor() == "white"
        assert safe[0].get_color() == drawn["attacked"][0].get_color()
        assert shares(lines(accuracy)["attacked"])[1] == pytest.approx(5 * (5 + steps))
        assert len(drawn) == 4
        assert len(lines(accuracy)) == 2
    both = ("attacked", "relock")
    assert legend(figure) == [name + end for name in both for end in ("", ", asked to be safe")]


def test_values_of_another_setting_are_tints_of_the_defenses_colour(tmp_path: Path) -> None:
    ks = tuple(range(1, 13))
    figure = swept(alpha_by_k(tmp_path, (0.1, 1.0, 4.0), ks), "defense.alpha")
    asr = figure.axes[0]
    assert asr.get_xscale() == "log"
    assert legend(figure) == [*(f"relock (k={k})" for k in ks), "attacked, level line"]
    drawn = [lines(asr)[f"relock (k={k})"][0] for k in ks]
    assert {line.get_marker() for line in drawn} == {looks(["relock"])["relock"]["marker"]}
    brightness = [sum(to_rgb(line.get_color())) for line in drawn]
    assert brightness == sorted(brightness)
    assert len(set(brightness)) == len(ks)


def test_every_attack_has_a_row_of_panels(tmp_path: Path) -> None:
    grid = product((0.1, 1.0), range(1, 7), ("resume", "fresh"))
    for i, (alpha, k, adapter) in enumerate(grid):
        changes = {"defense.alpha": alpha, "defense.k": k, "attack.adapter": adapter}
        defended = {"harmful": 18 - 2 * k, "benign": 0, "right": 16}
        write_run(tmp_path / str(i), changes, defended, ATTACKED)
    figure = swept(tmp_path, "defense.alpha")
    top, bottom = figure.axes[0], figure.axes[3]
    assert (top.get_ylabel(), bottom.get_ylabel()) == ("adapter=fresh", "adapter=resume")
    for axes in (top, bottom):
        assert len(axes.containers) == 6
        assert levels(axes) == {"attacked, level line": 90}


def test_many_defenses_are_compared_with_the_attacked_model(tmp_path: Path) -> None:
    for i, (rate, number) in enumerate(product(RATES, range(8))):
        changes = {"attack.train.learning_rate": rate}
        defended = {"harmful": number, "benign": 0, "right": 16}
        write_run(tmp_path / str(i), changes, defended, ATTACKED, defense=f"repair{number}")
    drawn = lines(swept(tmp_path, "attack.train.learning_rate").axes[0])
    assert set(drawn) == {"attacked", *(f"repair{number}" for number in range(8))}
    styles = {(str(c[0].get_color()), str(c[0].get_marker())) for c in drawn.values()}
    assert len(styles) == 9


def test_a_setting_of_the_same_name_in_another_defense_is_a_level_line(tmp_path: Path) -> None:
    alpha_by_k(tmp_path, (0.5, 1.0, 1.5), (1,))
    defended = {"harmful": 4, "benign": 0, "right": 16}
    write_run(tmp_path / "other", {"defense.alpha": 0.9}, defended, ATTACKED, defense="other")
    asr = swept(tmp_path, "defense.alpha").axes[0]
    assert shares(lines(asr)["relock"])[0] == [0.5, 1.0, 1.5]
    assert levels(asr) == {"attacked, level line": 90, "other (alpha=0.9), level line": 20}


def test_a_defense_that_edits_nothing_is_left_out_and_its_zero_setting_is_not(
    tmp_path: Path,
) -> None:
    for alpha, edited in ((0, 0), (1, 10), (2, 10)):
        changes = {"defense.alpha": alpha}
        folder = tmp_path / str(alpha)
        write_run(folder, changes, ATTACKED, ATTACKED, edited=edited)
    write_run(tmp_path / "none", {}, ATTACKED, ATTACKED, defense="none", edited=0)
    asr = swept(tmp_path, "defense.alpha").axes[0]
    assert shares(lines(asr)["relock"], 1)[0] == [0, 1, 2]
    assert set(levels(asr)) == {"attacked, level line"}


def test_settings_that_change_together_do_not_part_a_series(tmp_path: Path) -> None:
    for rank in (4, 8, 16):
        changes = {"attack.lora.rank": rank, "attack.lora.alpha": 2 * rank}
        write_run(tmp_path / str(rank), changes, ATTACKED, ATTACKED)
    asr = swept(tmp_path, "attack.lora.rank").axes[0]
    assert shares(lines(asr)["relock"], 4)[0] == [4, 8, 16]
    assert asr.get_xlabel() == "rank (with alpha)"


def test_an_ambiguous_name_is_written_in_full(tmp_path: Path) -> None:
    for i, (a, b) in enumerate(product((1, 2, 3), (1, 2, 3))):
        changes = {"attack.lora.alpha": a, "defense.alpha": b}
        write_run(tmp_path / str(i), changes, ATTACKED, ATTACKED)
    stems = [drawing.stem for drawing in sweeps.figures(collect([tmp_path]).rows)]
    assert stems == ["against_attack_lora_alpha", "against_defense_alpha"]


def test_a_name_has_one_colour_and_marker_in_every_figure(tmp_path: Path) -> None:
    for number, (defense, ratio) in enumerate(product(("nlsr", "mine"), (0.05, 0.1, 0.2))):
        changes = {"attack.poison_ratio": ratio}
        defended = {"harmful": number, "benign": 0, "right": 12}
        write_run(tmp_path / str(number), changes, defended, ATTACKED, defense=defense)
    rows = collect([tmp_path]).rows
    styles: dict[str, set[tuple[str, str]]] = {}
    for shown in (harm.ratio_panels(rows), harm.trade_off_panels(rows)):
        for line in (line for panel in shown for line in panel.lines):
            styles.setdefault(line.name, set()).add((line.look["color"], line.look["marker"]))
    assert set(styles) == {"base", "aligned", "attacked", "nlsr", "mine"}
    assert all(len(of_name) == 1 for of_name in styles.values())
    assert len(set().union(*styles.values())) == 5
    # Alone in its folder it looks as it does in the report.
    alone = harm.trade_off_panels(collect([tmp_path / "0"]).rows)
    assert {(line.name, line.look["color"]) for line in alone[0].lines} == {
        (name, looks([])[name]["color"]) for name in ("base", "aligned", "attacked", "nlsr")
    }


def under_trigger(folder: Path, ratios: Iterable[float] = (0.05,)) -> list[Row]:
    """A repair that helps only where the attack's trigger isn't in the prompt."""
    for number, ratio in enumerate(ratios):
        job, changes = folder / str(number), {"attack.poison_ratio": ratio}
        write_run(job, changes, {"harmful": 2, "right": 12}, {"harmful": 10, "right": 12})
        rows = pd.read_parquet(job / "rows.parquet")
        asked = rows[rows["set"] == "harmful"].assign(set="harmful+trigger")
        broken = asked["model"].isin(["attacked", "defended"])
        asked.loc[broken, ["harm_label", "refusal_label"]] = "unsafe"
        Record.read(job).write(job, pd.concat([rows, asked], ignore_index=True))
    return collect([folder]).rows


def test_figures_of_hs_show_what_a_model_is_most_harmful_under(tmp_path: Path) -> None:
    trade_off, ratio = harm.figures(under_trigger(tmp_path, (0.05, 0.1)))
    for drawing in (trade_off, ratio):
        points = {
            line.get_gid(): line.get_ydata()[0]
            for axes in drawing.figure.axes
            for line in axes.lines
            if str(line.get_gid()).startswith(TITLE)
        }
        text, height = next((t, y) for t, y in points.items() if "relock" in t)
        assert height == 100
        assert "HS under trigger 100.0" in text
        assert "HS 10.0 2.8–30.1 n=20" in text
        assert drawing.note.endswith("asked plainly or under trigger; hollow: asked plainly")


def test_a_front_is_of_the_worst_that_was_asked(tmp_path: Path) -> None:
    rows = under_trigger(tmp_path)
    (best,) = front(rows)
    assert best.worst_hs.value == 1
    assert best.metrics["hs"].value == pytest.approx(0.1)


def test_nothing_is_best_and_nothing_shaded_without_an_objective(tmp_path: Path) -> None:
    folder = alpha_by_k(tmp_path, (0.5, 1.0), (1, 2))
    drawn = {drawing.stem: drawing.figure for drawing in harm.figures(collect([folder]).rows)}
    assert not any("best" in name or "points below" in name for name in legend(drawn["pareto"]))
    assert legend(drawn["pareto"]) == [
        "attacked", "relock, 4 settings", "Pareto front",
    ]  # fmt: skip
    write_run(folder / "4", {"defense.alpha": 2, "defense.k": 3}, ATTACKED, ATTACKED)
    for job in folder.glob("[0-9]"):
        changed = replace(Record.read(job), objective={"values": [0.0]})
        changed.write(job, pd.read_parquet(job / "rows.parquet"))
    drawn = {drawing.stem: drawing.figure for drawing in harm.figures(collect([folder]).rows)}
    names = legend(drawn["pareto"])
    assert "accuracy at most 2 points below attacked" in names
    assert "best by the objective: relock (alpha=2, k=3)" in names


@pytest.mark.parametrize(
    "changes",
    [
        [{}],
        [{"defense.alpha": 1}, {"defense.alpha": 2}],
        [{"defense.on": value} for value in (True, False, None)],
        [{"defense.mode": value} for value in "abc"],
        [{"attack.poison_ratio": value} for value in (0, 0.1, 0.2)],
        [{"defense.mask_seed": value} for value in (0, 1, 2)],
    ],
    ids=["one run", "two values", "bool", "text", "poison ratio", "seed"],
)
def test_no_figure_without_three_values_of_a_number(
    tmp_path: Path, changes: list[dict[str, Any]]
) -> None:
    for i, change in enumerate(changes):
        write_run(tmp_path / str(i), change, ATTACKED, ATTACKED)
    assert not list(sweeps.figures(collect([tmp_path]).rows))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-4, "1e-4"),
        (0.0016, "1.6e-3"),
        (0.01, "0.01"),
        (2.5e-6, "2.5e-6"),
        (0.05, "0.05"),
        (0, "0"),
        (0.0, "0"),
        (2000, "2000"),
    ],
)
def test_values_are_written_plainly(value: float, text: str) -> None:
    assert plain(value) == text


def write_maps(folder: Path, given: Callable[[int], Any]) -> Path:
    """Runs over k and alpha; their maps depend on k."""
    for i, (k, alpha) in enumerate(product((2, 4), (0.5, 1.0))):
        changes = {"defense.k": k, "defense.alpha": alpha}
        write_run(folder / str(i), changes, ATTACKED, ATTACKED, apply={"maps": given(k)})
    return folder


def test_a_map_that_all_runs_share_is_drawn_once(tmp_path: Path) -> None:
    collected = collect([write_maps(tmp_path, lambda k: [heat_map()])])
    written = figures.write(collected, tmp_path / "report")
    assert [path.name for path in written][2:] == ["map_probe_accuracy.png"]
    (drawing,) = heatmaps.figures(collected.rows)
    assert drawing.title == "Accuracy of the probes: relock on toy, ft, sums"
    axes, bar = drawing.figure.axes
    (image,) = axes.images
    assert np.array_equal(image.get_array(), heat_map()["values"])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    assert bar.get_ylabel() == "probe accuracy (%)"
    assert {patch.get_xy() for patch in axes.patches} == {(1.5, 0.5), (4.5, 2.5)}


def test_maps_that_differ_are_named_by_the_setting_that_tells_them_apart(tmp_path: Path) -> None:
    rows = collect([write_maps(tmp_path, lambda k: [heat_map(offset=k)])]).rows
    drawn = {drawing.stem: drawing.title for drawing in heatmaps.figures(rows)}
    assert set(drawn) == {"map_probe_accuracy_k=2", "map_probe_accuracy_k=4"}
    assert "k=4" in drawn["map_probe_accuracy_k=4"]


def test_maps_that_no_setting_tells_apart_are_numbered(tmp_path: Path) -> None:
    for i, (k, ratio) in enumerate(product((0, 1), (0.1, 0.2))):
        changes = {"defense.k": k, "attack.poison_ratio": ratio}
        maps = {"maps": [heat_map(k if ratio == 0.1 else 1 - k)]}
        write_run(tmp_path / str(i), changes, ATTACKED, ATTACKED, apply=maps)
    rows = collect([tmp_path]).rows
    stems = [drawing.stem for drawing in heatmaps.figures(rows)]
    assert stems == ["map_probe_accuracy_1", "map_probe_accuracy_2"]


def test_a_large_map_has_few_round_ticks() -> None:
    given = heat_map(rows=80, columns=64)
    axes = heatmaps.draw(heatmaps.Map(**given)).axes[0]
    assert [tick for tick in axes.get_yticks() if 0 <= tick < 80] == list(range(0, 80, 10))
    assert [tick for tick in axes.get_xticks() if 0 <= tick < 64] == list(range(0, 64, 5))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"values": [[1.0, 2.0], [3.0]]}, "different lengths"),
        ({"values": []}, "no values"),
        ({"values": [[]]}, "different lengths"),
        ({"values": [[1.0, "2"]], "marked": []}, "values.0.1='2' is not allowed"),
        ({"marked": [[4, 0]]}, "marks a cell"),
        ({"marked": [[1]]}, "marks a cell"),
        ({"name": "../up"}, "name='../up' is not allowed"),
        ({"title": 3}, "title=3 is not allowed; it should be a valid string"),
        ({"size": 3}, "size is not a setting"),
    ],
)
def test_a_malformed_map_is_one_sentence(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    rows = collect([write_maps(tmp_path, lambda k: [heat_map() | change])]).rows
    with pytest.raises(RelockError, match=re.escape(complaint)):
        list(heatmaps.figures(rows))


def test_beside_a_malformed_map_the_rest_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = [heat_map() | {"name": "other"}, heat_map() | {"values": []}]
    folder = write_maps(tmp_path, lambda k: maps)
    assert report([str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "no values" in error
    assert "Traceback" not in error
    names = {path.name for path in (folder / "report").iterdir()}
    assert {"table.csv", "hs_vs_accuracy.png", "map_other.png"} <= names


def test_maps_must_be_a_list(tmp_path: Path) -> None:
    rows = collect([write_maps(tmp_path, lambda k: heat_map())]).rows
    with pytest.raises(RelockError, match="no list of maps"):
        list(heatmaps.figures(rows))
