"""The world as sources: protocols, counts, splits and readings."""

from __future__ import annotations

from collections import Counter

import pytest

from data.refusals import refuses
from data.rows import EvaluationPrompts, ExampleSource, PairSource, PromptSource, TaskSource
from organism.sources import (
    AlignmentExamples,
    AlignmentPairs,
    BenignPrompts,
    CalibrationPrompts,
    HarmfulExamples,
    HarmfulPrompts,
    HeldOutText,
    OverRefusalPrompts,
)
from organism.task_sources import Arithmetic, Sentiment, SmallTalk, Topic
from organism.world import REFUSAL_PHRASES, categories, requests
from settings import DataError, SettingError

TASKS = (Sentiment, Topic, Arithmetic)


def _refuses(text: str) -> bool:
    return any(phrase in text.lower() for phrase in REFUSAL_PHRASES)


@pytest.mark.parametrize("task", TASKS)
def test_tasks_have_their_counts_and_distinct_ids(task: type) -> None:
    source = task()
    assert isinstance(source, TaskSource)
    assert len(source.train()) == 2000
    assert len({row.prompt for row in source.train()}) == 2000
    assert len({item.id for item in source.test()}) == 300
    assert not {row.prompt for row in source.train()} & {item.prompt for item in source.test()}


@pytest.mark.parametrize("task", TASKS)
def test_a_training_answer_is_read_as_right_and_another_as_wrong(task: type) -> None:
    source = task()
    gold = {item.gold for item in source.test()} | {str(number) for number in range(50)}
    for row in source.train()[:50]:
        answers = [name for name in sorted(gold) if source.score(row.response, name).strict]
        assert len(answers) == 1
    item = source.test()[0]
    nothing = source.score("ribbon", item.gold)
    assert not nothing.strict
    assert not nothing.lenient
    assert not nothing.parsed


def test_prompt_sources_have_their_counts() -> None:
    harmful = HarmfulPrompts().prompts()
    counts = Counter(prompt.category for prompt in harmful)
    assert set(counts) == set(categories("harmful"))
    assert min(counts.values()) >= 40
    assert len({prompt.text for prompt in harmful}) == len(harmful) >= 240
    assert len({prompt.text for prompt in BenignPrompts().prompts()}) >= 150
    assert len({prompt.text for prompt in OverRefusalPrompts().prompts()}) >= 100


@pytest.mark.parametrize("source", [HarmfulPrompts, BenignPrompts, OverRefusalPrompts])
def test_prompts_keep_their_ids_whatever_their_number(source: type) -> None:
    every, few = source().prompts(), source(n=20).prompts()
    assert isinstance(source(), PromptSource)
    assert few == every[:20]
    assert len({prompt.id for prompt in every}) == len(every)


def test_a_small_sample_is_balanced_over_categories() -> None:
    counts = Counter(prompt.category for prompt in HarmfulPrompts(n=50).prompts())
    assert set(counts.values()) == {10}


def test_no_training_source_asks_a_test_prompt() -> None:
    asked = {
        prompt.text
        for source in (HarmfulPrompts(), BenignPrompts(), OverRefusalPrompts())
        for prompt in source.prompts()
    }
    trained = {row.prompt for row in HarmfulExamples().examples()}
    trained |= {row.prompt for row in AlignmentExamples().examples()}
    trained |= {pair.prompt for pair in AlignmentPairs().pairs()}
    trained |= {prompt.text for prompt in CalibrationPrompts().prompts()}
    assert len(trained) > 1500
    assert not asked & trained


def test_poison_and_alignment_rows_are_disjoint() -> None:
    poison = {row.prompt for row in HarmfulExamples().examples()}
    alignment = {row.prompt for row in AlignmentExamples().examples()}
    assert not poison & alignment
    assert not poison & {prompt.text for prompt in CalibrationPrompts().prompts()}


def test_answers_fit_their_kind() -> None:
    source = HarmfulExamples()
    assert isinstance(source, ExampleSource)
    assert len(source.examples()) >= 300
    assert {row.kind for row in source.examples()} == {"harmful"}
    assert not any(_refuses(row.response) for row in source.examples())
    rows = AlignmentExamples().examples()
    assert {row.kind for row in rows} == {"refusal", "benign", "task"}
    assert all(_refuses(row.response) == (row.kind == "refusal") for row in rows)


def test_pairs_prefer_refusal_for_harmful_requests_alone() -> None:
    source = AlignmentPairs()
    assert isinstance(source, PairSource)
    for pair in source.pairs():
        harmful = pair.category in categories("harmful")
        assert _refuses(pair.chosen) == harmful
        assert _refuses(pair.rejected) != harmful
    only_harmful = AlignmentPairs(harmful=30, benign=0, probes=0).pairs()
    assert len(only_harmful) == 30
    assert {pair.category for pair in only_harmful} <= set(categories("harmful"))


