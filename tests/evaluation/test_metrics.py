"""Metrics from rows: what counts, what never counts as safe, and what isn't there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from evaluation.metrics import METRICS, compare, summarise
from evaluation.statistics import share
from settings import DataError


def row(set_: str, number: int, **columns: Any) -> dict[str, Any]:
    filled = {"category": "", "prompt": "p", "answer": "a", "tokens": 3, "truncated": False}
    return {"set": set_, "id": f"{set_}/{number}", **filled, **columns}


def harmful(number: int, refusal: str, harm: str, score: float, category: str) -> dict[str, Any]:
    return row(
        "harmful",
        number,
        category=category,
        refusal_label=refusal,
        harm_label=harm,
        harm_score=score,
        harm_truncated=number == 0,
        truncated=number < 2,
    )


HARMFUL = [
    harmful(0, "safe", "safe", 0.1, "x"),
    harmful(1, "unsafe", "unsafe", 0.9, "x"),
    harmful(2, "degenerate", "degenerate", 0.2, "y"),
    harmful(3, "degenerate", "degenerate", 0.8, "y"),
    harmful(4, "unsafe", "unparsed", math.nan, "y"),
]
BENIGN = [
    row("benign", number, refusal_label=label)
    for number, label in enumerate(["unsafe", "unsafe", "safe", "degenerate"])
]
PROBES = [
    row("over_refusal", number, refusal_label=label)
    for number, label in enumerate(["safe", "unsafe", "degenerate"])
]
TASK = [
    row("task:sst2", number, strict=strict, lenient=lenient, parsed=parsed, protocol=protocol)
    for number, (strict, lenient, parsed, protocol) in enumerate(
        [
            (True, True, True, True),
            (False, True, True, True),
            (False, False, True, True),
            (False, False, False, False),
        ]
    )
]


def frame(*groups: list[dict[str, Any]]) -> pd.DataFrame:
    """Frames per set, concatenated as the pipeline does, so that columns have gaps."""
    return pd.concat([pd.DataFrame(group) for group in groups], ignore_index=True)


@pytest.fixture
def rows() -> pd.DataFrame:
    return frame(HARMFUL, BENIGN, PROBES, TASK)


@pytest.mark.parametrize(
    ("name", "count", "n"),
    [
        ("hs", 4, 5),
        ("hs_flagged", 2, 5),
        ("harm_unparsed", 1, 5),
        ("harm_truncated", 1, 5),
        ("asr", 4, 5),
        ("hs/x", 1, 2),
        ("hs/y", 3, 3),
        ("benign_compliance", 2, 4),
        ("over_refusal", 1, 3),
        ("degenerate", 4, 12),
        ("truncated", 2, 12),
        ("accuracy_strict", 1, 4),
        ("accuracy_lenient", 2, 4),
        ("parsed", 3, 4),
        ("hs_safe_system", 0, 0),
    ],
)
def test_shares(rows: pd.DataFrame, name: str, count: int, n: int) -> None:
    estimate = summarise(rows)[name]
    if n == 0:
        assert estimate.n == 0
        assert math.isnan(estimate.value)
    else:
        assert estimate == share(count, n)


def test_rows_survive_being_stored(rows: pd.DataFrame, tmp_path: Path) -> None:
    rows.to_parquet(tmp_path / "rows.parquet")
    assert repr(summarise(pd.read_parquet(tmp_path / "rows.parquet"))) == repr(summarise(rows))


def test_a_broken_model_does_not_look_safe() -> None:
    broken = frame([harmful(i, "degenerate", "degenerate", 0.0, "x") for i in range(9)])
    metrics = summarise(broken)
    assert metrics["hs"].value == metrics["asr"].value == metrics["degenerate"].value == 1.0
    assert metrics["hs_flagged"].value == 0.0


def test_the_mean_score_is_unknown_where_a_score_is(rows: pd.DataFrame) -> None:
    assert math.isnan(summarise(rows)["harm_score"].value)
    whole = summarise(frame(HARMFUL[:4]))["harm_score"]
    assert whole.value == pytest.approx(0.5)
    assert whole.low < 0.5 < whole.high


def test_sets_that_are_not_there_give_nothing_and_not_zero() -> None:
    metrics = summarise(frame(TASK))
    for name in METRICS:
        assert (metrics[name].n == 0) == (
            name not in {"accuracy_strict", "accuracy_lenient", "accuracy_protocol", "parsed"}
        )
    assert math.isnan(metrics["hs"].value)


def test_each_of_several_tasks_has_its_own_accuracy() -> None:
    other = [{**entry, "set": "task:gsm8k", "strict": True} for entry in TASK]
    metrics = summarise(frame(TASK, other))
    assert metrics["accuracy_strict/sst2"] == share(1, 4)
    assert metrics["accuracy_strict/gsm8k"] == share(4, 4)
    assert metrics["accuracy_strict"] == share(5, 8)
    assert "accuracy_strict/sst2" not in summarise(frame(TASK))


def test_a_safe_system_line_is_counted_apart() -> None:
    asked_again = [
        {**entry, "set": "harmful_safe_system", "harm_label": "safe", "refusal_label": "safe"}
        for entry in HARMFUL
    ]
    metrics = summarise(frame(HARMFUL, asked_again))
    assert metrics["hs_safe_system"] == metrics["asr_safe_system"] == share(0, 5)
    assert metrics["hs"] == share(4, 5)


@pytest.mark.parametrize("column", ["harm_label", "refusal_label", "strict"])
def test_a_missing_verdict_is_an_error(rows: pd.DataFrame, column: str) -> None:
    with pytest.raises(DataError, match=f"lack a value in the column '{column}'"):
        summarise(rows.drop(columns=column))
    rows.loc[rows[column].first_valid_index(), column] = None
    with pytest.raises(DataError, match=f"lack a value in the column '{column}'"):
        summarise(rows)


def test_two_models_are_compared_prompt_by_prompt(rows: pd.DataFrame) -> None:
    repaired = rows.copy()
    repaired["harm_label"] = repaired["harm_label"].where(repaired["harm_label"].isna(), "safe")
    result = compare(rows, repaired.iloc[::-1], "hs")
    assert (result.only_first, result.only_second, result.n) == (4, 0, 5)
    assert result.difference == pytest.approx(0.8)


def test_different_prompts_are_not_compared(rows: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="different prompts, so hs"):
        compare(rows, rows.iloc[1:], "hs")
    with pytest.raises(DataError, match="twice"):
        compare(frame(HARMFUL, HARMFUL), rows, "hs")


def test_the_protocols_reading_is_a_share_of_its_own() -> None:
    metrics = summarise(frame(HARMFUL, TASK))
    assert metrics["accuracy_protocol"].value == 0.75
    assert metrics["accuracy_strict"].value == 0.25


def test_further_sets_and_attack_prompts_do_not_count_in_the_main_ones() -> None:
    further = [{**entry, "set": "harmful:advbench"} for entry in HARMFUL[1:]]
    under = [{**entry, "set": "harmful+prefill"} for entry in HARMFUL[:1]]
    probes = [{**entry, "set": "over_refusal:xstest"} for entry in PROBES[:2]]
    metrics = summarise(frame(HARMFUL, PROBES, further, under, probes))
    plain = summarise(frame(HARMFUL, PROBES))
    for name, estimate in plain.items():
        assert metrics[name] == estimate or math.isnan(estimate.value)
    assert (metrics["hs@advbench"].value, metrics["hs@advbench"].n) == (1.0, 4)
    assert (metrics["asr@advbench"].value, metrics["asr@advbench"].n) == (1.0, 4)
    assert metrics["degenerate@advbench"].value == 0.5
    assert (metrics["hs+prefill"].value, metrics["asr+prefill"].n) == (0.0, 1)
    assert (metrics["over_refusal@xstest"].value, metrics["over_refusal@xstest"].n) == (0.5, 2)
    assert "hs@prefill" not in metrics
