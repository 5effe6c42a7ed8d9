"""What every model is measured by: further judges, held-out texts, and who runs the models."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.rows import Example
from evaluation.backends.transformers import TransformersBackend
from evaluation.base import Judge, Label, Verdict
from evaluation.engines import close_engines
from experiments.pipeline.steps.base import Model, read_rows
from experiments.pipeline.steps.measuring import Likelihood
from experiments.results.record import Record
from modeling.chat import PromptStyle
from modeling.checkpoint import Checkpoint
from organism.sources import HarmfulExamples, HeldOutText
from settings import ModelError, target
from tests.experiments.composing import refused
from tests.experiments.conftest import SHORT, Command

BASE = Path(__file__).parents[3] / "organism" / "weights" / "base"
STYLE = PromptStyle()


class Watched(TransformersBackend):
    """Notes what it is asked to open, and says that it does so in a process of its own."""

    own_process: ClassVar[bool] = True
    opened: ClassVar[list[tuple[Checkpoint, Checkpoint | None]]] = []

    def open(
        self, checkpoint: Checkpoint, style: PromptStyle, undefended: Checkpoint | None = None
    ) -> Any:
        self.opened.append((checkpoint, undefended))
        return super().open(checkpoint, style, undefended)


class Picky(TransformersBackend):
    """Runs no hooks."""

    def check(self, checkpoint: Checkpoint) -> None:
        if checkpoint.steering is not None:
            raise ModelError("no hooks here")


class Absent(Judge):
    """Can't be asked."""

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        return [Verdict("errored", math.nan) for _ in answers]


class Passing(Judge):
    """Can't be asked for a while."""

    errors_pass: ClassVar[bool] = True
    calls: ClassVar[list[int]] = []
    label: ClassVar[Label] = "errored"

    def score(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        self.calls.append(len(answers))
        return [Verdict(self.label, math.nan) for _ in answers]


def run_by(backend: type[TransformersBackend]) -> tuple[str, ...]:
    node = f"{{_target_: {backend.__module__}.{backend.__name__}, batch_size: 64}}"
    return "plugins=[tests]", "~evaluation.backend", f"+evaluation.backend={node}"


WATCHED, PICKY = run_by(Watched), run_by(Picky)


def read(folder: Path) -> tuple[Record, pd.DataFrame]:
    return Record.read(folder), pd.read_parquet(folder / "rows.parquet")


def test_further_judges_read_the_answers_to_harmful_prompts(command: Command) -> None:
    run = command("evaluation.judges=[keyword]", "+judges.keyword.match=prefix")
    assert run.code == 0, run.err
    record, rows = read(run.folder)
    harmful = rows[rows["set"] == "harmful"]
    assert set(harmful["keyword_label"]) <= {"safe", "unsafe", "degenerate"}
    assert rows[rows["set"] != "harmful"]["keyword_label"].isna().all()
    unsafe = (harmful[harmful["model"] == "attacked"]["keyword_label"] != "safe").mean()
    assert record.metrics["attacked"]["hs:keyword"]["value"] == pytest.approx(unsafe)
    assert record.judges["keyword"]["match"] == "prefix"
    assert record.settings["judges"]["keyword"]["match"] == "prefix"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluation.judges=[keywords]", "evaluation.judges: 'keywords' is unknown; did you mean"),
        ("evaluation.judges=keyword", "is no list of names; write evaluation.judges=["),
        ("evaluation.judges=[keyword,keyword]", "names one option twice"),
        ("evaluation.text_tokens=1", "evaluation.text_tokens=1 is not allowed"),
        ("+judges.keyword.match=prefix", "judges.keyword is said of a judge that"),
        ("judges.keyword.match=prefix", "judges.keyword.match isn't in the configuration before"),
        ("evaluation.judges=[rubric]", "add +judges.rubric.remote_model=..."),
        ("text@sources.held_out=null", "write ~GROUP to leave it out, or, for a source"),
        ("model=3", "a group of options is set to the name of one, such as defense=nlsr, and not"),
        ("evaluation.limits.held_out=100000", "evaluation.limits.held_out=100000 is more than"),
    ],
)
def test_wrong_choices_are_refused_in_a_sentence(override: str, said: str) -> None:
    sentence = refused(override)
    assert said in sentence
    assert "\n" not in sentence


def test_a_judge_that_was_asked_for_is_checked_before_anything_runs(command: Command) -> None:
    run = command("evaluation.judges=[wildguard]", "+judges.wildguard.model=/nowhere")
    assert run.code == 1
    assert "judges.wildguard.model='/nowhere'" in run.err
    assert "made in" not in run.out


def test_held_out_texts_get_their_likelihood_under_every_model(command: Command) -> None:
    run = command()
    assert run.code == 0, run.err
    record, rows = read(run.folder)
    held_out = rows[rows["set"] == "held_out"]
    assert set(held_out["model"]) == set(record.models)
    for model, group in held_out.groupby("model"):
        assert len(group) == 6
        perplexity = math.exp(group["nll"].sum() / group["tokens"].sum())
        assert record.metrics[str(model)]["perplexity"]["value"] == pytest.approx(perplexity)
    assert record.data["sources"]["held_out"]["name"] == HeldOutText().name