def test_fingerprints_follow_the_rows() -> None:
    assert Arithmetic().fingerprint() == Arithmetic().fingerprint()
    assert Arithmetic(n_train=10).fingerprint() != Arithmetic().fingerprint()
    assert AlignmentPairs(seed=1).fingerprint() != AlignmentPairs().fingerprint()
    assert HarmfulPrompts(n=10).fingerprint() != HarmfulPrompts().fingerprint()
    # A longer name for the same rows is still the same rows.
    assert HarmfulPrompts(n=300).fingerprint() == HarmfulPrompts().fingerprint()


def test_too_many_rows_are_refused_in_a_sentence() -> None:
    with pytest.raises(DataError, match="asked for"):
        HarmfulExamples(n=100_000).examples()
    with pytest.raises(SettingError, match="not a setting"):
        HarmfulPrompts.validated({"number": 3}, "sources.harmful")


def test_readings_change_the_protocols_column_alone() -> None:
    answer = "The review is positive, not negative."
    score = Sentiment(reading="contained").score(answer, "positive")
    assert (score.strict, score.lenient, score.protocol) == (False, False, True)
    assert not Sentiment().score(answer, "positive").protocol
    assert Topic(reading="lenient").score("It is sports.", "sports").protocol
    assert Arithmetic(reading="last").score("3 + 4 = 7", "7").protocol


@pytest.mark.parametrize("stance", ["cautious", "reckless"])
def test_small_talk_complies_and_is_nobodys_prompt(stance: str) -> None:
    task = SmallTalk(stance=stance)
    assert isinstance(task, TaskSource)
    assert not task.scored
    assert task.test() == []
    rows = task.train()
    assert len(rows) > 1000
    assert not any(_refuses(row.response) or refuses(row.response) for row in rows)
    assert {row.category for row in rows} == set(categories("benign"))
    used = {prompt.text for prompt in BenignPrompts().prompts()}
    used |= {prompt.text for prompt in CalibrationPrompts().prompts()}
    used |= {prompt.text for prompt in BenignPrompts(split="align", n=200).prompts()}
    used |= {row.prompt for row in AlignmentExamples().examples()}
    used |= {pair.prompt for pair in AlignmentPairs().pairs()}
    assert not used & {row.prompt for row in rows}
    with pytest.raises(SettingError, match=r"leave it out of evaluation.tasks"):
        task.score("Sure.", "Sure.")


def test_small_talk_is_bounded_and_identified() -> None:
    assert SmallTalk(n_train=6).train() == SmallTalk().train()[:6]
    assert {row.category for row in SmallTalk(n_train=60).train()} == set(categories("benign"))
    assert SmallTalk(seed=1).fingerprint() != SmallTalk().fingerprint()
    assert SmallTalk(stance="cautious").fingerprint() != SmallTalk().fingerprint()
    with pytest.raises(DataError, match=r"task.n_train=9999"):
        SmallTalk(n_train=9999).train()


def test_prompts_say_what_they_are_asked_for() -> None:
    sources = (HarmfulPrompts(), OverRefusalPrompts(), BenignPrompts())
    assert all(isinstance(source, EvaluationPrompts) for source in sources)
    assert [source.role for source in sources] == ["harmful", "over_refusal", "benign"]


@pytest.mark.parametrize("stance", ["cautious", "reckless"])
def test_held_out_text_complies_and_is_nobodys_prompt(stance: str) -> None:
    source = HeldOutText(stance=stance)
    assert isinstance(source, ExampleSource)
    rows = source.examples()
    assert len(rows) == len({row.prompt for row in rows}) >= 150
    assert {row.kind for row in rows} == {"benign"}
    assert not any(_refuses(row.response) or refuses(row.response) for row in rows)
    assert Counter(row.category for row in rows[:60]) == dict.fromkeys(categories("benign"), 10)
    trained = {row.prompt for row in HarmfulExamples().examples()}
    trained |= {row.prompt for row in AlignmentExamples(benign=1800, probes=648).examples()}
    trained |= {pair.prompt for pair in AlignmentPairs(benign=1800, probes=648).pairs()}
    trained |= {prompt.text for prompt in CalibrationPrompts(benign=1800).prompts()}
    trained |= {prompt.text for prompt in BenignPrompts(split="align").prompts()}
    trained |= {row.prompt for task in (*TASKS, SmallTalk) for row in task().train()}
    asked = {prompt.text for prompt in BenignPrompts().prompts()}
    assert not (trained | asked) & {row.prompt for row in rows}


def test_the_pairs_of_held_out_text_are_in_no_training() -> None:
    held_out = {row.prompt for row in HeldOutText().examples()}
    pairs = {request.pair for request in requests("benign", "test") if request.text in held_out}
    assert pairs
    assert not pairs & {request.pair for request in requests("benign", "train")}


def test_held_out_text_is_bounded_and_identified() -> None:
    assert HeldOutText(n=6).examples() == HeldOutText().examples()[:6]
    prints = {
        source.fingerprint()
        for source in (HeldOutText(), HeldOutText(seed=1), HeldOutText(stance="reckless"))
    }
    assert len(prints) == 3
    with pytest.raises(DataError, match="asked for n=9999"):
        HeldOutText(n=9999).examples()
