"""Rows as arrays: the same ones, in the same order, as a frame would choose."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.rows import Rows
from settings import DataError

FRAME = pd.DataFrame(
    {
        "set": ["harmful", "benign", "harmful", "task:sst2", "benign"],
        "id": ["1", "2", "3", "4", "2"],
        "seed": [0, 0, 1, 1, 1],
        "label": ["safe", None, "unsafe", "", "safe"],
        "score": [0.5, np.nan, 1.0, np.nan, 0.0],
        "mark": [True, None, False, None, True],
    }
)


@given(st.lists(st.booleans(), min_size=5, max_size=5), st.permutations(range(5)))
def test_rows_taken_of_taken_ones_are_the_frames(mask: list[bool], order: list[int]) -> None:
    which = np.array(mask)
    rows = Rows(FRAME).take(np.array(order)).take(which)
    frame = FRAME.iloc[order][which]
    assert len(rows) == len(frame)
    for name in rows.columns:
        expected = frame[name].astype(object).reset_index(drop=True)
        pd.testing.assert_series_equal(pd.Series(rows[name], name=name, dtype=object), expected)
        assert rows.missing(name).tolist() == frame[name].isna().tolist()
    assert rows.sets == list(dict.fromkeys(frame["set"]))
    assert rows.of({"benign"})["id"].tolist() == ["2"] * sum(frame["set"] == "benign")


def test_a_column_must_be_there_and_filled_where_rows_are() -> None:
    rows = Rows(FRAME)
    assert rows.needed(["score"], gaps=True) is rows
    with pytest.raises(DataError, match=r"of benign, harmful, task:sst2 lack .* 'score'; judge"):
        rows.needed(["score"])
    with pytest.raises(DataError, match="lack a value in the column 'other'"):
        rows.needed(["other"], gaps=True)
    nothing = rows.of({"elsewhere"})
    assert not len(nothing.needed(["other"])["other"])


def test_rows_that_have_a_column_are_none_where_nothing_stands_in_it() -> None:
    rows = Rows(FRAME)
    assert rows.filled(["label"])["id"].tolist() == ["1", "3", "4", "2"]
    assert rows.filled(["label", "mark"])["seed"].tolist() == [0, 1, 1]
    assert not len(rows.of({"task:sst2"}).filled(["label"]))
    assert not len(rows.filled(["other"]))


def test_a_prompt_of_two_seeds_is_one_cluster() -> None:
    clusters = Rows(FRAME).of({"benign", "harmful"}).clusters
    assert clusters is not None
    assert clusters.seeds.tolist() == [0, 0, 1, 1]
    assert clusters.prompts[1] == clusters.prompts[3]
    assert clusters.distinct_prompts == 3
    assert Rows(FRAME).of({"task:sst2"}).clusters is None
    assert Rows(FRAME.drop(columns="seed")).clusters is None
