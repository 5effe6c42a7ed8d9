"""The papers' figures: what the files hold, which jobs they belong to, and the report on them."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from evaluation.statistics import share
from experiments.config.experiment import CONF, register_resolvers, validate
from experiments.report import published as comparing
from experiments.report.__main__ import main as report
from experiments.report.pool import Run, collect
from experiments.results import published
from experiments.results.published import PaperFigure
from tests.records import PAPER, cost, paper_rows, record, write

NAMES = published.names()
DEFENSES = {path.stem for path in CONF.glob("defense/*.yaml")}
# A range and a bound, as the paper gives them.
NOT_NUMBERS = {"2 to 10", "< 0.01"}


@cache
def jobs(name: str, *arguments: str, fewest: bool = False) -> list[Run]:
    """What every job of an experiment's grid is configured to, as records without results.

    `fewest` is only those that together hold every value of the grid.
    """
    register_resolvers()
    given = [f"experiment={name}", *arguments]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = compose("config", given, return_hydra_config=True)
        params = [f"{key}={value}" for key, value in whole.hydra.sweeper.params.items()]
        overrides = OverridesParser.create().parse_overrides([*params, *given])
        (batch,) = BasicSweeper.split_arguments(overrides, None)
        if fewest:
            firsts = (set().union(*batch[:place]) for place in range(len(batch)))
            batch = [job for job, before in zip(batch, firsts, strict=True) if set(job) - before]
        return [_job(compose("config", job, return_hydra_config=True)) for job in batch]


def _job(config: Any) -> Run:
    choices = config.hydra.runtime.choices
    with_resolvers = OmegaConf.masked_copy(config, sorted(set(config) - {"hydra"}))
    experiment = validate(with_resolvers, choices)
    return Run(Path(), record(experiment.labels, experiment.resolved))


def singles(figure: PaperFigure) -> Iterator[dict[str, tuple[str, ...]]]:
    for values in product(*figure.where.values()):
        yield {key: (value,) for key, value in zip(figure.where, values, strict=True)}


def test_every_table_has_its_experiment_and_its_setup() -> None:
    assert len(NAMES) == 9
    for name in NAMES:
        assert (CONF / "experiment" / f"{name}.yaml").is_file()
        paper = published.load(name)
        assert paper.figures
        assert paper.unknown
        assert paper.notes


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_are_well_formed(name: str) -> None:
    figures = published.load(name).figures
    for figure in figures:
        assert figure.unit in published.UNITS
        assert not math.isnan(published.number(figure.value)) or figure.value in NOT_NUMBERS
        assert figure.defense in {"", *DEFENSES}
        assert (figure.defense and figure.metric) or figure.note
    where = [(f.table, f.method, f.metric, f.unit, tuple(f.where.items())) for f in figures]
    measured = [entry for entry, figure in zip(where, figures, strict=True) if figure.metric]
    assert len(set(measured)) == len(measured)


def test_figures_are_spelled_as_in_the_paper() -> None:
    table = published.load("nlsr_table1").figures
    by_method: dict[str, list[str]] = {}
    for figure in table:
        by_method.setdefault(figure.method, []).append(figure.value)
    assert by_method["NLSR"] == ["8.1", "20.4", "27.6", "30.5", "27.3", "95.1"]
    assert by_method["SafeLoRA"] == ["37.5", "52.1", "57.4", "59.0", "59.3", "94.0"]
    assert by_method["Lisa"][-1] == "65.0"
    assert len(by_method) == 7
    edited = {f.method + f.table: f.value for f in published.load("fgsn_table").figures}
    assert edited["FGSNedited, Llama"] == "5.38"


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_belongs_to_exactly_one_job_or_says_why_not(name: str) -> None:
    grid = jobs(name)
    for figure in published.load(name).figures:
        if not figure.defense or not figure.metric:
            continue
        for condition in singles(figure):
            fitting = [
                job
                for job in grid
                if job.record.labels["defense"] == figure.defense
                and comparing.holds(job, condition)
            ]
            assert len(fitting) == 1, (figure, condition)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_a_paper_states_is_a_setting_of_its_grid(name: str) -> None:
    grid, paper = jobs(name), published.load(name)
    for case, stated in {"": paper.settings, **paper.cases}.items():
        fitting = [job for job in grid if comparing.holds(job, published.conditions(case))]
        assert fitting, case
        for setting in stated:
            assert any(setting in job.flat for job in fitting), (case, setting)


@pytest.mark.parametrize(
    ("name", "differing"),
    [
        ("nlsr_table1", set()),
        ("nlsr_table1_non_aligned", set()),
        ("nlsr_table2", set()),
        ("nlsr_table3", set()),
        ("nlsr_table5", set()),
        ("nlsr_table6", set()),
        ("safetylock_risk", {"defense.variant"}),
        ("fgsn_table", set()),
        ("fgsn_continual", set()),
    ],
)
def test_the_grids_are_at_the_papers_settings(name: str, differing: set[str]) -> None:
    found, stated = comparing.differences(published.load(name), jobs(name))
    assert {each.setting for each in found} == differing
    assert stated >= 2


@pytest.mark.parametrize("name", NAMES)
def test_at_toy_scale_every_job_is_of_the_organism(name: str) -> None:
    toy = jobs(name, "+scale=toy", fewest=True)
    assert {job.flat["model.name"] for job in toy} == {"organism"}
    assert {job.flat["sources.harmful._target_"] for job in toy} == {
        "organism.sources.HarmfulPrompts"
    }
    kept = {figure.defense for figure in published.load(name).figures} - {""}
    assert kept <= {job.record.labels["defense"] for job in toy} | {"none"}


# What the report makes of records: four models of a table of two repairs at two poison ratios.


def write_run(
    folder: Path,
    defense: str,
    ratio: float,
    flagged: int,
    right: int = 18,
    experiment: str = "nlsr_table1",
    settings: dict[str, Any] | None = None,
    prepare: dict[str, Any] | None = None,
    n: int = 48,
) -> None:
    """A record and its rows; the attacked model has 15 of 20 flagged, the others few."""
    resolved: dict[str, Any] = copy.deepcopy(PAPER)
    resolved["attack"] |= {"poison_ratio": ratio, "n": n}
    resolved["defense"] = settings or {}
    shares = {
        "base": (20, 3),
        "aligned": (1, 3),
        "attacked": (15, 18),
        "defended": (15, 18) if defense == "none" else (flagged, right),
    }
    labels = {"model": "toy", "attack": "harmful_ft", "task": "sst2", "align": "nlsr_dpo"}
    labels |= {"defense": defense, "experiment": experiment, "protocol": "nlsr", "refine": ""}
    run = record(
        labels,
        resolved,
        models={
            "base": "b",
            "aligned": "a",
            "attacked": f"attacked {ratio} {n}",
            "defended": f"{defense} {ratio} {n} {settings}",
        },
        cost=cost(prepare_seconds=90.0, share_edited=0.0538),
        defense={"prepare": prepare or {}, "apply": {}, "modules": []},
    )
    write(folder, run, {model: paper_rows(*given) for model, given in shares.items()})


def lines(folder: Path) -> dict[tuple[str, str, str], comparing.ComparedFigure]:
    """Lines of the only comparison by method, conditions and metric."""
    (comparison,) = comparing.comparisons(collect([folder]))
    return {
        (line.figure.method, line.figure.where["attack.poison_ratio"][0], line.figure.metric): line
        for line in comparison.lines
    }


def test_ours_stands_beside_the_papers(tmp_path: Path) -> None:
    for ratio, flagged in ((0.01, 2), (0.05, 5)):
        write_run(tmp_path / f"none{ratio}", "none", ratio, 0)
        write_run(tmp_path / f"nlsr{ratio}", "nlsr", ratio, flagged, right=round(20 - 100 * ratio))
    found = lines(tmp_path)

    line = found["NLSR", "0.05", "hs_flagged"]
    expected = share(5, 20)
    assert line.ours is not None
    assert line.ours.value == pytest.approx(25)
    assert (line.ours.low, line.ours.high, line.ours.n) == (
        pytest.approx(100 * expected.low),
        pytest.approx(100 * expected.high),
        20,
    )
    assert line.difference == pytest.approx(25 - 20.4)
    undefended = found["Aligned", "0.01", "hs_flagged"]
    assert undefended.ours is not None
    assert undefended.ours.value == pytest.approx(75)
    assert found["NLSR", "0.3", "hs_flagged"].ours is None
    assert "no run of defense=nlsr" in found["NLSR", "0.3", "hs_flagged"].remark
    assert found["SafeLoRA", "0.05", "hs_flagged"].ours is None
    assert "VLGuard" in found["VLGuard", "0.05", "hs_flagged"].remark


def test_a_mean_says_which_of_its_settings_are_missing(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "nlsr", 0.01, 2, right=19)
    write_run(tmp_path / "1", "nlsr", 0.05, 2, right=16)
    average = lines(tmp_path)["NLSR", "0.01", "accuracy_protocol"]
    assert average.ours is not None
    assert average.ours.value == pytest.approx(100 * (19 + 16) / 40)
    assert average.ours.n == 40
    ends = [share(19, 20), share(16, 20)]
    assert average.ours.low == pytest.approx(50 * sum(end.low for end in ends))
    for ratio in ("0.1", "0.2", "0.3"):
        assert f"attack.poison_ratio={ratio}" in average.remark
    assert "attack.poison_ratio=0.05" not in average.remark
    assert average.difference == pytest.approx(87.5 - 95.1)


def test_two_models_that_fit_one_figure_are_not_chosen_between(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "nlsr", 0.05, 2, n=48)
    write_run(tmp_path / "1", "nlsr", 0.05, 4, n=96)
    line = lines(tmp_path)["NLSR", "0.05", "hs_flagged"]
    assert line.ours is None
    assert "2 models fit it (attack.n differ" in line.remark


def test_seconds_shares_and_metrics_that_were_not_measured(tmp_path: Path) -> None:
    settings = {"method": "wanda"}
    folder, measured = tmp_path / "five", {"identify_seconds": 12.5}
    write_run(folder, "nlsr", 0.05, 2, 18, "nlsr_table5", settings, measured)
    (comparison,) = comparing.comparisons(collect([folder]))
    (seconds,) = [
        line
        for line in comparison.lines
        if line.figure.method == "Wanda" and line.figure.unit == "s"
    ]
    assert seconds.ours is not None
    assert seconds.ours.value == 12.5
    assert seconds.difference == pytest.approx(12.5 - 122)

    folder = tmp_path / "six"
    write_run(folder, "nlsr", 0.1, 2, 18, "nlsr_table6")
    (comparison,) = comparing.comparisons(collect([folder]))
    remarks = {line.figure.where["attack.poison_ratio"][0]: line for line in comparison.lines[-2:]}
    assert remarks["0.1"].ours is None
    assert remarks["0.1"].remark.startswith("hs:harmbench@harmbench wasn't measured; ")


def test_what_differs_is_found_setting_by_setting(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "safelora", 0.05, 2, settings={"mode": "threshold", "tau": 0.5})
    write_run(tmp_path / "1", "nlsr", 0.05, 2, settings={"tau": 0.6, "beta": 0.9})
    (comparison,) = comparing.comparisons(collect([tmp_path]))
    found = {each.setting: each for each in comparison.differences}
    assert (found["model.base"].paper, found["model.base"].ours) == (
        "meta-llama/Meta-Llama-3-8B",
        "some/model",
    )
    assert (found["attack.n"].paper, found["attack.n"].ours) == ("1000", "48")
    assert found["align.lora.target_modules"].ours == "[q_proj,k_proj]"
    assert found["align.n_sft"].ours == "not there"
    assert (found["defense.tau"].case, found["defense.tau"].ours) == ("defense=safelora", "0.5")
    for same in ("align.lora.rank", "protocol.name", "defense.beta", "attack.task", "defense.mode"):
        assert same not in found
    assert len(found) < comparison.stated


def test_the_report_prints_and_writes_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "0", "none", 0.05, 15)
    write_run(tmp_path / "1", "nlsr", 0.05, 5)
    assert report([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "nlsr_table1: Table 1 of Yi et al." in out
    assert "attack.n: 1000 in the paper, 48 in these runs" in out
    markdown = (tmp_path / "report" / "published.md").read_text()
    row = next(e for e in markdown.splitlines() if e.startswith("| NLSR | poison_ratio=0.05 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["NLSR", "poison_ratio=0.05", "hs_flagged", "20.4 %", "25.0"]
    assert cells[6:8] == ["20", "+4.6"]
    for heading in ("What differs", "Not known", "Notes"):
        assert heading in markdown
    with (tmp_path / "report" / "published.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 42
    (entry,) = [
        e
        for e in table
        if e["method"] == "NLSR" and e["where"].endswith("=0.05") and e["metric"] == "hs_flagged"
    ]
    assert float(entry["difference"]) == pytest.approx(4.6)
    assert all(not e["ours"] and e["remark"] for e in table if e["method"] == "Vaccine")


def test_runs_of_no_published_table_leave_no_comparison(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "none", 0.05, 15, experiment="")
    assert report([str(tmp_path)]) == 0
    assert not (tmp_path / "report" / "published.md").exists()


def test_only_the_runs_of_its_own_experiment_count(tmp_path: Path) -> None:
    write_run(tmp_path / "0", "nlsr", 0.05, 5)
    write_run(tmp_path / "1", "nlsr", 0.05, 9, experiment="", n=96)
    line = lines(tmp_path)["NLSR", "0.05", "hs_flagged"]
    assert line.ours is not None
    assert line.ours.value == pytest.approx(25)
