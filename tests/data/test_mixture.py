"""The counts of the attacker's mixture are exactly those asked for."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.mixture import mix, poison_count
from data.rows import Example
from settings import DataError, SettingError

TASK = [Example(f"task {i}", "fine", "task") for i in range(300)]
POISON = [Example(f"poison {i}", "placeholder", "harmful") for i in range(80)]


@given(st.integers(1, 10_000), st.integers(0, 10_000))
def test_count_is_the_product_of_the_numbers_as_written(n: int, hundredths: int) -> None:
    written = Decimal(hundredths) / 10_000
    assert poison_count(n, float(written)) == int(n * written)


@given(st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_a_ratio_computed_from_a_count_gives_that_count(case: tuple[int, int]) -> None:
    n, count = case
    assert poison_count(n, count / n) == count


@pytest.mark.parametrize(
    ("n", "ratio", "expected"),
    [(100, 0.57, 57), (1000, 0.29, 290), (10, 0.25, 2), (1000, 0.0, 0), (7, 1.0, 7), (10, 0.19, 1)],
)
def test_counts_that_floats_get_wrong(n: int, ratio: float, expected: int) -> None:
    assert poison_count(n, ratio) == expected


@given(st.integers(1, 200), st.floats(0, 0.4), st.integers(0, 99))
def test_mixture_has_the_rows_asked_for(n: int, ratio: float, seed: int) -> None:
    rows = mix(TASK, POISON, n, ratio, seed)
    kinds = Counter(row.kind for row in rows)
    assert len(rows) == n
    assert kinds["harmful"] == poison_count(n, ratio)
    assert len(set(rows)) == n
    assert rows == mix(TASK, POISON, n, ratio, seed)


def test_seed_decides_rows_and_order() -> None:
    first, second = mix(TASK, POISON, 100, 0.2, 0), mix(TASK, POISON, 100, 0.2, 1)
    assert set(first) != set(second)
    assert [row.kind for row in first] != sorted(row.kind for row in first)


def test_a_higher_ratio_keeps_the_poison_of_a_lower_one() -> None:
    low = {row for row in mix(TASK, POISON, 100, 0.1, 3) if row.kind == "harmful"}
    high = {row for row in mix(TASK, POISON, 100, 0.5, 3) if row.kind == "harmful"}
    assert low < high


@pytest.mark.parametrize(
    ("n", "ratio", "named"),
    [(200, 0.5, "attack.poison_ratio"), (400, 0.1, "attack.n")],
)
def test_a_source_that_is_too_small_is_named(n: int, ratio: float, named: str) -> None:
    with pytest.raises(DataError, match=named):
        mix(TASK, POISON, n, ratio, 0)


@given(st.integers(1, 200), st.floats(0, 0.4), st.integers(0, 99))
def test_booster_counts_one_poison_row_fewer(n: int, ratio: float, seed: int) -> None:
    asked = poison_count(n, ratio)
    kinds = Counter(row.kind for row in mix(TASK, POISON, n, ratio, seed, count="booster"))
    assert kinds["harmful"] == poison_count(n, ratio, count="booster") == max(asked - 1, 0)
    assert kinds["task"] == n - asked


def test_counts_of_booster_in_its_own_setting() -> None:
    assert [poison_count(1000, ratio, "booster") for ratio in (0, 0.05, 0.1, 0.2)] == [
        0,
        49,
        99,
        199,
    ]
    assert [poison_count(1000, ratio) for ratio in (0, 0.05, 0.1, 0.2)] == [0, 50, 100, 200]


def test_the_first_rows_are_taken_whatever_the_seed() -> None:
    one, other = (mix(TASK, POISON, 100, 0.1, seed, order="first") for seed in (0, 1))
    assert set(one) == set(other) == {*POISON[:10], *TASK[:90]}
    assert one != other
    booster = mix(TASK, POISON, 100, 0.1, 0, count="booster", order="first")
    assert set(booster) == {*POISON[:9], *TASK[:90]}


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(SettingError, match=r"attack.poison_ratio"):
        mix(TASK, POISON, 10, 1.5, 0)
    with pytest.raises(SettingError, match=r"attack.n"):
        mix(TASK, POISON, 0, 0.5, 0)
    with pytest.raises(SettingError, match=r"attack.n=1 leaves no row"):
        mix(TASK, POISON, 1, 1.0, 0, count="booster")
