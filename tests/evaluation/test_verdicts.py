"""What a judge gave is looked at before it is counted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from evaluation.base import Verdict, checked_verdicts
from evaluation.judges.keyword import KeywordJudge
from settings import ModelError

RIGHT = Verdict("safe", math.nan)


def test_verdicts_of_any_kind_of_sequence_are_taken() -> None:
    given = [RIGHT, Verdict("errored", np.float32(0.5), response="partial")]
    for verdicts in (given, tuple(given), iter(given)):
        assert checked_verdicts(KeywordJudge(), verdicts, 2) == given


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([RIGHT], "KeywordJudge gave 1 verdicts for 2 answers; a judge must give one each"),
        (None, "gave 0 verdicts for 2 answers"),
        ([RIGHT, "safe"], "gave 'safe'; give an evaluation.base.Verdict whose score is a number"),
        ([RIGHT, Verdict("safe", "high")], "whose score is a number, or NaN"),
        ([RIGHT, Verdict("safe", None)], "whose score is a number, or NaN"),
        ([RIGHT, Verdict("Safe", 1.0)], "gave a verdict of 'Safe'; it may be one of 'safe', 'uns"),
        ([RIGHT, Verdict("safe", 1.0, response="no")], "a verdict of 'no'; it may be one of ''"),
    ],
)
def test_what_is_no_verdict_is_one_sentence(wrong: Any, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        checked_verdicts(KeywordJudge(), wrong, 2)
    assert said in str(caught.value)
