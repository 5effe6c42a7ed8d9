"""Steps that ask the same model or judge are asked in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from data.rows import Prompt
from evaluation import engines
from evaluation.base import Backend, Judge, Verdict
from evaluation.token_engine import Answer, Questions
from experiments.pipeline.prompt_sets import PromptSet
from experiments.pipeline.runner import Listener, Runner
from experiments.pipeline.steps.base import Model, read_rows
from experiments.pipeline.steps.measuring import Generate, JudgeAnswers
from experiments.store import StageResult, Store
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint


class Echo:
    """An engine that answers with the question and the limit."""

    usable = True

    def generate_sets(self, sets: Sequence[Questions]) -> list[list[Answer]]:
        Echoes.asked.append([list(each.prompts) for each in sets])
        return [
            [Answer(f"{text} {each.max_new_tokens}", 2, False) for text in each.prompts]
            for each in sets
        ]

    def close(self) -> None: ...


class Echoes(Backend):
    asked: ClassVar[list[list[list[str]]]] = []

    def open(self, *_: Any) -> Any:
        return Echo()


class Counting(Judge):
    errors_pass: ClassVar[bool] = True
    asked: ClassVar[list[list[str]]] = []

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        self.asked.append(list(answers))
        return [Verdict("errored" if "b" in text else "safe", math.nan) for text in answers]


def asked_of_one_model(*texts: str) -> list[Generate]:
    model = Model(Checkpoint("nowhere"), "key", PromptStyle())
    return [
        Generate(model, PromptSet(text, (Prompt("0", text),), number + 1), Echoes())
        for number, text in enumerate(texts)
    ]


def results(runner: Runner, steps: Sequence[Any]) -> list[StageResult]:
    return [runner(step, steps[number + 1 :]) for number, step in enumerate(steps)]


def test_a_model_is_asked_once_what_the_store_lacks(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second, third = asked_of_one_model("a", "b", "c")
    with engines.closing():
        Echoes.asked.clear()
        results(Runner(store, Listener(), isolate=False), [second])
        made = results(Runner(store, Listener(), isolate=False), [first, second, third, third])
    assert Echoes.asked == [[["b"]], [["a"], ["c"]]]
    assert [result.reused for result in made] == [False, True, False, True]
    assert [read_rows(result.folder)["answer"].tolist() for result in made] == [
        ["a 1"],
        ["b 2"],
        ["c 3"],
        ["c 3"],
    ]
    assert made[0].report == {"rows": 1, "tokens": 2}


def test_a_judge_is_asked_once_for_all_sets_and_again_for_its_errors(tmp_path: Path) -> None:
    store = Store(tmp_path)
    asked = asked_of_one_model("a", "b", "c")
    with engines.closing():
        answers = results(Runner(store, Listener(), isolate=False), asked)
    judging = [JudgeAnswers(Counting(), *each) for each in zip(asked, answers, strict=True)]
    Counting.asked.clear()
    for _ in range(2):
        runner = Runner(store, Listener(), isolate=False)
        made = [*results(runner, judging), *results(runner, judging)]
    assert Counting.asked == [["a 1", "b 2", "c 3"], ["b 2"]]
    assert [result.report["labels"] for result in made[:3]] == [
        {"safe": 1},
        {"errored": 1},
        {"safe": 1},
    ]
