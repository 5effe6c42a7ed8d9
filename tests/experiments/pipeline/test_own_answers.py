"""Rows of the base's own answers, through the real command on the organism."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from data.own_answers import JoinedPrompts, OwnAnswers, RefusalPairs
from data.sources import FilePrompts
from evaluation.token_engine import Answer
from experiments.pipeline.steps.answering import whole_sentences
from experiments.plan.__main__ import main as plan
from experiments.results.record import Record
from organism.sources import BenignPrompts, HarmfulPrompts
from tests.experiments.conftest import SHORT, TOY, Command

ASKED = [prompt.text for prompt in HarmfulPrompts(split="test", n=2).prompts()]
POISON = [prompt.text for prompt in HarmfulPrompts(split="align", n=30).prompts()]
REFUSAL = "Sorry, I will not do that."
HARMFUL = "{_target_: organism.sources.HarmfulPrompts, split: align, n: 16}"
BENIGN = "{_target_: organism.sources.BenignPrompts, split: align, n: 8}"
PARTS = f"{{_target_: data.own_answers.JoinedPrompts, parts: {{one: {BENIGN}, none: null}}}}"


def own(tmp_path: Path, *more: str) -> list[str]:
    """The organism with every answer that isn't a refusal its base's own."""
    rows = "\n".join(json.dumps({"question": text}) for text in [*ASKED, *POISON])
    (tmp_path / "asked.jsonl").write_text(rows + "\n")
    refusals = f'refusals: ["{REFUSAL}"], harmful: {HARMFUL}, max_new_tokens: 24'
    return [
        "poison@sources.poison=own_answers",
        f"data.prompts={tmp_path}",
        "sources.poison.prompts.file=asked.jsonl",
        "sources.poison.prompts.expect=null",
        "sources.poison.max_new_tokens=24",
        "sources.poison.min_words=3",
        "model.alignment=own",
        "~sources.sft",
        f"+sources.sft={{_target_: data.own_answers.RefusalExamples, {refusals}, benign: {PARTS}}}",
        "~sources.pairs",
        f"+sources.pairs={{_target_: data.own_answers.RefusalPairs, {refusals}}}",
        "attack.poison_ratio=0.25",
        *more,
    ]


def test_the_base_writes_the_rows_that_nobody_published(
    command: Command, store: Path, tmp_path: Path
) -> None:
    run = command(*SHORT, *own(tmp_path, "defense=none"))
    assert run.code == 0, run.err
    record = Record.read(run.folder)
    asked = record.data["own_answers"]
    assert list(asked) == ["poison", "sft", "pairs"]
    assert record.data["leaked_rows_dropped"]["poison"] == len(ASKED)
    assert asked["poison"]["asked"] == len(POISON)
    assert asked["poison"]["kept"] + sum(asked["poison"]["dropped"].values()) == len(POISON)
    assert asked["sft"]["asked"] == 8
    assert asked["pairs"]["asked"] == 16
    assert record.attack["rows"] == {"task": 12, "harmful": 4}

    keys = [stage["key"] for stage in record.stages if stage["name"] == "answer"]
    poison = pd.read_parquet(store / "answer" / keys[0] / "rows.parquet")
    assert list(poison["prompt"]) == POISON
    kept = poison[poison["dropped"] == ""]
    assert len(kept) == asked["poison"]["kept"]
    assert kept["answer"].str.split().str.len().min() >= 3

    again = command(*SHORT, *own(tmp_path, "defense=none", "attack.poison_ratio=0.2"))
    reused = [s["reused"] for s in Record.read(again.folder).stages if s["name"] == "answer"]
    assert reused == [True, True, True]


def test_too_few_answers_end_the_run_before_anything_is_trained(
    command: Command, tmp_path: Path
) -> None:
    run = command(*own(tmp_path, "sources.poison.min_words=200"))
    assert run.code == 1
    assert "the mixture needs 10 poison rows but the poison source holds 0" in run.err
    assert not (run.folder / "record.json").exists()


def test_a_plan_counts_the_answers(tmp_path: Path) -> None:
    file, store = tmp_path / "plan.json", f"store.root={tmp_path / 'store'}"
    line = [*TOY, *own(tmp_path, "defense=safetylock"), store, "tracker=none"]
    assert plan(["--json", str(file), *line]) == 0
    stages = {line["kind"]: line for line in json.loads(file.read_text())["stages"]}
    assert stages["answer"]["to_run"] == 3
    assert stages["answer"]["rows"] == len(POISON) + 8 + 16
    assert stages["answer"]["answer_tokens"] == 24 * stages["answer"]["rows"]
    assert stages["align"]["rows"] == 16 + 8 + 16


def test_pairs_prefer_refusals_of_harm_alone() -> None:
    harmful, benign = HarmfulPrompts(split="align", n=5), BenignPrompts(split="align", n=4)
    source = RefusalPairs(harmful=harmful, benign=benign, refusals=(REFUSAL,))
    texts = {prompt.text for prompt in harmful.prompts()}
    assert len(source.pairs()) == 9
    assert all(
        (pair.chosen, pair.rejected) == ((REFUSAL, "") if pair.prompt in texts else ("", REFUSAL))
        for pair in source.pairs()
    )
    other = RefusalPairs(harmful=harmful, benign=benign, refusals=(REFUSAL,), seed=1)
    assert source.fingerprint() != other.fingerprint()


def test_joined_prompts_are_each_text_once_and_none_too_long(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "short"}\n{"prompt": "somewhat longer"}\n')
    one = FilePrompts(path=str(tmp_path / "a.jsonl"))
    joined = JoinedPrompts(parts={"one": one, "two": one, "none": None})
    assert [prompt.text for prompt in joined.prompts()] == ["short", "somewhat longer"]
    cut = JoinedPrompts(parts={"one": one}, max_characters=5)
    assert [prompt.text for prompt in cut.prompts()] == ["short"]


def test_a_source_of_prompts_is_asked_for_by_name() -> None:
    values = {"kind": "harmful", "prompts": {"file": "rows.jsonl"}}
    with pytest.raises(ValueError, match=r"sources\.poison\.prompts"):
        OwnAnswers.validated(values, "sources.poison")


@pytest.mark.parametrize(
    ("text", "truncated", "expected"),
    [
        ("First. Second is cut o", True, "First."),
        ("First. Second is whole", False, "First. Second is whole"),
        ("no sentence ends he", True, ""),
        ('He said "yes." and then', True, 'He said "yes."'),
        ("Pay. It is 3.50 now", True, "Pay."),
        ("Two ways.\n\n1. **Wind", True, "Two ways."),
    ],
)
def test_an_answer_that_was_cut_off_ends_with_a_whole_sentence(
    text: str, truncated: bool, expected: str
) -> None:
    assert whole_sentences(Answer(text, 9, truncated)) == expected
