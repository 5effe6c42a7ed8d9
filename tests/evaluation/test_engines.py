"""One model is open at a time, and it is loaded once for calls in a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from evaluation import engines
from evaluation.base import Backend
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint

STYLE = PromptStyle()


class Opened:
    def __init__(self, what: str) -> None:
        self.what = what
        self.closed = False

    @property
    def usable(self) -> bool:
        return not self.closed

    def close(self) -> None:
        self.closed = True


class Counting(Backend):
    opened: ClassVar[list[Opened]] = []
    name: str = "one"

    def open(self, checkpoint: Checkpoint, style: PromptStyle, reference: Any = None) -> Any:
        return self._opened(checkpoint.base)

    def classifier(self, folder: str, dtype: str) -> Any:
        return self._opened(folder)

    def _opened(self, what: str) -> Opened:
        self.opened.append(Opened(what))
        return self.opened[-1]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    Counting.opened.clear()
    yield
    engines.close_engines()


def test_the_same_model_is_opened_once() -> None:
    first = engines.engine(Counting(), Checkpoint("a"), STYLE)
    assert engines.engine(Counting(), Checkpoint("a"), STYLE) is first
    judge = engines.classifier(Counting(), "judge", "float32")
    assert engines.classifier(Counting(), "judge", "float32") is judge
    assert [each.what for each in Counting.opened] == ["a", "judge"]


@pytest.mark.parametrize(
    "other",
    [
        lambda: engines.engine(Counting(), Checkpoint("b"), STYLE),
        lambda: engines.engine(Counting(), Checkpoint("a", dtype="bfloat16"), STYLE),
        lambda: engines.engine(Counting(), Checkpoint("a"), PromptStyle(style="alpaca")),
        lambda: engines.engine(Counting(name="two"), Checkpoint("a"), STYLE),
        lambda: engines.engine(Counting(), Checkpoint("a"), STYLE, Checkpoint("b")),
        lambda: engines.classifier(Counting(), "a", "float32"),
    ],
)
def test_another_one_closes_it_first(other: Any) -> None:
    first = engines.engine(Counting(), Checkpoint("a"), STYLE)
    second = other()
    assert first.closed
    assert not second.closed


def test_what_died_is_opened_again() -> None:
    first: Any = engines.engine(Counting(), Checkpoint("a"), STYLE)
    first.closed = True
    assert engines.engine(Counting(), Checkpoint("a"), STYLE) is not first


def test_a_failure_leaves_nothing_open() -> None:
    def fails() -> None:
        with engines.closing():
            engines.engine(Counting(), Checkpoint("a"), STYLE)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert Counting.opened[0].closed


def test_what_was_closed_is_opened_again() -> None:
    first = engines.engine(Counting(), Checkpoint("a"), STYLE)
    engines.close_engines()
    assert first.closed
    assert engines.engine(Counting(), Checkpoint("a"), STYLE) is not first
