"""Metric names: what they are of, and the worst that a model was asked under."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.metric_names import HS, KINDS, MetricName, worst_hs
from evaluation.shares import METRICS
from evaluation.statistics import Estimate

NAMES = {
    "hs": HS,
    "hs/theft: a+b": MetricName("hs", part="theft: a+b"),
    "hs:strict": MetricName("hs", judges=("strict",)),
    "kappa:harm~strict": MetricName("kappa", judges=("harm", "strict")),
    "asr@advbench": MetricName("asr", prompt_set="advbench"),
    "asr+prefill": MetricName("asr", attack_prompt="prefill"),
    "score:strict+prefill": MetricName("score", judges=("strict",), attack_prompt="prefill"),
}


@pytest.mark.parametrize("text", NAMES)
def test_a_name_is_read_and_written(text: str) -> None:
    assert MetricName.parse(text) == NAMES[text]
    assert str(MetricName.parse(text)) == text


@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from("/:@+"),
    st.from_regex(r"[a-z_]+", fullmatch=True),
)
def test_what_is_read_is_written_again(kind: str, sign: str, of: str) -> None:
    assert str(MetricName.parse(f"{kind}{sign}{of}")) == f"{kind}{sign}{of}"


@pytest.mark.parametrize("text", ["hs:", "hs+", "asr@", "hs/"])
def test_a_sign_alone_is_no_name(text: str) -> None:
    with pytest.raises(ValueError, match="comes what it is of"):
        MetricName.parse(text)


def test_every_share_has_its_heading_and_direction() -> None:
    assert set(METRICS) <= set(KINDS)
    assert all(kind.heading and kind.better for kind in KINDS.values())
    assert {MetricName.parse(name).unit for name in METRICS} == {"%"}
    assert MetricName.parse("hs+prefill").heading == "HS under prefill"


def _estimate(value: float, n: int = 10) -> Estimate:
    return Estimate(value, math.nan, math.nan, n)


def test_the_worst_is_among_plain_hs_and_every_attack_prompt() -> None:
    metrics = {
        "hs": _estimate(0.2),
        "hs+trigger": _estimate(0.9),
        "hs+prefill": _estimate(0.4),
        "hs+unasked": _estimate(1.0, n=0),
        "hs+unknown": _estimate(math.nan),
        "hs@advbench": _estimate(1.0),
        "hs/fraud": _estimate(1.0),
        "hs:strict": _estimate(1.0),
        "asr+prefill": _estimate(1.0),
    }

    assert worst_hs(metrics) == MetricName("hs", attack_prompt="trigger")
    assert worst_hs({**metrics, "hs": _estimate(0.9)}) == HS
    assert worst_hs({"hs": _estimate(math.nan, n=0)}) is None


def test_an_estimate_and_its_parts_as_text() -> None:
    assert Estimate(0.87, 0.827, 0.903, 300).shown("%") == ("87.0", "82.7–90.3", "n=300")
    assert Estimate(1.73, math.nan, math.nan, 4).shown("") == ("1.73", "", "n=4")
    assert Estimate(math.nan, math.nan, math.nan, 0).shown() == ("-", "", "")
    assert Estimate.of({"value": None, "low": None, "high": None, "n": 3}).shown()[0] == "-"
