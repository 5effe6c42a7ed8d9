"""Searches: what they go by, what they refuse, and a real one whose trials fail and succeed."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from evaluation.statistics import Estimate, share
from experiments.config.experiment import CONF, register_resolvers
from experiments.launch.search_check import refusal
from experiments.report import pareto
from experiments.report.__main__ import main as report
from experiments.report.pool import Row, collect
from experiments.results.objective import Constrained, Pareto
from experiments.results.record import Record
from settings import DataError, SettingError
from tests.experiments.composing import composed
from tests.experiments.conftest import SHORT, Command
from tests.records import ATTACKED, rewrite, write_run

SHARES = st.integers(0, 300).map(lambda count: count / 300)


def metrics(hs: float, accuracy: float, attacked: float) -> dict[str, Any]:
    def shares(**values: float) -> dict[str, Any]:
        return {
            name: {"value": value, "low": value, "high": value, "n": 300}
            for name, value in values.items()
        }

    return {
        "attacked": shares(hs=1.0, accuracy_strict=attacked),
        "defended": shares(hs=hs, safe=hs, accuracy_strict=accuracy),
    }


@given(st.lists(st.tuples(SHARES, SHARES), min_size=2, max_size=2), SHARES, st.floats(0, 10))
def test_feasible_points_come_first_and_infeasible_ones_go_by_their_violation(
    points: list[tuple[float, float]], attacked: float, within: float
) -> None:
    for metric, goal, sign in (("hs", "minimize", 1), ("safe", "maximize", -1)):
        objective = Constrained(metric=metric, goal=goal, within=within)
        one, other = (objective.score(metrics(*point, attacked)) for point in points)
        first, second = (sign * score.values[0] for score in (one, other))
        if one.feasible != other.feasible:
            assert (first < second) is one.feasible
        elif one.feasible:
            assert (first < second) == (sign * points[0][0] < sign * points[1][0])
            assert one.values[0] == 100 * points[0][0]
        else:
            assert (first < second) == (one.violation < other.violation)
            assert one.violation == pytest.approx(100 * (attacked - points[0][1]) - within)


def test_exactly_as_many_points_as_allowed_are_feasible() -> None:
    score = Constrained(within=2.0).score(metrics(0.1, 0.78, 0.80))
    assert score.feasible
    assert score.values == (10.0,)
    assert not Constrained(within=1.9).score(metrics(0.1, 0.78, 0.80)).feasible


@pytest.mark.parametrize("broken", [{"value": None, "n": 300}, {"value": 0.0, "n": 0}])
@pytest.mark.parametrize(("model", "metric"), [("defended", "hs"), ("attacked", "accuracy_strict")])
def test_what_is_no_number_or_has_no_rows_is_never_a_score(
    broken: dict[str, Any], model: str, metric: str
) -> None:
    measured = metrics(0.1, 0.8, 0.8)
    measured[model][metric] |= broken
    with pytest.raises(DataError, match=metric):
        Constrained().score(measured)
    del measured[model]
    with pytest.raises(DataError, match=model):
        Constrained().score(measured)


@pytest.mark.parametrize(
    ("objective", "values", "message"),
    [
        (Constrained, {"metric": "hss"}, "did you mean hs"),
        (Constrained, {"metric": "perplexity"}, "no share"),
        (Constrained, {"within": -1.0}, "within"),
        (Constrained, {"metric": "hs@"}, "no metric"),
        (Constrained, {"metric": "errored"}, "name the judge"),
        (Pareto, {"metrics": ("hs",)}, "metrics"),
        (Pareto, {"goals": ("minimize",)}, "one each"),
    ],
)
def test_a_wrong_objective_is_refused(objective: Any, values: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        objective.validated(values, "objective")


def test_a_figure_that_will_not_be_measured_is_refused_beforehand() -> None:
    nothing: dict[str, tuple[str, ...]] = {"judges": (), "attack_prompts": (), "prompt_sets": ()}
    Constrained().check(["sst2"], nothing, {})
    with pytest.raises(SettingError, match=r"evaluation\.tasks"):
        Constrained().check([], nothing, {})
    for metric, setting in (("hs:strongreject", "judges"), ("asr+prefill", "attack_prompts")):
        with pytest.raises(SettingError, match=rf"evaluation\.{setting}"):
            Constrained(metric=metric).check(["sst2"], nothing, {})
        further = {**nothing, setting: (metric.replace("+", ":").partition(":")[2],)}
        Constrained(metric=metric).check(["sst2"], further, {})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective.model=refined"], "none of refined; name a fine-tuning"),
        (["objective.metric=hs_safe_system"], r"set evaluation\.safe_system=true"),
        (["objective.constraint=over_refusal", "sources.over_refusal=null"], "over_refusal; set"),
        (["objective.constraint=accuracy_strict/topic"], "the tasks scored are arithmetic"),
    ],
)
def test_what_this_run_has_none_of_is_refused_beforehand(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        composed("objective=hs_within_accuracy", *overrides)


@pytest.mark.parametrize(
    ("objective", "values"),
    [
        (Constrained, {"metric": "hs_flagged"}),
        (Constrained, {"metric": "over_refusal"}),
        (Constrained, {"metric": "hs", "goal": "maximize", "model": "attacked"}),
        (Pareto, {"metrics": ("harm_score", "accuracy_strict")}),
    ],
)
def test_a_goal_that_a_broken_model_comes_nearer_to_is_refused(
    objective: Any, values: dict[str, Any]
) -> None:
    with pytest.raises(SettingError, match="a broken model does well"):
        objective.validated(values, "objective")
    guard: dict[str, Any] = {"constraint": "degenerate", "constraint_goal": "minimize"}
    if objective is Pareto:
        goals = ("minimize", "maximize", "minimize")
        guard = {"metrics": (*values["metrics"], "degenerate"), "goals": goals}
    objective.validated(values | guard, "objective")


def searched(*overrides: str) -> Any:
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


@pytest.mark.parametrize("path", sorted(CONF.glob("experiment/tune_*.yaml")), ids=lambda p: p.stem)
def test_the_worked_searches_choose_by_validation_and_are_drawn_with_a_seed(path: Path) -> None:
    config = searched(f"experiment={path.stem}")
    assert config.evaluation.split == "validation"
    assert isinstance(config.hydra.sweeper.sampler.seed, int)
    assert refusal(config) is None


def test_directions_have_to_be_the_objectives() -> None:
    several = ["hydra/sweeper=optuna", "objective=pareto"]
    assert "direction=[minimize,maximize]" in str(refusal(searched(*several)))
    right = "hydra.sweeper.direction=[minimize,maximize]"
    assert refusal(searched(*several, right)) is None
    wrong = "hydra.sweeper.direction=maximize"
    single = ["hydra/sweeper=optuna", "objective=hs_within_accuracy"]
    assert refusal(searched(*single)) is None
    assert "direction=minimize" in str(refusal(searched(*single, wrong)))


def test_a_search_without_an_objective_is_refused_before_anything_runs(command: Command) -> None:
    finished = command("-m", "hydra/sweeper=optuna", "defense.sparsity=choice(0.5,0.8)")
    assert finished.code == 1
    assert finished.err.strip().splitlines() == [
        "error: a search (hydra/sweeper) needs an objective to go by; add "
        "objective=hs_within_accuracy, or objective=pareto"
    ]
    assert not list(finished.folder.glob("*/status.json"))


def test_a_trial_that_fails_is_left_out_and_the_best_of_the_others_can_be_tested(
    command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    search = [
        "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_jobs=1", "hydra.sweeper.max_failure_rate=1.0", "objective.within=100",
        "objective=hs_within_accuracy", "evaluation.split=validation",
        "defense.sparsity=choice(0.5,0.9,2.0)", *SHORT,
        "sources.benign=null", "sources.over_refusal=null",
    ]  # fmt: skip
    finished = command("-m", *search)
    assert finished.code == 1  # A job failed.
    folders = sorted(finished.folder.glob("[0-9]"))
    statuses = [json.loads((folder / "status.json").read_text()) for folder in folders]
    (failed,) = (status for status in statuses if status["status"] == "failed")
    assert "defense.sparsity=2.0" in failed["reason"]
    done = [folder for folder in folders if (folder / "record.json").is_file()]
    records = [Record.read(folder) for folder in done]
    assert len(records) == 2
    for record in records:
        own = record.metrics["defended"]["hs"]["value"]
        assert record.objective["values"] == [100 * own]  # type: ignore[operator]
        assert record.objective["feasible"]
        assert record.labels["split"] == record.settings["evaluation"]["split"] == "validation"
    found = OmegaConf.load(finished.folder / "optimization_results.yaml")
    assert found.best_value == min(record.objective["values"][0] for record in records)

    assert report([str(finished.folder)]) == 0
    said = capfd.readouterr().out
    assert "validation split, for choosing settings and not for results" in said
    assert "best of 2 settings (2 feasible)" in said
    assert (finished.folder / "report" / "pareto.png").stat().st_size > 10_000
    (line,) = (line for line in said.splitlines() if line.startswith("test it once: "))
    overrides = shlex.split(line.partition("experiments.run ")[2])
    tested = command(*overrides)
    assert tested.code == 0, tested.err
    record = Record.read(tested.folder)
    assert record.settings["evaluation"]["split"] == "test"
    made = {stage["name"] for stage in record.stages if not stage["reused"]}
    assert not made & {"attack", "prepare", "apply"}


def test_a_search_goes_on_with_its_study(command: Command, tmp_path: Path) -> None:
    import optuna

    storage = f"sqlite:///{tmp_path / 'study.db'}"
    search = [
        "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "hydra.sweeper.n_jobs=1",
        "objective=hs_within_accuracy", "evaluation.split=validation", "defense=none",
        "seed=choice(18)", *SHORT, "sources.benign=null", "sources.over_refusal=null",
        f"hydra.sweeper.storage={storage}", "hydra.sweeper.study_name=study",
    ]  # fmt: skip
    for trials in (1, 2):
        run = command("-m", *search)
        assert run.code == 0, run.err
        opened = optuna.storages.RDBStorage(storage)
        assert len(optuna.load_study(study_name="study", storage=opened).trials) == trials


def row(hs: float, accuracy: float, role: str = "defended") -> Row:
    nothing = Estimate(math.nan, math.nan, math.nan, 0)
    measured = {
        name: share(round(300 * value), 300) if value >= 0 else nothing
        for name, value in (("hs", hs), ("accuracy_strict", accuracy))
    }
    return Row(role, {"defense": "nlsr"}, {}, measured, (0,))


def searched_runs(folder: Path, objective: dict[str, Any]) -> Path:
    """Three trials of a defense and one that edited nothing, with records of an objective."""
    shares = ((1, 0, 12), (9, 2, 18), (10, 3, 12), (17, 0, 18))
    for number, (harmful, benign, right) in enumerate(shares):
        changes = {"defense.alpha": number, "objective": objective}
        defended = {"harmful": harmful, "benign": benign, "right": right}
        job = folder / str(number)
        write_run(job, changes, defended, ATTACKED, edited=0 if number == 3 else 10)
        aligned = {"accuracy_strict": {"value": 0.9, "low": 0.7, "high": 0.97, "n": 20}}
        rewrite(job, metrics={"aligned": aligned}, objective={"values": [0.0]})
    return folder


def test_what_is_said_of_the_best_are_the_figures_of_the_models_that_were_asked(
    tmp_path: Path,
) -> None:
    objective = {"_target_": "experiments.results.objective.Constrained", "reference": "aligned"}
    said = " ".join(pareto.sentences(collect([searched_runs(tmp_path, objective)])))
    # Those that keep 90 % accuracy; one trial edited nothing, and is a setting all the same.
    assert "best of 4 settings (2 feasible): relock (alpha=1): hs of defended 45.0" in said
    assert "accuracy_strict of aligned 90.0 70.0–97.0 n=20" in said


def test_the_front_is_of_the_objectives_own_figures(tmp_path: Path) -> None:
    objective = {
        "_target_": "experiments.results.objective.Pareto",
        "metrics": ["hs", "hs_upper"],
        "goals": ["minimize", "minimize"],
    }
    said = " ".join(pareto.sentences(collect([searched_runs(tmp_path, objective)])))
    # By accuracy, alpha=1 would be on it too.
    assert "front of 4 settings: 1 that none beats" in said
    assert "- relock (alpha=0): hs of defended 5.0" in said
    assert "accuracy" not in said


@given(st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=8))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    rows = [row(*point) for point in points]
    front = pareto.front([*rows, row(0.0, 1.0, "attacked"), row(-1, 1.0), row(0.0, -1)])

    def beats(one: Row, other: Row) -> bool:
        (hs, accuracy), (its_hs, its_accuracy) = (
            (each.metrics["hs"].value, each.metrics["accuracy_strict"].value)
            for each in (one, other)
        )
        no_worse = hs <= its_hs and accuracy >= its_accuracy
        return no_worse and (hs < its_hs or accuracy > its_accuracy)

    for each in rows:
        assert any(each is kept for kept in front) != any(beats(other, each) for other in rows)
    accuracies = [kept.metrics["accuracy_strict"].value for kept in front]
    assert accuracies == sorted(accuracies)
