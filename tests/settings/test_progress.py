"""How far long work is, where there is no terminal."""

from __future__ import annotations

import logging

import pytest

from settings import progress
from settings.progress import Progress, duration


def test_lines_say_how_far_it_is_at_most_one_in_so_many_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO), Progress(10, "training", "steps") as steps:
        for loss in range(10):
            clock[0] += 20.0
            steps.advance(note=f"loss {loss}.0")
    assert caplog.messages == [
        f"training: {done} of 10 steps, loss {done - 1}.0, about {duration(20 * (10 - done))} left"
        for done in (2, 4, 6, 8)
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (8.13, "8.1 s"), (42, "42 s"), (130, "2 min"), (9000, "2.5 h"),
     (90000, "25 h"), (400000, "4.6 days")],
)  # fmt: skip
def test_words_of_a_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words