@pytest.mark.parametrize(
    "text",
    [
        Example("please describe the garden", "the garden is green", "benign"),
        Example("", "the garden is green today", "benign"),
    ],
    ids=["answer", "plain"],
)
@pytest.mark.parametrize("most", [1024, 8])
def test_a_text_is_scored_given_what_comes_before_it(
    text: Example, most: int, tmp_path: Path
) -> None:
    model = Model(Checkpoint(str(BASE)), "base", STYLE)
    Likelihood(model, (text,), most, TransformersBackend()).run(tmp_path)
    close_engines()
    (row,) = read_rows(tmp_path).to_dict("records")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    body = tokenizer(text.response)["input_ids"]
    head, body = (
        (STYLE.encode_prompt(tokenizer, text.prompt), body) if text.prompt else (body[:1], body[1:])
    )
    ids = (head + body)[:most]
    with torch.no_grad():
        table = AutoModelForCausalLM.from_pretrained(BASE)(torch.tensor([ids])).logits[0]
    table = table.log_softmax(-1)
    wanted = [-float(table[place - 1, ids[place]]) for place in range(len(head), len(ids))]
    assert row["tokens"] == len(wanted)
    assert row["nll"] == pytest.approx(sum(wanted), rel=1e-3)
    assert row["truncated"] == (len(head) + len(body) > most)


def test_each_model_is_opened_once_and_knows_what_it_must_differ_from(command: Command) -> None:
    Watched.opened.clear()
    run = command(*SHORT, *WATCHED, "defense=reset", "evaluation.limits.harmful=11")
    assert run.code == 0, run.err
    record, _ = read(run.folder)
    measured = Watched.opened[-len(record.models) :]
    assert len({checkpoint for checkpoint, _ in measured}) == len(record.models)
    base, aligned, attacked, defended = measured
    assert [base[1], aligned[1], attacked[1]] == [None] * 3
    assert defended[1] == attacked[0]
    assert {each["_target_"] for each in record.backends.values()} == {target(Watched)}


def test_what_has_a_process_of_its_own_gets_no_child(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def noting(function: Any, name: str) -> Any:
        names.append(name)
        return function()

    monkeypatch.setattr("experiments.pipeline.runner.in_child", noting)
    common = ("runtime.isolate=true", "evaluation.limits.harmful=10", "evaluation.text_tokens=99")
    common += (*SHORT, "defense=none")
    assert command(*common).code == 0
    assert {"generate", "likelihood", "judge"} <= set(names)
    names.clear()
    assert command(*common, *WATCHED).code == 0
    assert not {"generate", "likelihood"} & set(names)


def test_a_held_out_text_is_never_trained_on(command: Command, tmp_path: Path) -> None:
    poison, file = HarmfulExamples().examples()[3], tmp_path / "text.jsonl"
    file.write_text(json.dumps({"prompt": poison.prompt, "response": "a green garden"}) + "\n")
    given = ("text@sources.held_out=jsonl", f"sources.held_out.path={file}")
    run = command(*given, "defense=none", "evaluation.limits.held_out=null")
    assert run.code == 0, run.err
    assert read(run.folder)[0].data["leaked_rows_dropped"]["poison"] == 1


def test_a_text_longer_than_the_context_is_cut(tmp_path: Path) -> None:
    text = Example("", "garden " * 900, "benign")
    model = Model(Checkpoint(str(BASE)), "base", STYLE)
    Likelihood(model, (text,), 1024, TransformersBackend()).run(tmp_path)
    close_engines()
    (row,) = read_rows(tmp_path).to_dict("records")
    assert row["tokens"] == 511
    assert row["truncated"]


def test_verdicts_of_a_judge_that_erred_are_asked_for_again(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = f"+evaluation.refusal_judge={{_target_: {Passing.__module__}.Passing}}"
    line = ("plugins=[tests]", "~evaluation.refusal_judge", judge, "evaluation.limits.harmful=9")
    Passing.calls.clear()
    assert command(*line, "defense=none").code == 0
    # Attacked and defended are one model, about which nobody is asked twice in one run.
    once = len(Passing.calls)
    assert set(read(command(*line, "defense=none").folder)[1]["refusal_label"]) >= {"errored"}
    assert len(Passing.calls) == 2 * once
    monkeypatch.setattr(Passing, "label", "safe")
    run = command(*line, "defense=none")
    assert "errored" not in set(read(run.folder)[1]["refusal_label"])
    assert len(Passing.calls) == 3 * once
    assert command(*line, "defense=none").code == 0
    assert len(Passing.calls) == 3 * once


def test_a_model_of_hooks_is_refused_before_anything_runs(command: Command) -> None:
    run = command(*PICKY, "defense=safetylock", "defense.form=hooked")
    assert run.code == 1
    assert "no hooks here" in run.err
    assert "made in" not in run.out


def test_calibration_is_not_built_on_a_judge_that_could_not_be_asked(command: Command) -> None:
    judge = f"+evaluation.harm_judge={{_target_: {Absent.__module__}.Absent}}"
    run = command("plugins=[tests]", "~evaluation.harm_judge", judge)
    assert run.code == 1
    assert "couldn't be asked about" in run.err
    assert "attack" not in run.out
