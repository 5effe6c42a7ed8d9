"""The attacker's training mixture: task rows with a share of poison."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal

from data.rows import Example
from settings import DataError, SettingError

Count = Literal["exact", "booster"]
DrawOrder = Literal["seeded", "first"]


def poison_count(n: int, poison_ratio: float, count: Count = "exact") -> int:
    """How many of `n` rows are poison: int(n p), as NLSR counts (arXiv 2412.12497).

    The product is rounded down, but one that misses the next integer by less than 1e-6 is that
    integer: 0.57 * 100 is 56.99999999999999 in floating point and means 57 rows.

    Args:
        n: Rows asked for in all.
        poison_ratio: Share p of poison, from 0 to 1.
        count: "exact", or "booster" for one row fewer: Booster's script (git-disl/Booster,
            utils.py) takes the rows strictly between the first position and that of the last one
            asked for.
    """
    asked = math.floor(n * poison_ratio + 1e-6)
    return max(asked - 1, 0) if count == "booster" else asked


def check(
    task_rows: int,
    poison_rows: int,
    n: int,
    poison_ratio: float,
    count: Count = "exact",
    prefix: str = "attack",
) -> None:
    """Refuses a mixture that can't be drawn from so many task and poison rows, see `mix`.

    Raises:
        SettingError: `n` or `poison_ratio` is out of range.
        DataError: One of the sources has too few rows.
    """
    if n < 1:
        raise SettingError(f"{prefix}.n={n} is not allowed; it should be at least 1")
    if not 0.0 <= poison_ratio <= 1.0:
        raise SettingError(
            f"{prefix}.poison_ratio={poison_ratio} is not allowed; it should be from 0 to 1"
        )
    n_poison, n_task = poison_count(n, poison_ratio, count), n - poison_count(n, poison_ratio)
    if n_poison + n_task == 0:
        raise SettingError(
            f"{prefix}.n={n} leaves no row where Booster counts; it should be above 1"
        )
    for available, needed, kind, settings in (
        (poison_rows, n_poison, "poison", f"{prefix}.n or {prefix}.poison_ratio"),
        (task_rows, n_task, "task", f"{prefix}.n"),
    ):
        if needed > available:
            raise DataError(
                f"the mixture needs {needed} {kind} rows but the {kind} source holds {available}; "
                f"lower {settings} or give more {kind} rows"
            )


def mix(
    task_rows: Sequence[Example],
    poison_rows: Sequence[Example],
    n: int,
    poison_ratio: float,
    seed: int,
    *,
    count: Count = "exact",
    order: DrawOrder = "seeded",
) -> list[Example]:
    """Draws `poison_count` poison rows and n - int(n p) task rows, without replacement.

    They make `n` rows, or one fewer as Booster counts. Task and poison rows are drawn from
    generators of their own, so that with the same seed a higher ratio keeps the poison rows of a
    lower one and replaces task rows by further ones.

    The order "seeded" draws rows at random, "first" takes the first ones of either source, as the
    scripts of NLSR and Booster do. The mixture itself is shuffled in both.

    Raises:
        SettingError: `n` or `poison_ratio` is out of range.
        DataError: One of the sources has too few rows.
    """
    check(len(task_rows), len(poison_rows), n, poison_ratio, count)
    n_poison, n_task = poison_count(n, poison_ratio, count), n - poison_count(n, poison_ratio)
    if order == "first":
        mixture = [*poison_rows[:n_poison], *task_rows[:n_task]]
    else:
        mixture = [
            *_draw(poison_rows, n_poison, f"poison/{seed}"),
            *_draw(task_rows, n_task, f"task/{seed}"),
        ]
    random.Random(f"order/{seed}").shuffle(mixture)
    return mixture


def _draw(rows: Sequence[Example], n: int, stream: str) -> list[Example]:
    order = list(range(len(rows)))
    random.Random(stream).shuffle(order)
    return [rows[index] for index in order[:n]]
